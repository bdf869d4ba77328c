"""Training order, and where on the axis of training each checkpoint stands."""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal

from redundancy_trace.checkpoints.names import parse_name
from redundancy_trace.checkpoints.records import Checkpoint

Unit = Literal["step", "index", "tokens"]
_UNITS: tuple[Unit, ...] = ("step", "index", "tokens")


def in_training_order(checkpoints: Sequence[Checkpoint]) -> tuple[Checkpoint, ...]:
    """Sort by seed, part, stage, ingredient, step; what has no place in the training comes last, by name.

    A name without a stage belongs to stage 1 where others of the same seed have stages (early OLMo-2), and a named
    part (`longctx-step…`) follows the numbered stages.
    """
    staged = {c.seed for c in checkpoints if c.is_parsed and c.stage is not None}
    placed = [
        replace(c, stage=1) if c.is_parsed and c.stage is None and c.seed in staged and not part_key(c.name) else c
        for c in checkpoints
    ]
    parsed = sorted((c for c in placed if c.is_parsed), key=_training_key)
    others = sorted((c for c in placed if not c.is_parsed), key=lambda c: (c.kind == "other", c.name))
    return (*parsed, *others)


def unit_of(checkpoint: Checkpoint) -> Unit | None:
    """What the name of a checkpoint counts: steps, else a running index, else tokens; None if nothing."""
    return next((unit for unit in _UNITS if getattr(checkpoint, unit) is not None), None)


def place_of(checkpoint: Checkpoint) -> int:
    """The number that the name counts, in its `unit_of`."""
    unit = unit_of(checkpoint)
    return 0 if unit is None else int(getattr(checkpoint, unit))


def stage_of(checkpoint: Checkpoint) -> tuple[object, ...]:
    """The stage of the training, or its named part, in a form that sorts: named parts follow the numbered stages."""
    return part_key(checkpoint.name), checkpoint.stage or 0


@lru_cache(maxsize=4096)  # every table and figure of a run asks for the same names
def part_key(name: str) -> tuple[tuple[bool, int, str], ...]:
    """The named part of the training that a checkpoint's name tells, in a form that sorts; none before any.

    Example:
        >>> part_key("step1000") < part_key("lc-4k-to-32k-step-4000") < part_key("lc-32k-to-64k-step-4000")
        True
    """
    parsed = parse_name(name.rpartition("/")[2])
    return _natural(parsed.tag if parsed else None)


def training_positions(checkpoints: Sequence[Checkpoint]) -> list[int]:
    """How far into its training each checkpoint is, on one axis over all stages.

    Args:
        checkpoints: Parsed ones, in training order.

    Returns:
        Steps (or index, or tokens: what the names count) from the start. A stage whose counter starts again is moved
        behind the one before it; parallel ingredients all start at the same place; every seed starts anew. Where
        names count different things, the running number of each.
    """
    if len({unit_of(c) for c in checkpoints}) > 1:
        return list(range(len(checkpoints)))
    positions: list[int] = []
    offset = 0
    reached = 0  # the furthest position of the stages before this one
    for number, checkpoint in enumerate(checkpoints):
        before = checkpoints[number - 1] if number else None
        if before is None or before.seed != checkpoint.seed:
            offset = reached = 0
        elif stage_of(before) != stage_of(checkpoint):
            reached = max(
                position for position, c in zip(positions, checkpoints, strict=False) if c.seed == before.seed
            )
            first = min(
                place_of(c) for c in checkpoints if stage_of(c) == stage_of(checkpoint) and c.seed == before.seed
            )
            offset = reached if first < reached else 0
        positions.append(offset + place_of(checkpoint))
    return positions


def is_first(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is the beginning of its training, before the first step."""
    return (
        checkpoint.is_parsed
        and place_of(checkpoint) == 0
        and checkpoint.stage in (None, 0, 1)
        and not part_key(checkpoint.name)
    )


def last_of_each_series(checkpoints: Sequence[Checkpoint]) -> frozenset[int]:
    """Positions of the checkpoints that end a seed's stage or ingredient, of checkpoints in training order."""
    last = {(c.seed, stage_of(c), c.ingredient): index for index, c in enumerate(checkpoints) if c.is_parsed}
    return frozenset(last.values())


def endpoints_first(count: int) -> list[int]:
    """An order in which any beginning is spread over the whole: the first, the last, then the middle of each gap.

    Example:
        >>> endpoints_first(7)
        [0, 6, 3, 1, 4, 2, 5]
    """
    order = [0, count - 1] if count > 1 else list(range(count))
    gaps = [(0, count - 1)]
    for left, right in gaps:  # grows while it is read
        if right - left > 1:
            middle = (left + right) // 2
            order.append(middle)
            gaps += [(left, middle), (middle, right)]
    return order


def _training_key(checkpoint: Checkpoint) -> tuple[object, ...]:
    unit = unit_of(checkpoint)
    return (
        _natural(checkpoint.seed),
        *stage_of(checkpoint),
        checkpoint.ingredient or 0,
        _UNITS.index(unit) if unit else len(_UNITS),
        place_of(checkpoint),
        checkpoint.name,
    )


def _natural(text: str | None) -> tuple[tuple[bool, int, str], ...]:
    """A sort key in which `seed-10` follows `seed-9`."""
    return tuple(
        (part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", text or "") if part
    )
