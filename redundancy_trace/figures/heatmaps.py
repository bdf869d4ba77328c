"""Layer × training heatmaps: light = redundant, cells as wide as the checkpoints are apart."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator
from numpy.typing import NDArray

from redundancy_trace.analysis import (
    Axis,
    blank_duplicates,
    checkpoint_order,
    leave_out_duplicates,
    metric_values,
    one_calibration,
    training_axis,
)
from redundancy_trace.analysis.frames import complete
from redundancy_trace.errors import InputError
from redundancy_trace.figures.style import (
    COLUMN_WIDTH,
    NOT_SCORED,
    REPEATED,
    Array,
    Limits,
    PaperAxes,
    PaperFigure,
    Width,
    arranges_colorbars,
    at_checkpoint,
    beyond,
    colour_limits,
    colour_map,
    component_label,
    head,
    layer_metric,
    layer_ticks,
    name_colorbar,
    own_room,
    panel_row,
    paper_style,
    title,
    wrap_title,
)
from redundancy_trace.figures.training import TrainingScale, dress_training, mesh_columns, over_training, training_scale
from redundancy_trace.metrics import COMPONENTS, Metric

# Thickness of the strip of layer 0 and of the gap beside it, as a share of that of all other layers.
STRIP, GAP = 0.09, 0.03
# Inches that a colour bar below its panels is high.
_BAR = 0.09
REPEATS = "repeats other weights"


def plot_heatmap(
    scores: pl.DataFrame,
    *,
    component: str = "attn",
    metric: str = "importance",
    ax: Axes | None = None,
    training: Literal["x", "y"] = "x",
    limits: Limits | None = None,
    first_layer_limits: Limits | None = None,
    colorbar: bool = True,
    duplicates: pl.DataFrame | None = None,
) -> Axes:
    """Layer × training heatmap of one component; light = redundant.

    Layer 0 stands in a strip beside the others with colours and a scale of its own: its values are far above theirs.
    Cells are as wide as the checkpoints are apart; what was not scored is hatched.

    Args:
        scores: Scores of one model.
        component: `attn`, `mlp` or `block`.
        metric: `importance` or a stored metric of layers.
        ax: Where to draw; None = a new figure one column wide (`plot_heatmap(scores).figure`).
        training: The side along which training runs; the layers are on the other.
        limits: Colour limits of layers 1 and up. None = from what means "redundant" to the largest value, outliers
            left out: then an arrow on the colour bar says up to where they reach.
        first_layer_limits: The same for layer 0.
        colorbar: Whether to draw the colour bars.
        duplicates: Checkpoints that repeat another's weights, as `read_duplicates` gives them: grey and hatched, at the
            places that their names claim, whatever scores they have.

    Returns:
        The axes of layers 1 and up (of layer 0 where there is no other).

    Raises:
        InputError: If the metric or the component is not in the scores.
    """
    grids = _grids(scores, metric, (component,), duplicates)
    both = _both_limits(grids, limits, first_layer_limits)
    label = component_label(component)
    return _one(grids, component, training, both, ax, label if ax else title(scores, label), colorbar=colorbar)


def plot_training_heatmaps(
    scores: pl.DataFrame,
    *,
    metric: str = "importance",
    training: Literal["x", "y"] = "x",
    duplicates: pl.DataFrame | None = None,
    width: Width = "page",
) -> Figure:
    """Attention, MLP and Block side by side over training, on one colour scale; layer 0 on one of its own.

    Args:
        scores: Scores of one model.
        metric: `importance` or a stored metric of layers.
        training: The side along which training runs: `x`, or `y` as in Fig. 7 of arXiv 2406.15786.
        duplicates: As for `plot_heatmap`.
        width: `page`: side by side, as wide as a two-column page; `column`: one above the other.

    Returns:
        The figure.

    Raises:
        InputError: If the metric is not in the scores.
    """
    components = [name for name in COMPONENTS if name in metric_values(scores, metric)["component"].to_list()]
    grids = _grids(scores, metric, tuple(components), duplicates)
    height = float(np.clip(1.6 + 0.03 * grids.n_layers, 2.2, 3.4))
    with paper_style():
        figure = _panels(grids, training, width, height if width == "page" else 0.75 * height)
        head(figure, title(scores, over_training(scores, grids.scale, layer_metric(metric).name.replace("_", " "))))
        return figure


def plot_calibrations(
    scores: pl.DataFrame, *, revision: str | None = None, metric: str = "importance", width: Width = "page"
) -> Figure:
    """One checkpoint on every calibration, a row each of texts and numbers of samples.

    As in Figs. 2, 3 and 10 of arXiv 2406.15786.

    Args:
        scores: Scores of one model on one calibration or more.
        revision: The checkpoint; None = the last that all calibrations have.
        metric: `importance` or a stored metric of layers.
        width: `page`: the components side by side; `column`: one above the other.

    Returns:
        The figure; all panels have one colour scale, layer 0 one of its own.

    Raises:
        InputError: If the metric is not in the scores, or there is no such checkpoint.
    """
    grids, revision = _by_calibration(scores, revision, metric)
    count = grids.scale.values.size
    height = max(2.1 if width == "page" else 1.2, 0.9 + 0.16 * count)
    with paper_style():
        figure = _panels(grids, "y", width, height)
        for ax in figure.axes[: len(grids.by_component)]:
            _name_rows(ax, grids)
        what = f"{grids.metric.name.replace('_', ' ')} by calibration"
        head(figure, title(scores, what + at_checkpoint(scores, revision)))
        return figure


def plot_calibration(
    scores: pl.DataFrame,
    *,
    component: str = "attn",
    revision: str | None = None,
    metric: str = "importance",
    ax: Axes | None = None,
    colorbar: bool = True,
) -> Axes:
    """One component of one checkpoint on every calibration, a row each of texts and numbers of samples.

    Args:
        scores: Scores of one model on one calibration or more.
        component: `attn`, `mlp` or `block`.
        revision: The checkpoint; None = the last that all calibrations have.
        metric: `importance` or a stored metric of layers.
        ax: Where to draw; None = a new figure one column wide.
        colorbar: Whether to draw the colour bars.

    Returns:
        The axes of layers 1 and up, which are on one colour scale; layer 0 has its own.

    Raises:
        InputError: If the metric or the component is not in the scores, or there is no such checkpoint.
    """
    grids, revision = _by_calibration(scores, revision, metric)
    if component not in grids.by_component:
        known = ", ".join(grids.by_component)
        raise InputError(f"There is no {metric} of component {component!r} in these scores. There are: {known}.")
    grids = replace(grids, by_component={component: grids.by_component[component]})
    label = component_label(component)
    name = label if ax else title(scores, label + at_checkpoint(scores, revision, 30))
    on = _one(grids, component, "y", _both_limits(grids, None, None), ax, name, colorbar=colorbar)
    _name_rows(on, grids)
    return on


def calibration_values(scores: pl.DataFrame, revision: str | None = None, metric: str = "importance") -> pl.DataFrame:
    """What `plot_calibrations` shows, one row a value; arguments and errors are its own."""
    scores = complete(scores)
    names = scores["calibration"].unique(maintain_order=True).to_list()
    parts = [metric_values(one_calibration(scores, name), metric) for name in names]
    there = [set(part["revision"]) for part in parts]
    if revision is None:
        shared = [name for name in parts[0]["revision"] if all(name in one for one in there)]
        if not shared:
            raise InputError("No checkpoint was scored on all calibrations: " + ", ".join(map(str, names)) + ".")
        revision = shared[-1]
    if not any(revision in one for one in there):
        known = ", ".join(parts[0]["revision"].unique(maintain_order=True))
        raise InputError(f"There are no scores of {revision!r}. There are: {known}.")
    shown = [
        part.filter(pl.col("revision") == revision).with_columns(calibration=pl.lit(name, pl.String))
        for name, part in zip(names, parts, strict=True)
    ]
    columns = ("model", "revision", "commit", "step", "tokens", "calibration", "component", "layer", "metric", "value")
    return pl.concat(shown).select(*columns, "stderr", "n_sequences", "n_tokens")


def _by_calibration(scores: pl.DataFrame, revision: str | None, metric: str) -> tuple["_Grids", str]:
    """Values of one checkpoint with calibrations in the place of checkpoints, the first on top, and its name."""
    values = calibration_values(scores, revision, metric)
    labels = values["calibration"].unique(maintain_order=True).to_list()
    names = tuple("?" if label is None else str(label).rsplit("/", 1)[-1] for label in labels)
    places = tuple(float(k) for k in range(len(names)))[::-1]
    scale = training_scale(Axis("index", "", log=False, revisions=names[::-1], values=places[::-1]))
    shape = (1 + int(values["layer"].to_numpy().max()), len(names))
    grids = {}
    for (component,), rows in values.partition_by("component", as_dict=True, maintain_order=True).items():
        grids[str(component)] = grid = np.full(shape, np.nan)
        columns = [len(names) - 1 - labels.index(label) for label in rows["calibration"]]
        grid[rows["layer"].to_numpy(), columns] = rows["value"].to_numpy()
    repeats = np.zeros(len(names), dtype=np.bool_)
    return _Grids(layer_metric(metric), scale, grids, repeats), values["revision"][0]


def _name_rows(ax: Axes, grids: "_Grids") -> None:
    """Each calibration has its name beside its row."""
    ax.yaxis.set_major_locator(FixedLocator(grids.scale.values.tolist()))
    ax.set_ylabel("")


def _one(
    grids: "_Grids",
    component: str,
    training: Literal["x", "y"],
    limits: tuple[Limits, Limits],
    ax: Axes | None,
    name: str,
    *,
    colorbar: bool,
) -> Axes:
    """One component under a title: on the given axes, or in a figure of its own."""
    if ax is not None:
        meshes = _draw(ax, grids, component, training, *limits)
        ax.set_title(name)
        if grids.repeats.any():
            _name_repeats(ax, own=False)
        if colorbar and ax.figure is not None:
            _colorbars(ax.figure, [ax], meshes, grids)
        return ax
    with paper_style():
        (on,), bars = _own_column(grids, 1, 2.8, colorbar=colorbar)
        _name_bars(on, bars, _draw(on, grids, component, training, *limits), grids)
        on.set_title(name)
        wrap_title(on)
        if grids.repeats.any():
            _name_repeats(on, own=True)
        return on


def _panels(grids: "_Grids", training: Literal["x", "y"], width: Width, height: float) -> PaperFigure:
    """All components on one scale, with the labels that they share and the colour bars."""
    limits = _both_limits(grids, None, None)
    page = width == "page"
    # Without `sharex`: ticks that are shared would be dressed once for all, and the strip of layer 0 has its own.
    bars: list[Axes] = []
    if page:
        _, panels = panel_row(len(grids.by_component), width, height)
    else:
        panels, bars = _own_column(grids, len(grids.by_component), height)
    for ax, component in zip(panels, grids.by_component, strict=True):
        meshes = _draw(ax, grids, component, training, *limits)
        ax.set_title(component_label(component))
    # A panel may have hatched cells that others have not: the shared label is the one that says so.
    x_label = max((ax.get_xlabel() for ax in panels), key=len)
    y_label = max((ax.get_ylabel() for ax in panels), key=len)
    for ax in panels:
        ax.set_xlabel(x_label if not page and ax is panels[-1] else "")
        ax.set_ylabel(y_label if not page or ax is panels[0] else "")
        ax.tick_params(axis="y", labelleft=not page or ax is panels[0])
        ax.tick_params(axis="x", labelbottom=page or ax is panels[-1])
    figure = panels[0].get_figure(root=True)
    assert isinstance(figure, PaperFigure)
    if page:
        figure.supxlabel(x_label, fontsize="medium")
        _colorbars(figure, panels, meshes, grids)
    _name_bars(panels[0], bars, meshes, grids)
    if grids.repeats.any():
        place: Literal["outside upper right", "outside lower center"]
        place = "outside upper right" if page else "outside lower center"
        figure.legend(handles=[_repeats_handle()], loc=place, frameon=False, fontsize="small")
    return figure


def _own_column(grids: "_Grids", count: int, height: float, *, colorbar: bool = True) -> tuple[list[Axes], list[Axes]]:
    """Panels of a figure one column wide, one above the other, and axes for the colour bars side by side below them.

    Beside the panels the bars and their labels would take half of the column.
    """
    parts = len(grids.parts()) if colorbar else 0
    figure = PaperFigure(COLUMN_WIDTH, height * count + (0.2 if parts and count > 1 else 0.0))
    grid = figure.add_gridspec(
        count + bool(parts), parts or 1, height_ratios=[1.0] * count + [_BAR / height] * bool(parts)
    )
    one = {"axes_class": PaperAxes} if count == 1 else {}
    panels = [figure.add_subplot(grid[k, :], **one) for k in range(count)]
    return panels, [figure.add_subplot(grid[count, k]) for k in range(parts)]


@dataclass(frozen=True)
class _Grids:
    """Values of one metric by component, shape (layers, checkpoints) each; NaN = not scored, or left out.

    Left out are those that `repeats`, shape (checkpoints,), says repeat the weights of another.
    """

    metric: Metric
    scale: TrainingScale
    by_component: dict[str, Array]
    repeats: NDArray[np.bool_]

    @property
    def n_layers(self) -> int:
        return len(next(iter(self.by_component.values())))

    @property
    def body(self) -> slice:
        """The layers of the main part: all but layer 0, if there are others."""
        return slice(1 if self.n_layers > 1 else 0, self.n_layers)

    def values(self, layers: slice) -> Array:
        return np.concatenate([grid[layers].ravel() for grid in self.by_component.values()])

    def parts(self) -> list[tuple[str, Array]]:
        """Label and values of the main part and, if there is one, of the strip of layer 0."""
        last = self.n_layers - 1
        which = "layer 0" if last == 0 else f"layers 1–{last}" if last > 1 else "layer 1"
        parts = [(f"{self.metric.label}\n{which}", self.values(self.body))]
        if last:
            parts.append(("layer 0", self.values(slice(0, 1))))
        return parts


def _grids(scores: pl.DataFrame, metric: str, components: tuple[str, ...], duplicates: pl.DataFrame | None) -> _Grids:
    names = leave_out_duplicates(scores, duplicates)["revision"].unique()
    scores = blank_duplicates(scores, duplicates)
    kind = layer_metric(metric)
    values = metric_values(scores, metric)
    scale = training_scale(training_axis(scores))
    n_layers = 1 + int(values["layer"].to_numpy().max())
    grids = {}
    for component in components:
        rows = metric_values(scores, metric, component)
        grid = np.full((n_layers, scale.values.size), np.nan)
        grid[rows["layer"].to_numpy(), rows["order"].to_numpy()] = rows["value"].to_numpy()
        grids[component] = grid
    repeats = ~checkpoint_order(scores)["revision"].is_in(names.implode())
    return _Grids(kind, scale, grids, repeats.to_numpy())


def _both_limits(grids: _Grids, limits: Limits | None, first_layer: Limits | None) -> tuple[Limits, Limits]:
    return (
        limits or colour_limits(grids.values(grids.body), grids.metric),
        first_layer or colour_limits(grids.values(slice(0, 1)), grids.metric),
    )


def _draw(
    ax: Axes, grids: _Grids, component: str, training: Literal["x", "y"], limits: Limits, first_layer: Limits
) -> list[QuadMesh]:
    """The meshes of layers 1 and up and of the strip of layer 0, with everything but titles and colour bars."""
    grid, scale = grids.by_component[component], grids.scale
    columns, shown = mesh_columns(scale)
    hole = np.full(grids.n_layers, np.nan)
    cells = np.ma.masked_invalid(np.stack([hole if k is None else grid[:, k] for k in shown], axis=1))
    ax.patch.set(**NOT_SCORED)

    def draw(rows: Array, values: Array, limits: Limits, *, first: bool) -> QuadMesh:
        x, y, colours = (columns, rows, values) if training == "x" else (rows, columns, values.T)
        colour = colour_map(grids.metric, first_layer=first)
        return ax.pcolormesh(x, y, colours, cmap=colour, vmin=limits[0], vmax=limits[1], rasterized=True)

    across, along = (ax.axhspan, ax.axvspan) if training == "x" else (ax.axvspan, ax.axhspan)
    for start, end in _stretches(grids):
        along(start, end, linewidth=0, snap=False, zorder=1.1, **REPEATED)  # above the cells, or thin ones are lost
    n_layers, ticks, names = grids.n_layers, [0.0], ["0"]
    if n_layers == 1:
        meshes, low = [draw(np.array([-0.5, 0.5]), cells, limits, first=True)], -0.5
    else:
        meshes = [draw(np.arange(0.5, n_layers), cells[1:], limits, first=False)]
        width, gap = STRIP * (n_layers - 1), GAP * (n_layers - 1)
        high, low = 0.5 - gap, 0.5 - gap - width
        meshes.append(draw(np.array([low, high]), cells[:1], first_layer, first=True))
        across(high, 0.5, facecolor="white", edgecolor="black", linewidth=mpl.rcParams["axes.linewidth"], zorder=1.2)
        layers = layer_ticks(1, n_layers - 1, 8 if training == "x" else 6)
        ticks, names = [(low + high) / 2, *map(float, layers)], ["0", *map(str, layers)]
    for k in range(scale.n_placed, scale.values.size):  # nothing is missing in front of what has no step
        along(scale.ends[k - 1], scale.starts[k], color="white", linewidth=0)

    n_holes = shown.count(None) - (scale.values.size - scale.n_placed)
    missing = n_holes > 0 or np.isnan(grid[:, ~grids.repeats]).any()
    dress_training(ax, scale, training, note="hatched: not scored" if missing else "")
    side = ax.yaxis if training == "x" else ax.xaxis
    side.set_major_locator(FixedLocator(ticks))
    side.set_major_formatter(FixedFormatter(names))
    side.set_minor_locator(NullLocator())
    side.set_label_text("layer")
    (ax.set_ylim if training == "x" else ax.set_xlim)(low, n_layers - 0.5)
    return meshes


def _stretches(grids: _Grids) -> list[tuple[float, float]]:
    """Start and end of what repeats other weights, neighbours together: thin cells would not show their hatching."""
    scale = grids.scale
    starts, ends = scale.spread(scale.starts), scale.spread(scale.ends)
    apart = 1e-6 * (ends[-1] - starts[0])
    found: list[tuple[float, float]] = []
    for k in np.flatnonzero(grids.repeats):
        joined = k > 0 and grids.repeats[k - 1] and starts[k] - ends[k - 1] <= apart
        start = found.pop()[0] if joined else float(scale.starts[k])
        found.append((start, float(scale.ends[k])))
    return found


def _repeats_handle() -> Patch:
    return Patch(**REPEATED, linewidth=0, label=REPEATS)


def _name_repeats(ax: Axes, *, own: bool) -> None:
    """The legend of one heatmap: below it in a figure of its own, else in the corner above the axes that were given."""
    style: dict[str, Any] = {"handles": [_repeats_handle()], "frameon": False, "fontsize": "small"}
    figure = ax.get_figure(root=True)
    if own and figure is not None:
        figure.legend(loc="outside lower center", **style)
        return
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0, **style)
    ax.set_title(ax.get_title(), loc="left")
    ax.set_title("")


def _colorbars(figure: Figure | SubFigure, axes: Sequence[Axes], meshes: Sequence[QuadMesh], grids: _Grids) -> None:
    """Colour bars on the right of the axes: side by side, or one above the other where no engine makes them room."""
    arranged = arranges_colorbars(axes[0])
    height = axes[0].get_figure(root=True).get_figheight()  # type: ignore[union-attr]
    columns = [] if arranged else _bars_above_each_other(figure, axes[0], len(meshes))
    # Side by side, the one drawn last stands next to the axes: that of layers 1 and up.
    for k in reversed(range(len(meshes))):
        label, values = grids.parts()[k]
        where: dict[str, Any] = {"ax": axes, "aspect": 14 * height if len(axes) > 1 else 20, "pad": 0.015}
        if columns:
            where = {"cax": columns[k]}
        elif not arranged:
            where["pad"] = (0.05, 0.3)[k]
        bar = figure.colorbar(meshes[k], extend=beyond(values, meshes[k].get_clim()), **where)
        name_colorbar(bar, label, values)


def _name_bars(ax: Axes, bars: list[Axes], meshes: Sequence[QuadMesh], grids: _Grids) -> None:
    """Colour bars in axes of their own below the panels; none where there are no such axes."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    for bar, mesh, (label, values) in zip(bars, meshes, grids.parts(), strict=False):
        extend = beyond(values, mesh.get_clim())
        name_colorbar(figure.colorbar(mesh, cax=bar, orientation="horizontal", extend=extend), label, values)


def _bars_above_each_other(figure: Figure | SubFigure, ax: Axes, count: int) -> list[Axes]:
    """Axes for colour bars in a column that holds their labels too; none where `ax` was placed by hand."""
    cell = ax.get_subplotspec()
    if cell is None:
        return []
    share, aspect = own_room(ax, lines=2)
    heights = [3.0, 1.0][:count]
    grid = cell.subgridspec(count, 2, width_ratios=[1 - share, share], height_ratios=heights, wspace=0.08)
    ax.set_subplotspec(grid[:, 0])
    bars = [figure.add_subplot(grid[k, 1]) for k in range(count)]
    for bar, height in zip(bars, heights, strict=True):
        bar.set_box_aspect(aspect * height / sum(heights))
        bar.set_anchor("W")
    return bars
