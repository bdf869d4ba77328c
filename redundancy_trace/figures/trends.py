"""Mean importance over training, with what the standard errors leave open; several models over relative depth."""

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator

from redundancy_trace.analysis import main_series
from redundancy_trace.analysis.trends import curves_frame, mean_importance
from redundancy_trace.errors import InputError
from redundancy_trace.figures.style import (
    COMPONENT_COLOURS,
    WIDTHS,
    PaperFigure,
    Width,
    at_checkpoint,
    axes_or_new,
    component_label,
    head,
    model_name,
    outer_labels,
    panel_row,
    paper_style,
    progress_map,
    title,
)
from redundancy_trace.figures.training import dress_training, training_scale
from redundancy_trace.metrics import COMPONENTS, IMPORTANCE

STATISTICS = {
    "importance_inner": "mean importance\nwithout the first and last layer",
    "importance": "mean importance of all layers",
}


def plot_trends(
    scores: pl.DataFrame,
    *,
    statistic: str | None = None,
    duplicates: pl.DataFrame | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Mean importance of each component over training, with a band of 95 %.

    Args:
        scores: Scores of one model; of several series (seeds, stages, ingredients) the longest is taken.
        statistic: `importance` (all layers) or `importance_inner` (without the first and the last); None = the second,
            where there are such layers.
        duplicates: Checkpoints to leave out, as `read_duplicates` gives them.
        ax: Where to draw; None = a new figure one column wide.

    Returns:
        The axes.

    Raises:
        InputError: If importances are missing, or there is no such statistic.
    """
    values = trend_values(scores, duplicates, statistic)
    scale = training_scale(main_series(scores, duplicates).axis)
    with axes_or_new(ax, height=2.4) as on:
        for component in values["component"].unique(maintain_order=True):
            rows, colour = values.filter(component=component), COMPONENT_COLOURS[component]
            where = scale.values[rows["order"].to_numpy()]
            marker = "o" if len(where) <= 60 else ""
            on.plot(where, rows["value"].to_numpy(), color=colour, linewidth=1, marker=marker, markersize=2.2,
                    label=component_label(component))  # fmt: skip
            if rows["low"].null_count() == 0:
                band = rows["low"].to_numpy(), rows["high"].to_numpy()
                on.fill_between(where, *band, color=colour, alpha=0.25, linewidth=0)
        dress_training(on, scale, "x")
        on.set_ylim(bottom=0)
        on.set_ylabel(STATISTICS[values["statistic"][0]])
        on.legend(frameon=False, fontsize="small", loc="best")
        on.set_title(title(scores, "mean importance over training") if ax is None else "Mean importance")
        return on


def trends_figure(scores: pl.DataFrame, duplicates: pl.DataFrame | None, width: Width) -> Figure:
    """`plot_trends` alone on a figure of that width."""
    with paper_style():
        figure = PaperFigure(WIDTHS[width], 2.4)
        plot_trends(scores, duplicates=duplicates, ax=figure.add_subplot()).set_title("")
        head(figure, title(scores, "mean importance over training"))
        return figure


def trend_values(
    scores: pl.DataFrame, duplicates: pl.DataFrame | None = None, statistic: str | None = None
) -> pl.DataFrame:
    """What `plot_trends` shows: one statistic of `checkpoint_statistics`."""
    if statistic is not None and statistic not in STATISTICS:
        raise InputError(f"{statistic!r} is no statistic of this figure; known: {', '.join(STATISTICS)}.")
    series = main_series(scores, duplicates)
    layers = {"importance_inner": "inner", "importance": "all"}
    for name in [statistic] if statistic else list(STATISTICS):
        curves = [mean_importance(series, component, layers[name]) for component in series.grids]
        if found := [curve for curve in curves if curve is not None]:
            return curves_frame(series, found)
    raise InputError("There is no layer between the first and the last; use statistic='importance'.")


def plot_models(scores: pl.DataFrame, *, component: str = "attn", ax: Axes | None = None, legend: bool = True) -> Axes:
    """Importance of several models over relative depth, one line a model: sizes of one family side by side.

    Args:
        scores: Scores of several models, such as `polars.concat` of what `read_scores` gives of each; of every model
            the last checkpoint of its longest series is shown, on its first calibration.
        component: `attn`, `mlp` or `block`.
        ax: Where to draw; None = a new figure one column wide.
        legend: Whether to name the models.

    Returns:
        The axes: 0 = first and 1 = last layer to the right, importance (log) upwards; the model with the fewest layers
        is lightest.

    Raises:
        InputError: If importances are missing, or no model has the component.
    """
    values = model_values(scores)
    rows = values.filter(component=component)
    if rows.is_empty():
        raise InputError(f"There is no importance of component {component!r} in these scores.")
    with axes_or_new(ax, height=2.8) as on:
        _draw_models(on, rows, values)
        on.set_title(component_label(component))
        if legend:
            on.legend(frameon=False, fontsize=6.5, loc="best")
        return on


def plot_models_side_by_side(scores: pl.DataFrame, *, width: Width = "page") -> Figure:
    """The panels of `plot_models` for every component, on the same axes.

    Args:
        scores: Scores of several models.
        width: `page`: side by side; `column`: one above the other.

    Returns:
        The figure.

    Raises:
        InputError: As `plot_models`.
    """
    values = model_values(scores)
    components = values["component"].unique(maintain_order=True).to_list()
    with paper_style():
        figure, panels = panel_row(len(components), width, 2.6 if width == "page" else 1.8, sharex=True, sharey=True)
        for ax, component in zip(panels, components, strict=True):
            _draw_models(ax, values.filter(component=component), values)
            ax.set_title(component_label(component))
        outer_labels(panels, width)
        if width == "column":
            figure.supylabel(panels[0].get_ylabel(), fontsize="medium")  # it is longer than a panel is high
            for ax in panels:
                ax.set_ylabel("")
        handles, labels = panels[0].get_legend_handles_labels()
        columns = max(1, min(len(handles), 3 if width == "page" else 1))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
        head(figure, "Importance over relative depth, each model at its last checkpoint")
        return figure


def model_values(scores: pl.DataFrame) -> pl.DataFrame:
    """What the figures of several models show.

    Returns:
        One row a model, component and layer, models with fewer layers first: `model`, `revision`, `step`, `tokens`,
        `component`, `layer`, `depth` (0 = first and 1 = last layer), `importance`.
    """
    frames = []
    for part in scores.partition_by("model", maintain_order=True):
        series = main_series(part)
        last = series.checkpoints.select("revision", "step", "tokens").tail(1)
        deepest = max(1, series.last_layer)
        for component in (name for name in COMPONENTS if name in series.grids):
            grid = series.grids[component]
            numbers = pl.DataFrame(
                {
                    "model": part["model"][0],
                    "component": component,
                    "layer": grid.layers,
                    "depth": np.asarray(grid.layers) / deepest,
                    "importance": grid.values[-1],
                },
                schema_overrides={"model": pl.String},
            )
            frames.append(last.join(numbers, how="cross"))
    order = ("model", "revision", "step", "tokens", "component", "layer", "depth", "importance")
    frames.sort(key=lambda frame: int(frame["layer"].to_numpy().max()))
    return pl.concat(frames).select(order)


def _draw_models(ax: Axes, rows: pl.DataFrame, values: pl.DataFrame) -> None:
    models = values["model"].unique(maintain_order=True).to_list()
    for number, model in enumerate(models):
        own = rows.filter(pl.col("model").eq_missing(pl.lit(model, pl.String)))
        shade = progress_map()(0.1 + 0.85 * number / max(1, len(models) - 1))
        name = (model_name(own) or "model") if len(own) else ""
        at = name + (at_checkpoint(own, own["revision"][0], 16) if len(own) else "")
        ax.plot(own["depth"], own["importance"].clip(lower_bound=1e-6), color=shade, linewidth=1, label=at, marker="o",
                markersize=1.8)  # fmt: skip
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    ax.xaxis.set_major_locator(MultipleLocator(0.25))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_xlim(-0.03, 1.03)
    ax.set_xlabel("relative depth")
    ax.set_ylabel(IMPORTANCE.label)
