"""The scores of a run: one parquet a checkpoint, written whole or not at all, each row traceable to what made it.

Needs neither torch nor a network. Two processes may work on one run: files are written under names of their own and
renamed, so that at worst a checkpoint is scored twice.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from redundancy_trace.errors import InputError
from redundancy_trace.locking import alone_in
from redundancy_trace.metrics import Distance, ModelScores, Value, metric_versions
from redundancy_trace.versions import library_versions
from redundancy_trace.writing import part_of, remove_stray_parts, write_whole

_LABELS: dict[str, Any] = {
    "model": pl.String,
    "revision": pl.String,
    "commit": pl.String,
    "kind": pl.String,
    "stage": pl.Int64,
    "ingredient": pl.Int64,
    "seed": pl.String,
    "step": pl.Int64,
    "tokens": pl.Int64,
    "calibration": pl.String,
}
SCORE_SCHEMA: dict[str, Any] = {
    **_LABELS,
    "layer": pl.Int64,
    "component": pl.String,
    "metric": pl.String,
    "value": pl.Float64,
    "stderr": pl.Float64,
    "n_sequences": pl.Int64,
    "n_tokens": pl.Int64,
    "identity": pl.String,
}
DISTANCE_SCHEMA: dict[str, Any] = {
    **_LABELS,
    "layer": pl.Int64,
    "to_layer": pl.Int64,
    "metric": pl.String,
    "value": pl.Float64,
    "n_tokens": pl.Int64,
    "identity": pl.String,
}
# Rows of a run are read in training order.
_ORDER = ("seed", "stage", "ingredient", "step", "tokens", "revision")


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What a row says of where its number comes from."""

    model: str
    revision: str
    commit: str | None = None
    kind: str | None = None
    stage: int | None = None
    ingredient: int | None = None
    seed: str | None = None
    step: int | None = None
    tokens: int | None = None
    calibration: str | None = None
    identity: str | None = None


@dataclass(frozen=True)
class CalibrationRecord:
    """One calibration of a run: what it is called in the rows, the hash of its ids, the file that holds them."""

    label: str
    sha256: str
    file: str


@dataclass(frozen=True)
class Run:
    """A run folder and what it was made with.

    Attributes:
        folder: The folder.
        model: The model all rows are of.
        dtype: Compute dtype of all rows.
        trust_remote_code: Whether code of the repository was run.
        tokens_per_step: As the user gave it, for rows whose name carries no tokens.
        calibrations: In the order in which they were added; readers take the first unless told.
        metric_versions: Of the metrics when the rows were made.
    """

    folder: Path
    model: str
    dtype: str
    trust_remote_code: bool
    tokens_per_step: int | None
    calibrations: tuple[CalibrationRecord, ...]
    metric_versions: Mapping[str, int] = field(default_factory=metric_versions)


def row_identity(commit: str, token_hash: str, settings: Mapping[str, Any], subfolder: str | None = None) -> str:
    """SHA-256 over all that changes a stored number: commit, calibration tokens, metric versions, settings.

    Args:
        commit: 40 hex digits.
        token_hash: SHA-256 of the calibration's ids.
        settings: The settings that change a number, resolved (`auto` replaced by what it stands for).
        subfolder: The checkpoint's folder, where one commit holds several.

    Returns:
        64 hex digits.
    """
    facts = {
        "commit": commit,
        "tokens": token_hash,
        "metrics": metric_versions(),
        "settings": dict(settings),
    }
    if subfolder:
        facts["subfolder"] = subfolder
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def part_name(commit: str, identity: str) -> str:
    """Name, without suffix, of the files of one checkpoint under one identity."""
    return f"{commit[:12]}-{identity[:12]}"


def read_run(folder: Path) -> Run | None:
    """The run in a folder, None if the folder holds none yet.

    Raises:
        InputError: If `settings.json` is there but cannot be read.
    """
    file = folder / "settings.json"
    if not file.is_file():
        return None
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return Run(
            folder,
            kept["model"],
            kept["dtype"],
            kept["trust_remote_code"],
            kept["tokens_per_step"],
            tuple(CalibrationRecord(**record) for record in kept["calibrations"]),
            kept["metric_versions"],
        )
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(
            f"{file} cannot be read ({error}), so {folder} cannot be gone on with. Restore it, or use another --out."
        ) from error


def check_writable(folder: Path) -> Path:
    """Refuse a folder that cannot be made or written to, before any work is done for it; nothing is made.

    Returns:
        The folder, or the nearest one above it that is there.

    Raises:
        InputError: It is not writable.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        probe = part_of(there / "writable")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written to ({error.strerror}); try another --out.") from error
    return there


def open_run(
    folder: Path, *, model: str, trust_remote_code: bool, dtype: str | None, tokens_per_step: int | None
) -> Run | None:
    """The run in `folder` if it can be gone on with, None if the folder is free; makes sure it can be written to.

    Args:
        folder: `--out`; it need not be there, and is not made.
        model: The model asked for.
        trust_remote_code: As asked for.
        dtype: The compute dtype asked for, None for `auto` (the run's own then holds).
        tokens_per_step: As given.

    Raises:
        InputError: If the folder holds another run (the field is named) or something else, or is not writable.
    """
    there = check_writable(folder)
    run = read_run(folder)
    if run is None:
        # Token ids and listing are kept before settings.json: alone, they are what a killed sweep left. Evaluations
        # need no sweep.
        ours = (".", "token_ids", "listing.json", "evaluations")
        names = sorted(path.name for path in folder.iterdir()) if there == folder else []
        foreign = [name for name in names if not name.startswith(ours)]
        if foreign:
            raise InputError(
                f"--out {folder} is not empty and holds no run ({', '.join(foreign[:3])}); name a new folder."
            )
        return None
    asked = {
        "model": model,
        "dtype": dtype or run.dtype,
        "trust_remote_code": trust_remote_code,
        "metric_versions": metric_versions(),
    }
    for name, value in asked.items():
        held = getattr(run, name)
        if held != value:
            raise InputError(
                f"--out {folder} holds a run with {name} {held!r}, not {value!r}; a run holds one of them. "
                "Name another --out."
            )
    return run if tokens_per_step is None else replace(run, tokens_per_step=tokens_per_step)


def tidy_run(folder: Path) -> None:
    """Delete what killed processes left half-written in a run."""
    remove_stray_parts(
        [folder, *(folder / part for part in ("scores", "distances", "failures", "figures", "evaluations"))]
    )


def write_run(run: Run, settings: Mapping[str, Any]) -> Run:
    """Write `settings.json`: what the run is, the last settings, the versions of the libraries.

    Args:
        run: The run.
        settings: The settings of this call, ready for JSON.

    Returns:
        The run with the calibrations, too, that another process has meanwhile put on record.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with alone_in(run.folder):  # else one of two processes that add a calibration each would undo the other
        recorded = current.calibrations if (current := read_run(run.folder)) else ()
        known = {record.sha256 for record in recorded}
        added = tuple(record for record in run.calibrations if record.sha256 not in known)
        run = replace(run, calibrations=(*recorded, *added))
        write_json(
            run.folder / "settings.json",
            {
                "model": run.model,
                "dtype": run.dtype,
                "trust_remote_code": run.trust_remote_code,
                "tokens_per_step": run.tokens_per_step,
                "calibrations": [vars(record) for record in run.calibrations],
                "metric_versions": dict(run.metric_versions),
                "settings": dict(settings),
                "versions": library_versions(),
            },
        )
    return run


def withdraw_run(run: Run, settings: Mapping[str, Any]) -> None:
    """Take back a run that `write_run` has just begun, if no checkpoint has been through it: the folder is free again.

    Args:
        run: The run.
        settings: The settings of this call; a run whose last settings are others is in use, and stays.
    """
    stored = [path for part in ("scores", "failures") for path in (run.folder / part).glob("*")]
    kept = json.loads((run.folder / "settings.json").read_text(encoding="utf-8"))
    if stored or kept["settings"] != dict(settings):
        return
    for file in (*run.folder.glob("token_ids*"), run.folder / "listing.json", run.folder / "settings.json"):
        file.unlink(missing_ok=True)
    if not any(run.folder.iterdir()):
        run.folder.rmdir()


def finished_parts(folder: Path) -> frozenset[str]:
    """Names of the checkpoints, under their identities, that are stored already."""
    return frozenset(path.stem for path in (folder / "scores").glob("*.parquet"))


def write_part(folder: Path, labels: Labels, scores: ModelScores) -> None:
    """Store one checkpoint: distances first, then the scores, whose file is the mark of done; clears its failure.

    Args:
        folder: The run folder.
        labels: Where the numbers come from; commit and identity must be set.
        scores: The numbers.

    Raises:
        InputError: If there is no space left or the folder is not writable.
    """
    assert labels.commit is not None
    assert labels.identity is not None
    name = part_name(labels.commit, labels.identity)
    write_parquet(folder / "distances" / f"{name}.parquet", distances_frame(labels, scores.distances))
    write_parquet(folder / "scores" / f"{name}.parquet", scores_frame(labels, scores.values))
    clear_failures(folder, {labels.revision}, labels.calibration)


def clear_failures(folder: Path, revisions: Set[str], calibration: str | None) -> None:
    """Remove the notes of checkpoints that have scores of this calibration."""
    for failure in (folder / "failures").glob("*.json"):
        # By name: a local checkpoint that was repaired has another commit, and its old failure is none any more.
        try:
            noted = _failure(failure)
        except FileNotFoundError:
            continue  # another process has removed it
        if noted["revision"] in revisions and noted["calibration"] == calibration:
            failure.unlink(missing_ok=True)


def write_failure(folder: Path, labels: Labels, reason: str) -> None:
    """Note why a checkpoint has no scores; it is tried again next time.

    Args:
        folder: The run folder.
        labels: Which checkpoint. One whose files cannot be read has no commit: its note is named after what it is
            called.
        reason: What is told.
    """
    record = {**vars(labels), "reason": reason, "time": datetime.now(UTC).isoformat(timespec="seconds")}
    commit = labels.commit or hashlib.sha256(labels.revision.encode()).hexdigest()
    identity = labels.identity or hashlib.sha256((labels.calibration or "").encode()).hexdigest()
    write_json(folder / "failures" / f"{part_name(commit, identity)}.json", record)


def read_failures(folder: Path) -> list[dict[str, Any]]:
    """The failures noted in a run: the labels of each checkpoint and the reason."""
    return [_failure(path) for path in sorted((folder / "failures").glob("*.json"))]


def _failure(path: Path) -> dict[str, Any]:
    noted: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return noted


def scores_frame(labels: Labels, values: Iterable[Value]) -> pl.DataFrame:
    """Tidy rows of one checkpoint, one a value, with the columns of `SCORE_SCHEMA`."""
    return _frame(labels, values, SCORE_SCHEMA)


def distances_frame(labels: Labels, distances: Iterable[Distance]) -> pl.DataFrame:
    """Tidy rows of one checkpoint's block-distance matrix, with the columns of `DISTANCE_SCHEMA`."""
    return _frame(labels, distances, DISTANCE_SCHEMA)


def read_scores(folder: str | Path) -> pl.DataFrame:
    """All scores of a run, one row a value, in training order, the run's first calibration first.

    Args:
        folder: A run folder.

    Returns:
        Columns as `SCORE_SCHEMA`. `tokens` is that of the checkpoint's name, else its step times the tokens per step
        that the run was told, else null. Of a revision that was scored at several commits (a branch that moved, a
        model trained anew in place) the rows of the commit that was listed last; the others stay in the folder.

    Raises:
        InputError: If the folder is no run or holds no scores yet.
    """
    return _read(Path(folder).expanduser(), "scores", SCORE_SCHEMA, ("layer", "component", "metric"))


def read_distances(folder: str | Path) -> pl.DataFrame:
    """All block distances of a run, columns as `DISTANCE_SCHEMA`, in training order; raises as `read_scores`."""
    return _read(Path(folder).expanduser(), "distances", DISTANCE_SCHEMA, ("layer", "to_layer", "metric"))


def read_duplicates(folder: str | Path) -> pl.DataFrame:
    """The checkpoints of a run's listing whose weights are, whole or in part, those of another.

    Args:
        folder: A run folder.

    Returns:
        One row a checkpoint, in training order, whether it was scored or not: `revision`, `commit`, `stage`,
        `ingredient`, `seed`, `step`, `tokens` (as in `read_scores`), `duplicate_of` (the revision whose weights it has)
        and `partial` (whether it shares only some of its weight files). No rows without a listing.

    Raises:
        InputError: If the run's `settings.json` cannot be read.
    """
    folder = Path(folder).expanduser()
    names = ("revision", "commit", "stage", "ingredient", "seed", "step", "tokens")
    schema = {name: SCORE_SCHEMA[name] for name in names} | {"duplicate_of": pl.String, "partial": pl.Boolean}
    try:
        listed = json.loads((folder / "listing.json").read_text(encoding="utf-8"))["checkpoints"]
        rows = [
            (c["name"], *(c[name] for name in names[1:]), whole or part, whole is None)
            for c in listed
            if (whole := c["duplicate_of"]) or (part := c["partial_duplicate_of"])
        ]
    except (OSError, ValueError, KeyError, TypeError):
        rows = []
    run = read_run(folder)
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    return frame.with_columns(tokens=pl.coalesce("tokens", pl.col("step") * (run.tokens_per_step if run else None)))


def write_json(path: Path, content: Any, *, indent: int | None = 1) -> None:
    """Write JSON whole or not at all; without an indent in one line, which is many times faster."""
    text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
    _write(path, lambda part: part.write_text(text, encoding="utf-8"))


def _frame(labels: Labels, records: Iterable[Value] | Iterable[Distance], schema: dict[str, Any]) -> pl.DataFrame:
    shared = {name: value for name, value in vars(labels).items() if name in schema}
    return pl.DataFrame([{**shared, **vars(record)} for record in records], schema=schema)


def _read(folder: Path, part: str, schema: dict[str, Any], within: tuple[str, ...]) -> pl.DataFrame:
    run = read_run(folder)
    if run is None:
        raise InputError(f"{folder} is no run: it has no settings.json. A run is what `trace --model … --out` writes.")
    files = sorted((folder / part).glob("*.parquet"))
    if not files:
        raise InputError(f"{folder} holds no scores yet; run trace --model {run.model} --out {folder} first.")
    first = {record.label: i for i, record in enumerate(run.calibrations)}
    by_calibration = pl.col("calibration").replace_strict(first, default=len(first), return_dtype=pl.Int64)
    frame = pl.scan_parquet(files, schema=schema).collect()
    return as_listed(frame, folder, run, [by_calibration], ["calibration", "commit", *within])


def as_listed(
    frame: pl.DataFrame, folder: Path, run: Run | None, before: Sequence[pl.Expr], within: Sequence[str]
) -> pl.DataFrame:
    """Rows in training order, with the tokens that the run's listing knows, without those of commits that moved.

    Args:
        frame: Rows with the columns of a checkpoint.
        folder: The run folder.
        run: The run in it, if there is one.
        before: What decides the order before the place in training does.
        within: Columns that decide it between rows of one checkpoint.
    """
    listed = _listed(folder)
    # Tokens of the listing first: those in the rows are by the tokens per step that the run was told at the time.
    tokens = pl.col("revision").replace_strict(listed["name"], listed["tokens"], default=None, return_dtype=pl.Int64)
    per_step = run.tokens_per_step if run else None
    frame = frame.with_columns(tokens=pl.coalesce(tokens, "tokens", pl.col("step") * per_step))
    place = pl.col("revision").replace_strict(
        listed["name"], listed["place"], default=len(listed), return_dtype=pl.Int64
    )
    return _present(frame, listed).sort([*before, place, *_ORDER, *within], nulls_last=False)


def _listed(folder: Path) -> pl.DataFrame:
    """Name, commit, tokens and place in training order of every ref of the run's last listing; empty without one."""
    schema = {"name": pl.String, "commit": pl.String, "tokens": pl.Int64, "place": pl.Int64}
    try:
        listing = json.loads((folder / "listing.json").read_text(encoding="utf-8"))
        rows = [(c["name"], c["commit"], c["tokens"], i) for i, c in enumerate(listing["checkpoints"])]
    except (OSError, ValueError, KeyError, TypeError):
        rows = []
    return pl.DataFrame(rows, schema=schema, orient="row")


def _present(frame: pl.DataFrame, listed: pl.DataFrame) -> pl.DataFrame:
    """The rows but for those of commits that a revision no longer stands at, where it was scored at several."""
    commits = listed.drop_nulls("commit").select("name", present="commit")
    joined = frame.join(commits, left_on="revision", right_on="name", how="left", maintain_order="left")
    several = pl.col("commit").n_unique().over("revision") > 1
    scored = (pl.col("commit") == pl.col("present")).any().over("revision")
    moved = several & scored & (pl.col("commit") != pl.col("present"))
    return joined.filter(~moved.fill_null(value=False)).drop("present")


def write_parquet(path: Path, frame: pl.DataFrame) -> None:
    """Write a frame whole or not at all.

    Raises:
        InputError: There is no space left, or the place is not writable.
    """
    _write(path, frame.write_parquet)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all; what stands in the way is told as the user's."""
    try:
        write_whole(path, write)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(path.parent).free
            raise InputError(
                f"No space left to write {path} ({free:,} bytes free). Free some, then give the same command again."
            ) from error
        raise InputError(f"{path} cannot be written ({error.strerror or error}).") from error
