"""Block distances: how far a whole stack of layers turns the residual stream."""

from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator

from redundancy_trace.analysis.frames import ordered
from redundancy_trace.errors import InputError
from redundancy_trace.figures.style import (
    Limits,
    Width,
    at_checkpoint,
    axes_or_new,
    bar_beside,
    colour_map,
    head,
    layer_ticks,
    outer_labels,
    panel_row,
    paper_style,
    plain,
    shortened,
    title,
)
from redundancy_trace.metrics import DISTANCE_METRICS

MOST_CHECKPOINTS = 3
DOT: dict[str, Any] = {
    "marker": "o", "linestyle": "", "color": "#0072B2", "markersize": 2.4, "markeredgecolor": "white",
    "markeredgewidth": 0.35,
}  # fmt: skip


def plot_distances(
    distances: pl.DataFrame,
    *,
    revision: str | None = None,
    metric: str = "angular_distance",
    ax: Axes | None = None,
    colorbar: bool = True,
) -> Axes:
    """Distance between the input of layer ℓ and the output of the n-th layer from there (arXiv 2403.17887).

    Light = the n layers from ℓ on turn the residual stream little. A dot marks the lightest of every row: the block of
    that size that is dropped first.

    Args:
        distances: As `read_distances` gives them; of several calibrations the first is taken.
        revision: The checkpoint; None = the last.
        metric: `angular_distance` or `cosine_similarity`.
        ax: Where to draw; None = a new figure one column wide.
        colorbar: Whether to draw the colour bar.

    Returns:
        The axes: first layer of the block to the right, its number of layers upwards.

    Raises:
        InputError: If there are no distances, or no such checkpoint or metric.
    """
    values = distance_values(distances, None if revision is None else [revision], metric)
    with axes_or_new(ax, height=3.0) as on:
        mesh = _draw(on, values, _limits(values, metric), metric)
        name = values["revision"][0]
        alone = title(distances, "blocks of layers" + at_checkpoint(distances, name, 30))
        on.set_title(alone if ax is None else plain(shortened(name, 30)))
        if colorbar and on.figure is not None:
            on.figure.colorbar(mesh, ax=on).set_label(_label(metric))
        if ax is None and (figure := on.get_figure(root=True)) is not None:
            _name_dots(figure)
        return on


def plot_distances_over_training(
    distances: pl.DataFrame, *, metric: str = "angular_distance", width: Width = "page"
) -> Figure:
    """The triangles of `plot_distances` of the first checkpoint, one in the middle and the last, on one scale.

    Args:
        distances: As `read_distances` gives them.
        metric: `angular_distance` or `cosine_similarity`.
        width: `page`: side by side; `column`: one above the other.

    Returns:
        The figure.

    Raises:
        InputError: If there are no distances, or no such metric.
    """
    return draw_distances(distance_values(distances, spread(distances), metric), metric, width)


def draw_distances(values: pl.DataFrame, metric: str, width: Width) -> Figure:
    """As `plot_distances_over_training`, of values that were computed before."""
    names = values["revision"].unique(maintain_order=True).to_list()
    with paper_style():
        figure, panels = panel_row(
            len(names), width, 2.8 if width == "page" or len(names) == 1 else 2.2, sharex=True, sharey=True
        )
        limits = _limits(values, metric)
        for ax, name in zip(panels, names, strict=True):
            mesh = _draw(ax, values.filter(revision=name), limits, metric)
            ax.set_title(plain(shortened(name, 30)) if at_checkpoint(values, name) else "")
        outer_labels(panels, width)
        bar_beside(figure, mesh, panels).set_label(_label(metric))
        _name_dots(figure)
        head(figure, title(values, "how far blocks of layers turn the residual stream"))
        return figure


def distance_values(
    distances: pl.DataFrame, revisions: list[str] | None = None, metric: str = "angular_distance"
) -> pl.DataFrame:
    """What the figures of block distances show.

    Args:
        distances: As `read_distances` gives them; of several calibrations the first is taken.
        revisions: Checkpoints; None = the last.
        metric: `angular_distance` or `cosine_similarity`.

    Returns:
        One row a pair of states: `model`, `revision`, `step`, `tokens`, `layer` (first of the block), `n_layers` (in
        it), `metric`, `value`, `least` (whether it is the nearest to redundant of its size).

    Raises:
        InputError: If there are no distances, or no such checkpoint or metric.
    """
    if metric not in DISTANCE_METRICS:
        raise InputError(f"{metric!r} is no metric of block distances; known: {', '.join(DISTANCE_METRICS)}.")
    if distances.is_empty():
        raise InputError("There are no block distances. They are stored with the scores: score a checkpoint first.")
    rows = distances.filter(pl.col("calibration").eq_missing(distances["calibration"][0]), metric=metric)
    names = ordered(rows)["revision"].to_list()
    for name in revisions or ():
        if name not in names:
            raise InputError(f"There are no block distances of {name!r}. There are: {', '.join(names)}.")
    wanted = revisions or names[-1:]
    redundant = DISTANCE_METRICS[metric].redundant or 0.0
    away = (pl.col("value") - redundant).abs()
    order = pl.DataFrame({"revision": wanted, "place": range(len(wanted))})
    return (
        rows.join(order, on="revision")
        .with_columns(n_layers=pl.col("to_layer") - pl.col("layer"))
        .with_columns(least=away == away.min().over("revision", "n_layers"))
        .sort("place", "n_layers", "layer")
        .select("model", "revision", "step", "tokens", "layer", "n_layers", "metric", "value", "least")
    )


def spread(distances: pl.DataFrame) -> list[str]:
    """The first checkpoint, one in the middle, and the last."""
    if distances.is_empty():
        return []
    rows = distances.filter(pl.col("calibration").eq_missing(distances["calibration"][0]))
    names = ordered(rows)["revision"].to_list()
    chosen = dict.fromkeys(
        np.linspace(0, len(names) - 1, min(MOST_CHECKPOINTS, len(names))).round().astype(int).tolist()
    )
    return [names[index] for index in chosen]


def _limits(values: pl.DataFrame, metric: str) -> Limits:
    redundant = DISTANCE_METRICS[metric].redundant or 0.0
    found = values["value"].drop_nulls().to_numpy()
    far = float(np.abs(found - redundant).max()) if found.size else 1.0
    far = far or 1e-6
    return (redundant - far, redundant) if redundant == DISTANCE_METRICS[metric].high else (redundant, redundant + far)


def _label(metric: str) -> str:
    return {"angular_distance": "angular distance\n(share of half a turn)"}.get(metric, DISTANCE_METRICS[metric].label)


def _name_dots(figure: Figure) -> None:
    dot = Line2D([], [], label="block of that size that is dropped first", **{**DOT, "markersize": 3.5})
    figure.legend(handles=[dot], loc="outside lower center", frameon=False, fontsize="small")


def _draw(ax: Axes, values: pl.DataFrame, limits: Limits, metric: str) -> QuadMesh:
    layers, counts = values["layer"].to_numpy(), values["n_layers"].to_numpy()
    depth = int(counts.max())
    cells = np.full((depth, depth), np.nan)
    cells[counts - 1, layers] = values["value"].fill_null(np.nan).to_numpy()
    edges = np.arange(depth + 1) - 0.5, np.arange(depth + 1) + 0.5
    colours = colour_map(DISTANCE_METRICS[metric])
    mesh = ax.pcolormesh(
        *edges, np.ma.masked_invalid(cells), cmap=colours, vmin=limits[0], vmax=limits[1], rasterized=True
    )
    least = values.filter("least")
    ax.plot(least["layer"], least["n_layers"], **DOT)
    ax.xaxis.set_major_locator(FixedLocator(layer_ticks(0, depth - 1)))
    ax.yaxis.set_major_locator(FixedLocator(layer_ticks(1, depth)))
    ax.set_xlabel("first layer of the block")
    ax.set_ylabel("layers in the block")
    return mesh
