"""The order in which layers would be dropped: retained or dropped over the module index, at one checkpoint or many."""

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator

from redundancy_trace.analysis import leave_out_duplicates, main_series, training_axis
from redundancy_trace.analysis.ranks import drop_places
from redundancy_trace.analysis.series import grid_of
from redundancy_trace.errors import InputError
from redundancy_trace.figures.style import (
    WIDTHS,
    PaperFigure,
    Width,
    at_checkpoint,
    axes_or_new,
    compact,
    component_label,
    head,
    layer_ticks,
    outer_labels,
    panel_row,
    paper_style,
    plain,
    shortened,
    title,
)
from redundancy_trace.metrics import COMPONENTS

RETAINED, DROPPED = "#F7E28A", "#B2182B"
# Side by side there is room for so many.
MOST_CHECKPOINTS = {"page": 6, "column": 4}


def plot_drop_order(
    scores: pl.DataFrame,
    *,
    component: str = "attn",
    revision: str | None = None,
    ax: Axes | None = None,
    legend: bool = True,
) -> Axes:
    """What is retained (yellow) and dropped (red) when the n least important modules go (arXiv 2406.15786, Fig. 6).

    Args:
        scores: Scores of one model; of several series (seeds, stages, ingredients) the longest is taken.
        component: `attn`, `mlp` or `block`.
        revision: The checkpoint; None = the last.
        ax: Where to draw; None = a new figure one column wide.
        legend: Whether to explain the colours.

    Returns:
        The axes: module index to the right, number dropped upwards.

    Raises:
        InputError: If there is no such checkpoint, or importances of it are missing.
    """
    values = drop_order_values(scores, revisions=None if revision is None else [revision])
    rows = values.filter(component=component)
    if rows.is_empty():
        known = ", ".join(values["component"].unique(maintain_order=True))
        raise InputError(f"There is no importance of component {component!r} in these scores. There are: {known}.")
    with axes_or_new(ax, height=2.8) as on:
        _draw(on, rows)
        on.set_xlabel("module index")
        on.set_ylabel("modules dropped")
        if legend and ax is not None:
            on.legend(handles=_handles(), loc="upper left", fontsize="small")
        elif legend and (figure := on.get_figure(root=True)) is not None:
            figure.legend(handles=_handles(), loc="outside lower center", ncols=2, frameon=False, fontsize="small")
        named = component_label(component) + at_checkpoint(scores, rows["revision"][0], 30)
        on.set_title(title(scores, named) if ax is None else component_label(component))
        return on


def plot_drop_orders(scores: pl.DataFrame, *, revision: str | None = None, width: Width = "page") -> Figure:
    """Fig. 6 of arXiv 2406.15786: the panels of `plot_drop_order` for every component of one checkpoint.

    Args:
        scores: Scores of one model.
        revision: The checkpoint; None = the last.
        width: `page`: side by side; `column`: one above the other.

    Returns:
        The figure.

    Raises:
        InputError: As `plot_drop_order`.
    """
    values = drop_order_values(scores, revisions=None if revision is None else [revision])
    components = values["component"].unique(maintain_order=True).to_list()
    with paper_style():
        figure, panels = panel_row(len(components), width, 2.5 if width == "page" else 1.9, sharex=True)
        for ax, component in zip(panels, components, strict=True):
            _draw(ax, values.filter(component=component))
            ax.set_title(component_label(component))
            ax.set_xlabel("module index")
            ax.set_ylabel("modules dropped")
        outer_labels(panels, width)
        figure.legend(handles=_handles(), loc="outside lower center", ncols=2, frameon=False, fontsize="small")
        head(figure, title(scores, "dropping order" + at_checkpoint(scores, values["revision"][0])))
        return figure


def plot_drop_orders_over_training(
    scores: pl.DataFrame, *, duplicates: pl.DataFrame | None = None, width: Width = "page"
) -> Figure:
    """The dropping order of checkpoints spread evenly over the training (in order), side by side.

    Args:
        scores: Scores of one model; of several series the longest is taken.
        duplicates: Checkpoints to leave out, as `read_duplicates` gives them.
        width: `page`: six checkpoints to the right, a row each component; `column`: four downwards, a column each.

    Returns:
        The figure.

    Raises:
        InputError: If importances are missing in the series.
    """
    values = drop_order_values(scores, spread_over_training(scores, duplicates, MOST_CHECKPOINTS[width]), duplicates)
    revisions = values["revision"].unique(maintain_order=True).to_list()
    components = values["component"].unique(maintain_order=True).to_list()
    across, down = (revisions, components) if width == "page" else (components, revisions)
    with paper_style():
        figure = PaperFigure(WIDTHS[width], 0.7 + 1.15 * len(down))
        panels = figure.subplots(len(down), len(across), sharex=True, sharey=True, squeeze=False)
        where = _places(scores, duplicates)
        for row, below in enumerate(down):
            for column, right in enumerate(across):
                component, revision = (below, right) if width == "page" else (right, below)
                ax = panels[row, column]
                _draw(ax, values.filter(component=component, revision=revision), few=True)
                named = {component: component_label(component), revision: where[revision]}
                if row == 0:
                    ax.set_title(named[right])
                if column == 0:
                    ax.set_ylabel(named[below])
                if below == down[-1]:
                    ax.set_xlabel("module index")
        figure.supylabel("modules dropped", fontsize="medium")
        figure.legend(handles=_handles(), loc="outside lower center", ncols=2, frameon=False, fontsize="small")
        label = training_axis(leave_out_duplicates(scores, duplicates)).label
        head(figure, title(scores, f"dropping order over training ({label})"))
        return figure


def drop_order_values(
    scores: pl.DataFrame, revisions: list[str] | None = None, duplicates: pl.DataFrame | None = None
) -> pl.DataFrame:
    """What the figures of dropping orders show.

    Args:
        scores: Scores of one model; of several series the longest is taken.
        revisions: Checkpoints; None = the last.
        duplicates: Checkpoints to leave out.

    Returns:
        One row a checkpoint, component and layer: `model`, `revision`, `step`, `tokens`, `component`, `layer`,
        `importance`, `place` (1 = dropped first).

    Raises:
        InputError: If there is no such checkpoint in the series, or importances are missing in it.
    """
    series = main_series(scores, duplicates)
    names = series.checkpoints["revision"].to_list()
    for name in revisions or ():
        if name not in names:
            raise InputError(f"There are no scores of {name!r} in this series. There are: {', '.join(names)}.")
    rows = [names.index(name) for name in revisions] if revisions else [len(names) - 1]
    frames = []
    for row in rows:
        place = series.checkpoints.select("revision", "step", "tokens")[row]
        for component in (name for name in COMPONENTS if name in series.grids):
            grid = grid_of(series.grids, component)
            frames.append(
                place.join(
                    pl.DataFrame(
                        {
                            "component": component,
                            "layer": grid.layers,
                            "importance": grid.values[row],
                            "place": drop_places(grid.values[row]) + 1,
                        }
                    ),
                    how="cross",
                )
            )
    model = scores["model"].first() if "model" in scores.columns else None
    return pl.concat(frames).select(pl.lit(model, pl.String).alias("model"), pl.all())


def spread_over_training(scores: pl.DataFrame, duplicates: pl.DataFrame | None, most: int) -> list[str]:
    """At most so many checkpoints of the longest series, evenly in training order, the first and the last too."""
    names = main_series(scores, duplicates).checkpoints["revision"].to_list()
    chosen = dict.fromkeys(np.linspace(0, len(names) - 1, min(most, len(names))).round().astype(int).tolist())
    return [names[index] for index in chosen]


def _places(scores: pl.DataFrame, duplicates: pl.DataFrame | None) -> dict[str, str]:
    """Where each checkpoint stands, in a word: the number on the training axis, else its name."""
    axis = training_axis(leave_out_duplicates(scores, duplicates))
    return {
        name: plain(shortened(name, 14)) if value is None or axis.column == "index" else compact(value)
        for name, value in zip(axis.revisions, axis.values, strict=True)
    }


def _draw(ax: Axes, rows: pl.DataFrame, *, few: bool = False) -> None:
    layers, places = rows["layer"].to_numpy(), rows["place"].to_numpy()
    count = 1 + int(layers.max())
    cells = np.full((len(layers) + 1, count), np.nan)
    cells[:, layers] = np.arange(len(layers) + 1)[:, None] >= places
    edges = np.arange(count + 1) - 0.5, np.arange(len(layers) + 2) - 0.5
    colours = ListedColormap([RETAINED, DROPPED])
    ax.pcolormesh(*edges, np.ma.masked_invalid(cells), cmap=colours, vmin=0, vmax=1, rasterized=True)
    ax.xaxis.set_major_locator(FixedLocator(layer_ticks(0, count - 1, 4 if few else 8)))
    ax.yaxis.set_major_locator(MaxNLocator(4 if few else 8, integer=True))


def _handles() -> list[Patch]:
    return [
        Patch(facecolor=colour, edgecolor="0.4", linewidth=0.4, label=label)
        for colour, label in ((RETAINED, "retained"), (DROPPED, "dropped"))
    ]
