"""The charts over training: lines with what is left open, placed along training from 0 to 1 as in the figures."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
from matplotlib.ticker import MaxNLocator

from redundancy_trace.analysis import metric_values
from redundancy_trace.figures.quality import drop_label
from redundancy_trace.figures.style import Array
from redundancy_trace.figures.training import TrainingScale, fitting_ticks, tick_label, training_scale
from redundancy_trace.metrics import COMPONENT_LABELS, LOSS
from redundancy_trace.report.gathering import Sources

# Told apart by everybody (Okabe and Ito's colours), and by their dashes in print.
LINES = {
    "attn": ("#0072b2", ""),
    "mlp": ("#d55e00", "7 3"),
    "block": ("#009e73", "2 3"),
    "joint": ("#cc79a7", ""),
    "": ("#333333", ""),
}
MOST_TICKS = 5
# Characters of the tick labels that stand side by side on the narrowest screen.
_TICK_ROOM = 36.0


def curves(sources: Sources) -> Iterator[dict[str, Any]]:
    """One chart a statistic; none of a single checkpoint."""
    stats = sources.stats
    if stats.series.checkpoints.height < 2:
        return
    scale = training_scale(stats.series.axis)
    chances = {stats.chance(name) for name in stats.series.grids}
    charts = (
        ("importance_inner", "Mean importance, without the first and the last layer", None),
        ("spearman", "Order of the layers against the last checkpoint's: Spearman", 0.0),
        (
            "overlap",
            "Most redundant quarter of the layers, shared with the last checkpoint's: Jaccard",
            chances.pop() if len(chances) == 1 else None,
        ),
        ("attn_below_mlp", "Share of the layers whose attention is less important than their MLP", None),
        ("attn_first", "Attentions that would be dropped before the first MLP", None),
        ("last_layer", "Importance of the last layer ÷ median of the inner layers", None),
    )
    columns = sources.series_columns
    for statistic, title, chance in charts:
        rows = stats.curves.filter(statistic=statistic)
        if rows.is_empty():
            continue
        lines = [
            _line(line_style(str(name)), part) for (name,), part in rows.partition_by("component", as_dict=True).items()
        ]
        yield _chart(title, lines, scale, columns, chance)
    if LOSS.name in sources.scores["metric"]:
        rows = metric_values(sources.shown, LOSS.name).select("order", "value", "stderr")
        rows = pl.DataFrame({"order": columns}, schema={"order": rows.schema["order"]}).join(
            rows, on="order", how="left", maintain_order="left"
        )
        error = pl.col("stderr")
        rows = rows.with_columns(low=pl.col("value") - error, high=pl.col("value") + error)
        yield _chart(
            "Loss (nats per token; band: one standard error)", [_line(line_style(""), rows)], scale, columns, None
        )


def costs(sources: Sources) -> Iterator[dict[str, Any]]:
    """One chart for each drop that was measured along training: what it adds to the loss."""
    if sources.costs is None or sources.stats.series.checkpoints.height < 2:
        return
    scale = training_scale(sources.stats.series.axis)
    for (plan,), rows in sources.costs.partition_by("plan", as_dict=True, maintain_order=True).items():
        style = line_style(rows["component"][0])
        parts = (
            (style | {"label": "its own plan", "dashes": ""}, "own", "importance"),
            (style | {"label": "that plan on the last", "dashes": "7 3"}, "last", "importance"),
            (line_style("") | {"label": "random plans", "dashes": "2 3"}, "own", "random"),
        )
        lines = [
            _line(look, _over_series(sources, rows.filter(applied=applied, order=order)))
            for look, applied, order in parts
            if not rows.filter(applied=applied, order=order).is_empty()
        ]
        title = f"Loss added with {drop_label(plan)} dropped, on {rows['dataset'][0]} (band: random plans)"
        yield _chart(title, lines, scale, sources.series_columns, None)


def _over_series(sources: Sources, rows: pl.DataFrame) -> pl.DataFrame:
    """Mean, least and most of what is added, one row a checkpoint of the series; null where nothing was measured."""
    keys = ["revision", "commit"]
    added = pl.col("added")
    several = pl.len() > 1
    by_checkpoint = rows.group_by(keys).agg(
        value=added.mean(), low=pl.when(several).then(added.min()), high=pl.when(several).then(added.max())
    )
    series = sources.stats.series.checkpoints.select(keys)
    return series.join(by_checkpoint, on=keys, how="left", nulls_equal=True, maintain_order="left")


def line_style(component: str) -> dict[str, str]:
    """Label, colour and dashes of a component's line; of anything else black."""
    colour, dashes = LINES.get(component, LINES[""])
    return {"label": COMPONENT_LABELS.get(component, ""), "colour": colour, "dashes": dashes}


def _line(style: dict[str, str], rows: pl.DataFrame) -> dict[str, Any]:
    return {**style, **{name: rows[name].to_list() for name in ("value", "low", "high")}}


def _chart(
    title: str, lines: list[dict[str, Any]], scale: TrainingScale, columns: list[int], chance: float | None
) -> dict[str, Any]:
    numbers = [x for line in lines for name in ("value", "low", "high") for x in line[name] if x is not None]
    low, high, ticks = linear_axis(np.array([*numbers, *([] if chance is None else [chance])]))
    first, last = scale.spread(np.array([scale.starts[0], scale.ends[-1]]))

    def place(value: float) -> float:
        return float((scale.spread(np.array([value]))[0] - first) / (last - first))

    at = fitting_ticks(scale, MOST_TICKS, lambda tick: float(len(tick_label(scale, tick)) + 2), _TICK_ROOM)
    return {
        "title": title,
        "axis": scale.axis.label + (", log scale" if scale.axis.log else ""),
        "x": [place(value) for value in scale.values],
        "columns": columns,
        "apart": scale.n_placed,
        "ticks": [{"at": place(tick), "label": tick_label(scale, tick).replace(r"\$", "$")} for tick in at],
        "low": low,
        "high": high,
        "yTicks": labelled(ticks),
        "lines": lines,
        "chance": chance,
    }


def linear_axis(values: Array) -> tuple[float, float, list[float]]:
    """Lower and upper end of an axis that holds the values with some room, and its ticks."""
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - pad, high + pad
    ticks = MaxNLocator(nbins=MOST_TICKS, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return low, high, [float(tick) for tick in ticks if low <= tick <= high]


def labelled(ticks: list[float]) -> list[dict[str, Any]]:
    """Ticks with what stands beside them."""
    return [{"at": float(tick), "label": f"{tick + 0.0:.4g}"} for tick in ticks]
