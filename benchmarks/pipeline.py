"""How much longer a sweep takes than its slower half alone, moving the bytes or scoring, over a network of a set rate.

A loopback Hub whose answers share one cable serves randomly filled checkpoints. The same checkpoints are scored from
disk first: the seconds that the engine takes are one half; the bytes over the rate of the cable are the other.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BOUND = 1.15
_SCORED = re.compile(r"^\[\d+/\d+\] (\S+) scored in ([\d.]+) s$", re.MULTILINE)
_COMMAND = "from redundancy_trace.cli import main; main()"


@dataclass(frozen=True)
class Shape:
    """The model and its calibration; 28 million float32 weights a checkpoint as it stands."""

    width: int = 1024
    layers: int = 2
    vocabulary: int = 1024
    samples: int = 8
    sequence_length: int = 512


@dataclass(frozen=True)
class PipelineTimes:
    """One sweep over a cable, from the start of the process to its end. Seconds, unless another unit is named.

    Attributes:
        checkpoints: How many.
        bytes: Bytes of weights in all.
        bytes_per_second: Of the cable.
        moving: Bytes over the rate.
        scoring: What the engine takes for all of them, read from disk, with no network beside it.
        wall: What the sweep takes.
        ratio: `wall` over the larger of `moving` and `scoring`.
        start: Until the first byte of the first checkpoint is asked for.
        idle: Without a byte on its way, between the first and the last.
        last: From the last byte to the last score.
        figures: From the last score to the end.
    """

    checkpoints: int
    bytes: int
    bytes_per_second: float
    moving: float
    scoring: float
    wall: float
    ratio: float
    start: float
    idle: float
    last: float
    figures: float


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--checkpoints", type=int, default=12)
    parser.add_argument("--balance", type=float, nargs="+", default=[1.0], help="seconds to move over seconds to score")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "pipeline.json")


def run(options: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON; 1 if a ratio is above the bound."""
    measured = [measure(options.checkpoints, balance) for balance in options.balance]
    for times in measured:
        for what, number in asdict(times).items():
            print(f"{what:20} {number:,.3f}" if isinstance(number, float) else f"{what:20} {number:,}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps([asdict(times) for times in measured], indent=1))
    print(f"Written: {options.out}")
    return int(any(times.ratio > BOUND for times in measured))


def measure(checkpoints: int = 12, balance: float = 1.0, shape: Shape | None = None) -> PipelineTimes:
    """Sweep checkpoints from disk, then over a cable.

    Args:
        checkpoints: How many.
        balance: Seconds to move the bytes over seconds to score them; 1 leaves the least slack.
        shape: Of the model.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    from loopback_hub import LoopbackHub

    shape = shape or Shape()
    with tempfile.TemporaryDirectory(prefix="benchmark-pipeline-") as name, LoopbackHub() as hub:
        folder = Path(name)
        ids = write_checkpoints(folder / "model", checkpoints, shape)
        saved = {f"step{path.name.removeprefix('checkpoint-')}": path for path in (folder / "model").iterdir()}
        hub.add_repo("bench/model", revisions=saved)
        total = sum((path / "model.safetensors").stat().st_size for path in saved.values())
        shared = ["--calibration", f"tokens:{ids}", "--samples", str(shape.samples), "--revisions", "all"]
        environment = os.environ | hub.environment(folder / "hf-home")
        local = ["--model", str(folder / "model"), "--out", str(folder / "local"), *shared]
        _, scored, _ = _sweep(local, environment)
        scoring = sum(scored.values())
        rate = hub.bytes_per_second_of_all = total / (scoring * balance)
        remote = ["--model", "bench/model", "--out", str(folder / "run"), "--fetch", "file", *shared]
        started = time.monotonic()
        ended, _, last_scored = _sweep(remote, environment)
        bodies = [(body.began, body.ended or ended) for body in hub.bodies if body.sent > total / checkpoints / 20]
        wall = ended - started
        return PipelineTimes(
            checkpoints, total, rate, total / rate, scoring, wall, wall / max(total / rate, scoring),
            start=min(began for began, _ in bodies) - started, idle=_gaps(bodies),
            last=last_scored - max(end for _, end in bodies), figures=ended - last_scored,
        )  # fmt: skip


def write_checkpoints(folder: Path, count: int, shape: Shape) -> Path:
    """Randomly filled Llamas, `checkpoint-N` below `folder`; returns a file of token ids beside it."""
    import numpy as np
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.width, num_hidden_layers=shape.layers, intermediate_size=11 * shape.width // 4,
        num_attention_heads=shape.width // 64, vocab_size=shape.vocabulary, architectures=["LlamaForCausalLM"],
        max_position_embeddings=shape.sequence_length,
    )  # fmt: skip
    torch.manual_seed(0)
    weights = LlamaForCausalLM(config).state_dict()
    for step in range(count):
        place = folder / f"checkpoint-{step}"
        place.mkdir(parents=True)
        config.save_pretrained(place)
        weights["model.norm.weight"][0] = 1 + step / 1000  # files that are equal would be one checkpoint
        save_file(weights, place / "model.safetensors", {"format": "pt"})
    size = (shape.samples, shape.sequence_length)
    np.save(folder.parent / "ids.npy", np.random.default_rng(0).integers(0, shape.vocabulary, size=size))
    return folder.parent / "ids.npy"


def _sweep(arguments: list[str], environment: Mapping[str, str]) -> tuple[float, dict[str, float], float]:
    """Run `trace` to its end; returns when it ended, seconds of scoring by checkpoint, when the last was scored."""
    process = subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *arguments],
        env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    )  # fmt: skip
    told, last = [], 0.0
    assert process.stdout is not None
    for line in process.stdout:
        told.append(line)
        if _SCORED.match(line):
            last = time.monotonic()
    if process.wait():
        raise RuntimeError("".join(told))
    return time.monotonic(), {name: float(seconds) for name, seconds in _SCORED.findall("".join(told))}, last


def _gaps(bodies: list[tuple[float, float]]) -> float:
    """Seconds in which no body was on its way, between the first and the last."""
    idle, until = 0.0, None
    for began, ended in sorted(bodies):
        idle += 0.0 if until is None else max(0.0, began - until)
        until = ended if until is None else max(until, ended)
    return idle
