"""Scoring against one plain forward of the same decoder, and against the naive way of three passes."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.decoders import Shape, random_ids, save_decoder
from benchmarks.ratios import Options, Ratio, median_ratio

if TYPE_CHECKING:
    import numpy as np
    import torch

DTYPES = ("float32", "bfloat16")
# The bars hold from width 1024 on; below, the products are smaller beside what each token costs.
_OVER_FORWARD = {"float32": 1.08, "bfloat16": 1.10}
_OVER_FORWARD_SMALL = {"float32": 1.15, "bfloat16": 1.25}
_NAIVE_OVER_SCORING = {"float32": 2.6, "bfloat16": 3.4}


@dataclass(frozen=True)
class Case:
    """A decoder and what it is run on.

    Attributes:
        shape: Vocabulary and depth are those of a Pythia of that width, divided by the same number, so that the head
            takes the share of the time that it has in a real model.
        sequences: Of the calibration.
        rounds: Runs of each way, taken in turn.
        naive_rounds: In how many of them the naive way is run too.
    """

    shape: Shape
    sequences: int = 32
    rounds: int = 3
    naive_rounds: int = 0


CASES = (
    Case(Shape(width=512, layers=4, vocabulary=16384)),
    Case(Shape(width=1024, layers=3, vocabulary=6144), naive_rounds=2),
    Case(Shape(width=2048, layers=1, vocabulary=2048)),
)
TOY = (Case(Shape(width=64, layers=2, vocabulary=128), sequences=4, rounds=1, naive_rounds=1),)


def measure(options: Options) -> list[Ratio]:
    """Scoring ÷ forward at each size and dtype, and the naive way ÷ scoring."""
    rows = []
    for case in TOY if options.toy else CASES:
        with tempfile.TemporaryDirectory(prefix="benchmark-scoring-") as name:
            folder = save_decoder(case.shape, Path(name) / "model")
            for dtype in DTYPES:
                rows += _rows(case, folder, dtype)
    return rows


def _rows(case: Case, folder: Path, dtype: str) -> list[Ratio]:
    import torch

    from benchmarks.naive import naive_similarities
    from redundancy_trace.engine import choose_batch_size, score_checkpoint
    from redundancy_trace.weights import load_whole_model

    ids = random_ids(case.shape.vocabulary, case.sequences)
    device, kind = torch.device("cpu"), getattr(torch, dtype)
    batch_size = choose_batch_size(None, ids.shape[1], len(ids))
    model = load_whole_model(folder, device=device, dtype=kind)

    def score(some: "np.ndarray") -> None:
        score_checkpoint(folder, some, device=device, dtype=kind, batch_size=batch_size)

    ways: dict[str, Callable[[Any], object]] = {
        "forward": lambda some: plain_forward(model, torch.as_tensor(some), batch_size),
        "scoring": score,
        "naive": lambda some: naive_similarities(model, some),
    }
    for way in ways.values():  # what is loaded, compiled or cached on the first call
        way(ids[:batch_size])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(case.rounds):
        names = ["forward", "scoring"] if number % 2 == 0 else ["scoring", "forward"]
        for name in [*names, *(["naive"] if number < case.naive_rounds else [])]:
            seconds[name].append(_seconds(ways[name], ids))
    detail = {**vars(case), "shape": vars(case.shape), "length": ids.shape[1], "dtype": dtype, "seconds": seconds}
    large = case.shape.width >= 1024
    where = f"width {case.shape.width}, {dtype}"
    rows = [
        Ratio(
            f"one-pass scoring with loss ÷ plain forward, {where}",
            median_ratio(list(zip(seconds["scoring"], seconds["forward"], strict=True))),
            (_OVER_FORWARD if large else _OVER_FORWARD_SMALL)[dtype],
            detail=detail,
        )
    ]
    if seconds["naive"]:
        pairs = list(zip(seconds["naive"], seconds["scoring"], strict=False))
        name = f"three naive passes ÷ one-pass scoring, {where}"
        rows.append(Ratio(name, median_ratio(pairs), _NAIVE_OVER_SCORING[dtype], "higher", detail))
    return rows


def plain_forward(model: Any, ids: "torch.Tensor", batch_size: int) -> float:
    """The model's own forward with the next-token cross-entropy, nothing else; returns the loss."""
    import torch

    total = 0.0
    with torch.inference_mode():
        for batch in ids.split(batch_size):
            logits = model(input_ids=batch, use_cache=False).logits
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum"
            )
            total += float(losses)
    return total / (ids.shape[0] * (ids.shape[1] - 1))


def _seconds(way: Callable[[Any], object], ids: "np.ndarray") -> float:
    started = time.perf_counter()
    way(ids)
    return time.perf_counter() - started
