"""Everything that `trace stats` says of a run, computed once."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from redundancy_trace.analysis.agreement import calibration_agreement, onset_of, quarter, shared_in_draws
from redundancy_trace.analysis.checks import Check, all_checks
from redundancy_trace.analysis.costs import drop_costs
from redundancy_trace.analysis.frames import complete, one_calibration
from redundancy_trace.analysis.published import BesidePublished, beside_published
from redundancy_trace.analysis.ranks import chance_overlap
from redundancy_trace.analysis.series import INTERVAL, RESAMPLES, SEED, LeftOut, Series, main_series
from redundancy_trace.analysis.trends import curves_frame, curves_of, trends_of


@dataclass(frozen=True)
class TrainingStats:
    """Agreement and trends of one series of a run.

    Attributes:
        model: The model, where the scores name it.
        calibration: The calibration that all but `calibrations` is of.
        series: The checkpoints that count, their importances, and those left out.
        curves: As `checkpoint_statistics`.
        trends: As `importance_trends`.
        onsets: As `drop_onset`, with the column `component` in front.
        calibrations: As `calibration_agreement`, of all calibrations.
        checks: What others found, asked of this run.
        published: Drop orders that were published of this model, beside those of the last checkpoint.
        left_out: Checkpoints that do not count: those of the series, and those that failed.
    """

    model: str | None
    calibration: str | None
    series: Series
    curves: pl.DataFrame
    trends: pl.DataFrame
    onsets: pl.DataFrame
    calibrations: pl.DataFrame
    checks: tuple[Check, ...]
    published: tuple[BesidePublished, ...]
    left_out: tuple[LeftOut, ...]

    def to_json(self) -> dict[str, Any]:
        """What `stats.json` holds, ready for JSON."""
        checkpoints = self.series.checkpoints
        has_errors = all(grid.errors is not None for grid in self.series.grids.values())
        return {
            "model": self.model,
            "calibration": self.calibration,
            "series": self.series.name,
            "checkpoints": checkpoints.height,
            "first": checkpoints["revision"][0],
            "last": checkpoints["revision"][-1],
            "axis": self.series.axis.column,
            "layers": {name: len(grid.layers) for name, grid in self.series.grids.items()},
            "interval": {"percentiles": INTERVAL, "draws": RESAMPLES, "seed": SEED} if has_errors else None,
            "onset": {name: self.onset(name) for name in self.series.grids},
            "chance": {name: self.chance(name) for name in self.series.grids},
            "trend": {
                component: {
                    row.pop("layers"): row
                    for row in self.trends.filter(component=component).drop("component").to_dicts()
                }
                for component in self.series.grids
            },
            "statistics": self._statistics(),
            "calibrations": self.calibrations.to_dicts(),
            "checks": [asdict(check) for check in self.checks],
            "published": [asdict(one) for one in self.published],
            "left_out": [asdict(one) for one in self.left_out],
        }

    def onset(self, component: str) -> dict[str, Any] | None:
        """From when on the most redundant quarter of the layers is that of the last checkpoint; None of one layer."""
        n_layers = len(self.series.grids[component].layers)
        rows = self.onsets.filter(component=component, k=quarter(n_layers))
        if rows.is_empty():
            return None
        row = rows.drop("component", "order").row(0, named=True)
        names = self.series.checkpoints["revision"]
        return {
            **{name: row[name] for name in ("k", "step", "revision", "tokens")},
            **{end: None if (at := row[f"{end}_order"]) is None else names[at] for end in ("low", "high")},
        }

    def chance(self, component: str) -> float:
        """Expected overlap (Jaccard) of the most redundant quarter of the layers with a random set as large."""
        n_layers = len(self.series.grids[component].layers)
        return float(chance_overlap(n_layers)[0][quarter(n_layers) - 1])

    def _statistics(self) -> list[dict[str, Any]]:
        """One object a checkpoint: component → statistic → value and interval."""
        found = self.series.checkpoints.select("revision", "step", "tokens").to_dicts()
        columns = ("order", "component", "statistic", "value", "low", "high")
        for order, component, statistic, value, low, high in self.curves.select(columns).rows():
            cell = {"value": value} if low is None else {"value": value, "low": low, "high": high}
            found[order].setdefault(component, {})[statistic] = cell
        return found


def training_stats(
    scores: pl.DataFrame,
    duplicates: pl.DataFrame | None = None,
    *,
    calibration: str | None = None,
    evaluations: pl.DataFrame | None = None,
    failed: Iterable[LeftOut] = (),
) -> TrainingStats:
    """Agreement and trends of a run's longest series, and the answers to what others found.

    Args:
        scores: Scores of one model, of all its calibrations.
        duplicates: Checkpoints that repeat another's weights, as `read_duplicates` gives them: left out, and named.
        calibration: The calibration to look at; None = the first.
        evaluations: What was measured of the run, as `read_evaluations` gives it; decides what scores alone cannot.
        failed: Checkpoints that have no scores, to be named.

    Returns:
        The statistics. Intervals are between the 2.5th and 97.5th percentile of 200 draws of all importances from
        normal distributions with their standard errors (see `Series.draws`); they do not cover how another training
        would have come out. Of one checkpoint there is what can be said of one.

    Raises:
        InputError: If importances are missing or no numbers, or there is no such calibration.
    """
    rows = one_calibration(scores, calibration)
    series = main_series(rows, duplicates)
    shared = {component: shared_in_draws(series, component) for component in series.grids}
    curves = curves_of(series, shared)
    onsets = {component: onset_of(series, grid, shared[component]) for component, grid in series.grids.items()}
    between = calibration_agreement(complete(scores))
    return TrainingStats(
        model=rows["model"][0],
        calibration=rows["calibration"][0],
        series=series,
        curves=curves_frame(series, curves),
        trends=trends_of(series),
        onsets=pl.concat(
            frame.select(pl.lit(component).alias("component"), pl.all()) for component, frame in onsets.items()
        ),
        calibrations=between,
        checks=all_checks(series, curves, onsets, between, drop_costs(series, evaluations)),
        published=beside_published(rows["model"][0], series),
        left_out=(*series.left_out, *failed),
    )
