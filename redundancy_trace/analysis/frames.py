"""The rows that a statistic or a picture may use: of one model and one calibration, in training order."""

from typing import Any

import polars as pl

from redundancy_trace.checkpoints.ordering import part_key
from redundancy_trace.errors import InputError, nearest
from redundancy_trace.metrics import COMPONENTS, IMPORTANCE

REQUIRED = ("revision", "layer", "component", "metric", "value")
# Columns that a frame may lack (`score_model` knows no commit, step or calibration): filled with null.
OPTIONAL: dict[str, type[pl.DataType]] = {
    "model": pl.String,
    "commit": pl.String,
    "stage": pl.Int64,
    "ingredient": pl.Int64,
    "seed": pl.String,
    "step": pl.Int64,
    "tokens": pl.Int64,
    "calibration": pl.String,
    "stderr": pl.Float64,
    "n_sequences": pl.Int64,
    "n_tokens": pl.Int64,
}
CHECKPOINT_COLUMNS = ("revision", "commit", "stage", "ingredient", "seed", "step", "tokens")
VALUE_COLUMNS = ("layer", "component", "metric", "value", "stderr", "n_sequences", "n_tokens")


def one_calibration(scores: pl.DataFrame, calibration: str | None = None) -> pl.DataFrame:
    """The rows of one calibration, so that no mean or picture mixes two.

    Every function here and in `figures` takes the first calibration of a frame; to see another, pass it what
    this returns.

    Args:
        scores: Scores of one model, as `read_scores` gives them.
        calibration: Name in the `calibration` column; None = the first in the frame.

    Returns:
        The rows of that calibration.

    Raises:
        InputError: If columns are missing, there are no rows, or there is no such calibration.
    """
    scores = complete(scores)
    names = scores["calibration"].unique(maintain_order=True).to_list()
    if calibration is not None and calibration not in names:
        raise InputError(f"No scores were calibrated on {calibration!r}. There are: {', '.join(map(str, names))}.")
    wanted = names[0] if calibration is None else calibration
    return scores.filter(pl.col("calibration").eq_missing(pl.lit(wanted, dtype=pl.String)))


def calibration_first(scores: pl.DataFrame, calibration: str | None = None) -> pl.DataFrame:
    """The same rows, those of one calibration in front: what is looked at where a figure shows one."""
    chosen = one_calibration(scores, calibration)
    return pl.concat([chosen, complete(scores).join(chosen.select("calibration").unique(), on="calibration", how="anti",
                                                    nulls_equal=True)])  # fmt: skip


def checkpoint_order(scores: pl.DataFrame) -> pl.DataFrame:
    """The checkpoints of a frame in training order.

    Seeds are kept apart, then stage (unnumbered = the first, named parts behind the numbered), ingredient, step and
    tokens decide. Checkpoints without step and tokens come last, in the order of the frame.

    Returns:
        One row a checkpoint: `order` (0, 1, …), `revision`, `commit`, `stage`, `ingredient`, `seed`, `step`,
        `tokens`.
    """
    return ordered(checked(scores))


def metric_values(scores: pl.DataFrame, metric: str, component: str | None = None) -> pl.DataFrame:
    """All values of one metric, in training order, then by component and layer.

    Args:
        scores: Scores of one model.
        metric: A stored metric, or `importance` = 1 − `cosine_similarity` (range 0 to 2, 0 = redundant; its
            standard error is that of the similarity).
        component: `attn`, `mlp`, `block`, or `model` for the loss; None = all that have the metric.

    Returns:
        Columns `model`, those of `checkpoint_order`, `layer`, `component`, `metric`, `value`, `stderr`,
        `n_sequences`, `n_tokens`. A value that is not a number is null.

    Raises:
        InputError: If the metric or the component is not there; names those that are.
    """
    rows = checked(scores)
    stored = sorted(rows["metric"].unique().to_list())
    known = [*stored, IMPORTANCE.name] if "cosine_similarity" in stored else stored
    if metric not in known:
        near = nearest(metric, known)
        raise InputError(
            f"There is no metric {metric!r} in these scores. There are: {', '.join(known)}."
            + (f" Did you mean {near[0]}?" if near else "")
        )
    values = values_of(rows, metric)
    components = values["component"].unique().to_list()
    if component is None:
        return values
    if component not in components:
        raise InputError(
            f"There is no {metric} of component {component!r} in these scores. "
            f"Components with it: {', '.join(sorted(components))}."
        )
    return values.filter(pl.col("component") == component)


def complete(scores: pl.DataFrame) -> pl.DataFrame:
    """Scores with every column; refuses frames without rows, or without a column that nothing can stand for."""
    missing = [name for name in REQUIRED if name not in scores.columns]
    if missing:
        raise InputError(
            f"These scores lack the column {missing[0]!r}; the columns are: {', '.join(scores.columns)}. "
            "read_scores(RUN) gives a frame with all of them."
        )
    if scores.is_empty():
        raise InputError("There are no scores. Score a checkpoint first: trace --model MODEL, or trace --demo.")
    return scores.with_columns(
        pl.lit(None, dtype=dtype).alias(name) for name, dtype in OPTIONAL.items() if name not in scores.columns
    )


def checked(scores: pl.DataFrame) -> pl.DataFrame:
    """Rows of one model and one calibration, each value once."""
    rows = one_calibration(scores)
    models = rows["model"].unique(maintain_order=True).to_list()
    if len(models) > 1:
        raise InputError(
            f"These scores are of {len(models)} models: {', '.join(map(str, models))}. "
            "Take one: scores.filter(polars.col('model') == ...)."
        )
    keys = ["revision", "commit", "layer", "component", "metric"]
    twice = rows.filter(rows.select(keys).is_duplicated())
    if not twice.is_empty():
        first = twice.row(0, named=True)
        raise InputError(
            f"{twice.height} values stand in these scores more than once, the first is {first['metric']} of "
            f"{first['component']} in layer {first['layer']} at {first['revision']}. Keep one row of each."
        )
    return rows


def ordered(rows: pl.DataFrame) -> pl.DataFrame:
    """As `checkpoint_order`, of rows that were checked."""
    checkpoints = rows.select(CHECKPOINT_COLUMNS).unique(
        subset=["revision", "commit"], keep="first", maintain_order=True
    )
    parts = [part_key(name or "") for name in checkpoints["revision"]]
    ranks = {part: rank for rank, part in enumerate(sorted(set(parts)))}
    return checkpoints.sort(
        "seed",
        pl.col("step").is_null() & pl.col("tokens").is_null(),
        # A named part (longctx-step50) counts its steps anew, behind the numbered stages.
        pl.Series([ranks[part] for part in parts], dtype=pl.Int64),
        # OLMo-2 publishes a few early checkpoints of stage 1 without the stage in their names.
        pl.col("stage").fill_null(1),
        "ingredient",
        pl.col("step").fill_null(-1),
        "tokens",
        maintain_order=True,
    ).with_row_index("order")


def values_of(rows: pl.DataFrame, metric: str) -> pl.DataFrame:
    """As `metric_values`, all components; no rows where the metric is not stored."""
    stored = "cosine_similarity" if metric == IMPORTANCE.name else metric
    values = rows.filter(pl.col("metric") == stored).with_columns(
        pl.col("value").cast(pl.Float64).fill_nan(None), pl.col("stderr").cast(pl.Float64).fill_nan(None)
    )
    if metric == IMPORTANCE.name:
        values = values.with_columns(value=1.0 - pl.col("value"), metric=pl.lit(metric))
    order = ordered(rows).select("order", "revision", "commit")
    known = {name: place for place, name in enumerate((*COMPONENTS, "model"))}
    return (
        values.join(order, on=["revision", "commit"], nulls_equal=True)
        .select("model", "order", *CHECKPOINT_COLUMNS, *VALUE_COLUMNS)
        .sort("order", pl.col("component").replace_strict(known, default=len(known)), "layer")
    )


def place_of(row: dict[str, Any]) -> tuple[object, ...]:
    """Series of a checkpoint, and its step in it (else its tokens, else its name)."""
    stage = row.get("stage")
    within = next((value for name in ("step", "tokens") if (value := row.get(name)) is not None), row["revision"])
    part = part_key(row["revision"] or "")
    return row.get("seed"), 1 if stage is None else stage, row.get("ingredient"), part, within
