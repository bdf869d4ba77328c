"""What the stored scores say: values of a metric, the training axis, a row a checkpoint. Polars in and out."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl

from redundancy_trace.checkpoints.ordering import part_key, training_positions
from redundancy_trace.checkpoints.records import Checkpoint
from redundancy_trace.errors import InputError, nearest
from redundancy_trace.metrics import COMPONENTS, IMPORTANCE, LOSS

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
    scores = _complete(scores)
    names = scores["calibration"].unique(maintain_order=True).to_list()
    if calibration is not None and calibration not in names:
        raise InputError(f"No scores were calibrated on {calibration!r}. There are: {', '.join(map(str, names))}.")
    wanted = names[0] if calibration is None else calibration
    return scores.filter(pl.col("calibration").eq_missing(pl.lit(wanted, dtype=pl.String)))


def leave_out_duplicates(scores: pl.DataFrame, duplicates: pl.DataFrame | None) -> pl.DataFrame:
    """The rows of checkpoints that are what their names say: for curves and statistics.

    Args:
        scores: Scores of one model.
        duplicates: Checkpoints that repeat another's weights, as `read_duplicates` gives them; None = none.

    Returns:
        The rows of the others; all rows where there are no others. Scores of a revision at another commit than the one
        that repeats stay.
    """
    if duplicates is None or duplicates.is_empty():
        return scores
    commit = pl.col("commit") if "commit" in scores.columns else pl.lit(None, pl.String)
    repeating = duplicates.select("revision", repeating="commit", repeats=pl.lit(value=True))
    repeats = pl.col("repeats") & (commit == pl.col("repeating")).fill_null(value=True)
    joined = scores.join(repeating, on="revision", how="left", maintain_order="left")
    kept = joined.filter(repeats.fill_null(value=False).not_()).drop("repeating", "repeats")
    return scores if kept.is_empty() else kept


def blank_duplicates(scores: pl.DataFrame, duplicates: pl.DataFrame | None) -> pl.DataFrame:
    """The scores with every duplicate in its place, scored or not, and no value there: for pictures that show gaps.

    Args:
        scores: Scores of one model.
        duplicates: As for `leave_out_duplicates`.

    Returns:
        The rows of the others, and for each duplicate all their layers, components and metrics with a null value. Of
        duplicates that were not scored, only those of a seed, stage and ingredient that is in the scores, and at a
        place in it that no other checkpoint has.
    """
    kept = leave_out_duplicates(scores, duplicates)
    if duplicates is None or duplicates.is_empty():
        return scores
    shared = kept.select(name for name in ("model", "calibration") if name in kept.columns).head(1)
    keys = kept.select("layer", "component", "metric").unique(maintain_order=True)
    place = [name for name in CHECKPOINT_COLUMNS if name in duplicates.columns]
    blank = _placed(kept, scores, duplicates).select(place).join(keys, how="cross").join(shared, how="cross")
    blank = blank.select(name for name in blank.columns if name in kept.columns)
    return pl.concat([kept, blank], how="diagonal_relaxed")


def mark_repeats(summary: pl.DataFrame, duplicates: pl.DataFrame) -> pl.DataFrame:
    """A frame of one row a checkpoint, with `duplicate_of` and `partial` of `read_duplicates`; null of the others."""
    known = duplicates.select("revision", "commit", "duplicate_of", "partial")
    return summary.join(known, on=["revision", "commit"], how="left", nulls_equal=True, maintain_order="left")


def checkpoint_order(scores: pl.DataFrame) -> pl.DataFrame:
    """The checkpoints of a frame in training order.

    Seeds are kept apart, then stage (unnumbered = the first, named parts behind the numbered), ingredient, step and
    tokens decide. Checkpoints without step and tokens come last, in the order of the frame.

    Returns:
        One row a checkpoint: `order` (0, 1, …), `revision`, `commit`, `stage`, `ingredient`, `seed`, `step`,
        `tokens`.
    """
    return _order(_checked(scores))


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
    rows = _checked(scores)
    stored = sorted(rows["metric"].unique().to_list())
    known = [*stored, IMPORTANCE.name] if "cosine_similarity" in stored else stored
    if metric not in known:
        near = nearest(metric, known)
        raise InputError(
            f"There is no metric {metric!r} in these scores. There are: {', '.join(known)}."
            + (f" Did you mean {near[0]}?" if near else "")
        )
    values = _values(rows, metric)
    components = values["component"].unique().to_list()
    if component is None:
        return values
    if component not in components:
        raise InputError(
            f"There is no {metric} of component {component!r} in these scores. "
            f"Components with it: {', '.join(sorted(components))}."
        )
    return values.filter(pl.col("component") == component)


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
    return _axis(_order(_checked(scores)))


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


def training_summary(scores: pl.DataFrame) -> pl.DataFrame:
    """One row a checkpoint: mean importance of each component over the layers, and the loss.

    Returns:
        `revision`, `commit`, `stage`, `ingredient`, `seed`, `step`, `tokens`; `attn`, `mlp`, `block`: mean
        importance over all layers; `attn_inner`, `mlp_inner`, `block_inner`: without the first and the last
        layer, which stand far above the rest; `loss` in nats per token. Null where a layer that other
        checkpoints have is missing (a mean over other layers is another quantity), or nothing is stored.
    """
    rows = _checked(scores)
    summary = _order(rows)
    values = _values(rows, IMPORTANCE.name)
    last = values["layer"].max()
    inner = values.filter((pl.col("layer") > 0) & (pl.col("layer") < last))
    for suffix, layers in (("", values), ("_inner", inner)):
        for component in COMPONENTS:
            there = layers.filter((pl.col("component") == component) & pl.col("value").is_not_null())
            n_layers = there["layer"].n_unique()
            means = there.group_by("order").agg(
                pl.when(pl.len() == n_layers).then(pl.col("value").mean()).alias(component + suffix)
            )
            summary = summary.join(means, on="order", how="left")
    loss = _values(rows, LOSS.name).select("order", pl.col("value").alias("loss"))
    return summary.join(loss, on="order", how="left").sort("order").drop("order")


def _complete(scores: pl.DataFrame) -> pl.DataFrame:
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


def _checked(scores: pl.DataFrame) -> pl.DataFrame:
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


def _order(rows: pl.DataFrame) -> pl.DataFrame:
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


def _placed(kept: pl.DataFrame, scores: pl.DataFrame, duplicates: pl.DataFrame) -> pl.DataFrame:
    """Those duplicates that were scored, or stand at a place of their own in a series that is shown."""
    scored, names = set(scores["revision"]), set(kept["revision"])
    columns = [name for name in CHECKPOINT_COLUMNS if name in kept.columns]
    taken = {_place(row) for row in kept.select(columns).unique().iter_rows(named=True)}
    series = {place[:-1] for place in taken}
    found = []
    for row in duplicates.iter_rows(named=True):
        place = _place(row)
        is_placed = row.get("step") is not None or row.get("tokens") is not None
        belongs = row["revision"] in scored or (is_placed and place[:-1] in series)
        if belongs and place not in taken and row["revision"] not in names:
            taken.add(place)
            found.append(row)
    return pl.DataFrame(found, schema=duplicates.schema)


def _place(row: dict[str, Any]) -> tuple[object, ...]:
    """Series of a checkpoint, and its step in it (else its tokens, else its name)."""
    stage = row.get("stage")
    within = next((value for name in ("step", "tokens") if (value := row.get(name)) is not None), row["revision"])
    part = part_key(row["revision"] or "")
    return row.get("seed"), 1 if stage is None else stage, row.get("ingredient"), part, within


def _values(rows: pl.DataFrame, metric: str) -> pl.DataFrame:
    """As `metric_values`, all components; no rows where the metric is not stored."""
    stored = "cosine_similarity" if metric == IMPORTANCE.name else metric
    values = rows.filter(pl.col("metric") == stored).with_columns(
        pl.col("value").cast(pl.Float64).fill_nan(None), pl.col("stderr").cast(pl.Float64).fill_nan(None)
    )
    if metric == IMPORTANCE.name:
        values = values.with_columns(value=1.0 - pl.col("value"), metric=pl.lit(metric))
    order = _order(rows).select("order", "revision", "commit")
    known = {name: place for place, name in enumerate((*COMPONENTS, "model"))}
    return (
        values.join(order, on=["revision", "commit"], nulls_equal=True)
        .select("model", "order", *CHECKPOINT_COLUMNS, *VALUE_COLUMNS)
        .sort("order", pl.col("component").replace_strict(known, default=len(known)), "layer")
    )


def _axis(order: pl.DataFrame) -> Axis:
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
