"""Scoring against one plain forward and three naive passes, on the 16 layers of width 1024 that bars were set on.

64 × 512 tokens: half an hour on two cores. What is done once a checkpoint weighs as little here as in a real model,
which it does not in the short decoders of the table.
"""

import argparse
import sys
import time
from pathlib import Path

from benchmarks.decoders import Shape
from benchmarks.ratios import machine, processor_times, stolen_since, tell_apart
from benchmarks.scoring import Case, measure_cases

ROOT = Path(__file__).parents[1]
CASE = Case(Shape(width=1024, layers=16, vocabulary=33536), sequences=64, rounds=3, naive_rounds=1)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--device", default="cpu", help="where all of it is computed, cpu or cuda [default: cpu]")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "deep.json")


def run(options: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON; 1 if a bound is missed, 2 if there is no such device."""
    from redundancy_trace.engine.scoring import choose_device
    from redundancy_trace.errors import InputError

    try:
        device = choose_device(options.device)
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    before, started = processor_times(), time.monotonic()
    rows = measure_cases([CASE], str(device))
    on = machine() | {"stolen": stolen_since(before)}
    if device.type == "cuda":
        on["device"] = _name_of(str(device))
    return tell_apart(rows, {"deep": time.monotonic() - started}, on, options.out, on.get("device"))


def _name_of(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device)
