"""What dropping costs, from the losses that `trace eval` stored: along training, and at each checkpoint of a series."""

import polars as pl

from redundancy_trace.analysis.series import Series
from redundancy_trace.errors import InputError
from redundancy_trace.metrics import ADDED_LOSS, LOSS
from redundancy_trace.settings import CURVES

_DROP = ["component", "order", "order_seed", "plan", "plan_sha256", "n_dropped"]


def along_values(evaluations: pl.DataFrame) -> pl.DataFrame:
    """The losses of `trace eval --along`, as what a drop adds to the loss of the whole model.

    Args:
        evaluations: Rows of a run, as `read_evaluations` gives them; of several texts, those on the first count.

    Returns:
        One row a checkpoint and plan: the checkpoint whose plan it is, `position_order` (its place in training), what
        was dropped, `applied` (`own`: to that checkpoint; `last`: to the last one), `value`, `added` = value less
        the loss of the same model without the drop, in nats per token, and its standard error `added_stderr`.

    Raises:
        InputError: There are no such rows.
    """
    along = evaluations.filter(pl.col("purpose") == "along")
    rows = along.filter(pl.col("metric") == LOSS.name)
    if rows.is_empty():
        raise InputError("No loss was measured along training. Measure it: trace eval --along RUN.")
    text = ["dataset", "token_sha256"]
    rows = rows.join(rows.select(text).head(1), on=text, how="semi", nulls_equal=True, maintain_order="left")
    whole = rows.filter(pl.col("plan").is_null()).unique(subset=["revision"], maintain_order=True)
    places = whole.select("revision", "commit", "stage", "ingredient", "seed", "step", "tokens", baseline="value")
    places = places.with_row_index("position_order")
    keys = ["dataset", "order", "order_seed", "plan", "plan_revision", "measured"]
    planned = rows.filter(pl.col("plan").is_not_null()).select(
        "model", "dataset", "plan", "component", "n_dropped", "order", "order_seed", "plan_revision", "value", "stderr",
        measured="revision",
    )  # fmt: skip
    # A longer run was measured again: what was the last checkpoint then is none any more, and the rest is there twice.
    at_the_end = (pl.col("plan_revision") == pl.col("measured")) | (pl.col("measured") == places["revision"][-1])
    planned = planned.filter(at_the_end).unique(subset=keys, keep="last", maintain_order=True)
    errors = along.filter(pl.col("metric") == ADDED_LOSS.name).select(
        *keys[:-1], measured="revision", added_stderr="stderr"
    )
    planned = planned.join(
        errors.unique(subset=keys, keep="last"), on=keys, how="left", nulls_equal=True, maintain_order="left"
    )
    baseline = places.select(measured="revision", baseline="baseline")
    table = planned.join(baseline, on="measured").join(
        places.drop("baseline"), left_on="plan_revision", right_on="revision"
    )
    own = pl.when(pl.col("plan_revision") == pl.col("measured")).then(pl.lit("own")).otherwise(pl.lit("last"))
    table = table.with_columns(applied=own, added=pl.col("value") - pl.col("baseline"))
    # The last checkpoint's own plan is where the line of plans applied to it ends.
    last = table.filter((pl.col("applied") == "own") & (pl.col("order") == "importance"))
    last = last.filter(pl.col("position_order") == len(places) - 1).with_columns(applied=pl.lit("last"))
    table = pl.concat([table, last]).rename({"plan_revision": "revision"})
    kinds = {kind: place for place, kind in enumerate(CURVES)}
    return table.sort(
        pl.col("component").replace_strict(kinds, default=len(kinds)), "n_dropped", "position_order", "order",
        "order_seed", maintain_order=True,
    )  # fmt: skip


def drop_costs(series: Series, evaluations: pl.DataFrame | None) -> pl.DataFrame:
    """What drops add to the loss of the checkpoint whose own scores planned them, whatever they were measured for.

    Args:
        series: The checkpoints that count.
        evaluations: Rows of the run, as `read_evaluations` gives them; None where nothing was measured.

    Returns:
        One row a checkpoint (its place `at` in the series), text, kind of component, order and number dropped: `added`
        nats per token and `stderr`, null where it is unknown. Random orders are one row, the mean over the seeds; their
        error is that of the seeds and that of the text together.
    """
    schema = {
        "at": pl.Int64, "dataset": pl.String, "component": pl.String, "order": pl.String, "n_dropped": pl.Int64,
        "added": pl.Float64, "stderr": pl.Float64,
    }  # fmt: skip
    if evaluations is None:
        return pl.DataFrame(schema=schema)
    keys = ["revision", "commit"]
    counted = series.checkpoints.select(*keys, at=pl.col("order").cast(pl.Int64))
    rows = evaluations.join(counted, on=keys, how="inner", nulls_equal=True, maintain_order="left")
    within = ["at", "dataset", "token_sha256"]
    losses = rows.filter(pl.col("metric") == LOSS.name)
    whole = losses.filter(pl.col("plan").is_null()).unique(subset=within, keep="last", maintain_order=True)
    own = (pl.col("plan_revision") == pl.col("revision")) & pl.col("component").is_in(CURVES)
    planned = losses.filter(own).join(
        whole.select(*within, baseline="value"), on=within, nulls_equal=True, maintain_order="left"
    )
    errors = rows.filter(own & (pl.col("metric") == ADDED_LOSS.name)).select(*within, *_DROP, error="stderr")
    # A drop that was measured twice, along training and as a curve, say, is the same drop.
    same = [*within, "component", "order", "order_seed", "n_dropped"]
    table = planned.join(errors, on=[*within, *_DROP], how="left", nulls_equal=True, maintain_order="left")
    table = table.unique(subset=same, keep="last", maintain_order=True)
    table = table.with_columns(added=pl.col("value") - pl.col("baseline"))
    seeds = pl.col("added").var().fill_null(0.0) / pl.len()
    known = pl.col("error").null_count() == 0
    return (
        table.group_by("at", "dataset", "component", "order", "n_dropped", maintain_order=True)
        .agg(pl.col("added").mean(), stderr=pl.when(known).then((seeds + (pl.col("error") ** 2).mean()).sqrt()))
        .cast(pl.Schema(schema))
    )
