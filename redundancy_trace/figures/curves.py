"""Curves: a metric over depth, one line a checkpoint; the loss over training."""

from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from redundancy_trace.analysis import metric_values, training_axis
from redundancy_trace.figures.style import (
    Array,
    Limits,
    Width,
    arranges_colorbars,
    axes_or_new,
    bar_beside,
    component_label,
    head,
    layer_metric,
    layer_ticks,
    outer_labels,
    own_room,
    panel_row,
    paper_style,
    progress_map,
    title,
)
from redundancy_trace.figures.training import (
    TrainingScale,
    dress_training,
    fitting_ticks,
    over_training,
    tick_label,
    training_scale,
)
from redundancy_trace.metrics import COMPONENTS, LOSS, Metric

# Bands of standard errors of more lines than this hide each other.
MOST_BANDS = 12


def plot_depth(
    scores: pl.DataFrame,
    *,
    component: str = "attn",
    metric: str = "cosine_similarity",
    ax: Axes | None = None,
    colorbar: bool = True,
) -> Axes:
    """A metric over depth, one line a checkpoint, light = early and dark = late in training.

    The y axis spreads the values near "redundant" out (1, 0.99, 0.9 … for similarity; it says so); it is linear for
    a metric without such a value. It is the same for all components.

    Args:
        scores: Scores of one model.
        component: `attn`, `mlp` or `block`.
        metric: A stored metric of layers, or `importance`.
        ax: Where to draw; None = a new figure one column wide (`plot_depth(scores).figure`).
        colorbar: Whether to draw the colour bar of training.

    Returns:
        The axes. Bands of one standard error are drawn for up to 12 checkpoints.

    Raises:
        InputError: If the metric or the component is not in the scores.
    """
    kind = layer_metric(metric)
    values = metric_values(scores, metric, component)
    everywhere = metric_values(scores, metric)["value"]
    scale = training_scale(training_axis(scores))
    with axes_or_new(ax, height=2.6) as on:
        colours = _draw_depth(on, values, kind, everywhere, scale)
        on.set_title(title(scores, component_label(component)) if ax is None else component_label(component))
        if colorbar and on.figure is not None and len(scale.axis.values) > 1:
            room: dict[str, Any] = {}
            if not arranges_colorbars(on):
                room["fraction"], room["aspect"] = own_room(on, lines=1)
            _name_progress(on.figure.colorbar(colours, ax=on, **room), scale)
        return on


def plot_depths(scores: pl.DataFrame, *, metric: str = "cosine_similarity", width: Width = "page") -> Figure:
    """Attention, MLP and Block side by side: a metric over depth, one line a checkpoint, on one scale.

    Args:
        scores: Scores of one model.
        metric: A stored metric of layers, or `importance`.
        width: `page`: side by side, as wide as a two-column page; `column`: one above the other.

    Returns:
        The figure.

    Raises:
        InputError: If the metric is not in the scores.
    """
    kind = layer_metric(metric)
    values = metric_values(scores, metric)
    parts = values.partition_by("component", as_dict=True, maintain_order=True)
    components = [name for name in COMPONENTS if (name,) in parts]
    scale = training_scale(training_axis(scores))
    with paper_style():
        figure, panels = panel_row(len(components), width, 2.3 if width == "page" else 1.9, sharex=True, sharey=True)
        for ax, component in zip(panels, components, strict=True):
            _draw_depth(ax, parts[component,], kind, values["value"], scale)
            ax.set_title(component_label(component))
        outer_labels(panels, width)
        what = f"{kind.name.replace('_', ' ')} over depth"
        if len(scale.axis.values) > 1:
            progress_bar(figure, panels, scale)
        else:
            what = over_training(scores, scale, what)
        head(figure, title(scores, what))
        return figure


def plot_loss(scores: pl.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Loss on the calibration tokens over training, with a band of one standard error.

    Args:
        scores: Scores of one model.
        ax: Where to draw; None = a new figure one column wide (`plot_loss(scores).figure`).

    Returns:
        The axes.

    Raises:
        InputError: If there is no loss in the scores.
    """
    values = metric_values(scores, LOSS.name)
    scale = training_scale(training_axis(scores))
    with axes_or_new(ax, height=2.2) as on:
        y = np.full(scale.values.size, np.nan)
        error = np.zeros(scale.values.size)
        y[values["order"].to_numpy()] = values["value"].to_numpy()
        error[values["order"].to_numpy()] = values["stderr"].fill_null(0.0).to_numpy()
        placed = slice(0, scale.n_placed)
        colour = progress_map()(0.75)
        marker = "o" if scale.values.size <= 60 else ""
        x = scale.values
        on.plot(x[placed], y[placed], color=colour, linewidth=1, marker=marker, markersize=2.5)
        on.fill_between(x[placed], (y - error)[placed], (y + error)[placed], color=colour, alpha=0.25, linewidth=0)
        if scale.n_placed < x.size:  # no line leads to what has no step
            apart = slice(scale.n_placed, x.size)
            on.errorbar(x[apart], y[apart], error[apart], color=colour, marker="D", markersize=2.5, linestyle="")
        dress_training(on, scale, "x")
        on.set_ylabel(LOSS.label)
        on.set_title(title(scores, over_training(scores, scale, "loss")) if ax is None else "Loss")
        return on


def _draw_depth(
    on: Axes, values: pl.DataFrame, kind: Metric, everywhere: pl.Series, scale: TrainingScale
) -> ScalarMappable:
    """Lines of one component; the y axis is that of the values of all, so that pictures can be laid side by side."""
    reach = _reach(everywhere.drop_nulls().to_numpy(), kind)
    colours = progress(scale)
    shades = colours.to_rgba(scale.spread(scale.values))
    by_checkpoint = values.partition_by("order", as_dict=True, maintain_order=True)
    lines = []
    for (order,), one in by_checkpoint.items():
        x, y = one["layer"].to_numpy(), one["value"].fill_null(float("nan")).to_numpy()
        lines.append(np.column_stack((x, y)))
        if len(by_checkpoint) <= MOST_BANDS and one["stderr"].null_count() < one.height:
            error = one["stderr"].fill_null(0.0).to_numpy()
            on.fill_between(x, y - error, y + error, color=shades[order], alpha=0.25, linewidth=0)
    shades = shades[[order for (order,) in by_checkpoint]]
    on.add_collection(LineCollection(lines, colors=shades, linewidths=0.9 if len(lines) < 40 else 0.5))
    if values["layer"].n_unique() == 1:
        for line, shade in zip(lines, shades, strict=True):
            on.plot(line[:, 0], line[:, 1], "o", color=shade, markersize=3)
    on.autoscale_view()
    on.xaxis.set_major_locator(FixedLocator(layer_ticks(0, int(values["layer"].to_numpy().max()))))
    on.set_xlabel("layer")
    on.set_ylabel(kind.label)
    if reach is not None:
        _spread_out(on, kind, reach)
    return colours


def _reach(values: Array, metric: Metric) -> Limits | None:
    """Smallest and largest distance from the value that means "redundant"; None where there are none above 0."""
    distances = np.abs(values[np.isfinite(values)] - (metric.redundant or 0.0))
    distances = distances[distances > 0]
    return (float(distances.min()), float(distances.max())) if distances.size and metric.redundant is not None else None


def _spread_out(ax: Axes, metric: Metric, reach: Limits) -> None:
    """Logarithmic y axis of the distance from "redundant": 0.9, 0.99 and 0.999 stand equally far apart.

    Layer 0 is often a hundred times as far from it as a deep layer: on a linear axis all the others lie on one line.
    """
    redundant, (low, high) = metric.redundant or 0.0, reach
    sign = -1.0 if redundant == metric.high else 1.0

    def forward(y: Array) -> Array:
        return np.asarray(sign * np.log10(np.maximum(sign * (np.asarray(y) - redundant), low / 2)))

    def inverse(spread: Array) -> Array:
        return np.asarray(redundant + sign * 10.0 ** (sign * np.asarray(spread)))

    ax.set_yscale("function", functions=(forward, inverse))
    bottom, top = sorted((redundant + sign * low / 1.3, redundant + sign * high * 1.3))
    ax.set_ylim(bottom, top)
    decades = range(int(np.floor(np.log10(low))) - 1, int(np.ceil(np.log10(high))) + 1)
    mantissas = (1, 2, 5) if np.log10(high / low) < 2.5 else (1,)
    ticks = [redundant + sign * m * 10.0**k for k in decades for m in mantissas]
    ticks = [tick for tick in ticks if bottom <= tick <= top]
    ax.yaxis.set_major_locator(FixedLocator(ticks))
    ax.yaxis.set_major_formatter(FixedFormatter([f"{tick:.6g}" for tick in ticks]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylabel(f"{metric.label}\n" + ("log axis" if redundant == 0 else f"log axis of distance from {redundant:g}"))


def progress_bar(figure: Figure, axes: list[Axes], scale: TrainingScale) -> None:
    """A colour bar of training beside axes with a line a checkpoint."""
    _name_progress(bar_beside(figure, progress(scale), axes), scale)


def progress(scale: TrainingScale) -> ScalarMappable:
    """Colour of a place in training, spread as on the training axis."""
    spread = scale.spread(scale.values)
    low, high = float(spread[0]), float(spread[-1])
    return ScalarMappable(Normalize(low, high) if high > low else Normalize(low - 1, low), progress_map())


def _name_progress(bar: Colorbar, scale: TrainingScale) -> None:
    ticks = fitting_ticks(scale, 6, lambda _: 0.08, length=1.0)
    bar.set_ticks(scale.spread(np.array(ticks)).tolist(), labels=[tick_label(scale, tick) for tick in ticks])
    bar.minorticks_off()
    bar.set_label(scale.axis.label)
