"""What changes while a model trains: means, the place of attention, the ends of the stack. All with intervals."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from redundancy_trace.analysis.agreement import quarter, shared_in_draws
from redundancy_trace.analysis.ranks import (
    Array,
    Counts,
    drop_places,
    jaccard,
    kendall,
    shared_layers,
    spearman,
    spearman_of_rows,
    weighted_tau,
)
from redundancy_trace.analysis.series import Series, interval, main_series

# Component of what compares attention with MLP.
JOINT = "joint"
LAYERS = ("all", "inner")


@dataclass(frozen=True)
class Curve:
    """One statistic over the checkpoints of a series.

    Attributes:
        component: `attn`, `mlp`, `block` or `joint`.
        statistic: Its name.
        values: One a checkpoint.
        draws: The same of every draw, shape (draws, checkpoints); None without standard errors.
    """

    component: str
    statistic: str
    values: Array
    draws: Array | None


def checkpoint_statistics(scores: pl.DataFrame, duplicates: pl.DataFrame | None = None) -> pl.DataFrame:
    """What can be said of every checkpoint, one row a value.

    Args:
        scores: Scores of one model; of several series (seeds, stages, ingredients) the longest is taken.
        duplicates: Checkpoints to leave out, as `read_duplicates` gives them.

    Returns:
        `order`, `revision`, `step`, `tokens`, `component`, `statistic`, `value`, and `low` and `high`, what the
        standard errors leave open (95 %; null without them, or where no interval is computed). Statistics of `attn`,
        `mlp`, `block`: `importance` and `importance_inner` (mean over all layers, and without the first and the last);
        `spearman`, `kendall`, `weighted_tau` (order of the layers against the last checkpoint's); `overlap` (Jaccard of
        the most redundant quarter of the layers with the last checkpoint's); `first_layer`, `last_layer` (importance of
        the layer ÷ median of the inner layers). Of `joint`: `attn_below_mlp` (share of layers whose attention is less
        important than their MLP), `attn_first` (attentions that are dropped before the first MLP, where both are
        ordered together: Joint Layer Drop of arXiv 2406.15786, sec. 7).

    Raises:
        InputError: If importances are missing or no numbers; names where.
    """
    series = main_series(scores, duplicates)
    shared = {component: shared_in_draws(series, component) for component in series.grids}
    return curves_frame(series, curves_of(series, shared))


def importance_trends(scores: pl.DataFrame, duplicates: pl.DataFrame | None = None) -> pl.DataFrame:
    """How the mean importance of each component moves over training, with and without the first and last layer.

    Args:
        scores: Scores of one model; of several series the longest is taken.
        duplicates: Checkpoints to leave out.

    Returns:
        One row a component and `layers` (`all`, `inner`): `first` and `last` (mean importance at the ends), `slope`
        (least squares, per tenfold of what `per` says: `tokens` or `step`; checkpoints at 0 are left out of it; null
        where names tell neither), `slope_low`, `slope_high`, `spearman` (of the mean with the place in training),
        `spearman_low`, `spearman_high` (95 %, from the standard errors), `n_checkpoints`.

    Raises:
        InputError: As `checkpoint_statistics`.
    """
    return trends_of(main_series(scores, duplicates))


def curves_of(series: Series, shared: dict[str, Counts | None]) -> list[Curve]:
    """Every statistic of `checkpoint_statistics`; `shared` is what `shared_in_draws` gives of each component."""
    curves = [curve for component in series.grids for curve in _of_component(series, component, shared[component])]
    return [*curves, *_of_attention_and_mlp(series)]


def curves_frame(series: Series, curves: list[Curve]) -> pl.DataFrame:
    """Curves as `checkpoint_statistics` gives them."""
    place = series.checkpoints.select("order", "revision", "step", "tokens")
    frames = []
    for curve in curves:
        band = interval(curve.draws)
        nothing = pl.lit(None, pl.Float64)
        frames.append(
            place.with_columns(
                component=pl.lit(curve.component),
                statistic=pl.lit(curve.statistic),
                value=pl.Series(curve.values).fill_nan(None),
                low=nothing if band is None else pl.Series(band[0]).fill_nan(None),
                high=nothing if band is None else pl.Series(band[1]).fill_nan(None),
            )
        )
    return pl.concat(frames)


def trends_of(series: Series) -> pl.DataFrame:
    """As `importance_trends`, of one series."""
    rows = []
    for component in series.grids:
        for layers in LAYERS:
            curve = mean_importance(series, component, layers)
            rows.append({"component": component, "layers": layers, **trend_of(series, curve)})
    return pl.DataFrame(rows, schema=_TREND)


def slopes(series: Series, curve: Curve) -> tuple[float, Array | None] | None:
    """Least-squares slope per tenfold of tokens or steps, and that of every draw; None where there is none."""
    if (weights := _slope_weights(series)) is None:
        return None
    return float(curve.values @ weights), None if curve.draws is None else curve.draws @ weights


def trend_of(series: Series, curve: Curve | None) -> dict[str, float | int | str | None]:
    """First and last value, slope per tenfold of tokens or steps, and Spearman with the place in training."""
    column = series.axis.column
    found: dict[str, float | int | str | None] = {
        "n_checkpoints": series.checkpoints.height,
        "per": None if column == "index" else column,
    }
    if curve is None:
        return found
    found["first"], found["last"] = float(curve.values[0]), float(curve.values[-1])
    draws = curve.draws
    if (slope := slopes(series, curve)) is not None:
        found["slope"] = slope[0]
        found["slope_low"], found["slope_high"] = _ends(slope[1])
    place = np.arange(len(curve.values), dtype=np.float64)
    found["spearman"] = _known(float(spearman_of_rows(curve.values, place)))
    found["spearman_low"], found["spearman_high"] = _ends(None if draws is None else spearman_of_rows(draws, place))
    return found


def mean_importance(series: Series, component: str, layers: str) -> Curve | None:
    """Mean importance over `all` or the `inner` layers that have the component; None where there is none."""
    grid, draws = series.grids[component], series.draws[component]
    columns = grid.among(range(series.last_layer + 1) if layers == "all" else series.inner)
    if not columns:
        return None
    mean = np.zeros(len(grid.layers))
    mean[columns] = 1 / len(columns)
    name = "importance" if layers == "all" else "importance_inner"
    return Curve(component, name, grid.values @ mean, None if draws is None else draws @ mean)


_TREND = {
    "component": pl.String,
    "layers": pl.String,
    "per": pl.String,
    "first": pl.Float64,
    "last": pl.Float64,
    "slope": pl.Float64,
    "slope_low": pl.Float64,
    "slope_high": pl.Float64,
    "spearman": pl.Float64,
    "spearman_low": pl.Float64,
    "spearman_high": pl.Float64,
    "n_checkpoints": pl.Int64,
}


def _of_component(series: Series, component: str, shared: Counts | None) -> Iterator[Curve]:
    grid, draws = series.grids[component], series.draws[component]
    values = grid.values
    for layers in LAYERS:
        if (curve := mean_importance(series, component, layers)) is not None:
            yield curve
    yield Curve(component, "spearman", spearman(values, values[-1:])[:, 0], _spearman_in_draws(series, component))
    yield Curve(component, "kendall", kendall(values, values[-1:])[:, 0], None)
    yield Curve(component, "weighted_tau", weighted_tau(values, values[-1:])[:, 0], None)
    places, k = drop_places(values), quarter(len(grid.layers))
    overlap = jaccard(shared_layers(places, places[-1]))[:, k - 1]
    yield Curve(component, "overlap", overlap, None if shared is None else jaccard(shared)[..., k - 1])
    inner = grid.among(series.inner)
    if not inner:
        return
    middle = _median(values, inner)
    middles = None if draws is None else _median(draws, inner)
    for name, layer in (("first_layer", 0), ("last_layer", series.last_layer)):
        for column in grid.among([layer]):
            ratios = None if draws is None or middles is None else draws[..., column] / middles
            yield Curve(component, name, values[:, column] / middle, ratios)


def _median(values: Array, inner: list[int]) -> Array:
    """Median of the inner layers; NaN where it is 0, for nothing is a multiple of that."""
    ordered = np.sort(values[..., inner[0] : inner[-1] + 1], axis=-1)  # several times faster than numpy's median
    half = ordered.shape[-1] // 2
    middle = (ordered[..., half] + ordered[..., -half - 1]) / 2
    return np.where(middle == 0, np.nan, middle)


def _of_attention_and_mlp(series: Series) -> Iterator[Curve]:
    if not {"attn", "mlp"} <= set(series.grids):
        return
    attn, mlp = series.grids["attn"], series.grids["mlp"]
    attn_draws, mlp_draws = series.draws["attn"], series.draws["mlp"]
    both = attn.among(mlp.layers), mlp.among(attn.layers)

    def below(attention: Array, other: Array) -> Array:
        return np.asarray((attention[..., both[0]] < other[..., both[1]]).mean(-1))

    def first(attention: Array, other: Array) -> Array:
        return np.asarray((attention <= other.min(-1, keepdims=True)).sum(-1), dtype=np.float64)

    statistics = {"attn_below_mlp": below} if both[0] else {}
    for name, compute in {**statistics, "attn_first": first}.items():
        drawn = None if attn_draws is None or mlp_draws is None else compute(attn_draws, mlp_draws)
        yield Curve(JOINT, name, compute(attn.values, mlp.values), drawn)


def _spearman_in_draws(series: Series, component: str) -> Array | None:
    """Order of every draw against that of its last checkpoint; the ranks of draws tie nowhere but by chance."""
    if (drawn := series.draw_places[component]) is None:
        return None
    places = drawn - (drawn.shape[-1] - 1) / 2
    size = (places[:, -1] ** 2).sum(-1)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((places * places[:, -1:]).sum(-1) / size)


def _slope_weights(series: Series) -> Array | None:
    """What the values are multiplied by to give the least-squares slope on the log axis; None without two places."""
    if series.axis.column == "index":
        return None
    position = np.array([np.nan if value is None else value for value in series.axis.values])
    there = position > 0
    if there.sum() < 2:
        return None
    weights = np.zeros(position.size)
    weights[there] = np.log10(position[there]) - np.log10(position[there]).mean()
    return np.asarray(weights / (weights**2).sum())


def _ends(draws: Array | None) -> tuple[float | None, float | None]:
    band = interval(draws)
    return (None, None) if band is None else (_known(float(band[0])), _known(float(band[1])))


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value
