"""Is the order of the layers the same throughout training? Every pair, the sets that would be dropped, calibrations."""

import itertools

import numpy as np
import polars as pl

from redundancy_trace.analysis.frames import checked, complete, one_calibration, ordered
from redundancy_trace.analysis.ranks import (
    Array,
    Counts,
    chance_overlap,
    drop_places,
    jaccard,
    kendall,
    settled_from,
    shared_layers,
    spearman,
    weighted_tau,
)
from redundancy_trace.analysis.series import Grid, Series, grid_of, importance_grids, interval, main_series
from redundancy_trace.errors import InputError


def quarter(n_layers: int) -> int:
    """A quarter of the layers, rounded up: the k that is told where one number has to do."""
    return -(-n_layers // 4)


def rank_agreement(scores: pl.DataFrame, component: str = "attn") -> pl.DataFrame:
    """How far the orders of the layers by importance agree between every two checkpoints.

    Args:
        scores: Scores of one model.
        component: `attn`, `mlp` or `block`.

    Returns:
        One row a pair, earlier checkpoint first: `revision`, `other_revision`, `step`, `other_step`, `spearman`,
        `kendall` (tau-b), `weighted_tau` (`scipy.stats.weightedtau` of the similarities: the most redundant layers
        weigh most), `n_layers`. All are −1 … 1, 1 = the same order; null where all layers of one are equal, or there
        is but one.

    Raises:
        InputError: If the component is not in the scores, or importances are missing or no numbers; names where.
    """
    rows = checked(scores)
    order, grid = ordered(rows), grid_of(importance_grids(rows), component)
    first, second = np.triu_indices(order.height, 1)
    one, other = order[first], order[second]
    found = {name: matrix[first, second] for name, matrix in _agreement(grid.values, grid.values).items()}
    return pl.DataFrame(
        {
            "revision": one["revision"],
            "other_revision": other["revision"],
            "step": one["step"],
            "other_step": other["step"],
            **found,
        }
    ).with_columns(pl.col(*found).fill_nan(None), n_layers=pl.lit(len(grid.layers)))


def topk_overlap(scores: pl.DataFrame, component: str = "attn", duplicates: pl.DataFrame | None = None) -> pl.DataFrame:
    """Overlap of the k most redundant layers with those of the last checkpoint, for every k.

    Args:
        scores: Scores of one model; of several series (seeds, stages, ingredients) the longest is taken.
        component: `attn`, `mlp` or `block`.
        duplicates: Checkpoints to leave out, as `read_duplicates` gives them.

    Returns:
        One row a checkpoint and k = 1 … L: `order`, `revision`, `step`, `tokens`, `k`, `overlap` (Jaccard, 0 … 1),
        `low` and `high` (what the standard errors of both checkpoints leave open, 95 %; null without them), `chance`
        (expected of two random sets), `chance_high` (what 95 of 100 random sets stay within).

    Raises:
        InputError: As `rank_agreement`.
    """
    series = main_series(scores, duplicates)
    grid = grid_of(series.grids, component)
    places = drop_places(grid.values)
    overlap = jaccard(shared_layers(places, places[-1]))
    band = interval(None if (shared := shared_in_draws(series, component)) is None else jaccard(shared))
    n_checkpoints, n_layers = overlap.shape
    chance, chance_high = chance_overlap(n_layers)
    place = series.checkpoints.select("order", "revision", "step", "tokens")
    nothing = pl.lit(None, pl.Float64)
    return place[np.repeat(np.arange(n_checkpoints), n_layers)].with_columns(
        k=pl.Series(np.tile(np.arange(1, n_layers + 1), n_checkpoints)),
        overlap=pl.Series(overlap.ravel()),
        low=nothing if band is None else pl.Series(band[0].ravel()),
        high=nothing if band is None else pl.Series(band[1].ravel()),
        chance=pl.Series(np.tile(chance, n_checkpoints)),
        chance_high=pl.Series(np.tile(chance_high, n_checkpoints)),
    )


def drop_onset(scores: pl.DataFrame, component: str = "attn", duplicates: pl.DataFrame | None = None) -> pl.DataFrame:
    """From when on the k most redundant layers are those of the last checkpoint, until the end.

    Args:
        scores: Scores of one model; of several series the longest is taken.
        component: `attn`, `mlp` or `block`.
        duplicates: Checkpoints to leave out.

    Returns:
        One row for k = 1 … L − 1: `k`, `order`, `revision`, `step`, `tokens` of the first checkpoint from which the set
        holds, `low_order` and `high_order`, the checkpoints between which it lies for all that the standard errors
        leave open (95 %; null without them).

    Raises:
        InputError: As `rank_agreement`.
    """
    series = main_series(scores, duplicates)
    grid = grid_of(series.grids, component)
    return onset_of(series, grid, shared_in_draws(series, component))


def onset_of(series: Series, grid: Grid, drawn: Counts | None) -> pl.DataFrame:
    """As `drop_onset`, from what was computed before."""
    places = drop_places(grid.values)
    onset = settled_from(shared_layers(places, places[-1]))[:-1]
    band = interval(None if drawn is None else settled_from(drawn)[:, :-1].astype(np.float64))
    nothing = pl.lit(None, pl.Int64)
    columns = ("order", "revision", "step", "tokens")
    found: pl.DataFrame = series.checkpoints.select(columns)[onset.tolist()]
    return found.with_columns(
        pl.int_range(1, pl.len() + 1).alias("k"),
        low_order=nothing if band is None else pl.Series(band[0], dtype=pl.Int64),
        high_order=nothing if band is None else pl.Series(band[1], dtype=pl.Int64),
    ).select("k", *columns, "low_order", "high_order")


def calibration_agreement(scores: pl.DataFrame) -> pl.DataFrame:
    """How far the order of the layers depends on the calibration: every two of a run, checkpoint by checkpoint.

    Args:
        scores: Scores of one model on several calibrations.

    Returns:
        One row a checkpoint, component and pair of calibrations that both have it, in training order: `revision`,
        `step`, `tokens`, `component`, `calibration`, `other_calibration`, `spearman`, `kendall`, `weighted_tau`,
        `k` (a quarter of the layers, rounded up), `shared` (how many of the k most redundant layers are the same),
        `overlap` (Jaccard), `chance` (expected of two random sets), `n_layers`. No rows where there is one calibration.

    Raises:
        InputError: As `rank_agreement`.
    """
    names = complete(scores)["calibration"].unique(maintain_order=True).to_list()
    pairs = itertools.combinations(names, 2) if len(names) > 1 else ()
    found = [frame for one, other in pairs for frame in _between(scores, one, other)]
    return pl.concat(found) if found else pl.DataFrame(schema=_BETWEEN)


def shared_in_draws(series: Series, component: str) -> Counts | None:
    """As `shared_layers` with the last checkpoint, for every draw; None without standard errors."""
    places = series.draw_places[component]
    return None if places is None else shared_layers(places, places[:, -1:])


_BETWEEN = {
    "revision": pl.String,
    "step": pl.Int64,
    "tokens": pl.Int64,
    "component": pl.String,
    "calibration": pl.String,
    "other_calibration": pl.String,
    "spearman": pl.Float64,
    "kendall": pl.Float64,
    "weighted_tau": pl.Float64,
    "k": pl.Int64,
    "shared": pl.Int64,
    "overlap": pl.Float64,
    "chance": pl.Float64,
    "n_layers": pl.Int64,
}


def _between(scores: pl.DataFrame, one: str | None, other: str | None) -> list[pl.DataFrame]:
    keys = ["revision", "commit"]
    first, second = (checked(one_calibration(scores, name)) for name in (one, other))
    both = [
        rows.join(others.select(keys).unique(), on=keys, how="semi", nulls_equal=True)
        for rows, others in ((first, second), (second, first))
    ]
    if both[0].is_empty():
        return []
    order = ordered(both[0])
    # Labels may differ where a run was told its tokens per step between the two: one order for both.
    place = order.select("revision", "commit", "step", "tokens", "stage", "ingredient", "seed")
    second = both[1].drop(place.columns[2:]).join(place, on=keys, nulls_equal=True)
    grids = [importance_grids(rows) for rows in (both[0], second)]
    return [
        _agreeing(order, component, (one, other), grids[0][component], grids[1][component])
        for component in grids[0]
        if component in grids[1]
    ]


def _agreeing(
    order: pl.DataFrame, component: str, names: tuple[str | None, str | None], one: Grid, other: Grid
) -> pl.DataFrame:
    if one.layers != other.layers:
        raise InputError(
            f"{component} was scored in the layers {one.layers} on {names[0]} and {other.layers} on {names[1]}; score "
            "the checkpoints anew on one of them."
        )
    n_layers = len(one.layers)
    k = quarter(n_layers)
    shared = shared_layers(drop_places(one.values), drop_places(other.values))
    found = {name: np.diagonal(matrix) for name, matrix in _agreement(one.values, other.values).items()}
    columns: dict[str, pl.Expr | pl.Series] = {
        "component": pl.lit(component),
        "calibration": pl.lit(names[0], pl.String),
        "other_calibration": pl.lit(names[1], pl.String),
        "k": pl.lit(k, pl.Int64),
        "shared": pl.Series(shared[:, k - 1]),
        "overlap": pl.Series(jaccard(shared)[:, k - 1]),
        "chance": pl.lit(float(chance_overlap(n_layers)[0][k - 1])),
        "n_layers": pl.lit(n_layers, pl.Int64),
        **{name: pl.Series(values).fill_nan(None) for name, values in found.items()},
    }
    return order.with_columns(**columns).select(*_BETWEEN)


def _agreement(one: Array, other: Array) -> dict[str, Array]:
    """The three coefficients of every two rows; NaN where one layer or equal ones have no order."""
    return {
        "spearman": spearman(one, other),
        "kendall": kendall(one, other),
        "weighted_tau": weighted_tau(one, other),
    }
