"""Two workers with a core each (`--devices cpu,cpu`) against one with one core, on the same checkpoints on disk."""

import os
import tempfile
from pathlib import Path

from benchmarks.decoders import Shape
from benchmarks.pipeline import save_checkpoints, sweep_timed
from benchmarks.ratios import Options, Ratio

_SHAPE, _CHECKPOINTS, _SEQUENCES = Shape(width=768, layers=2, vocabulary=1024), 8, 8
_TOY = Shape(width=64, layers=1, vocabulary=64), 2, 2
# Two cores share caches and memory, and the process that hands out the work runs on them too.
_BOUND = 1.6


def measure(options: Options) -> list[Ratio]:
    """Seconds from the start of scoring to the last score, of one worker over two."""
    shape, count, sequences = _TOY if options.toy else (_SHAPE, _CHECKPOINTS, _SEQUENCES)
    with tempfile.TemporaryDirectory(prefix="benchmark-cluster-") as name:
        folder = Path(name)
        ids = save_checkpoints(shape, folder / "model", count, sequences)
        shared = ["--model", str(folder / "model"), "--calibration", f"tokens:{ids}", "--samples", str(sequences)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        seconds = {}
        for devices in ("cpu", "cpu,cpu"):
            out = ["--revisions", "all", "--devices", devices, "--out", str(folder / devices)]
            swept = sweep_timed([*shared, *out], environment)
            # From the first score on, so that imports count for neither; the first ones are not counted either.
            done = count - len(devices.split(","))
            seconds[devices] = (swept.last - swept.first) / max(1, done) * count
    detail = {"width": shape.width, "layers": shape.layers, "checkpoints": count, "seconds": seconds}
    ratio = seconds["cpu"] / max(1e-3, seconds["cpu,cpu"])
    return [Ratio("two workers over one, checkpoints scored in a second", ratio, _BOUND, "higher", detail)]
