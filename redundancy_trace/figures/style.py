"""How every figure looks: sizes and fonts as printed, colours, file metadata, short texts."""

import io
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.style
import numpy as np
import polars as pl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from redundancy_trace.errors import InputError
from redundancy_trace.metrics import COMPONENT_LABELS, IMPORTANCE, LAYER_METRICS, Metric

Array = NDArray[np.float64]
Limits = tuple[float, float]

# Inches: one column and the full width of a two-column page; fonts are in points at that printed size.
COLUMN_WIDTH = 3.4
PAGE_WIDTH = 7.0
Width = Literal["column", "page"]
WIDTHS: dict[str, float] = {"page": PAGE_WIDTH, "column": COLUMN_WIDTH}
# Colours that stay apart in print and for the colour-blind (Okabe and Ito).
COMPONENT_COLOURS = {"attn": "#0072B2", "mlp": "#D55E00", "block": "#009E73"}
_SCREEN_DPI = 100
# Of a title above axes that fill a column together with their labels and a colour bar.
_TITLE_CHARACTERS = 42
# Height over width of a colour bar beside one axes.
_BAR_ASPECT = 20.0
STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "figure.titlesize": 9,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "hatch.linewidth": 0.4,
    "savefig.dpi": 300,
    # Type 42 keeps text as text: journals refuse Type 3 fonts.
    "pdf.fonttype": 42,
    "svg.hashsalt": "redundancy_trace",
}
# What a file would say of its day and its maker: left out, so that the same scores give the same bytes.
FORMATS: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None},
}
NOT_SCORED = {"facecolor": "0.93", "edgecolor": "0.7", "hatch": "//////"}
# Darker than the light end of every colour map, and hatched the other way than what was not scored.
REPEATED: dict[str, Any] = {"facecolor": "0.82", "edgecolor": "0.5", "hatch": "\\\\\\\\\\\\"}


@contextmanager
def paper_style() -> Iterator[None]:
    """Matplotlib's defaults with the sizes above, whatever the user's own settings; they are restored."""
    with matplotlib.style.context(["default", STYLE]):
        yield


class PaperFigure(Figure):
    """A figure outside pyplot, which a notebook shows where it is the last value of a cell."""

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), layout="constrained")

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """The picture, drawn as it is saved, and its size on the screen; what IPython asks for."""
        file = io.BytesIO()
        with paper_style():
            self.savefig(file, format="png", dpi=2 * _SCREEN_DPI, metadata=FORMATS["png"])
        width, height = (round(_SCREEN_DPI * inches) for inches in self.get_size_inches())
        return file.getvalue(), {"width": int(width), "height": int(height)}


def panel_row(count: int, width: Width, height: float, **sharing: Any) -> tuple[PaperFigure, list[Axes]]:
    """A figure with axes side by side across a page, or one above the other in a column; one alone takes a column.

    Args:
        count: How many axes.
        width: `page` or `column`.
        height: Inches that one row of axes takes.
        **sharing: `sharex`, `sharey` of `Figure.subplots`.
    """
    rows, columns = (1, count) if width == "page" else (count, 1)
    figure = PaperFigure(COLUMN_WIDTH if count == 1 else WIDTHS[width], height * rows)
    return figure, figure.subplots(rows, columns, squeeze=False, **sharing).ravel().tolist()


def head(figure: Figure, text: str) -> None:
    """The title of a figure, on as many lines as it needs at its width."""
    figure.suptitle(wrapped(text, int(figure.get_figwidth() / 0.078)))


def wrapped(text: str, most: int) -> str:
    """Text on lines of so many characters; a word that is longer has a line of its own."""
    return "\n".join(textwrap.wrap(text, most, break_long_words=False))


def bar_beside(figure: Figure, drawn: ScalarMappable, axes: list[Axes]) -> Colorbar:
    """A slender colour bar along all of the axes, whether they stand in a row or in a column."""
    bar = figure.colorbar(drawn, ax=axes, aspect=14 * figure.get_figheight(), pad=0.015)
    bar.outline.set_linewidth(0.4)
    return bar


def outer_labels(axes: list[Axes], width: Width) -> None:
    """Labels of a row of axes that share both sides, at the outer ones only."""
    for ax in axes:
        if width == "page" and ax is not axes[0]:
            ax.set_ylabel("")
        if width == "column" and ax is not axes[-1]:
            ax.set_xlabel("")


class PaperAxes(Axes):
    """The only axes of a `PaperFigure`, shown as it is."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        figure = self.get_figure(root=True)
        assert isinstance(figure, PaperFigure)
        return figure._repr_png_()


@contextmanager
def axes_or_new(ax: Axes | None, height: float) -> Iterator[Axes]:
    """The given axes as they are, or new ones in a figure of their own, one column wide, in the paper's style.

    The title of new ones, which names the model, is set on as many lines as it needs.
    """
    with paper_style() if ax is None else nullcontext():
        on = ax or PaperFigure(COLUMN_WIDTH, height).add_subplot(axes_class=PaperAxes)
        yield on
        if ax is None:
            wrap_title(on)


def wrap_title(ax: Axes) -> None:
    """Break the title of axes that are as wide as a column, so that it ends within it."""
    ax.set_title(wrapped(ax.get_title(), _TITLE_CHARACTERS))


def arranges_colorbars(ax: Axes) -> bool:
    """Whether the figure's layout engine makes room for the labels of colour bars."""
    figure = ax.get_figure(root=True)
    return figure is not None and isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine)


def own_room(ax: Axes, *, lines: int) -> tuple[float, float]:
    """What a colour bar needs if its ticks and label are to find room by themselves.

    Args:
        ax: The axes that the bar stands beside, and that it takes its room from.
        lines: Lines of the label.

    Returns:
        Share of the width of `ax`, and height over width of the bar.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    points = 72 / figure.dpi
    width, height = ax.bbox.width * points, ax.bbox.height * points
    tick, label = (
        FontProperties(size=mpl.rcParams[name]).get_size_in_points() for name in ("ytick.labelsize", "axes.labelsize")
    )
    # Ticks of four or five characters, each some 0.6 font sizes wide; lines 1.2 font sizes apart; gaps between them.
    needed = height / _BAR_ASPECT + 2.8 * tick + 1.2 * label * lines + 12.0
    return min(0.5, needed / width), _BAR_ASPECT


def layer_metric(name: str) -> Metric:
    """Label and range of a metric that every layer has."""
    known = {**LAYER_METRICS, IMPORTANCE.name: IMPORTANCE}
    if name not in known:
        raise InputError(f"{name!r} is no metric of layers. Those are: {', '.join(known)}.")
    return known[name]


def colour_map(metric: Metric, *, first_layer: bool = False) -> Colormap:
    """Light = redundant; layer 0 has other colours, since it has another scale."""
    if metric.redundant is None:
        return _palette("vlag")
    name = "mako" if first_layer else "rocket"
    return _palette(name if metric.redundant == metric.high else name + "_r")


def progress_map() -> Colormap:
    """Early in training = light, late = dark."""
    return _palette("crest")


def agreement_map() -> Colormap:
    """Light = the same order, dark = another."""
    return _palette("mako")


def _palette(name: str) -> Colormap:
    colours = sns.color_palette(name, as_cmap=True)
    if not isinstance(colours, Colormap):
        raise TypeError(f"seaborn has no colour map {name!r}")
    return colours


def colour_limits(values: Array, metric: Metric) -> Limits:
    """Limits from the value that means "redundant" to the largest, but no outlier stretches them.

    Where the largest is over twice as far away as 95 of 100 values are, they reach half as far again as those do.
    They lie around 0 where no value means "redundant".
    """
    values = values[np.isfinite(values)]
    distances = np.abs(values - (metric.redundant or 0.0))
    bound = 1e-6
    if distances.size and distances.max() > 0:
        common, largest = float(np.quantile(distances, 0.95)), float(distances.max())
        bound = 1.5 * common if 0 < 2 * common < largest else largest
    if metric.redundant is None:
        return -bound, bound
    if metric.redundant == metric.high:
        return metric.redundant - bound, metric.redundant
    return metric.redundant, metric.redundant + bound


def beyond(values: Array, limits: Limits) -> Literal["neither", "min", "max", "both"]:
    """At which ends of a colour bar values lie beyond it."""
    values = values[np.isfinite(values)]
    below, above = bool((values < limits[0]).any()), bool((values > limits[1]).any())
    return "both" if below and above else "min" if below else "max" if above else "neither"


def name_colorbar(bar: Colorbar, label: str, values: Array) -> None:
    """Label a colour bar; its arrows are explained by the values that they stand for."""
    values = values[np.isfinite(values)]
    ends = {"min": ("min",), "max": ("max",), "both": ("min", "max")}.get(bar.extend, ())
    reach = [f"{values.min() if end == 'min' else values.max():.2g}" for end in ends]
    bar.set_label(label + (f" (arrow: to {' and '.join(reach)})" if reach else ""))
    bar.outline.set_linewidth(0.4)


def plain(text: str) -> str:
    """Text shown as it is: a dollar sign opens no formula."""
    return text.replace("$", r"\$")


def shortened(text: str, length: int) -> str:
    """Text of at most `length` characters, the middle left out: ends tell names of checkpoints apart."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[head + 1 - length :]}"


def compact(value: float) -> str:
    """A count for a tick.

    Example:
        >>> [compact(value) for value in (0, 512, 1000, 143000, 4.2e9)]
        ['0', '512', '1k', '143k', '4.2B']
    """
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


def layer_ticks(first: int, last: int, count: int = 8) -> list[int]:
    """At most about `count` whole layers, the last among them: it often stands apart.

    Example:
        >>> layer_ticks(1, 31)
        [4, 8, 12, 16, 20, 24, 31]
    """
    stride = next(s for s in (1, 2, 4, 5, 8, 10, 16, 20, 25, 50, 100, 1000) if (last - first) / s < count)
    ticks = [layer for layer in range(first, last + 1) if layer % stride == 0]
    while ticks and 0 < last - ticks[-1] < 0.8 * stride:
        ticks.pop()
    return ticks if ticks and ticks[-1] == last else [*ticks, last]


def model_name(scores: pl.DataFrame) -> str:
    """The model as a title names it: a repository in full, of a folder the last part; empty where unknown."""
    name = scores["model"].drop_nulls().first() if "model" in scores.columns else None
    if name is None:
        return ""
    text = str(name).replace("\\", "/").rstrip("/")
    return plain(text if text.count("/") <= 1 and text[:1] not in "./~" else text.rsplit("/", 1)[-1])


def title(scores: pl.DataFrame, text: str) -> str:
    """`text`, behind the model's name where it is known."""
    name = model_name(scores)
    return f"{name}: {text}" if name else text[:1].upper() + text[1:]


def at_checkpoint(scores: pl.DataFrame, revision: str, length: int = 40) -> str:
    """` at REVISION`, for a title; empty where the revision is what the model is called."""
    return "" if plain(revision) == model_name(scores) else f" at {plain(shortened(revision, length))}"


def component_label(component: str) -> str:
    """Attention, MLP, Block."""
    return COMPONENT_LABELS.get(component, component)
