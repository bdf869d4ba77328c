"""Where each checkpoint stands in training, in one quantity for all."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import polars as pl

from redundancy_trace.analysis.frames import checked, ordered
from redundancy_trace.checkpoints.ordering import part_key, training_positions
from redundancy_trace.checkpoints.records import Checkpoint


@dataclass(frozen=True)
class Axis:
    """Where each checkpoint stands in training: one quantity for all, never a mixture.

    Attributes:
        column: What `values` count: tokens, optimizer steps, or places in training order (`index`).
        label: Name of the axis, with the unit.
        log: Whether the checkpoints are spaced for a logarithmic axis.
        revisions: One name a checkpoint, in training order: row k of `checkpoint_order`.
        values: Position of each, strictly increasing; None for a checkpoint without step (a final,
            averaged model): it stands behind the others, at no place that could be measured.
    """

    column: Literal["tokens", "step", "index"]
    label: str
    log: bool
    revisions: tuple[str, ...]
    values: tuple[float | None, ...]


def training_axis(scores: pl.DataFrame) -> Axis:
    """The axis on which to draw training: tokens where they are known, else steps, else the order itself.

    Tokens are those of the labels; where some labels lack them, or rounding made two equal, step × tokens per
    step, the median over the labels. A quantity is used only if every checkpoint that has a step or tokens
    has it and it grows along the training order; steps that start anew in each stage are put one behind the
    other. One checkpoint alone, parallel ingredients, or names without numbers, stand evenly spaced by order, under
    their names.

    Example:
        >>> frame = pl.DataFrame(
        ...     {"revision": ["step0", "step1", "step512"], "step": [0, 1, 512], "layer": 0}
        ... ).with_columns(component=pl.lit("attn"), metric=pl.lit("relative_norm"), value=1.0)
        >>> training_axis(frame).values
        (0.0, 1.0, 512.0)
    """
    return axis_of(ordered(checked(scores)))


def is_log_spaced(values: Sequence[float]) -> bool:
    """Whether increasing positions read better on a logarithmic axis. A zero is left out of account.

    They do where they reach over a factor of ten or more, and either the gaps between them vary less on a
    logarithmic axis than on a linear one (1, 10, 100), or two or more of them and over a twentieth of all
    crowd into the first hundredth of a linear axis (Pythia: 1, 2, 4 … 512, then every 1000 to 143000).

    Example:
        >>> is_log_spaced([0, 1, 2, 4, 8, 16]), is_log_spaced([0, 1000, 2000, 3000])
        (True, False)
    """
    positive = [value for value in values if value > 0]
    if len(positive) < 3 or positive[-1] < 10 * positive[0]:
        return False
    ratios = [math.log(later / earlier) for earlier, later in itertools.pairwise(positive)]
    differences = [later - earlier for earlier, later in itertools.pairwise(positive)]
    early = sum(value <= positive[-1] / 100 for value in positive)
    return _variation(ratios) < _variation(differences) or (early >= 2 and early > len(positive) / 20)


def axis_of(order: pl.DataFrame) -> Axis:
    """As `training_axis`, of checkpoints as `ordered` gives them."""
    names = tuple("?" if name is None else str(name) for name in order["revision"])
    steps: list[int | None] = order["step"].to_list()
    labels: list[int | None] = order["tokens"].to_list()
    placed = [step is not None or tokens is not None for step, tokens in zip(steps, labels, strict=True)]
    derived = _tokens_from_steps(steps, labels)
    filled = [label if label is not None else other for label, other in zip(labels, derived, strict=True)]
    candidates: tuple[tuple[Literal["tokens", "step"], str, Sequence[float | None]], ...] = (
        ("tokens", "training tokens", labels),
        ("tokens", "training tokens", filled),
        ("tokens", "training tokens", derived),
        ("step", "optimizer steps", steps),
        ("step", "optimizer steps, each stage behind the one before", _steps_over_stages(order)),
    )
    for column, label, positions in candidates:
        known = [float(x) for x, there in zip(positions, placed, strict=True) if there and x is not None]
        grows = all(earlier < later for earlier, later in itertools.pairwise(known))
        if len(known) == sum(placed) > 1 and grows:
            values = tuple(None if x is None else float(x) for x in positions)
            return Axis(column, label, is_log_spaced(known), names, values)
    label = "checkpoint" if len(names) == 1 else "checkpoint, in training order"
    return Axis("index", label, log=False, revisions=names, values=tuple(float(k) for k in range(len(names))))


def _steps_over_stages(order: pl.DataFrame) -> list[int | None]:
    """Steps from the start of the training, where every stage counts its own; None of what has no step."""
    staged = order["stage"].is_not_null().any()
    rows = [row for row in order.iter_rows(named=True) if row["step"] is not None]
    checkpoints = [
        Checkpoint(
            name=str(row["revision"]),
            kind="branch",
            seed=row["seed"],
            stage=1 if staged and row["stage"] is None and not part_key(str(row["revision"])) else row["stage"],
            ingredient=row["ingredient"],
            step=row["step"],
        )
        for row in rows
    ]
    positions = iter(training_positions(checkpoints))
    return [None if step is None else next(positions) for step in order["step"]]


def _tokens_from_steps(steps: Sequence[int | None], labels: Sequence[int | None]) -> list[float | None]:
    """Step × tokens per step (median of the labels); all None where steps start anew or no label tells."""
    known = [step for step in steps if step is not None]
    if any(later <= earlier for earlier, later in itertools.pairwise(known)):
        return [None] * len(steps)
    rates = [tokens / step for step, tokens in zip(steps, labels, strict=True) if step and tokens]
    if not rates:
        return [None] * len(steps)
    rate = statistics.median(rates)
    return [None if step is None else step * rate for step in steps]


def _variation(values: Sequence[float]) -> float:
    """Standard deviation over mean: the spread of positive values, whatever their unit."""
    return statistics.pstdev(values) / statistics.fmean(values)
