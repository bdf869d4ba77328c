"""What is measured of one model in memory: the rows of each kind of evaluation, whole and with components dropped."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from redundancy_trace.errors import InputError
from redundancy_trace.evaluation.dropping import (
    DropLosses,
    Dropper,
    beginnings,
    distinct_drops,
    most_that_can_go,
    with_plan,
)
from redundancy_trace.evaluation.speed import Load, Variant, measure_speed
from redundancy_trace.evaluation.windows import Windows
from redundancy_trace.pruning import DropPlan, plan_drop
from redundancy_trace.store import Evaluated

if TYPE_CHECKING:
    import polars as pl

    from redundancy_trace.evaluation.tasks import LoadedTasks

Plans = Sequence[DropPlan | None]


def loss_rows(
    model: Any, windows: Windows, plans: Plans = (None,), *, batch_size: int | None = None
) -> list[Evaluated]:
    """Loss, perplexity and bits per byte on a text, under each plan (None = the whole model), and what a plan adds."""
    losses = DropLosses(_dropper(model, plans), windows, batch_size=batch_size)
    return _where(model, [number for plan in plans for number in losses.rows(plan, every=True)])


def speed_rows(model: Any, load: Load, plans: Plans = (None,)) -> list[Evaluated]:
    """Time and memory under each plan, in turns; the first is what the others are compared with."""
    dropper = _dropper(model, plans)
    variants: list[Variant] = [nullcontext if plan is None else partial(dropper.dropped, plan) for plan in plans]
    found = measure_speed(model, variants, load)
    return _where(model, [with_plan(number, plan) for plan, one in zip(plans, found, strict=True) for number in one])


def task_rows(
    model: Any, tokenizer: Any, tasks: "LoadedTasks", plans: Plans = (None,), *, batch_size: int | None = None
) -> list[Evaluated]:
    """Every metric of every task of lm-eval under each plan."""
    dropper = _dropper(model, plans)
    numbers = []
    for plan in plans:
        with nullcontext() if plan is None else dropper.dropped(plan):
            found = tasks.ask(model, tokenizer, batch_size=batch_size)
        numbers += [with_plan(number, plan) for number in found]
    return _where(model, numbers)


def curve_rows(
    model: Any,
    windows: Windows,
    plans: Sequence[DropPlan],
    *,
    batch_size: int | None = None,
    on_loss: Callable[[int, int], None] | None = None,
) -> list[Evaluated]:
    """The loss of the whole model, then for each plan the loss, and what it adds, after its first 1, 2, … components.

    Args:
        model: The model.
        windows: The text.
        plans: Whole orders, as `curve_plans` gives them.
        batch_size: Windows at a time.
        on_loss: Told how many losses are measured, and of how many.
    """
    return _losses(model, windows, [None, *(part for plan in plans for part in beginnings(plan))], batch_size, on_loss)


def curve_plans(
    scores: "pl.DataFrame", revision: str | None, components: Sequence[str], orders: Sequence[str]
) -> list[DropPlan]:
    """For each kind of component and each order, the plan that drops as many as can go.

    Args:
        scores: Scores of the checkpoint, as `read_scores` gives them.
        revision: Which checkpoint; None where there is only one.
        components: Of attn, mlp, block, joint.
        orders: `importance`, `deepest`, `random:SEED`.

    Raises:
        InputError: There is no such order, or no such scores.
    """
    plans = []
    for component in components:
        n_layers = plan_drop(scores, revision, drop=f"{component}=1").n_layers
        for order in orders:
            most = most_that_can_go(component, order, n_layers)
            if most:
                plans.append(plan_drop(scores, revision, drop=f"{component}={most}", order=order))
    if not plans:
        raise InputError("--curve: of a model with one layer, no block can be dropped.")
    return plans


def along_rows(
    model: Any,
    windows: Windows,
    plans: Sequence[DropPlan],
    *,
    batch_size: int | None = None,
    on_loss: Callable[[int, int], None] | None = None,
) -> list[Evaluated]:
    """The loss of the whole model, and under each plan with what it adds; `on_loss` is told as for `curve_rows`."""
    return _losses(model, windows, [None, *plans], batch_size, on_loss)


def _losses(
    model: Any,
    windows: Windows,
    plans: Plans,
    batch_size: int | None,
    on_loss: Callable[[int, int], None] | None,
) -> list[Evaluated]:
    total, done = distinct_drops(plans), 0

    def measured() -> None:
        nonlocal done
        done += 1
        if on_loss is not None:
            on_loss(done, total)

    losses = DropLosses(_dropper(model, plans), windows, batch_size=batch_size, on_measured=measured)
    return _where(model, [number for plan in plans for number in losses.rows(plan)])


def _dropper(model: Any, plans: Plans) -> Dropper:
    """What carries out the plans, each of which is known to fit before anything is measured."""
    dropper = Dropper(model)
    for plan in plans:
        if plan is not None:
            dropper.check(plan)
    return dropper


def _where(model: Any, numbers: Sequence[Evaluated]) -> list[Evaluated]:
    weight = model.get_input_embeddings().weight
    dtype = str(weight.dtype).removeprefix("torch.")
    return [replace(number, device=str(weight.device), dtype=dtype) for number in numbers]
