"""Peak memory against samples, depth and checkpoints, and beside that of the whole engine and of the naive way.

Each figure is the most anonymous memory that scoring took in a process of its own: what pages of mapped files take, the
system takes back when it needs them. The calibrations are long enough for the states of the block distances, which
never take more than 256 MiB of float32, to take that already at the smaller size; where they are not, they are short
beside the weights. What MKL would keep of its own buffers from one product to the next, some 25 MiB, is left out.
"""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.decoders import LENGTH, Shape, random_ids, save_decoder
from benchmarks.peaks import Peaks, score_apart
from benchmarks.ratios import Options, Ratio

_BOUND = 1.1
_NAIVE_BOUND, _WHOLE_BOUND = 2.0, 0.5


@dataclass(frozen=True)
class Case:
    """Decoders and what they are scored on.

    Attributes:
        wide: Wide and nearly without weights: all it has are states.
        samples: Sequences that it is scored on, few and many.
        deep: Has weights; it is scored in bfloat16, so that a layer that is loaded takes memory of its own.
        depths: Layers of it, few and many.
        wider: What a run scores many checkpoints of; its layers are large beside what libraries keep once.
        checkpoints: How many, beside one.
        short: Sequences that `deep` is scored on, and their length.
    """

    wide: Shape
    samples: tuple[int, int]
    deep: Shape
    depths: tuple[int, int]
    wider: Shape
    checkpoints: int
    short: tuple[int, int] = (4, 64)


CASE = Case(
    wide=Shape(width=2048, layers=2, vocabulary=64, inner=64, heads=1),
    samples=(16, 128),
    deep=Shape(width=1024, layers=0, vocabulary=2048),
    depths=(4, 24),
    wider=Shape(width=2048, layers=2, vocabulary=2048),
    checkpoints=12,
)
TOY = Case(
    wide=Shape(width=64, layers=2, vocabulary=64, inner=64, heads=1),
    samples=(1, 2),
    deep=Shape(width=64, layers=0, vocabulary=64),
    depths=(1, 2),
    wider=Shape(width=64, layers=1, vocabulary=64),
    checkpoints=2,
)


def measure(options: Options) -> list[Ratio]:
    """What grows with samples, depth and checkpoints, and what does not."""
    case = TOY if options.toy else CASE
    os.environ["MKL_DISABLE_FAST_MM"] = "1"
    with tempfile.TemporaryDirectory(prefix="benchmark-memory-") as name:
        folder = Path(name)
        # Two at a time: memory, unlike time, is the same.
        with ThreadPoolExecutor(2) as pool:
            return [
                *_samples(case, folder / "wide", pool),
                *_depth(case, folder, pool),
                _checkpoints(case, folder / "wider", pool),
            ]


def _samples(case: Case, folder: Path, pool: ThreadPoolExecutor) -> list[Ratio]:
    save_decoder(case.wide, folder)
    few, many = case.samples
    ids = random_ids(case.wide.vocabulary, many)
    states = (many - few) * LENGTH * case.wide.width * 4

    measured = [pool.submit(score_apart, [folder], some) for some in (ids[:few], ids)]
    naive = pool.submit(score_apart, [folder], ids, engine="naive").result()
    ours = measured[0].result(), measured[1].result()
    detail = {"shape": vars(case.wide), "length": LENGTH, "states": states}
    return [
        Ratio(
            f"peak memory, {many} samples ÷ that of {few} and the hidden states of the others",
            _grown(*ours, states),
            _BOUND,
            detail=detail | _told(ours),
        ),
        Ratio(
            f"peak memory of a naive pass ÷ scoring, {many} samples",
            naive.taken / ours[1].taken,
            _NAIVE_BOUND,
            "higher",
            detail=detail | {"naive": vars(naive), "scoring": vars(ours[1])},
        ),
    ]


def _depth(case: Case, folder: Path, pool: ThreadPoolExecutor) -> list[Ratio]:
    few, many = case.depths
    ids = random_ids(case.deep.vocabulary, *case.short)
    folders = [save_decoder(_deep(case.deep, layers), folder / str(layers)) for layers in (few, many)]
    measured = [pool.submit(score_apart, [one], ids, dtype="bfloat16") for one in folders]
    whole = pool.submit(score_apart, folders[1:], ids, dtype="bfloat16", engine="whole").result()
    shallow, deep = measured[0].result(), measured[1].result()
    detail = {"shape": vars(case.deep), "sequences": case.short[0], "length": case.short[1], "dtype": "bfloat16"}
    return [
        Ratio(
            f"peak memory, {many} layers ÷ {few}",
            _grown(shallow, deep),
            _BOUND,
            detail=detail | _told((shallow, deep)),
        ),
        Ratio(
            f"peak memory, streaming ÷ whole engine, {many} layers",
            deep.taken / whole.taken,
            _WHOLE_BOUND,
            detail=detail | {"streaming": vars(deep), "whole": vars(whole)},
        ),
    ]


def _checkpoints(case: Case, folder: Path, pool: ThreadPoolExecutor) -> Ratio:
    save_decoder(case.wider, folder)
    ids = random_ids(case.wider.vocabulary, *case.short)
    # A peak is a little higher where threads meet: many checkpoints have many chances of it, one is given three.
    counts = (case.checkpoints, 1, 1, 1)
    measured = [pool.submit(score_apart, [folder] * count, ids, dtype="bfloat16") for count in counts]
    many, *ones = (one.result() for one in measured)
    one = max(ones, key=lambda peaks: peaks.taken)
    detail = {"shape": vars(case.wider), "sequences": case.short[0], "length": case.short[1], "dtype": "bfloat16"}
    name = f"peak memory, {case.checkpoints} checkpoints ÷ 1"
    return Ratio(name, _grown(one, many), _BOUND, detail=detail | _told((one, many)))


def _deep(shape: Shape, layers: int) -> Shape:
    return Shape(shape.width, layers, shape.vocabulary)


def _grown(small: Peaks, large: Peaks, allowed: int = 0) -> float:
    """What the larger took over what the smaller took and some bytes more."""
    return large.taken / max(1, small.taken + allowed)


def _told(peaks: tuple[Peaks, Peaks]) -> dict[str, Any]:
    return {"small": vars(peaks[0]), "large": vars(peaks[1])}
