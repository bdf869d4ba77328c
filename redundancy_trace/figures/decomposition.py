"""Why a component is redundant: the size of its update and the direction, whose mixture importance is."""

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from redundancy_trace.analysis import metric_values
from redundancy_trace.errors import InputError
from redundancy_trace.figures.style import (
    Array,
    Limits,
    Width,
    at_checkpoint,
    axes_or_new,
    bar_beside,
    component_label,
    head,
    layer_ticks,
    outer_labels,
    panel_row,
    paper_style,
    progress_map,
    title,
)
from redundancy_trace.metrics import COMPONENTS, LAYER_METRICS

# Importances that lines are drawn for.
CONTOURS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

# Of more layers the line from each to the next is a web: it is drawn fainter.
MOST_JOINED = 16


def plot_decomposition(
    scores: pl.DataFrame,
    *,
    component: str = "attn",
    revision: str | None = None,
    ax: Axes | None = None,
    colorbar: bool = True,
) -> Axes:
    """Every layer by the relative norm r of its update and the cosine c between update and residual stream.

    Grey lines join what has the same importance S = 1 − (1 + r c) / √(1 + 2 r c + r²): an update along the residual
    stream (c near ±1) leaves S small however large it is. Points are means over tokens, so that they lie near, not on,
    the line of their mean importance.

    Args:
        scores: Scores of one model.
        component: `attn`, `mlp` or `block`.
        revision: The checkpoint; None = the last.
        ax: Where to draw; None = a new figure one column wide.
        colorbar: Whether to draw the colour bar of depth.

    Returns:
        The axes: r to the right (log), c upwards; a point a layer, light = first and dark = last.

    Raises:
        InputError: If there is no such checkpoint or component, or its metrics are not stored.
    """
    values = decomposition_values(scores, revision)
    rows = values.filter(component=component)
    if rows.is_empty():
        known = ", ".join(values["component"].unique(maintain_order=True))
        raise InputError(f"There is no {component!r} in these scores. There are: {known}.")
    with axes_or_new(ax, height=2.8) as on:
        _draw(on, rows, *_limits(values))
        named = component_label(component) + at_checkpoint(scores, rows["revision"][0], 30)
        on.set_title(title(scores, named) if ax is None else component_label(component))
        if colorbar and (figure := on.get_figure(root=True)) is not None:
            _depth_bar(figure, [on], values)
        return on


def plot_decompositions(scores: pl.DataFrame, *, revision: str | None = None, width: Width = "page") -> Figure:
    """The panels of `plot_decomposition` for every component of one checkpoint, on the same axes.

    Args:
        scores: Scores of one model.
        revision: The checkpoint; None = the last.
        width: `page`: side by side; `column`: one above the other.

    Returns:
        The figure.

    Raises:
        InputError: As `plot_decomposition`.
    """
    values = decomposition_values(scores, revision)
    components = values["component"].unique(maintain_order=True).to_list()
    with paper_style():
        figure, panels = panel_row(len(components), width, 2.5 if width == "page" else 2.0, sharex=True, sharey=True)
        limits = _limits(values)
        for ax, component in zip(panels, components, strict=True):
            _draw(ax, values.filter(component=component), *limits)
            ax.set_title(component_label(component))
        outer_labels(panels, width)
        _depth_bar(figure, panels, values)
        at = at_checkpoint(scores, values["revision"][0])
        head(figure, title(scores, f"size and direction of the updates{at} (lines: equal importance)"))
        return figure


def decomposition_values(scores: pl.DataFrame, revision: str | None = None) -> pl.DataFrame:
    """What the figures of the decomposition show.

    Args:
        scores: Scores of one model.
        revision: The checkpoint; None = the last.

    Returns:
        One row a component and layer: `model`, `revision`, `step`, `tokens`, `component`, `layer`, `relative_norm`,
        `update_cosine`, `importance`.

    Raises:
        InputError: If there is no such checkpoint, or a metric is not stored.
    """
    names = ("relative_norm", "update_cosine", "importance")
    first, *others = (metric_values(scores, name).filter(pl.col("layer").is_not_null()) for name in names)
    order = first["revision"].unique(maintain_order=True).to_list()
    if revision is not None and revision not in order:
        raise InputError(f"There are no scores of {revision!r}. There are: {', '.join(order)}.")
    keys = ["order", "component", "layer"]
    rows = first.filter(pl.col("revision") == (revision or order[-1])).rename({"value": names[0]})
    for name, frame in zip(names[1:], others, strict=True):
        rows = rows.join(frame.select(*keys, pl.col("value").alias(name)), on=keys, how="left", maintain_order="left")
    known = {name: place for place, name in enumerate(COMPONENTS)}
    return rows.sort(pl.col("component").replace_strict(known, default=len(known)), "layer").select(
        "model", "revision", "step", "tokens", "component", "layer", *names
    )


def importance_of(norm: Array, cosine: Array) -> Array:
    """Importance of an update of relative norm r at cosine c to the stream: 1 − (1 + r c) / √(1 + 2 r c + r²)."""
    length = np.sqrt(np.maximum(1 + 2 * norm * cosine + norm**2, 1e-12))
    return np.asarray(1 - (1 + norm * cosine) / length)


def _limits(values: pl.DataFrame) -> tuple[Limits, Limits]:
    """Of both axes, with some room around the points of all components."""
    norm = values["relative_norm"].drop_nulls().to_numpy()
    norm = norm[norm > 0]
    cosine = values["update_cosine"].drop_nulls().to_numpy()
    low, high = (float(norm.min()), float(norm.max())) if norm.size else (0.1, 1.0)
    bottom, top = (float(cosine.min()), float(cosine.max())) if cosine.size else (-0.5, 0.5)
    room = max(0.1, 0.12 * (top - bottom))
    return (low / 1.5, high * 1.5), (max(-1.02, bottom - room), min(1.02, top + room))


def _draw(ax: Axes, rows: pl.DataFrame, across: Limits, upwards: Limits) -> None:
    norm, cosine = np.meshgrid(np.geomspace(*across, 120), np.linspace(*upwards, 120))
    inside = np.clip(cosine, -1, 1)
    ax.contour(
        norm, cosine, importance_of(norm, inside), levels=list(CONTOURS), colors="0.75", linewidths=0.5, zorder=0
    )
    _name_contours(ax, across, upwards)
    ax.axhline(0, color="0.85", linewidth=0.5, zorder=0)
    depth = max(1, int(rows["layer"].to_numpy().max()))
    shades = progress_map()(rows["layer"].to_numpy() / depth)
    ax.plot(
        rows["relative_norm"],
        rows["update_cosine"],
        color="0.6" if depth < MOST_JOINED else "0.85",
        linewidth=0.4,
        zorder=1,
    )
    ax.scatter(
        rows["relative_norm"], rows["update_cosine"], c=shades, s=11, linewidths=0.3, edgecolors="white", zorder=2
    )
    for row in (rows.row(0, named=True), rows.row(-1, named=True)):
        if row["relative_norm"]:
            ax.annotate(str(row["layer"]), (row["relative_norm"], row["update_cosine"]), xytext=(3, 3),
                        textcoords="offset points", fontsize=6)  # fmt: skip
    ax.set_xscale("log")
    ax.set_xlim(*across)
    ax.set_ylim(*upwards)
    wide = across[1] / across[0] > 30
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("update norm ‖update‖ / ‖X‖")
    ax.set_ylabel(LAYER_METRICS["update_cosine"].label)


def _name_contours(ax: Axes, across: Limits, upwards: Limits) -> None:
    """The importance of each line, where it leaves at the bottom: in the middle the labels would lie on points."""
    norm = np.geomspace(*across, 400)
    found = importance_of(norm, np.full(norm.size, max(-1.0, upwards[0])))
    length = np.log(across[1] / across[0])
    free = 0.05  # from here on along the axis there is room for a label
    for level in CONTOURS:
        # Where the cosine is near -1 importance does not grow with the norm throughout: the first crossing counts.
        crossed = np.flatnonzero((found[:-1] < level) & (found[1:] >= level))
        place = np.log(norm[crossed[0]] / across[0]) / length if crossed.size else 1.0
        if free <= place <= 0.95:
            free = place + 0.12
            ax.annotate(f"{level:g}", (norm[crossed[0]], upwards[0]), xytext=(0, 2), textcoords="offset points",
                        ha="center", fontsize=5.5, color="0.4", zorder=0.5,
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4})  # fmt: skip


def _depth_bar(figure: Figure, axes: list[Axes], values: pl.DataFrame) -> None:
    last = int(values["layer"].to_numpy().max())
    if last == 0:
        return
    bar = bar_beside(figure, ScalarMappable(Normalize(0, last), progress_map()), axes)
    bar.set_ticks(layer_ticks(0, last))
    bar.minorticks_off()
    bar.set_label("layer")
