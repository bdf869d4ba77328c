"""The numbers that the page's script draws, ready for JSON; matrices as base64 of their bytes, so that none is rounded.

Of a matrix of C checkpoints and L layers the layers of one checkpoint stand together; NaN = nothing is shown there.
"""

import base64
from typing import Any

import numpy as np
import polars as pl
from matplotlib.colors import Colormap
from matplotlib.ticker import LogLocator
from numpy.typing import NDArray

from redundancy_trace.analysis import Axis, metric_values, rank_agreement, training_axis
from redundancy_trace.analysis.ranks import drop_places
from redundancy_trace.figures.style import (
    Array,
    agreement_map,
    beyond,
    colour_limits,
    colour_map,
    compact,
    layer_ticks,
    shortened,
)
from redundancy_trace.metrics import COMPONENTS, IMPORTANCE, LAYER_METRICS, LOSS, Metric
from redundancy_trace.report.curves import MOST_TICKS, costs, curves, labelled, line_style, linear_axis
from redundancy_trace.report.gathering import Sources

# Importance comes from the stored similarity, which hovering shows too.
SHOWN = (IMPORTANCE, *(metric for name, metric in LAYER_METRICS.items() if name != "cosine_similarity"))
# Agreement is quantised: no reader needs more than four decimals of a rank correlation.
QUANTUM, NO_AGREEMENT = 1e-4, -32768


def pictures(sources: Sources) -> dict[str, Any]:
    """Everything the script draws: checkpoints, colours, heatmaps of every metric, agreement, curves."""
    maps: dict[str, Colormap] = {}
    order = sources.checkpoints
    values = _values(sources.shown, order.height)
    return {
        "checkpoints": _checkpoints(sources),
        "ticks": _column_ticks(sources.shown, order),
        "components": [{"name": name, **line_style(name)} for name in values.components],
        "layers": values.n_layers,
        "layerTicks": layer_ticks(1, values.n_layers - 1) if values.n_layers > 1 else [],
        "metrics": [_metric(values, metric, maps) for metric in SHOWN if metric.name in values.by_metric],
        "places": {name: _encoded(places, np.uint16) for name, places in values.places.items()},
        "agreement": _agreement(sources, maps),
        "curves": [*curves(sources), *costs(sources)],
        "maps": {name: _hex(colours) for name, colours in maps.items()},
    }


class _Values:
    """Values and standard errors by metric and component, shape (checkpoints, layers) each."""

    def __init__(self, n_layers: int, components: list[str]) -> None:
        self.n_layers = n_layers
        self.components = components
        self.by_metric: dict[str, dict[str, tuple[Array, Array]]] = {}
        self.places: dict[str, NDArray[np.int64]] = {}

    def all_of(self, metric: str, layers: slice) -> Array:
        return np.concatenate([value[:, layers].ravel() for value, _ in self.by_metric[metric].values()])


def _values(shown: pl.DataFrame, n_checkpoints: int) -> _Values:
    layers = shown["layer"].max()
    assert isinstance(layers, int)  # importances were found
    there = metric_values(shown, IMPORTANCE.name)["component"].unique().to_list()
    found = _Values(1 + layers, [name for name in COMPONENTS if name in there])
    stored = set(shown["metric"])
    for metric in ("cosine_similarity", *(metric.name for metric in SHOWN[1:])):
        if metric not in stored:
            continue
        by_component = metric_values(shown, metric).partition_by("component", as_dict=True)
        name = IMPORTANCE.name if metric == "cosine_similarity" else metric
        found.by_metric[name] = {
            component: _matrices(by_component[component,], (n_checkpoints, found.n_layers))
            for component in found.components
            if (component,) in by_component
        }
    for component, (cosines, _) in found.by_metric[IMPORTANCE.name].items():
        found.places[component] = drop_places(1.0 - cosines)  # NaN, where there is no such part, goes last
    return found


def _matrices(rows: pl.DataFrame, shape: tuple[int, int]) -> tuple[Array, Array]:
    value, error = np.full(shape, np.nan), np.full(shape, np.nan)
    at = rows["order"].to_numpy(), rows["layer"].to_numpy()
    value[at], error[at] = rows["value"].to_numpy(), rows["stderr"].to_numpy()
    return value, error


def _metric(values: _Values, metric: Metric, maps: dict[str, Colormap]) -> dict[str, Any]:
    """A metric's matrices (`importance`: of the stored similarity), colours, and range of the profile over depth."""
    parts = {"limits": slice(1 if values.n_layers > 1 else 0, None), "firstLimits": slice(0, 1)}
    found: dict[str, Any] = {"name": metric.name, "label": metric.label, "complement": metric is IMPORTANCE}
    for name, layers in parts.items():
        numbers = values.all_of(metric.name, layers)
        numbers = 1.0 - numbers if metric is IMPORTANCE else numbers
        limits = colour_limits(numbers, metric)
        finite = numbers[np.isfinite(numbers)]
        arrow = beyond(numbers, limits)
        found[name] = {
            "low": limits[0],
            "high": limits[1],
            "reaches": [
                f"{end:.2g}"
                for end, side in ((finite.min(initial=np.inf), "min"), (finite.max(initial=-np.inf), "max"))
                if arrow in (side, "both")
            ],
            "map": _named(colour_map(metric, first_layer=name == "firstLimits"), maps),
        }
    everything = values.all_of(metric.name, slice(None))
    found["profile"] = _depth_axis(1.0 - everything if metric is IMPORTANCE else everything, metric)
    found["values"] = {name: _encoded(value) for name, (value, _) in values.by_metric[metric.name].items()}
    found["errors"] = {name: _encoded(error, np.float32) for name, (_, error) in values.by_metric[metric.name].items()}
    return found


def _depth_axis(values: Array, metric: Metric) -> dict[str, Any]:
    """Range and ticks of a metric over depth: logarithmic where 0 means "redundant", for layer 0 is far above."""
    values = values[np.isfinite(values)]
    positive = values[values > 0]
    if metric.redundant == 0 and positive.size:
        low, high = float(positive.min()) / 1.3, float(positive.max()) * 1.3
        ticks = [tick for tick in LogLocator(numticks=6).tick_values(low, high) if low <= tick <= high]
        return {"log": True, "low": low, "high": high, "ticks": labelled(ticks)}
    low, high, ticks = linear_axis(values)
    return {"log": False, "low": low, "high": high, "ticks": labelled(ticks)}


def _checkpoints(sources: Sources) -> list[dict[str, Any]]:
    loss = _loss(sources.shown)
    return [
        {
            "name": str(row["revision"]),
            "where": _where(row),
            "commit": None if row["commit"] is None else row["commit"][:12],
            "blank": row["why_blank"],
            "repeats": (row["why_blank"] or "").startswith("repeats"),
            "loss": loss.get(row["order"]),
        }
        for row in sources.checkpoints.to_dicts()
    ]


def _loss(shown: pl.DataFrame) -> dict[int, float]:
    if LOSS.name not in shown["metric"]:
        return {}
    return dict(metric_values(shown, LOSS.name).drop_nulls("value").select("order", "value").rows())


def _where(row: dict[str, Any]) -> str:
    """Step and tokens, in words."""
    step = "" if row["step"] is None else f"step {row['step']:,}"
    tokens = "" if row["tokens"] is None else f"{compact(row['tokens'])} tokens"
    return ", ".join(text for text in (step, tokens) if text)


def _column_ticks(shown: pl.DataFrame, order: pl.DataFrame) -> dict[str, Any]:
    """A few columns of the heatmaps and what stands below them: tokens, steps, or names."""
    axis = training_axis(shown)
    count = MOST_TICKS if axis.column != "index" else 2
    columns = sorted({round(k * (order.height - 1) / max(1, count - 1)) for k in range(count)})
    unit = {"tokens": "tokens", "step": "optimizer steps"}.get(axis.column, "")
    return {
        "label": "checkpoints, one column each" + (f" ({unit})" if unit else ""),
        "at": [{"column": k, "label": _tick(axis, k)} for k in columns],
    }


def _tick(axis: Axis, column: int) -> str:
    value = axis.values[column]
    return shortened(axis.revisions[column], 14) if axis.column == "index" or value is None else compact(value)


def _agreement(sources: Sources, maps: dict[str, Colormap]) -> dict[str, Any] | None:
    """Spearman of every two checkpoints of the series, shape (S, S), in steps of `QUANTUM`; None of one checkpoint."""
    series = sources.stats.series
    size = series.checkpoints.height
    if size < 2:
        return None
    keys = ["revision", "commit"]
    rows = sources.scores.join(series.checkpoints.select(keys), on=keys, how="semi", nulls_equal=True)
    matrices, lowest = {}, 0.0
    for component in series.grids:
        pairs = rank_agreement(rows, component)["spearman"].fill_null(float("nan")).to_numpy()
        matrix = np.ones((size, size))
        matrix[np.triu_indices(size, 1)] = pairs
        matrix.T[np.triu_indices(size, 1)] = pairs
        steps = np.where(np.isnan(matrix), NO_AGREEMENT, np.round(matrix / QUANTUM))
        matrices[component] = _encoded(steps, np.int16)
        lowest = min(lowest, float(np.nanmin(matrix)))
    return {
        "columns": sources.series_columns,
        "values": matrices,
        "quantum": QUANTUM,
        "none": NO_AGREEMENT,
        "low": lowest,
        "map": _named(agreement_map(), maps),  # as in the figure
    }


def _encoded(values: NDArray[Any], kind: Any = np.float64) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=np.dtype(kind).newbyteorder("<")).tobytes()).decode()


def _named(colours: Colormap, maps: dict[str, Colormap]) -> str:
    maps[colours.name] = colours
    return colours.name


def _hex(colours: Colormap) -> str:
    """256 colours, six hexadecimal digits each."""
    rgb = np.round(colours(np.arange(256))[:, :3] * 255).astype(np.uint8)
    return rgb.tobytes().hex()
