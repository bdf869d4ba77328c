"""A run of 558 checkpoints of 32 layers beside one of 1: storing, reading, `stats`, `plot`; and resuming it."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.ratios import Options, Ratio

if TYPE_CHECKING:
    from redundancy_trace.metrics import ModelScores

ROOT = Path(__file__).parents[1]
_COMMAND = "from redundancy_trace.cli import main; main()"
_REPO = "bench/model"
_LENGTH = 16
# All checkpoints of OLMo-1B-hf, the longest of the runs that are known by name.
_CHECKPOINTS = 558
_LAYERS = 32
_ROUNDS = 2
# Seconds from the start of the process to its end.
_BOUNDS = {"resume": 2.0, "read_scores": 2.0, "trace stats": 3.0, "heatmaps": 10.0, "all figures": 20.0}
# Run once, as what else the machine does for a moment is a small part of them.
_LONG = ("heatmaps", "all figures")


@dataclass(frozen=True)
class _Grown:
    """Seconds of one run: of its last ten writes (the median), and of each command (the better of two, if short)."""

    write: float
    seconds: dict[str, float]


def measure(options: Options) -> list[Ratio]:
    """The same for a run of one checkpoint and for one of all."""
    count, layers = (3, 2) if options.toy else (_CHECKPOINTS, _LAYERS)
    one, all_ = _grown(1, layers, 1), _grown(count, layers, 1 if options.toy else _ROUNDS)
    detail = {"layers": layers, "components": 3, "one": vars(one), str(count): vars(all_)}
    size = f"{count} × {layers} × 3"
    rows = [Ratio(f"storing checkpoint {count} of a run ÷ its first", all_.write / one.write, 1.5, detail=detail)]
    for name, bound in _BOUNDS.items():
        told = {**detail, "over one": all_.seconds[name] / one.seconds[name]}
        rows.append(Ratio(f"{name}, {size}", all_.seconds[name], bound, detail=told, unit="s"))
    return rows


def _grown(count: int, layers: int, rounds: int) -> _Grown:
    sys.path.insert(0, str(ROOT / "tests"))
    from loopback_hub import LoopbackHub

    with tempfile.TemporaryDirectory(prefix="benchmark-growth-") as name, LoopbackHub() as hub:
        folder = Path(name)
        hub.add_repo(_REPO, revisions={f"step{1000 * step}": _files(step) for step in range(count)})
        environment = os.environ | hub.environment(folder / "hf-home")
        np.save(folder / "ids.npy", np.zeros((2, _LENGTH), dtype=np.int64))
        write = _fill(folder / "run", folder / "ids.npy", hub.url, layers)
        sweep = ["--model", _REPO, "--revisions", "all", "--out", "run", "--calibration", "tokens:ids.npy"]
        sweep += ["--samples", "2", "--quiet"]
        commands = {
            "resume": ["-c", _COMMAND, *sweep],
            "read_scores": ["-c", "import redundancy_trace as rt; rt.read_scores('run')"],
            "trace stats": ["-c", _COMMAND, "stats", "run"],
            "heatmaps": ["-c", _COMMAND, "plot", "run", "--figure", "importance"],
            "all figures": ["-c", _COMMAND, "plot", "run"],
        }
        _run(commands["resume"], folder, environment)  # draws the figures, which a sweep that has nothing to do leaves
        seconds = {
            name: min(_run(command, folder, environment) for _ in range(1 if name in _LONG else rounds))
            for name, command in commands.items()
        }
        return _Grown(write, seconds)


def _files(step: int) -> dict[str, bytes]:
    """A checkpoint that is never opened: only its name, its sizes and its hashes are seen."""
    return {"config.json": b"{}", "model.safetensors": json.dumps(step).encode()}


def _fill(run_folder: Path, ids: Path, endpoint: str, layers: int) -> float:
    """A run as a sweep leaves it, but for the numbers, which are drawn; returns the median of the last ten writes."""
    from redundancy_trace import store
    from redundancy_trace.checkpoints import list_checkpoints, listing_to_json
    from redundancy_trace.hub import Hub
    from redundancy_trace.settings import TraceSettings
    from redundancy_trace.sweep.calibrating import calibrate
    from redundancy_trace.sweep.tasks import all_tasks

    settings = TraceSettings(model=_REPO, revisions="all", calibration=(f"tokens:{ids}",), samples=(2,))
    listing = list_checkpoints(_REPO, "all", endpoint=endpoint)
    run = store.Run(run_folder, _REPO, "float32", False, None, ())
    run_folder.mkdir()
    calibrations, run = calibrate(settings, listing, run, Hub(endpoint=endpoint))
    run = store.write_run(run, {})
    store.write_json(run_folder / "listing.json", listing_to_json(listing, {}))
    rng = np.random.default_rng(0)
    seconds = []
    tasks = all_tasks(listing, run, calibrations)
    store.write_part(run_folder, tasks[0].parts[0].labels, _drawn_scores(rng, layers, 0))  # imports what it needs
    for task in tasks:
        scores = _drawn_scores(rng, layers, len(seconds) / 558)
        started = time.perf_counter()
        store.write_part(run_folder, task.parts[0].labels, scores)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[-10:]))


def _drawn_scores(rng: np.random.Generator, layers: int, progress: float) -> "ModelScores":
    """All numbers that a checkpoint has, of the shape that real ones have."""
    from redundancy_trace.metrics import LAYER_METRICS, Distance, ModelScores, Value

    def value(layer: int | None, component: str, metric: str, number: Any) -> Value:
        return Value(layer, component, metric, float(number), 0.001, 64, 64 * 512)

    importance = rng.uniform(0.9, 1.1, size=(layers, 3)) * np.exp(-2 * np.arange(layers) / layers)[:, None] * 0.1
    values = [
        value(layer, component, metric, 1 - (1 + progress) * importance[layer, k])
        for layer in range(layers)
        for k, component in enumerate(("attn", "mlp", "block"))
        for metric in LAYER_METRICS
    ]
    values.append(value(None, "model", "loss", 4 - progress))
    cells = [(i, j) for i in range(layers + 1) for j in range(i + 1, layers + 1)]
    metrics = ("angular_distance", "cosine_similarity")
    distances = [Distance(i, j, metric, float(rng.uniform()), 512) for i, j in cells for metric in metrics]
    return ModelScores(tuple(values), tuple(distances))


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    """Seconds of a Python process from its start to its end."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(done.stderr)
    return seconds
