"""Run folders of made-up scores, for what reads a run."""

import polars as pl

from redundancy_trace import store
from redundancy_trace.checkpoints import Checkpoint, Listing, listing_to_json
from redundancy_trace.settings import TraceSettings
from redundancy_trace.store import CalibrationRecord, Labels, Run


def write_made_run(folder, scores, *, repeats=None, partly=None, failures=None, unchosen=(), **settings):
    """Write scores as a sweep would have stored them.

    Args:
        folder: The run folder.
        scores: A frame in the store's columns, of one or several calibrations.
        repeats: Revision → the one whose weights it has.
        partly: The same, of a part of the weights.
        failures: Revision → (step, reason).
        unchosen: Revisions that the last selector does not choose.
        settings: Of the last sweep.

    Returns:
        The folder.
    """
    repeats, partly, failures = repeats or {}, partly or {}, failures or {}
    names = scores["calibration"].unique(maintain_order=True).to_list()
    records = tuple(
        CalibrationRecord(name, f"{k:064x}", f"token_ids{f'-{k}' if k else ''}.npy") for k, name in enumerate(names)
    )
    model = scores["model"][0]
    run = Run(folder, model, "float32", False, None, records)
    given = {name: field.default for name, field in TraceSettings.__dataclass_fields__.items()}
    store.write_run(run, {**given, "model": model, **settings})
    for (calibration, revision), rows in scores.partition_by(
        "calibration", "revision", as_dict=True, maintain_order=True
    ).items():
        k = names.index(calibration)
        (folder / "scores").mkdir(exist_ok=True)
        rows.write_parquet(folder / "scores" / f"{rows['commit'][0][-12:]}-{k:012x}.parquet")
        assert rows["revision"].unique().to_list() == [revision]
    labels = ("revision", "commit", "stage", "ingredient", "seed", "step", "tokens")
    seen = scores.select(labels).unique(subset="revision", maintain_order=True).to_dicts()
    others = [{"revision": name, "step": step} for name, (step, _) in failures.items()]
    placed = {row["revision"] for row in seen}
    for name in (*repeats, *partly):
        if name not in placed:
            others.append({"revision": name, "step": int("".join(filter(str.isdigit, name)) or 0)})
    checkpoints = [
        Checkpoint(
            name=row["revision"],
            kind="branch",
            commit=row.get("commit") or f"{row['revision']:f<40}".encode().hex()[:40],
            step=row["step"],
            tokens=row.get("tokens"),
            stage=row.get("stage"),
            bytes=1_500_000_000,
            format="safetensors",
            duplicate_of=repeats.get(row["revision"]),
            partial_duplicate_of=partly.get(row["revision"]),
            chosen=row["revision"] not in unchosen,
        )
        for row in [*seen, *others]
    ]
    store.write_json(folder / "listing.json", listing_to_json(Listing(model, "hub", tuple(checkpoints)), {}))
    for name, (step, reason) in failures.items():
        failed = Labels(model=model, revision=name, commit="f" * 40, step=step, calibration=names[0], identity="e" * 64)
        store.write_failure(folder, failed, reason)
    return folder


def value_at(scores, revision, component, layer, metric="cosine_similarity"):
    """One stored value."""
    at = {"revision": revision, "component": component, "layer": layer, "metric": metric}
    return scores.row(by_predicate=pl.all_horizontal(pl.col(name) == value for name, value in at.items()), named=True)[
        "value"
    ]
