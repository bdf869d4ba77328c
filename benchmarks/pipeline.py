"""Sweeps over a network of a set rate, against their slower half alone; and the time to the first figure.

A loopback Hub whose answers share one cable serves randomly filled checkpoints. Some are scored from disk before
and behind: the seconds that the engine takes for all are one half, the bytes over the rate of the cable are the other.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.decoders import Shape, random_ids, save_decoder
from benchmarks.ratios import Options, Ratio

ROOT = Path(__file__).parents[1]
_SCORED = re.compile(r"^\[\d+/\d+\] (\S+) scored in ([\d.]+) s$", re.MULTILINE)
_COMMAND = "from redundancy_trace.cli import main; main()"


@dataclass(frozen=True)
class Case:
    """A sweep.

    Attributes:
        shape: Of the model.
        checkpoints: How many.
        sequences: Of 512 tokens that the first is scored on.
        seconds: That each of the others is to take; as many sequences are taken as fill them on this machine.
        balance: Seconds to move the bytes over seconds to score them; 1 leaves the least slack.
    """

    shape: Shape
    checkpoints: int
    sequences: int
    seconds: float
    balance: float = 1.0


CASE = Case(Shape(width=768, layers=2, vocabulary=1024), checkpoints=24, sequences=24, seconds=4.5)
TOY = Case(Shape(width=64, layers=1, vocabulary=64), checkpoints=3, sequences=2, seconds=0.1)
# Times the first's sequences that there are at most.
_MOST = 8
BOUND = 1.15
# Seconds from the command to the figures of one checkpoint, most of which are imports and drawing.
FIRST_FIGURE_BOUND = 15.0


def measure(options: Options) -> list[Ratio]:
    """Sweep some checkpoints from disk, then all over the cable."""
    sys.path.insert(0, str(ROOT / "tests"))
    from loopback_hub import LoopbackHub

    case = TOY if options.toy else CASE
    with tempfile.TemporaryDirectory(prefix="benchmark-pipeline-") as name, LoopbackHub() as hub:
        folder = Path(name)
        ids = save_checkpoints(case.shape, folder / "model", case.checkpoints, _MOST * case.sequences)
        saved = {f"step{path.name.removeprefix('checkpoint-')}": path for path in (folder / "model").iterdir()}
        hub.add_repo("bench/model", revisions=saved)
        total = sum((path / "model.safetensors").stat().st_size for path in saved.values())
        environment = os.environ | hub.environment(folder / "hf-home")
        local = ["--model", str(folder / "model"), "--calibration", f"tokens:{ids}", "--out"]
        few = ["--samples", str(case.sequences), "--revisions", "checkpoint-0"]
        first = sweep_timed([*local, str(folder / "first"), *few], environment)
        times = case.seconds / max(1e-3, *first.scored.values())
        sequences = max(1, round(case.sequences * min(times, _MOST)))
        samples = ["--samples", str(sequences)]

        def scored_from_disk(out: str) -> float:
            """Seconds of one checkpoint; the first warms up and is not counted."""
            some = ["--revisions", "checkpoint-0,checkpoint-1"]
            timed = sweep_timed([*local, str(folder / out), *samples, *some], environment, until=2)
            return timed.scored["checkpoint-1"]

        before = scored_from_disk("before")
        scoring = before * case.checkpoints
        rate = hub.bytes_per_second_of_all = total / (max(scoring, 0.1) * case.balance)
        remote = ["--model", "bench/model", "--out", str(folder / "run"), "--fetch", "file", "--revisions", "all"]
        swept = sweep_timed([*remote, "--calibration", f"tokens:{ids}", *samples], environment)
        # Before and behind the sweep: machines are faster at one time than at another.
        scoring = (before + scored_from_disk("behind")) / 2 * case.checkpoints
        large = [body for body in hub.bodies if body.sent > total / case.checkpoints / 20]
        bodies = [(body.began, body.ended or swept.ended) for body in large]
        row = _row(case, sequences, swept, total, rate, scoring, bodies)
        told = {"width": case.shape.width, "layers": case.shape.layers, "tokens": case.sequences * 512}
        name = "from the command to the first figures, one checkpoint on disk"
        return [row, Ratio(name, first.ended - first.started, FIRST_FIGURE_BOUND, detail=told, unit="s")]


def save_checkpoints(shape: Shape, folder: Path, count: int, sequences: int) -> Path:
    """Checkpoints of one model, `checkpoint-N` below `folder`, that differ in a number; returns a file of token ids."""
    from safetensors.torch import load_file, save_file

    first = save_decoder(shape, folder / "checkpoint-0")
    weights = load_file(first / "model.safetensors")
    for step in range(1, count):
        place = folder / f"checkpoint-{step}"
        place.mkdir()
        (place / "config.json").write_bytes((first / "config.json").read_bytes())
        weights["model.norm.weight"][0] = 1 + step / 1000  # files that are equal would be one checkpoint
        save_file(weights, place / "model.safetensors", {"format": "pt"})
    np.save(folder.parent / "ids.npy", random_ids(shape.vocabulary, sequences))
    return folder.parent / "ids.npy"


@dataclass(frozen=True)
class Swept:
    """When `trace` was started, told the first and the last score, and ended; seconds by checkpoint."""

    started: float
    first: float
    last: float
    ended: float
    scored: dict[str, float]


def _row(
    case: Case,
    sequences: int,
    swept: Swept,
    total: int,
    rate: float,
    scoring: float,
    bodies: list[tuple[float, float]],
) -> Ratio:
    moving = total / rate
    wall = swept.ended - swept.started
    last_byte = max(end for _, end in bodies)
    detail: dict[str, Any] = {
        "checkpoints": case.checkpoints,
        "sequences": sequences,
        "bytes": total,
        "bytes_per_second": rate,
        "seconds": {
            "moving": moving,
            "scoring": scoring,
            "wall": wall,
            "before the first byte": min(began for began, _ in bodies) - swept.started,
            "without a byte on its way, in between": _gaps(bodies),
            "from the last byte to the last score": swept.last - last_byte,
            "from the last score to the end": swept.ended - swept.last,
        },
    }
    name = f"sweep of {case.checkpoints} checkpoints ÷ the longer of moving and scoring"
    return Ratio(name, wall / max(moving, scoring), BOUND, detail=detail)


def sweep_timed(arguments: list[str], environment: Mapping[str, str], until: int | None = None) -> Swept:
    """Run `trace` in a process of its own to its end, or until so many checkpoints are scored."""
    started = time.monotonic()
    times: list[float] = []
    process = subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *arguments],
        env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    )  # fmt: skip
    told = []
    assert process.stdout is not None
    for line in process.stdout:
        told.append(line)
        if _SCORED.match(line):
            times.append(time.monotonic())
        if len(times) == until:
            process.kill()  # figures are not what is timed
            break
    if process.wait() and len(times) != until:
        raise RuntimeError("".join(told))
    scored = {name: float(seconds) for name, seconds in _SCORED.findall("".join(told))}
    return Swept(started, times[0], times[-1], time.monotonic(), scored)


def _gaps(bodies: list[tuple[float, float]]) -> float:
    """Seconds in which no body was on its way, between the first and the last."""
    idle, until = 0.0, None
    for began, ended in sorted(bodies):
        idle += 0.0 if until is None else max(0.0, began - until)
        until = ended if until is None else max(until, ended)
    return idle
