"""Checkpoints that repeat the weights of others: left out of curves, gaps in pictures, marks in tables."""

import polars as pl

from redundancy_trace.analysis.frames import CHECKPOINT_COLUMNS, place_of


def leave_out_duplicates(scores: pl.DataFrame, duplicates: pl.DataFrame | None) -> pl.DataFrame:
    """The rows of checkpoints that are what their names say: for curves and statistics.

    Args:
        scores: Scores of one model.
        duplicates: Checkpoints that repeat another's weights, as `read_duplicates` gives them; None = none.

    Returns:
        The rows of the others; all rows where there are no others. Scores of a revision at another commit than the one
        that repeats stay.
    """
    if duplicates is None or duplicates.is_empty():
        return scores
    commit = pl.col("commit") if "commit" in scores.columns else pl.lit(None, pl.String)
    repeating = duplicates.select("revision", repeating="commit", repeats=pl.lit(value=True))
    repeats = pl.col("repeats") & (commit == pl.col("repeating")).fill_null(value=True)
    joined = scores.join(repeating, on="revision", how="left", maintain_order="left")
    kept = joined.filter(repeats.fill_null(value=False).not_()).drop("repeating", "repeats")
    return scores if kept.is_empty() else kept


def blank_duplicates(scores: pl.DataFrame, duplicates: pl.DataFrame | None) -> pl.DataFrame:
    """The scores with every duplicate in its place, scored or not, and no value there: for pictures that show gaps.

    Args:
        scores: Scores of one model.
        duplicates: As for `leave_out_duplicates`.

    Returns:
        The rows of the others, and for each duplicate all their layers, components and metrics with a null value. Of
        duplicates that were not scored, only those of a seed, stage and ingredient that is in the scores, and at a
        place in it that no other checkpoint has.
    """
    kept = leave_out_duplicates(scores, duplicates)
    if duplicates is None or duplicates.is_empty():
        return scores
    shared = kept.select(name for name in ("model", "calibration") if name in kept.columns).head(1)
    keys = kept.select("layer", "component", "metric").unique(maintain_order=True)
    place = [name for name in CHECKPOINT_COLUMNS if name in duplicates.columns]
    blank = _placed(kept, scores, duplicates).select(place).join(keys, how="cross").join(shared, how="cross")
    blank = blank.select(name for name in blank.columns if name in kept.columns)
    return pl.concat([kept, blank], how="diagonal_relaxed")


def mark_repeats(summary: pl.DataFrame, duplicates: pl.DataFrame) -> pl.DataFrame:
    """A frame of one row a checkpoint, with `duplicate_of` and `partial` of `read_duplicates`; null of the others."""
    known = duplicates.select("revision", "commit", "duplicate_of", "partial")
    return summary.join(known, on=["revision", "commit"], how="left", nulls_equal=True, maintain_order="left")


def _placed(kept: pl.DataFrame, scores: pl.DataFrame, duplicates: pl.DataFrame) -> pl.DataFrame:
    """Those duplicates that were scored, or stand at a place of their own in a series that is shown."""
    scored, names = set(scores["revision"]), set(kept["revision"])
    columns = [name for name in CHECKPOINT_COLUMNS if name in kept.columns]
    taken = {place_of(row) for row in kept.select(columns).unique().iter_rows(named=True)}
    series = {place[:-1] for place in taken}
    found = []
    for row in duplicates.iter_rows(named=True):
        place = place_of(row)
        is_placed = row.get("step") is not None or row.get("tokens") is not None
        belongs = row["revision"] in scored or (is_placed and place[:-1] in series)
        if belongs and place not in taken and row["revision"] not in names:
            taken.add(place)
            found.append(row)
    return pl.DataFrame(found, schema=duplicates.schema)
