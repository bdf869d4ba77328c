"""Is the order of the layers the same throughout training? Every two checkpoints, and the sets that would go first."""

from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator

from redundancy_trace.analysis import main_series, rank_agreement, topk_overlap, training_axis
from redundancy_trace.analysis.series import Series
from redundancy_trace.errors import InputError
from redundancy_trace.figures.curves import progress, progress_bar
from redundancy_trace.figures.orders import spread_over_training
from redundancy_trace.figures.style import (
    NOT_SCORED,
    Limits,
    Width,
    agreement_map,
    axes_or_new,
    bar_beside,
    component_label,
    head,
    layer_ticks,
    outer_labels,
    panel_row,
    paper_style,
    title,
)
from redundancy_trace.figures.training import TrainingScale, dress_training, mesh_columns, training_scale

# More rows and columns than dots at the printed size: of more checkpoints these many are shown.
MOST_CHECKPOINTS = 200
CHANCE: dict[str, Any] = {"color": "0.35", "linewidth": 0.9, "linestyle": (0, (4, 2))}
REACH_OF_CHANCE: dict[str, Any] = {"color": "0.9", "linewidth": 0}
COEFFICIENTS = {"spearman": "Spearman's ρ", "kendall": "Kendall's τ", "weighted_tau": "weighted τ"}


def plot_agreement(
    scores: pl.DataFrame,
    *,
    component: str = "attn",
    coefficient: str = "spearman",
    duplicates: pl.DataFrame | None = None,
    ax: Axes | None = None,
    colorbar: bool = True,
) -> Axes:
    """How far every two checkpoints order the layers alike: checkpoint × checkpoint, light = the same order.

    Args:
        scores: Scores of one model; of several series (seeds, stages, ingredients) the longest is taken.
        component: `attn`, `mlp` or `block`.
        coefficient: `spearman`, `kendall` or `weighted_tau` of `rank_agreement`.
        duplicates: Checkpoints to leave out, as `read_duplicates` gives them.
        ax: Where to draw; None = a new figure one column wide.
        colorbar: Whether to draw the colour bar.

    Returns:
        The axes.

    Raises:
        InputError: If there is one checkpoint only, component or coefficient are unknown, or importances are missing.
    """
    rows = _in_series(scores, duplicates)
    values = agreement_values(rows).filter(component=component)
    if values.is_empty():
        raise InputError(f"There is no importance of component {component!r} in these scores.")
    with axes_or_new(ax, height=3.0) as on:
        mesh = _draw_matrix(on, values, training_scale(training_axis(rows)), coefficient, _limits(values, coefficient))
        on.set_title(title(scores, component_label(component)) if ax is None else component_label(component))
        if colorbar and on.figure is not None:
            on.figure.colorbar(mesh, ax=on).set_label(f"{COEFFICIENTS[coefficient]} of the layers' order")
        return on


def plot_agreements(
    scores: pl.DataFrame,
    *,
    coefficient: str = "spearman",
    duplicates: pl.DataFrame | None = None,
    width: Width = "page",
) -> Figure:
    """The matrices of `plot_agreement` for every component, on one scale.

    Args:
        scores: Scores of one model.
        coefficient: `spearman`, `kendall` or `weighted_tau`.
        duplicates: Checkpoints to leave out.
        width: `page`: side by side; `column`: one above the other.

    Returns:
        The figure.

    Raises:
        InputError: As `plot_agreement`.
    """
    return draw_agreements(scores, agreement_values(scores, duplicates), duplicates, width, coefficient)


def draw_agreements(
    scores: pl.DataFrame,
    values: pl.DataFrame,
    duplicates: pl.DataFrame | None,
    width: Width,
    coefficient: str = "spearman",
) -> Figure:
    """As `plot_agreements`, of values that were computed before."""
    rows = _in_series(scores, duplicates)
    scale = training_scale(training_axis(rows))
    components = values["component"].unique(maintain_order=True).to_list()
    with paper_style():
        figure, panels = panel_row(len(components), width, 2.6)
        limits = _limits(values, coefficient)
        for ax, component in zip(panels, components, strict=True):
            mesh = _draw_matrix(ax, values.filter(component=component), scale, coefficient, limits)
            ax.set_title(component_label(component))
            ax.tick_params(axis="y", labelleft=width == "column" or ax is panels[0])
            ax.set_xlabel("" if width == "page" else ax.get_xlabel())
        outer_labels(panels, width)
        if width == "page":
            figure.supxlabel(scale.axis.label, fontsize="medium")
        bar_beside(figure, mesh, panels).set_label(f"{COEFFICIENTS[coefficient]} of the layers' order")
        head(figure, title(rows, "agreement of every two checkpoints"))
        return figure


def agreement_values(scores: pl.DataFrame, duplicates: pl.DataFrame | None = None) -> pl.DataFrame:
    """What `plot_agreements` shows: `rank_agreement` of each component, of at most 200 checkpoints of the series."""
    rows = _in_series(scores, duplicates)
    there = rows.filter(pl.col("metric") == "cosine_similarity")["component"].unique().to_list()
    parts = [
        rank_agreement(rows, component).select(pl.lit(component).alias("component"), pl.all())
        for component in ("attn", "mlp", "block")
        if component in there
    ]
    values = pl.concat(parts)
    if values.is_empty():
        raise InputError("Agreement is between two checkpoints or more; these scores are of one.")
    return values


def plot_overlap(
    scores: pl.DataFrame,
    *,
    component: str = "attn",
    duplicates: pl.DataFrame | None = None,
    ax: Axes | None = None,
    colorbar: bool = True,
) -> Axes:
    """Overlap of the k most redundant layers with the last checkpoint's, one line a checkpoint, with chance.

    Dashed: what two random sets of k layers are expected to share; grey: what 95 of 100 of them stay within.

    Args:
        scores: Scores of one model; of several series the longest is taken.
        component: `attn`, `mlp` or `block`.
        duplicates: Checkpoints to leave out.
        ax: Where to draw; None = a new figure one column wide.
        colorbar: Whether to draw the colour bar of training.

    Returns:
        The axes.

    Raises:
        InputError: As `topk_overlap`, or if there is one checkpoint only.
    """
    values = topk_overlap(scores, component, duplicates)
    scale = _series_scale(main_series(scores, duplicates))
    if scale.values.size == 1:
        raise InputError("Overlap is with the last of two checkpoints or more; these scores are of one.")
    with axes_or_new(ax, height=2.8) as on:
        _draw_overlap(on, values, scale)
        on.set_title(title(scores, component_label(component)) if ax is None else component_label(component))
        figure = on.get_figure(root=True)
        if colorbar and figure is not None:
            progress_bar(figure, [on], scale)
        if ax is None and figure is not None:
            _name_chance(figure)
        return on


def plot_overlaps(scores: pl.DataFrame, *, duplicates: pl.DataFrame | None = None, width: Width = "page") -> Figure:
    """The curves of `plot_overlap` for every component.

    Args:
        scores: Scores of one model.
        duplicates: Checkpoints to leave out.
        width: `page`: side by side; `column`: one above the other.

    Returns:
        The figure.

    Raises:
        InputError: As `plot_overlap`.
    """
    return draw_overlaps(scores, overlap_values(scores, duplicates), duplicates, width)


def draw_overlaps(scores: pl.DataFrame, values: pl.DataFrame, duplicates: pl.DataFrame | None, width: Width) -> Figure:
    """As `plot_overlaps`, of values that were computed before."""
    scale = _series_scale(main_series(scores, duplicates))
    components = values["component"].unique(maintain_order=True).to_list()
    with paper_style():
        figure, panels = panel_row(len(components), width, 2.5 if width == "page" else 1.9, sharex=True, sharey=True)
        for ax, component in zip(panels, components, strict=True):
            _draw_overlap(ax, values.filter(component=component), scale)
            ax.set_title(component_label(component))
        outer_labels(panels, width)
        progress_bar(figure, panels, scale)
        _name_chance(figure)
        head(figure, title(scores, "the k most redundant layers, then and at the end"))
        return figure


def overlap_values(scores: pl.DataFrame, duplicates: pl.DataFrame | None = None) -> pl.DataFrame:
    """What `plot_overlaps` shows: `topk_overlap` of each component."""
    series = main_series(scores, duplicates)
    if series.checkpoints.height == 1:
        raise InputError("Overlap is with the last of two checkpoints or more; these scores are of one.")
    return pl.concat(
        topk_overlap(scores.filter(component=component), component, duplicates).select(
            pl.lit(component).alias("component"), pl.all()
        )
        for component in series.grids
    )


def _name_chance(figure: Figure) -> None:
    """What two random sets share, below the figure."""
    handles = [
        Line2D([], [], label="by chance", **CHANCE),
        Patch(label="reach of 95 of 100 random sets", **REACH_OF_CHANCE),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize="small")


def _in_series(scores: pl.DataFrame, duplicates: pl.DataFrame | None) -> pl.DataFrame:
    """The rows of the checkpoints that a matrix shows."""
    chosen = spread_over_training(scores, duplicates, MOST_CHECKPOINTS)
    return scores.filter(pl.col("revision").is_in(chosen))


def _series_scale(series: Series) -> TrainingScale:
    return training_scale(series.axis)


def _limits(values: pl.DataFrame, coefficient: str) -> Limits:
    """From 0, or as far below it as values go, to the same order."""
    if coefficient not in COEFFICIENTS:
        raise InputError(f"{coefficient!r} is no coefficient; known: {', '.join(COEFFICIENTS)}.")
    lowest = values[coefficient].min()
    return min(0.0, float(lowest) if isinstance(lowest, float) else 0.0), 1.0


def _draw_matrix(ax: Axes, values: pl.DataFrame, scale: TrainingScale, coefficient: str, limits: Limits) -> QuadMesh:
    count = scale.values.size
    matrix = np.full((count, count), np.nan)
    np.fill_diagonal(matrix, 1.0)
    places = {name: k for k, name in enumerate(scale.axis.revisions)}
    one, other = ([places[name] for name in values[column]] for column in ("revision", "other_revision"))
    matrix[one, other] = matrix[other, one] = values[coefficient].fill_null(np.nan).to_numpy()
    edges, shown = mesh_columns(scale)
    cells = np.full((len(shown), len(shown)), np.nan)
    there = [k for k, index in enumerate(shown) if index is not None]
    cells[np.ix_(there, there)] = matrix
    ax.patch.set(**NOT_SCORED)
    mesh = ax.pcolormesh(
        edges, edges, np.ma.masked_invalid(cells), cmap=agreement_map(), vmin=limits[0], vmax=limits[1], rasterized=True
    )
    dress_training(ax, scale, "x")
    dress_training(ax, scale, "y")
    return mesh


def _draw_overlap(ax: Axes, values: pl.DataFrame, scale: TrainingScale) -> None:
    first = values.filter(pl.col("order") == values["order"].min())
    k, chance = first["k"].to_numpy(), first["chance"].to_numpy()
    ax.fill_between(k, 0, first["chance_high"].to_numpy(), zorder=0, **REACH_OF_CHANCE)
    ax.plot(k, chance, zorder=3, **CHANCE)
    shades = progress(scale).to_rgba(scale.spread(scale.values))
    # The last is 1 everywhere; the early ones, which differ most, are drawn over the late ones.
    parts = values.partition_by("order", maintain_order=True)[-2::-1]
    lines = [np.column_stack((part["k"].to_numpy(), part["overlap"].to_numpy())) for part in parts]
    width = 0.9 if len(lines) < 40 else 0.5
    ax.add_collection(LineCollection(lines, colors=shades[[part["order"][0] for part in parts]], linewidths=width))
    ax.set_xlim(1, max(2, k[-1]))
    ax.set_ylim(0, 1.03)
    ax.xaxis.set_major_locator(FixedLocator(layer_ticks(1, int(k[-1]))))
    ax.set_xlabel("k most redundant layers")
    ax.set_ylabel("overlap (Jaccard)")
