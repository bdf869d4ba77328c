"""All that a report is made from, read once: the run, its scores on one calibration, its gaps, its statistics."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from redundancy_trace.analysis import (
    CHECKPOINT_COLUMNS,
    LeftOut,
    TrainingStats,
    along_values,
    blank_duplicates,
    checkpoint_order,
    leave_out_duplicates,
    one_calibration,
    training_stats,
    training_summary,
)
from redundancy_trace.checkpoints import Listing, listing_from_json
from redundancy_trace.errors import InputError
from redundancy_trace.store import (
    CalibrationRecord,
    Run,
    holds_evaluations,
    read_duplicates,
    read_evaluations,
    read_failures,
    read_run,
    read_scores,
)


@dataclass(frozen=True)
class Sources:
    """What a report is made from.

    Attributes:
        run: The run.
        made_with: Content of its `settings.json`.
        calibration: The calibration that is shown; None where the run does not know it by name.
        scores: All rows on that calibration.
        duplicates: As `read_duplicates` gives them.
        failures: The labels and the reason of each checkpoint that has no scores on that calibration.
        listing: The refs that the run saw; None where it keeps no list that can be read.
        stats: What `trace stats` says.
        costs: What drops add to the loss along training, as `along_values` gives it; None where it was not measured.
    """

    run: Run
    made_with: Mapping[str, Any]
    calibration: CalibrationRecord | None
    scores: pl.DataFrame
    duplicates: pl.DataFrame
    failures: tuple[Mapping[str, Any], ...]
    listing: Listing | None
    stats: TrainingStats
    costs: pl.DataFrame | None

    @cached_property
    def shown(self) -> pl.DataFrame:
        """The scores, with null values in the places of duplicates and failures: what the heatmaps show."""
        known = self.scores["revision"].unique().to_list()
        failed = [one for one in self.failures if one["revision"] not in known]
        rows = [{name: one.get(name) for name in CHECKPOINT_COLUMNS} for one in failed]
        failed_frame = pl.DataFrame(rows, schema={name: self.duplicates.schema[name] for name in CHECKPOINT_COLUMNS})
        return blank_duplicates(self.scores, pl.concat([self.duplicates, failed_frame], how="diagonal"))

    @cached_property
    def checkpoints(self) -> pl.DataFrame:
        """The checkpoints of `shown` in training order, as `checkpoint_order` gives them, with `why_blank`."""
        order = checkpoint_order(self.shown)
        valued = set(leave_out_duplicates(self.scores, self.duplicates)["revision"])
        blank = {name: "not scored" if name not in valued else None for name in order["revision"]}
        reasons = {name: why for name, why in self.reasons.items() if name not in valued}
        return order.with_columns(
            why_blank=pl.Series([reasons.get(name, blank[name]) for name in order["revision"]], dtype=pl.String)
        )

    @cached_property
    def reasons(self) -> dict[str, str]:
        """Why a checkpoint has no values to show, by name: it repeats the weights of another, or it failed."""
        failed = {one["revision"]: f"could not be scored: {one['reason']}" for one in self.failures}
        repeats = {
            name: f"repeats {'a part of ' if partial else ''}the weights of {other}"
            for name, other, partial in self.duplicates.select("revision", "duplicate_of", "partial").rows()
        }
        return failed | repeats

    @cached_property
    def series_columns(self) -> list[int]:
        """Where in `checkpoints` each checkpoint of the series stands."""
        keys = ["revision", "commit"]
        series, order = self.stats.series.checkpoints.select(keys), self.checkpoints.select("order", *keys)
        joined = series.join(order, on=keys, how="left", nulls_equal=True, maintain_order="left")
        return [int(column) for column in joined["order"]]

    @cached_property
    def table(self) -> list[dict[str, Any]]:
        """One row a checkpoint, scored or not: labels, means, loss, weights, and `marks`, what is to be known of it."""
        summary = {row["revision"]: row for row in training_summary(self.scores).to_dicts()}
        placed = self.checkpoints.drop("order", "why_blank").to_dicts()
        names = {row["revision"] for row in placed}
        others = [*self.duplicates.to_dicts(), *self.failures]
        apart = [{name: row.get(name) for name in CHECKPOINT_COLUMNS} for row in others if row["revision"] not in names]
        listed = {one.name: one for one in self.listing or ()}
        left_out = {one.revision: one.reason for one in self.stats.left_out}
        rows = []
        for row in [*placed, *{one["revision"]: one for one in apart}.values()]:
            name = row["revision"]
            seen = listed.get(name)
            values = summary.get(name, {})
            rows.append(
                {
                    **row,
                    **{key: values.get(key) for key in ("attn", "mlp", "block", "loss")},
                    "bytes": seen.bytes if seen else None,
                    "format": seen.format if seen else None,
                    "is_scored": name in summary,
                    "mark": self.reasons.get(name) or left_out.get(name) or "",
                }
            )
        return rows


def gather(folder: Path, calibration: str | None = None) -> Sources:
    """Read a run.

    Args:
        folder: A run folder.
        calibration: As the rows name it; None = the run's first.

    Raises:
        InputError: If the folder is no run, holds no scores, importances are missing or no numbers, or there is no
            such calibration.
    """
    scores = read_scores(folder)
    rows = one_calibration(scores, calibration)
    name = rows["calibration"][0]
    run = read_run(folder)
    assert run is not None  # held by read_scores
    duplicates = read_duplicates(folder)
    failures = tuple(one for one in read_failures(folder) if one["calibration"] in (name, None))
    evaluations = read_evaluations(folder) if holds_evaluations(folder) else None
    failed = [LeftOut(one["revision"], f"could not be scored: {one['reason']}") for one in failures]
    return Sources(
        run=run,
        made_with=json.loads((folder / "settings.json").read_text(encoding="utf-8")),
        calibration=next((record for record in run.calibrations if record.label == name), None),
        scores=rows,
        duplicates=duplicates,
        failures=failures,
        listing=_listing(folder / "listing.json"),
        stats=training_stats(scores, duplicates, calibration=name, evaluations=evaluations, failed=failed),
        costs=_costs(evaluations),
    )


def _costs(evaluations: pl.DataFrame | None) -> pl.DataFrame | None:
    try:
        return None if evaluations is None else along_values(evaluations)
    except InputError:
        return None


def _listing(file: Path) -> Listing | None:
    """None where there is none, or it is damaged: the report goes without what it would tell."""
    try:
        return listing_from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, InputError):
        return None
