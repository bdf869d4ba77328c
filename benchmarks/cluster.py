"""Two workers with a core each (`--devices cpu,cpu`) against one with one core, on the same checkpoints on disk."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.decoders import Shape
from benchmarks.pipeline import save_checkpoints, sweep_timed
from benchmarks.ratios import Options, Ratio

_SHAPE, _CHECKPOINTS, _SEQUENCES = Shape(width=768, layers=2, vocabulary=1024), 6, 10
_TOY = Shape(width=64, layers=1, vocabulary=64), 2, 2
# Of what two processes of matrix products gain on this machine, whose cores share caches and memory: the process that
# hands out the work runs on them too.
_SHARE = 0.85
_PRODUCTS = """
import time, torch
torch.set_num_threads(1)
x, w, count = torch.randn(1024, 768), torch.randn(2048, 768), 0
end = time.perf_counter() + 3
while time.perf_counter() < end:
    torch.nn.functional.linear(x, w)
    count += 1
print(count)
"""


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
            swept = sweep_timed([*shared, *out], environment, until=count)
            # From the first score on, so that imports count for neither; the first ones are not counted either.
            done = count - len(devices.split(","))
            seconds[devices] = (swept.last - swept.first) / max(1, done) * count
    two_cores = min(2.0, _products(2) / _products(1))
    detail = {"width": shape.width, "layers": shape.layers, "checkpoints": count, "seconds": seconds}
    ratio = seconds["cpu"] / max(1e-3, seconds["cpu,cpu"])
    name = "two workers over one, checkpoints scored in a second"
    return [Ratio(name, ratio, round(_SHARE * two_cores, 2), "higher", detail | {"two cores over one": two_cores})]


def _products(processes: int) -> int:
    """Matrix products that so many processes of a thread each compute in three seconds, all at once."""
    running = [
        subprocess.Popen([sys.executable, "-c", _PRODUCTS], stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    return sum(int(process.communicate()[0]) for process in running)
