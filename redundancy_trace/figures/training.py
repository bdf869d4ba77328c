"""The training axis as drawn: where each checkpoint stands, how far its cell reaches, which ticks are shown."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import matplotlib as mpl
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, MaxNLocator, NullLocator

from redundancy_trace.analysis import Axis
from redundancy_trace.figures.style import Array, at_checkpoint, compact, plain, shortened

# A gap that is wider than this many times the gaps around it is a hole: a checkpoint that failed or was not saved.
HOLE = 1.75


@dataclass(frozen=True)
class TrainingScale:
    """Positions of the checkpoints along training and the way they are spread out on paper.

    Attributes:
        axis: What the positions count.
        values: Position of each checkpoint; those without step stand behind the last, past a gap.
        starts: Where the cell of each begins, in the same unit.
        ends: Where it ends; the next begins there, unless there is a hole.
        smallest: The smallest position above 0 (log axes).
        zero_gap: Decades between a checkpoint at 0 and the smallest above it; None where none stands at 0.
    """

    axis: Axis
    values: Array
    starts: Array
    ends: Array
    smallest: float
    zero_gap: float | None

    @property
    def n_placed(self) -> int:
        """Number of checkpoints whose position is known."""
        return sum(value is not None for value in self.axis.values)

    def spread(self, values: Array) -> Array:
        """Positions as seen on paper: themselves, or their logarithm (0 lies `zero_gap` left of the smallest)."""
        return _spread(values, self.smallest, self.zero_gap) if self.axis.log else values


def training_scale(axis: Axis) -> TrainingScale:
    """Lay the checkpoints of an axis out for drawing."""
    known = np.array([value for value in axis.values if value is not None])
    positive = known[known > 0]
    smallest = float(positive[0]) if positive.size else 1.0
    zero_gap = None
    if axis.log and positive.size < known.size:
        decades = np.log10(positive / smallest)
        zero_gap = float(max(decades[1], 0.03 * decades[-1]))
    spread = _spread(known, smallest, zero_gap) if axis.log else known
    starts, ends = cell_bounds(spread)
    width = max(0.025 * (ends[-1] - starts[0]), ends[-1] - starts[-1])
    for _ in range(len(axis.values) - known.size):
        starts = np.append(starts, ends[-1] + width)
        ends = np.append(ends, ends[-1] + 2 * width)
    spread = np.append(spread, ((starts + ends) / 2)[known.size :])
    if axis.log:
        spread, starts, ends = (_unspread(numbers, smallest, zero_gap) for numbers in (spread, starts, ends))
    return TrainingScale(axis, spread, starts, ends, smallest, zero_gap)


def cell_bounds(positions: Array) -> tuple[Array, Array]:
    """Start and end of the cell of each position: halfway to its neighbours, but not across a hole.

    Next to a hole a cell ends where the gaps around would let it end, so that nothing is shown in between.

    Args:
        positions: Increasing, as seen on paper, shape (S,), S ≥ 1.

    Returns:
        Starts and ends, shape (S,) each.

    Example:
        >>> starts, ends = cell_bounds(np.array([0.0, 1.0, 2.0, 5.0, 6.0]))
        >>> ends.tolist()
        [0.5, 1.5, 2.5, 5.5, 6.5]
    """
    if positions.size == 1:
        return positions - 0.5, positions + 0.5
    gaps = np.diff(positions)
    reach = gaps / 2
    for k in range(gaps.size):
        around = np.concatenate((gaps[max(0, k - 2) : k], gaps[k + 1 : k + 3]))
        if around.size and gaps[k] > HOLE * around.max():
            reach[k] = around.max() / 2
    return positions - np.append(reach[0], reach), positions + np.append(reach, reach[-1])


def mesh_columns(scale: TrainingScale) -> tuple[Array, list[int | None]]:
    """Edges of a mesh along training and the checkpoint in each of its columns; None = a hole."""
    starts, ends = scale.spread(scale.starts), scale.spread(scale.ends)
    edges, shown = [scale.starts[0]], list[int | None]()
    for k in range(starts.size):
        if k and starts[k] - ends[k - 1] > 1e-6 * (ends[-1] - starts[0]):
            edges.append(scale.starts[k])
            shown.append(None)
        edges.append(scale.ends[k])
        shown.append(k)
    return np.array(edges), shown


def training_ticks(scale: TrainingScale, count: int) -> list[float]:
    """About `count` ticks among the checkpoints; those without step come last."""
    axis, placed = scale.axis, scale.n_placed
    if axis.column == "index":
        return [float(scale.values[k]) for k in range(placed - 1, -1, -max(1, -(-placed // count)))][::-1]
    apart = scale.values[placed:][: max(1, count // 3)].tolist()
    count = max(2, count - len(apart))
    first, last = float(scale.values[0]), float(scale.values[placed - 1])
    if placed <= min(count, 5):
        return [*scale.values[:placed].tolist(), *apart]
    return [*(_log_ticks(scale, last, count) if axis.log else _linear_ticks(first, last, count)), *apart]


def tick_label(scale: TrainingScale, tick: float) -> str:
    """A number, or the name of the checkpoint where it has none."""
    named = 0 if scale.axis.column == "index" else scale.n_placed
    for name, value in zip(scale.axis.revisions[named:], scale.values[named:], strict=True):
        if value == tick:
            return plain(shortened(name, 16 if named == 0 else 10))
    return compact(tick)


def uncrowded(scale: TrainingScale, ticks: list[float], sizes: list[float], length: float) -> list[float]:
    """The ticks whose labels touch no other: names behind the others first, then from the left.

    Args:
        scale: The axis that the ticks are on.
        ticks: Axis values.
        sizes: Size of each label along the axis, in the unit of `length`.
        length: Length of the axis as drawn.
    """
    first, last = scale.spread(np.array([scale.starts[0], scale.ends[-1]]))
    places = (scale.spread(np.array(ticks)) - first) / (last - first) * length
    kept: list[int] = []
    for k in sorted(range(len(ticks)), key=lambda k: ticks[k] <= scale.values[scale.n_placed - 1]):
        if all(abs(places[k] - places[m]) >= (sizes[k] + sizes[m]) / 2 for m in kept):
            kept.append(k)
    return [ticks[k] for k in sorted(kept)]


def fitting_ticks(scale: TrainingScale, count: int, size_of: Callable[[float], float], length: float) -> list[float]:
    """As `training_ticks`, but only ticks whose labels touch no other.

    Of a log axis as many powers of ten as fit, evenly spaced: what stands behind the others (`main`) would otherwise
    cover the last of them, and the rest be too few to tell the scale.

    Args:
        scale: The axis that the ticks are on.
        count: About how many, beside those of checkpoints without step.
        size_of: Size of the label of a tick along the axis, in the unit of `length`.
        length: Length of the axis as drawn.
    """

    def fitting(ticks: list[float]) -> list[float]:
        return uncrowded(scale, ticks, [size_of(tick) for tick in ticks], length)

    best = fitting(training_ticks(scale, count))
    powers = _powers_of_ten(scale)
    if not scale.axis.log or len(powers) < 2:
        return best
    zero = [] if scale.zero_gap is None else [0.0]
    apart = scale.values[scale.n_placed :][: max(1, count // 3)].tolist()
    for stride in range(1, len(powers)):
        for left_out in range(stride):
            chosen = powers[: len(powers) - left_out][::-stride][::-1]
            kept = fitting([*zero, *chosen, *apart])
            inner = [tick for tick in kept if tick in chosen]
            start = chosen.index(inner[0]) if inner else 0
            evenly = inner == chosen[start : start + len(inner)]
            if evenly and len(best) < len(kept) <= count + len(apart):
                best = kept
    return best


class TrainingLocator(Locator):
    """As many ticks as fit on the side as it is drawn, whatever it was resized to."""

    axis: XAxis | YAxis

    def __init__(self, scale: TrainingScale, along: Literal["x", "y"]) -> None:
        self._scale = scale
        self._along = along

    def __call__(self) -> list[float]:
        """Positions of the ticks, at most eight."""
        # matplotlib's unit of room: three font sizes side by side, two on top of each other.
        room = max(1, self.axis.get_tick_space())
        if _slanted(self._scale, self._along):
            return training_ticks(self._scale, int(np.clip(1.5 * room, 2, 8)))
        count = int(np.clip(0.8 * room, 2, 8))
        if self._along == "y":
            return fitting_ticks(self._scale, count, lambda _: 0.6, room)
        # A character is some 0.6 font sizes wide; a half one stays free between labels.
        return fitting_ticks(
            self._scale, count, lambda tick: 0.2 * max(2, len(tick_label(self._scale, tick))) + 0.1, room
        )

    def tick_values(self, vmin: float, vmax: float) -> list[float]:  # noqa: ARG002 (matplotlib's signature)
        """The same ticks whatever the limits of the view."""
        return self()


def dress_training(ax: Axes, scale: TrainingScale, along: Literal["x", "y"], *, note: str = "") -> None:
    """Scale, limits, ticks and label of the training axis of `ax`, in the unit of `scale.axis`."""
    set_scale, set_limits = (ax.set_xscale, ax.set_xlim) if along == "x" else (ax.set_yscale, ax.set_ylim)
    if scale.axis.log and scale.zero_gap is not None:
        # matplotlib divides linscale by 1 - 1/base: 0.9 puts 0 exactly zero_gap decades from the smallest.
        set_scale("symlog", linthresh=scale.smallest, linscale=0.9 * scale.zero_gap)
    elif scale.axis.log:
        set_scale("log")
    set_limits(float(scale.starts[0]), float(scale.ends[-1]))
    side = ax.xaxis if along == "x" else ax.yaxis
    # Fixed now, for the room that labels take is asked again when the figure is saved, under other rcParams.
    size = mpl.rcParams["xtick.labelsize"] if along == "x" else mpl.rcParams["ytick.labelsize"]
    ax.tick_params(axis=along, labelsize=size)
    side.set_major_locator(TrainingLocator(scale, along))
    side.set_major_formatter(FuncFormatter(lambda tick, _: tick_label(scale, tick)))
    side.set_minor_locator(FixedLocator(_minor_ticks(scale)) if scale.axis.log else NullLocator())
    if _slanted(scale, along):
        for text in side.get_ticklabels():
            text.set(rotation=30, ha="right", rotation_mode="anchor")
    side.set_label_text(scale.axis.label + (f" ({note})" if note else ""))


def over_training(scores: pl.DataFrame, scale: TrainingScale, text: str) -> str:
    """The end of a title: `text` over training, or at the one checkpoint that there is."""
    names = scale.axis.revisions
    return f"{text} over training" if len(names) > 1 else text + at_checkpoint(scores, names[0])


def _slanted(scale: TrainingScale, along: Literal["x", "y"]) -> bool:
    """Whether labels are long names that stand side by side."""
    return along == "x" and scale.axis.column == "index" and scale.n_placed > 1


def _spread(values: Array, smallest: float, zero_gap: float | None) -> Array:
    if zero_gap is None:
        return np.asarray(np.log10(values / smallest))
    above = np.log10(np.maximum(values, smallest) / smallest)
    return np.where(values >= smallest, above, (values / smallest - 1.0) * zero_gap)


def _unspread(spread: Array, smallest: float, zero_gap: float | None) -> Array:
    if zero_gap is None:
        return np.asarray(smallest * 10.0**spread)
    above = smallest * 10.0 ** np.maximum(spread, 0.0)
    return np.where(spread >= 0, above, smallest * (spread / zero_gap + 1.0))


def _linear_ticks(first: float, last: float, count: int) -> list[float]:
    found = MaxNLocator(nbins=max(1, count - 1), steps=[1, 2, 2.5, 5, 10]).tick_values(first, last)
    return [float(tick) for tick in found if first <= tick <= last] or [first]


def _log_ticks(scale: TrainingScale, last: float, count: int) -> list[float]:
    """0 where a checkpoint stands there, and powers of ten, every second or third where they are many."""
    zero = [] if scale.zero_gap is None else [0.0]
    powers = _powers_of_ten(scale)
    stride = -(-len(powers) // max(1, count - len(zero)))
    if len(powers) >= 2:
        return zero + powers[::-stride][::-1]
    low, high = np.log10(scale.smallest) - 1e-9, np.log10(last) + 1e-9
    mantissas = [m * 10.0**k for k in range(int(np.floor(low)), int(high) + 1) for m in (1, 2, 5)]
    return zero + [tick for tick in mantissas if 10**low <= tick <= 10**high]


def _powers_of_ten(scale: TrainingScale) -> list[float]:
    """Those between the smallest position above 0 and the last that is known."""
    last = float(scale.values[scale.n_placed - 1])
    low, high = np.log10(scale.smallest) - 1e-9, np.log10(max(last, scale.smallest)) + 1e-9
    return [10.0**k for k in range(int(np.ceil(low)), int(np.floor(high)) + 1)]


def _minor_ticks(scale: TrainingScale) -> list[float]:
    """Two to nine of every decade: they tell the reader that the axis is logarithmic."""
    last = scale.values[scale.n_placed - 1]
    decades = range(int(np.floor(np.log10(scale.smallest))), int(np.floor(np.log10(last))) + 1)
    return [m * 10.0**k for k in decades for m in range(2, 10) if scale.smallest <= m * 10.0**k <= last]
