"""What dropping costs: quality against number dropped, joint drops, speed and memory, and the loss along training."""

from typing import Any, Literal

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from redundancy_trace.analysis import along_values, training_axis
from redundancy_trace.errors import InputError
from redundancy_trace.figures.style import (
    COLUMN_WIDTH,
    COMPONENT_COLOURS,
    WIDTHS,
    Array,
    PaperFigure,
    Width,
    axes_or_new,
    head,
    outer_labels,
    panel_row,
    paper_style,
    plain,
    title,
)
from redundancy_trace.figures.training import TrainingScale, dress_training, training_scale
from redundancy_trace.metrics import COMPONENT_LABELS, EVALUATION_METRICS, LOSS

KINDS = ("attn", "mlp", "block", "joint")
# Nats per token; what a drop adds is shown on a log axis beyond.
LINEAR_UP_TO = 0.01
_LABELS = {**COMPONENT_LABELS, "joint": "Joint"}
_COLOURS = {**COMPONENT_COLOURS, "joint": "#CC79A7"}
_MARKERS = {"attn": "s", "mlp": "*"}
_ORDER_MARKERS = {"deepest": "v", "random": "D"}
_GREY = "0.55"
_ADDED = "added loss (nats per token)"
_FINE = (0, (1, 1.5))
# What a speed or a cache's size depends on, beside the plan.
_LOAD = ("batch_size", "prompt_tokens", "new_tokens", "device", "dtype")
Curve = tuple[Array, Array]


def plot_quality(
    evaluations: pl.DataFrame,
    *,
    component: str = "attn",
    metric: str = "loss",
    dataset: str | None = None,
    ax: Axes | None = None,
    legend: bool = True,
) -> Axes:
    """Quality against the number of components dropped (arXiv 2406.15786, Fig. 5).

    Solid: by importance. Grey: the mean of random orders, with a band from their worst to their best. Dotted: deepest
    first. Horizontal: the whole model.

    Args:
        evaluations: Rows of one checkpoint, as `read_evaluations` gives them.
        component: `attn`, `mlp`, `block` or `joint`.
        metric: What was measured: `loss`, or a metric of a task such as `acc_norm`.
        dataset: On what; None = where most plans were measured.
        ax: Where to draw; None = a new figure one column wide.
        legend: Whether to explain the lines.

    Returns:
        The axes.

    Raises:
        InputError: There are no such rows, or they are of several checkpoints.
    """
    values = curve_values(evaluations, metric, dataset)
    rows = values.filter(pl.col("component") == component)
    if rows.is_empty():
        known = values["component"].drop_nulls().unique(maintain_order=True).to_list()
        raise InputError(f"No {metric} was measured with {component!r} dropped; dropped were {', '.join(known)}.")
    with axes_or_new(ax, height=2.8) as on:
        whole = _whole(values)
        on.axhline(whole, color=_GREY, linewidth=0.6, linestyle=_FINE, zorder=0)
        _draw_orders(on, rows, whole, _COLOURS[component])
        _dress_dropped(on, rows, metric)
        if legend:
            _legend(on, _order_handles(_COLOURS[component], rows["order"].to_list()), ax)
        label = _LABELS[component]
        on.set_title(label if ax is not None else _titled(values, f"{label} dropped"))
        return on


def plot_qualities(
    evaluations: pl.DataFrame, *, metric: str = "loss", dataset: str | None = None, width: Width = "page"
) -> Figure:
    """Quality against number dropped, a panel each kind of component, on one scale.

    Args:
        evaluations: Rows of one checkpoint, as for `plot_quality`.
        metric: What was measured.
        dataset: On what.
        width: `page`: side by side; `column`: one above the other.

    Raises:
        InputError: There are no such rows, or they are of several checkpoints.
    """
    values = curve_values(evaluations, metric, dataset)
    kinds = [kind for kind in KINDS if kind in values["component"].to_list()]
    with paper_style():
        figure, panels = panel_row(len(kinds), width, 2.4 if width == "page" else 1.7, sharey=True)
        for ax, kind in zip(panels, kinds, strict=True):
            plot_quality(evaluations, component=kind, metric=metric, dataset=dataset, ax=ax, legend=False)
        outer_labels(panels, width)
        _legend_below(figure, _order_handles("0.2", values["order"].to_list()))
        head(figure, _titled(values, "quality against number dropped"))
        return figure


def plot_joint(
    evaluations: pl.DataFrame, *, metric: str = "loss", dataset: str | None = None, ax: Axes | None = None
) -> Axes:
    """Dropping attention and MLP sorted together, step by step, against dropping one kind (arXiv 2406.15786, Fig. 8).

    On the joint curve a star says that this step dropped an MLP, a square that it dropped an attention.

    Args:
        evaluations: Rows of one checkpoint, as `read_evaluations` gives them.
        metric: What was measured.
        dataset: On what; None = where most plans were measured.
        ax: Where to draw; None = a new figure one column wide.

    Returns:
        The axes.

    Raises:
        InputError: There are no such rows with a joint order, or they are of several checkpoints.
    """
    rows = joint_values(evaluations, metric, dataset)
    joint = rows.filter(pl.col("component") == "joint").sort("n_dropped")
    with axes_or_new(ax, height=2.8) as on:
        whole = _whole(rows)
        handles = []
        for kind in KINDS[:3]:
            one = rows.filter(pl.col("component") == kind)
            if not one.is_empty():
                x, y = _curve(one, whole)
                on.plot(x, y, color=_COLOURS[kind], linewidth=0.8, alpha=0.8)
                handles.append(Line2D([], [], color=_COLOURS[kind], linewidth=0.8, label=_LABELS[kind]))
        colour = _COLOURS["joint"]
        on.plot(*_curve(joint, whole), color=colour, linewidth=1, zorder=1.8)  # behind what it may coincide with
        handles.insert(0, Line2D([], [], color=colour, linewidth=1, label=_LABELS["joint"]))
        for kind, marker in _MARKERS.items():
            steps = joint.filter(pl.col("last_component") == kind)
            size = 6.5 if marker == "*" else 3.2
            on.plot(steps["n_dropped"], steps["value"], marker, color=colour, markersize=size, markeredgewidth=0)
            said = f"step drops an {_LABELS[kind] if kind == 'mlp' else 'attention'}"
            handles.append(
                Line2D(
                    [], [], color=colour, marker=marker, markersize=size, markeredgewidth=0, linestyle="", label=said
                )
            )
        on.axhline(whole, color=_GREY, linewidth=0.6, linestyle=_FINE, zorder=0)
        _dress_dropped(on, rows, metric)
        _legend(on, handles, ax)
        on.set_title("Joint" if ax is not None else _titled(rows, "joint drop"))
        return on


def plot_tradeoff(
    evaluations: pl.DataFrame,
    *,
    against: Literal["speed", "memory"] = "speed",
    metric: str = "loss",
    dataset: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """What a drop gains against what it costs, one point a plan: decoding speed or memory, and quality.

    Args:
        evaluations: Rows of one checkpoint, each plan measured for quality and speed (`trace eval --plan`).
        against: `speed`: how many times as fast a model decodes as the whole one; `memory`: weights and KV cache, as a
            share of the whole model's.
        metric: Quality.
        dataset: On what; None = where most plans were measured.
        ax: Where to draw; None = a new figure one column wide.

    Returns:
        The axes. Lines join plans of one kind that drop more and more.

    Raises:
        InputError: There are no such rows, or they are of several checkpoints.
    """
    rows = tradeoff_values(evaluations, metric, dataset)
    with axes_or_new(ax, height=2.8) as on:
        column = "speedup" if against == "speed" else "memory_share"
        whole = rows.filter(pl.col("n_dropped") == 0)
        on.plot(whole[column], whole["quality"], "o", color="0.2", markersize=4)
        handles = [Line2D([], [], color="0.2", marker="o", markersize=4, linestyle="", label="whole model")]
        for kind in KINDS:
            one = rows.filter((pl.col("component") == kind) & (pl.col("order") == "importance")).sort("n_dropped")
            if one.is_empty():
                continue
            x = np.concatenate((whole[column].to_numpy()[:1], one[column].to_numpy()))
            y = np.concatenate((whole["quality"].to_numpy()[:1], one["quality"].to_numpy()))
            on.plot(x, y, color=_COLOURS[kind], linewidth=0.8, marker="o", markersize=3, markevery=range(1, x.size))
            for place, height, count in zip(x[1:], y[1:], one["n_dropped"], strict=True):
                on.annotate(
                    str(count),
                    (place, height),
                    xytext=(3, 2),
                    textcoords="offset points",
                    fontsize=6,
                    color=_COLOURS[kind],
                )
            handles.append(Line2D([], [], color=_COLOURS[kind], marker="o", markersize=3, label=_LABELS[kind]))
        on.set_xlabel(
            "decoding speed, whole model = 1" if against == "speed" else "weights + KV cache, whole model = 1"
        )
        on.set_ylabel(_metric_label(metric))
        on.margins(0.1)
        _legend(on, handles, ax)
        name = "Decoding speed" if against == "speed" else "Memory"
        on.set_title(name if ax is not None else _titled(rows, f"{name.lower()} and quality"))
        return on


def plot_drop_along(evaluations: pl.DataFrame, *, drop: str, ax: Axes | None = None, legend: bool = True) -> Axes:
    """What one kind of drop adds to the loss, at each checkpoint of a training.

    Solid: each checkpoint under its own plan by importance. Dashed: the last checkpoint under the plan of each. Band:
    each checkpoint under random plans, with their mean. Dotted: deepest first. Of one checkpoint they are points.

    Args:
        evaluations: Rows of a run, as `trace eval --along` stores them.
        drop: What was dropped, such as `attn=25%`.
        ax: Where to draw; None = a new figure one column wide.
        legend: Whether to explain the lines.

    Returns:
        The axes; y is loss with the drop less loss of the whole model, in nats per token, logarithmic beyond ±0.01.

    Raises:
        InputError: There are no such rows.
    """
    rows = along_values(evaluations)
    one = rows.filter(pl.col("plan") == drop)
    if one.is_empty():
        known = rows["plan"].unique(maintain_order=True).to_list()
        raise InputError(f"{drop!r} was not dropped along this run; dropped were {', '.join(known)}.")
    scale = _scale(rows)
    is_one = _is_of_one(rows)
    with axes_or_new(ax, height=2.8) as on:
        kind = one["component"][0]
        colour = _COLOURS.get(kind, "0.2")
        on.axhline(0, color=_GREY, linewidth=0.6, linestyle=_FINE, zorder=0)
        own = one.filter(pl.col("applied") == "own")
        random = own.filter(pl.col("order") == "random").group_by("position_order", maintain_order=True)
        spread = random.agg(low=pl.col("added").min(), mean=pl.col("added").mean(), high=pl.col("added").max())
        spread = spread.sort("position_order")
        if not spread.is_empty():
            x = scale.values[spread["position_order"].to_numpy()]
            low, mean, high = (spread[name].to_numpy() for name in ("low", "mean", "high"))
            if is_one:
                on.vlines(x, low, high, color=_GREY, alpha=0.5, linewidth=3)
            else:
                on.fill_between(x, low, high, color=_GREY, alpha=0.25, linewidth=0)
            on.plot(x, mean, color=_GREY, linewidth=0.8, **_points("random", is_one=is_one))
        deepest = own.filter(pl.col("order") == "deepest")
        points = _points("deepest", is_one=is_one)
        _along_line(on, scale, deepest, color=colour, linestyle=":", linewidth=0.9, **points)
        last = one.filter(pl.col("applied") == "last")
        if not is_one:
            _along_line(on, scale, last, color=colour, linestyle=(0, (4, 2)), linewidth=0.9)
        by_importance = own.filter(pl.col("order") == "importance")
        _along_line(on, scale, by_importance, color=colour, linewidth=1.1, marker="o", markersize=2.5)
        on.set_yscale("symlog", linthresh=LINEAR_UP_TO, linscale=0.6)
        on.yaxis.set_major_locator(FixedLocator(_loss_ticks(rows["added"].to_numpy())))
        on.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
        on.yaxis.set_minor_locator(NullLocator())
        dress_training(on, scale, "x")
        on.set_ylabel(_ADDED)
        if legend:
            _legend(on, _along_handles(colour, one, is_one=is_one), ax)
        text = drop_label(drop)
        on.set_title(title(evaluations, f"{text} dropped") if ax is None else text)
        return on


def plot_drops_along(evaluations: pl.DataFrame, *, width: Width = "page") -> Figure:
    """Every kind of drop along a training, a panel each, on one scale.

    Args:
        evaluations: Rows of a run, as `trace eval --along` stores them.
        width: `page`: three side by side; `column`: one above the other.

    Returns:
        The figure.

    Raises:
        InputError: There are no such rows.
    """
    rows = along_values(evaluations)
    drops = rows["plan"].unique(maintain_order=True).to_list()
    with paper_style():
        columns = min(3 if width == "page" else 1, len(drops))
        lines = -(-len(drops) // columns)
        figure = PaperFigure(WIDTHS[width], 0.5 + (1.9 if width == "page" else 1.5) * lines)
        panels = figure.subplots(lines, columns, sharey=True, sharex=True, squeeze=False).ravel()
        for ax, drop in zip(panels, drops, strict=False):
            plot_drop_along(evaluations, drop=drop, ax=ax, legend=False)
        for place, ax in enumerate(panels):
            if place % columns or width == "column":
                ax.set_ylabel("")
            if place + columns < len(drops):
                ax.set_xlabel("")
            elif place < len(drops):
                ax.tick_params(labelbottom=True)
        if width == "column":
            figure.supylabel(_ADDED, fontsize="medium")  # one label is longer than a panel is high
        for ax in panels[len(drops) :]:
            ax.set_axis_off()
        handles = _along_handles("0.2", rows, is_one=_is_of_one(rows))
        if len(drops) < panels.size:
            panels[-1].legend(handles=handles, fontsize=7, frameon=False, loc="center")
        else:
            _legend_below(figure, handles)
        head(figure, title(evaluations, f"what dropping adds to the loss on {plain(rows['dataset'][0])}"))
        return figure


def plot_tradeoffs(evaluations: pl.DataFrame, *, width: Width = "page") -> Figure:
    """Speed and memory against the loss.

    Args:
        evaluations: Rows of one checkpoint, as for `plot_tradeoff`.
        width: `page`: side by side; `column`: one above the other.

    Raises:
        InputError: There are no such rows.
    """
    with paper_style():
        figure, (first, second) = panel_row(2, width, 2.6 if width == "page" else 2.2, sharey=True)
        plot_tradeoff(evaluations, against="speed", ax=first)
        plot_tradeoff(evaluations, against="memory", ax=second)
        if width == "page":
            second.set_ylabel("")
        if (legend := second.get_legend()) is not None:
            legend.remove()
        rows = tradeoff_values(evaluations, LOSS.name, None)
        head(figure, _titled(rows, "what dropping gains and costs"))
        return figure


def curve_values(evaluations: pl.DataFrame, metric: str = "loss", dataset: str | None = None) -> pl.DataFrame:
    """The rows that `plot_quality` and `plot_joint` show: one metric of one checkpoint on one text or task.

    Raises:
        InputError: There are no such rows, or they are of several checkpoints.
    """
    curves = evaluations.filter(pl.col("purpose") == "curve")
    of_plans = evaluations.filter(pl.col("purpose") == "model")
    rows = curves if metric in curves["metric"].to_list() else of_plans
    rows = _on_one(rows, metric, dataset).filter(pl.col("component").is_null() | pl.col("component").is_in(KINDS))
    if rows["n_dropped"].max() in (0, None):
        raise InputError(
            f"No {metric} was measured with parts dropped. Measure it: trace eval … --curve attn,mlp,block,joint."
        )
    return rows.select(
        "model", "revision", "commit", "step", "tokens", "dataset", "component", "order", "order_seed", "n_dropped",
        "last_component", "last_layer", "metric", "value", "stderr",
    ).unique(subset=["component", "order", "order_seed", "n_dropped"], maintain_order=True)  # fmt: skip


def joint_values(evaluations: pl.DataFrame, metric: str = "loss", dataset: str | None = None) -> pl.DataFrame:
    """The rows that `plot_joint` shows: those of `curve_values` by importance, joint drops among them.

    Raises:
        InputError: There are no such rows, or they are of several checkpoints.
    """
    rows = curve_values(evaluations, metric, dataset)
    rows = rows.filter((pl.col("order") == "importance") | (pl.col("n_dropped") == 0))
    if "joint" not in rows["component"].to_list():
        raise InputError(
            f"No {metric} was measured under joint drops. Measure it: trace eval … --curve joint,attn,mlp."
        )
    return rows


def tradeoff_values(evaluations: pl.DataFrame, metric: str = "loss", dataset: str | None = None) -> pl.DataFrame:
    """One row a plan: `quality`, `speedup`, `bytes` (weights and KV cache) and `memory_share`; the whole model first.

    Of several batch sizes and lengths, those at which most plans were measured.

    Raises:
        InputError: There are no such rows, or they are of several checkpoints.
    """
    rows = evaluations.filter(pl.col("purpose") == "model")
    quality = _on_one(rows, metric, dataset)
    keys = ["plan_sha256"]
    table = quality.select(
        "model", "revision", "commit", "step", "tokens", "dataset", "plan", "component", "order", "n_dropped",
        "plan_sha256", quality="value", quality_stderr="stderr",
    ).unique(subset=keys, maintain_order=True)  # fmt: skip
    rows = _most_measured(rows.filter(pl.col("prompt_tokens").is_not_null()), list(_LOAD))
    for metric_name, column in (
        ("decode_speedup", "speedup"),
        ("decode_speedup_bound", "speedup_bound"),
        ("weight_bytes", "weight_bytes"),
        ("kv_cache_bytes", "kv_cache_bytes"),
    ):
        one = rows.filter(pl.col("metric") == metric_name).unique(subset=keys, keep="last", maintain_order=True)
        table = table.join(
            one.select("plan_sha256", pl.col("value").alias(column)), on=keys, how="left", nulls_equal=True,
            maintain_order="left",
        )  # fmt: skip
    table = table.with_columns(
        speedup=pl.when(pl.col("n_dropped") == 0).then(1.0).otherwise("speedup"),
        bytes=pl.col("weight_bytes") + pl.col("kv_cache_bytes"),
    )
    table = table.filter(pl.col("bytes").is_not_null() & pl.col("speedup").is_not_null()).sort("n_dropped")
    if table.filter(pl.col("n_dropped") > 0).is_empty():
        raise InputError("No plan was measured for both loss and speed. Measure some: trace eval … --plan PLAN.json.")
    whole = table.filter(pl.col("n_dropped") == 0)["bytes"]
    return table.with_columns(memory_share=pl.col("bytes") / whole[0])


def drop_label(drop: str) -> str:
    """`attn=25%` as a title.

    Example:
        >>> drop_label("attn=25%")
        'Attention 25%'
    """
    kind, _, amount = drop.partition("=")
    return f"{_LABELS.get(kind, kind)} {amount}".strip()


def _on_one(rows: pl.DataFrame, metric: str, dataset: str | None) -> pl.DataFrame:
    """The rows of one metric on one text or task, of one checkpoint."""
    found = rows.filter(pl.col("metric") == metric)
    if found.is_empty():
        known = ", ".join(rows["metric"].unique(maintain_order=True).to_list())
        hint = (
            f"there is {known}" if known else "trace eval does, with --curve attn,mlp,block,joint or --plan PLAN.json"
        )
        raise InputError(f"No {metric} was measured for this; {hint}.")
    one = _most_measured(found, ["dataset"]) if dataset is None else found.filter(pl.col("dataset") == dataset)
    if one.is_empty():
        known = ", ".join(found["dataset"].unique(maintain_order=True).to_list())
        raise InputError(f"No {metric} was measured on {dataset!r}; there is {known}.")
    places = one.select("revision", "commit").unique(maintain_order=True)
    if len(places) > 1:
        raise InputError(
            f"These rows are of {len(places)} checkpoints, {places['revision'][0]} to {places['revision'][-1]}. Take "
            "one: rows.filter(polars.col('revision') == …)."
        )
    return one


def _most_measured(rows: pl.DataFrame, conditions: list[str]) -> pl.DataFrame:
    """The rows under those conditions at which most plans were measured; of equals, the first."""
    counted = rows.group_by(conditions, maintain_order=True).agg(n=pl.col("plan_sha256").n_unique())
    most = counted.sort("n", descending=True, maintain_order=True).head(1)
    return rows.join(most, on=conditions, how="semi", nulls_equal=True, maintain_order="left")


def _whole(rows: pl.DataFrame) -> float:
    """The value of the whole model; of what compares with it, that of a drop which changes nothing."""
    held = rows.filter(pl.col("n_dropped") == 0)["value"]
    if len(held):
        return float(held[0])
    metric = EVALUATION_METRICS.get(rows["metric"][0])
    return float("nan") if metric is None or metric.redundant is None else metric.redundant


def _draw_orders(ax: Axes, rows: pl.DataFrame, whole: float, colour: str) -> None:
    """By importance, the reach of random orders, deepest first."""
    random = rows.filter(pl.col("order") == "random").group_by("n_dropped")
    spread = random.agg(low=pl.col("value").min(), mean=pl.col("value").mean(), high=pl.col("value").max())
    if not spread.is_empty():
        spread = spread.sort("n_dropped")
        x = np.concatenate(([0], spread["n_dropped"].to_numpy()))
        low, mean, high = (np.concatenate(([whole], spread[name].to_numpy())) for name in ("low", "mean", "high"))
        ax.fill_between(x, low, high, color=_GREY, alpha=0.25, linewidth=0)
        ax.plot(x, mean, color=_GREY, linewidth=0.8)
    deepest, best = (rows.filter(pl.col("order") == order) for order in ("deepest", "importance"))
    if not deepest.is_empty():
        ax.plot(*_curve(deepest, whole), color=colour, linestyle=":", linewidth=0.9)
    if not best.is_empty():
        x, y = _curve(best, whole)
        ax.plot(x, y, color=colour, linewidth=1.1, marker="o" if x.size <= 33 else "", markersize=2.2)


def _curve(rows: pl.DataFrame, whole: float) -> Curve:
    rows = rows.sort("n_dropped")
    return np.concatenate(([0], rows["n_dropped"].to_numpy())), np.concatenate(([whole], rows["value"].to_numpy()))


def _dress_dropped(ax: Axes, rows: pl.DataFrame, metric: str) -> None:
    most = float(rows["n_dropped"].to_numpy().max())
    ax.set_xlim(-0.02 * most, 1.03 * most)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.set_xlabel("number dropped")
    ax.set_ylabel(_metric_label(metric))


def _metric_label(metric: str) -> str:
    return EVALUATION_METRICS[metric].label if metric in EVALUATION_METRICS else metric


def _order_handles(colour: str, orders: list[str | None]) -> list[Line2D]:
    handles = [Line2D([], [], color=colour, linewidth=1.1, marker="o", markersize=2.5, label="by importance")]
    return handles + _baseline_handles(colour, orders)


def _along_handles(colour: str, rows: pl.DataFrame, *, is_one: bool) -> list[Line2D]:
    handles = [Line2D([], [], color=colour, linewidth=1.1, marker="o", markersize=2.5, label="own plan, by importance")]
    if "last" in rows["applied"].to_list() and not is_one:  # of one checkpoint it is its own plan
        label = "this plan on the last"
        handles.append(Line2D([], [], color=colour, linestyle=(0, (4, 2)), linewidth=0.9, label=label))
    return handles + _baseline_handles(colour, rows["order"].to_list(), is_one=is_one)


def _baseline_handles(colour: str, orders: list[str | None], *, is_one: bool = False) -> list[Line2D]:
    handles = []
    if "deepest" in orders:
        style = _points("deepest", is_one=is_one)
        handles.append(Line2D([], [], color=colour, linestyle=":", linewidth=0.9, label="deepest first", **style))
    if "random" in orders:
        style = _points("random", is_one=is_one)
        handles.append(Line2D([], [], color=_GREY, linewidth=0.8, label="random (band: all seeds)", **style))
    return handles


def _is_of_one(rows: pl.DataFrame) -> bool:
    """Whether what was measured along training is of one checkpoint: a line of one point is not seen."""
    return rows["position_order"].n_unique() == 1


def _points(order: str, *, is_one: bool) -> dict[str, Any]:
    return {"marker": _ORDER_MARKERS[order], "markersize": 3.5} if is_one else {}


def _along_line(ax: Axes, scale: TrainingScale, rows: pl.DataFrame, **style: object) -> None:
    rows = rows.sort("position_order")
    ax.plot(scale.values[rows["position_order"].to_numpy()], rows["added"].to_numpy(), **style)  # type: ignore[arg-type]


def _loss_ticks(added: Array) -> list[float]:
    """0 and, on either side, the decades; with what lies between them where they are few."""
    far = float(np.abs(added).max(initial=LINEAR_UP_TO))
    between = (1, 2, 5) if far < 30 * LINEAR_UP_TO else (1, 3) if far < 300 * LINEAR_UP_TO else (1,)
    decades = range(int(np.floor(np.log10(LINEAR_UP_TO))), int(np.ceil(np.log10(far))) + 1)
    sizes = [float(f"{m}e{k}") for k in decades for m in between]
    return [*(-size for size in sizes[::-1]), 0.0, *sizes]


def _scale(rows: pl.DataFrame) -> TrainingScale:
    """The training axis of the checkpoints whose plans they are."""
    places = rows.select(
        "revision", "commit", "stage", "ingredient", "seed", "step", "tokens", "position_order",
        layer=pl.lit(None, pl.Int64), component=pl.lit("model"), metric=pl.lit(LOSS.name), value=pl.lit(0.0),
    )  # fmt: skip
    return training_scale(training_axis(places.unique(subset=["revision"], maintain_order=True).sort("position_order")))


def _legend(ax: Axes, handles: list[Line2D], given: Axes | None) -> None:
    """Explain the lines: below a figure of our own, else where axes of the caller's have room."""
    figure = ax.get_figure(root=True)
    if given is None and figure is not None:
        _legend_below(figure, handles)
    else:
        ax.legend(handles=handles, fontsize=6.5, frameon=False, loc="best", handlelength=2.2)


def _legend_below(figure: Figure, handles: list[Line2D]) -> None:
    """All on one line below a page; in a column as many side by side as fit."""
    columns = len(handles) if figure.get_figwidth() > COLUMN_WIDTH else 2
    figure.legend(handles=handles, fontsize=6.5, frameon=False, loc="outside lower center", ncols=columns,
                  handlelength=2.2, columnspacing=1.2)  # fmt: skip


def _titled(rows: pl.DataFrame, text: str) -> str:
    first = rows.row(0, named=True)
    at = "" if first["revision"] == first["model"] else f" at {plain(first['revision'])}"
    return title(rows, f"{text}{at}, on {plain(first['dataset'])}")
