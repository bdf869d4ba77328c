"""Tokens of checkpoints whose names tell steps alone: from the labels of the others, or from what the user says."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from redundancy_trace.checkpoints.ordering import stage_of, training_positions
from redundancy_trace.checkpoints.records import Checkpoint

# Labels are rounded, up or down: one of three digits or more is off by less than 1 %.
FEWEST_DIGITS = 3
FEWEST_LABELS = 3
TOLERANCE = 0.01


def with_tokens(checkpoints: Sequence[Checkpoint], tokens_per_step: int | None) -> tuple[Checkpoint, ...]:
    """Fill in tokens where a name tells its step and no tokens.

    Args:
        checkpoints: In training order.
        tokens_per_step: As the user gave it, for stages whose labels do not tell.

    Returns:
        The same checkpoints. A label stays as it is. Without one, tokens are the step times the tokens per step of
        the labels of its stage, if these agree; else the steps from the start times `tokens_per_step`; else unknown.
    """
    rates = _fitted_rates(checkpoints)
    parsed = [checkpoint for checkpoint in checkpoints if checkpoint.is_parsed]
    positions = dict(zip((c.name for c in parsed), training_positions(parsed), strict=True))

    def filled(checkpoint: Checkpoint) -> Checkpoint:
        if checkpoint.step is None or checkpoint.tokens is not None:
            return checkpoint
        if (rate := rates.get(stage_of(checkpoint))) is not None:
            return replace(checkpoint, tokens=round(checkpoint.step * rate))
        if tokens_per_step is not None:
            return replace(checkpoint, tokens=positions[checkpoint.name] * tokens_per_step)
        return checkpoint

    return tuple(map(filled, checkpoints))


def _fitted_rates(checkpoints: Sequence[Checkpoint]) -> dict[tuple[object, ...], float]:
    """Tokens per step of each stage by its labels; none where it changes (Apertus doubles it)."""
    labels: dict[tuple[object, ...], list[tuple[int, int]]] = defaultdict(list)
    for checkpoint in checkpoints:
        if checkpoint.step and checkpoint.tokens:
            labels[stage_of(checkpoint)].append((checkpoint.step, checkpoint.tokens))
    rates = {stage: _rate(found) for stage, found in labels.items()}
    return {stage: rate for stage, rate in rates.items() if rate is not None}


def _rate(labels: Sequence[tuple[int, int]]) -> float | None:
    """The median of tokens per step, if all labels agree with it but for their rounding."""
    exact = [tokens / step for step, tokens in labels if len(_digits(tokens)) >= FEWEST_DIGITS]
    if len(exact) < FEWEST_LABELS:
        return None
    rate = statistics.median(exact)
    fits = all(abs(tokens - rate * step) <= _unit(tokens) + TOLERANCE * tokens for step, tokens in labels)
    return rate if fits else None


def _digits(tokens: int) -> str:
    return str(tokens).rstrip("0")


def _unit(tokens: int) -> int:
    """What the last digit of a label counts, as far as one can see: 15T is told in units of 1T."""
    return int(10 ** (len(str(tokens)) - len(_digits(tokens))))
