"""One stretch of training as matrices: checkpoints × layers of importances and of their standard errors."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from redundancy_trace.analysis.axis import Axis, axis_of
from redundancy_trace.analysis.duplicates import leave_out_duplicates
from redundancy_trace.analysis.frames import checked, ordered, place_of, values_of
from redundancy_trace.analysis.ranks import Array, Counts, drop_places
from redundancy_trace.errors import InputError
from redundancy_trace.metrics import COMPONENTS, IMPORTANCE

# Draws behind every interval, and what starts them: the same scores give the same intervals.
RESAMPLES = 200
SEED = 0
# Percentiles between which an interval lies.
INTERVAL = (2.5, 97.5)
_NAMED = 3


@dataclass(frozen=True)
class Grid:
    """Importances of one component.

    Attributes:
        layers: Indices of the layers that have the component.
        values: Importance, shape (checkpoints, layers).
        errors: Standard errors over sequences, same shape; None where one is unknown.
    """

    layers: tuple[int, ...]
    values: Array
    errors: Array | None

    def among(self, layers: Collection[int]) -> list[int]:
        """Columns of these layers, of those that have the component."""
        return [column for column, layer in enumerate(self.layers) if layer in layers]


@dataclass(frozen=True)
class LeftOut:
    """A checkpoint that statistics go without, and why."""

    revision: str
    reason: str


@dataclass(frozen=True)
class Series:
    """The checkpoints of one seed, stage, ingredient and part of a training: what a trend may be drawn through.

    Attributes:
        checkpoints: As `checkpoint_order` gives them.
        axis: Where they stand in training.
        grids: By component.
        name: What sets the series apart, such as `stage 1, seed 3`; empty where there is no other.
        left_out: Scored checkpoints that are not in it.
    """

    checkpoints: pl.DataFrame
    axis: Axis
    grids: Mapping[str, Grid]
    name: str
    left_out: tuple[LeftOut, ...]

    @property
    def inner(self) -> range:
        """The layers but the first and the last of the model, which stand far above the others."""
        return range(1, self.last_layer)

    @property
    def last_layer(self) -> int:
        """Index of the last layer of the model."""
        return max(grid.layers[-1] for grid in self.grids.values())

    @cached_property
    def draws(self) -> Mapping[str, Array | None]:
        """Importances as they might have come out, shape (draws, checkpoints, layers); None without standard errors.

        Each is drawn from a normal distribution around the measured one, with its standard error, by itself. (The
        errors of checkpoints scored on the same text go together in part: what compares checkpoints is, if anything,
        more certain than these draws make it.)
        """
        return {component: _drawn(component, grid) for component, grid in self.grids.items()}

    @cached_property
    def draw_places(self) -> Mapping[str, Counts | None]:
        """Places of the layers in the order of dropping, of every draw."""
        return {name: None if draws is None else drop_places(draws) for name, draws in self.draws.items()}


def main_series(scores: pl.DataFrame, duplicates: pl.DataFrame | None = None) -> Series:
    """The longest series of the scores; of equally long ones the first in training order.

    Args:
        scores: Scores of one model.
        duplicates: Checkpoints that repeat another's weights, as `read_duplicates` gives them: left out.

    Returns:
        The series. Checkpoints whose names tell no place in training are in it only where no name tells one.

    Raises:
        InputError: If importances are missing in it, or are no numbers; names where.
    """
    scores = checked(scores)
    kept = leave_out_duplicates(scores, duplicates)
    left = [] if duplicates is None else _repeating(kept, duplicates)
    order = ordered(kept)
    rows = order.rows(named=True)
    placed = [row["step"] is not None or row["tokens"] is not None for row in rows]
    keys = [place_of(row)[:-1] if there else None for row, there in zip(rows, placed, strict=True)]
    members = {key: keys.count(key) for key in dict.fromkeys(keys) if key is not None or not any(placed)}
    chosen = max(members, key=lambda key: members[key])
    for row, key in zip(rows, keys, strict=True):
        if key != chosen:
            why = (
                "its name tells no place in training" if key is None else f"of another series ({_named(key, members)})"
            )
            left.append(LeftOut(row["revision"], why))
    inside = [key == chosen for key in keys]
    within = kept
    if not all(inside):
        within = kept.join(order.filter(inside), on=["revision", "commit"], how="semi", nulls_equal=True)
        order = ordered(within)
    name = _named(chosen, members) if chosen is not None and len(members) > 1 else ""
    return Series(order, axis_of(order), importance_grids(within), name, tuple(left))


def importance_grids(rows: pl.DataFrame) -> dict[str, Grid]:
    """The importances of every component, checkpoints in training order.

    Args:
        rows: Checked rows of one model and one calibration.

    Raises:
        InputError: If a layer lacks an importance that it has at other checkpoints, or one is no number.
    """
    values = values_of(rows, IMPORTANCE.name)
    names = [str(name) for name in ordered(rows)["revision"]]
    if values.is_empty():
        raise InputError("These scores hold no cosine_similarity, so no importance; score the checkpoints anew.")
    parts = values.partition_by("component", as_dict=True)
    return {name: _grid(name, parts[name,], names) for name in COMPONENTS if (name,) in parts}


def grid_of(grids: Mapping[str, Grid], component: str) -> Grid:
    """The importances of a component; refuses one that was not scored."""
    if component not in grids:
        raise InputError(
            f"There is no importance of component {component!r} in these scores. "
            f"Components with it: {', '.join(grids)}."
        )
    return grids[component]


def interval(draws: Array | None) -> tuple[Array, Array] | None:
    """Lower and upper end of the interval of what was computed from draws, along the first axis."""
    if draws is None:
        return None
    # One partial sort for both; interpolation between draws would feign an accuracy that 200 of them have not.
    low, high = np.percentile(draws, INTERVAL, axis=0, method="nearest")
    return low, high


def _drawn(component: str, grid: Grid) -> Array | None:
    if grid.errors is None:
        return None
    rng = np.random.default_rng([SEED, COMPONENTS.index(component)])
    draws = rng.standard_normal((RESAMPLES, *grid.values.shape))
    draws *= grid.errors
    draws += grid.values
    return draws


def _grid(component: str, values: pl.DataFrame, names: list[str]) -> Grid:
    layers = values["layer"].unique().sort()
    places = values["order"].to_numpy(), layers.search_sorted(values["layer"]).to_numpy()
    there = np.zeros((len(names), layers.len()), dtype=bool)
    there[places] = True
    grid, errors = np.full(there.shape, np.nan), np.full(there.shape, np.nan)
    grid[places], errors[places] = values["value"].to_numpy(), values["stderr"].to_numpy()
    for wrong, what in ((~there, "missing"), (~np.isfinite(grid), "no number")):
        if wrong.any():
            raise InputError(_told(component, wrong, what, layers.to_list(), names))
    return Grid(tuple(layers), grid, errors if np.isfinite(errors).all() else None)


def _told(component: str, wrong: NDArray[np.bool_], what: str, layers: list[int], names: list[str]) -> str:
    at = np.flatnonzero(wrong.any(axis=1))
    spots = [
        f"{names[k]} (layer{'s' if wrong[k].sum() > 1 else ''} "
        f"{', '.join(str(layers[index]) for index in np.flatnonzero(wrong[k])[:_NAMED])}"
        f"{', …' if wrong[k].sum() > _NAMED else ''})"
        for k in at[:_NAMED]
    ]
    more = f" and {at.size - _NAMED} more" if at.size > _NAMED else ""
    return (
        f"The importance of {component} is {what} at {', '.join(spots)}{more}, so the order of the layers is unknown "
        "there. Score anew (delete the checkpoint's file in the run's scores/ and repeat the sweep), or leave it out: "
        f"scores.filter(polars.col('revision') != {names[at[0]]!r})."
    )


def _repeating(kept: pl.DataFrame, duplicates: pl.DataFrame) -> list[LeftOut]:
    """The duplicates that no row is left of, scored or not."""
    there = set(kept["revision"].unique())
    named = duplicates.select("revision", "duplicate_of", "partial").rows()
    return [
        LeftOut(name, f"repeats {'a part of ' if partial else ''}the weights of {other}")
        for name, other, partial in named
        if name not in there
    ]


def _named(key: tuple[object, ...], keys: Iterable[tuple[object, ...] | None]) -> str:
    """What sets a series apart from the others, in words; the order of the key is that of `place_of`."""
    others = [other for other in keys if other is not None]
    words = []
    for index, (what, value) in enumerate(zip(("seed ", "stage ", "ingredient ", ""), key, strict=True)):
        if len({other[index] for other in others}) > 1:
            text = "".join(piece[-1] for piece in value) if isinstance(value, tuple) else value
            words.append(f"{what}{text}" if text not in (None, "") else f"no {what.strip() or 'named part'}")
    return ", ".join(words)
