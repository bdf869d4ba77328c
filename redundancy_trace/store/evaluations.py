"""What was measured of checkpoints, whole and with parts dropped: tidy parquet beside the scores.

A run keeps `evaluations/<commit12>-<identity12>.parquet`, written whole or not at all like the scores; one checkpoint
folder keeps a single `evaluation.parquet`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl

from redundancy_trace.errors import InputError, first_line
from redundancy_trace.locking import alone_in
from redundancy_trace.store.scores import Labels, as_listed, check_writable, part_name, read_run, write_parquet

ONE_FILE = "evaluation.parquet"
_FOLDER = "evaluations"
Purpose = Literal["model", "curve", "along"]
EVALUATION_SCHEMA: dict[str, Any] = {
    "model": pl.String,
    "revision": pl.String,
    "commit": pl.String,
    "kind": pl.String,
    "stage": pl.Int64,
    "ingredient": pl.Int64,
    "seed": pl.String,
    "step": pl.Int64,
    "tokens": pl.Int64,
    "purpose": pl.String,
    "plan": pl.String,
    "plan_revision": pl.String,
    "plan_sha256": pl.String,
    "component": pl.String,
    "n_dropped": pl.Int64,
    "order": pl.String,
    "order_seed": pl.Int64,
    "last_component": pl.String,
    "last_layer": pl.Int64,
    "dataset": pl.String,
    "metric": pl.String,
    "value": pl.Float64,
    "stderr": pl.Float64,
    "n_samples": pl.Int64,
    "n_tokens": pl.Int64,
    "n_bytes": pl.Int64,
    "token_sha256": pl.String,
    "sequence_length": pl.Int64,
    "stride": pl.Int64,
    "bos": pl.Boolean,
    "batch_size": pl.Int64,
    "prompt_tokens": pl.Int64,
    "new_tokens": pl.Int64,
    "shots": pl.Int64,
    "device": pl.String,
    "dtype": pl.String,
    "identity": pl.String,
}


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One number that was measured of a model, and under which conditions; None where that does not apply.

    Attributes:
        metric: A name in `metrics.EVALUATION_METRICS`, or one of a task (`acc`, `acc_norm`).
        value: The number.
        stderr: Its standard error, over windows of text, rounds of timing or questions.
        n_samples: Windows, rounds or questions.
        n_tokens: Tokens whose prediction counts.
        n_bytes: Bytes of UTF-8 text that those tokens stand for.
        dataset: The text or the task.
        token_sha256: Hash of the windows' token ids.
        sequence_length: Tokens of a window.
        stride: Tokens from the start of a window to the start of the next.
        bos: Whether every window starts with the tokenizer's special tokens.
        batch_size: Sequences at a time while speed and memory are measured.
        prompt_tokens: Tokens of the prompt there.
        new_tokens: Tokens decoded behind it.
        shots: Examples in front of a task's question; None: as many as the task itself says.
        plan: What was dropped, such as `attn=8`; None: nothing.
        plan_revision: The checkpoint whose scores the plan comes from.
        plan_sha256: Hash of the plan.
        component: attn, mlp, block or joint, as the plan drops; None of the whole model.
        n_dropped: Parts that are dropped.
        order: importance, random, deepest, …
        order_seed: Of a random order.
        last_component: Of the part that comes last in the order of the drop.
        last_layer: Its layer.
        device: Where it ran.
        dtype: Compute dtype.
    """

    metric: str
    value: float | None
    stderr: float | None = None
    n_samples: int | None = None
    n_tokens: int | None = None
    n_bytes: int | None = None
    dataset: str | None = None
    token_sha256: str | None = None
    sequence_length: int | None = None
    stride: int | None = None
    bos: bool | None = None
    batch_size: int | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    shots: int | None = None
    plan: str | None = None
    plan_revision: str | None = None
    plan_sha256: str | None = None
    component: str | None = None
    n_dropped: int | None = 0
    order: str | None = None
    order_seed: int | None = None
    last_component: str | None = None
    last_layer: int | None = None
    device: str | None = None
    dtype: str | None = None


def evaluations_frame(labels: Labels, purpose: Purpose, numbers: Iterable[Evaluated]) -> pl.DataFrame:
    """Tidy rows of one checkpoint, one a number, with the columns of `EVALUATION_SCHEMA`.

    Args:
        labels: Where the numbers come from.
        purpose: `model` (one plan, or none), `curve` (every number dropped) or `along` (a run).
        numbers: The numbers.
    """
    shared = {name: value for name, value in vars(labels).items() if name in EVALUATION_SCHEMA} | {"purpose": purpose}
    return pl.DataFrame([{**shared, **vars(number)} for number in numbers], schema=EVALUATION_SCHEMA)


def evaluation_file(place: Path, labels: Labels) -> Path:
    """Where the rows of one checkpoint and identity are kept.

    Args:
        place: A `.parquet` file, or a run folder.
        labels: With commit and identity.
    """
    if place.suffix == ".parquet":
        return place
    assert labels.commit is not None
    assert labels.identity is not None
    return place / _FOLDER / f"{part_name(labels.commit, labels.identity)}.parquet"


def write_evaluations(file: Path, rows: pl.DataFrame) -> None:
    """Store rows whole or not at all; those that the file has of other identities stay.

    Raises:
        InputError: It cannot be written, or the file is there and holds something else.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with alone_in(file.parent):  # else one of two processes that add rows would undo the other
        if file.is_file():
            kept = _of_file(file)
            kept = kept.filter(~pl.col("identity").is_in(rows["identity"].unique().to_list()))
            rows = pl.concat([kept, rows])
        write_parquet(file, rows)


def open_evaluations(place: Path, model: str, commit: str) -> frozenset[str]:
    """Identities whose rows a place has already; makes sure that rows of this checkpoint can be added to it.

    Args:
        place: A `.parquet` file, or a run folder; it need not be there, and is not made.
        model: The model, as rows name it.
        commit: The checkpoint's.

    Raises:
        InputError: It is a run of another model, holds something else, or is not writable.
    """
    is_file = place.suffix == ".parquet"
    check_writable(place.parent if is_file else place)
    run = None if is_file else read_run(place)
    # A checkpoint may go by another name, such as its own folder's, and still be one of the run.
    if run is not None and run.model != model and not any((place / "scores").glob(f"{commit[:12]}-*.parquet")):
        raise InputError(f"{place} is a run of {run.model}, not of {model}; name another place with --out.")
    return finished_evaluations(place)


def finished_evaluations(place: Path) -> frozenset[str]:
    """Identities whose rows are stored at a place, a `.parquet` file or a run folder."""
    return frozenset(identity for file in _files(place) for identity in _of_file(file)["identity"].unique())


def holds_evaluations(folder: Path) -> bool:
    """Whether anything in a folder was evaluated."""
    return bool(_files(folder))


def read_evaluations(folder: str | Path) -> pl.DataFrame:
    """All that `trace eval` measured, one row a number, in training order.

    Args:
        folder: A run folder, a checkpoint folder or a `.parquet` file that `trace eval` wrote.

    Returns:
        Columns as `EVALUATION_SCHEMA`; `metric` tells what `value` is (`loss` in nats per token, `bits_per_byte`,
        `decode_tokens_per_second`, `kv_cache_bytes`, `acc` …), `plan` what was dropped. Of a revision that was
        evaluated at several commits, the rows of the commit that was listed last.

    Raises:
        InputError: There are no evaluations.
    """
    place = Path(folder).expanduser()
    files = _files(place)
    if not files:
        raise InputError(
            f"{place} holds no evaluations yet. trace eval --along {place} measures a run; trace eval FOLDER one "
            "checkpoint."
        )
    frame = pl.concat([_of_file(file) for file in files])
    run = read_run(place) if place.is_dir() else None
    within = ("commit", "purpose", "component", "order", "order_seed", "plan_revision", "n_dropped", "dataset")
    return as_listed(frame, place, run, [], within)


def _files(place: Path) -> list[Path]:
    if place.suffix == ".parquet" or not place.is_dir():
        return [place] if place.is_file() else []
    one = place / ONE_FILE
    return [*([one] if one.is_file() else []), *sorted((place / _FOLDER).glob("*.parquet"))]


def _of_file(file: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(file).select(*EVALUATION_SCHEMA).cast(pl.Schema(EVALUATION_SCHEMA))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(
            f"{file} holds no evaluations that can be read ({first_line(error)}); delete it, or name another place."
        ) from error
