"""Scoring against one plain forward of the same decoder, the naive way of three passes, and the whole engine."""

import tempfile
import time
from collections.abc import Callable, Sequence
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
_STREAMING_OVER_WHOLE = 1.05


@dataclass(frozen=True)
class Case:
    """A decoder and what it is run on.

    Attributes:
        shape: Vocabulary and depth are those of a Pythia of that width, divided by the same number, so that the head
            takes the share of the time that it has in a real model.
        sequences: Of the calibration.
        rounds: Runs of each way, taken in turn.
        naive_rounds: In how many of them the naive way is run too.
        whole_rounds: In how many of them the whole engine is.
    """

    shape: Shape
    sequences: int = 32
    rounds: int = 3
    naive_rounds: int = 0
    whole_rounds: int = 0


CASES = (
    Case(Shape(width=512, layers=1, vocabulary=8384), whole_rounds=3),
    Case(Shape(width=1024, layers=2, vocabulary=4192), naive_rounds=1),
    Case(Shape(width=2048, layers=1, vocabulary=2096), sequences=16, rounds=2),
)
TOY = (Case(Shape(width=64, layers=2, vocabulary=128), sequences=4, rounds=1, naive_rounds=1, whole_rounds=1),)


def measure(options: Options) -> list[Ratio]:
    """Scoring ÷ forward at each size and dtype, and the naive way ÷ scoring."""
    return measure_cases(TOY if options.toy else CASES)


def measure_cases(cases: Sequence[Case], device: str = "cpu") -> list[Ratio]:
    """The rows of the cases, one after the other, each in both dtypes."""
    rows = []
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="benchmark-scoring-") as name:
            folder = save_decoder(case.shape, Path(name) / "model")
            for dtype in DTYPES:
                rows += _rows(case, folder, dtype, device)
    return rows


def _rows(case: Case, folder: Path, dtype: str, where: str) -> list[Ratio]:
    import torch

    from benchmarks.naive import naive_similarities
    from redundancy_trace.engine import Kept, choose_batch_size, score_checkpoint
    from redundancy_trace.weights import load_whole_model

    ids = random_ids(case.shape.vocabulary, case.sequences)
    device, kind = torch.device(where), getattr(torch, dtype)
    batch_size = choose_batch_size(None, ids.shape[1], len(ids), device)
    model = load_whole_model(folder, device=device, dtype=kind)
    kept = Kept()

    def score(some: "np.ndarray", engine: str = "stream") -> None:
        score_checkpoint(folder, some, device=device, dtype=kind, batch_size=batch_size, engine=engine, kept=kept)

    ways: dict[str, tuple[int, Callable[[Any], object]]] = {
        "forward": (case.rounds, lambda some: plain_forward(model, torch.as_tensor(some, device=device), batch_size)),
        "scoring": (case.rounds, score),
        "naive": (case.naive_rounds, lambda some: naive_similarities(model, some)),
        "whole": (case.whole_rounds, lambda some: score(some, "whole")),
    }
    ways = {name: way for name, way in ways.items() if way[0]}
    for _, way in ways.values():  # what is loaded, compiled or cached on the first call
        way(ids[:batch_size])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(case.rounds):
        # There and back, so that what comes first is not always the same.
        for name in list(ways) if number % 2 == 0 else list(ways)[::-1]:
            rounds, way = ways[name]
            if number < rounds:
                seconds[name].append(_seconds(way, ids))
    told = {"length": ids.shape[1], "dtype": dtype, "device": where, "seconds": seconds}
    detail = {**vars(case), "shape": vars(case.shape), **told}
    bounds = _OVER_FORWARD if case.shape.width >= 1024 else _OVER_FORWARD_SMALL
    of = f"width {case.shape.width}, {dtype}"

    def over(first: str, second: str) -> float:
        return median_ratio(list(zip(seconds[first], seconds[second], strict=False)))

    name = f"one-pass scoring with loss ÷ plain forward, {of}"
    rows = [Ratio(name, over("scoring", "forward"), bounds[dtype], detail=detail)]
    if case.naive_rounds:
        name = f"three naive passes ÷ one-pass scoring, {of}"
        rows.append(Ratio(name, over("naive", "scoring"), _NAIVE_OVER_SCORING[dtype], "higher", detail))
    if case.whole_rounds:
        name = f"streaming ÷ whole engine, {of}"
        rows.append(Ratio(name, over("scoring", "whole"), _STREAMING_OVER_WHOLE, detail=detail))
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
