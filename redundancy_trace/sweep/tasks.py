"""What of a sweep is left to do: one task for each chosen checkpoint that lacks scores of a calibration."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from redundancy_trace.checkpoints import Checkpoint, Listing, endpoints_first
from redundancy_trace.sweep.calibrating import calibration_label

if TYPE_CHECKING:
    from redundancy_trace.calibration import Calibration
    from redundancy_trace.store import Labels, Run


@dataclass(frozen=True)
class Part:
    """The token ids that a checkpoint is scored on, and what the rows will say of it."""

    calibration: "Calibration"
    labels: "Labels"


@dataclass(frozen=True)
class Task:
    """One checkpoint to be scored: its weights are fetched once, whatever it is scored on."""

    checkpoint: Checkpoint
    parts: tuple[Part, ...]


def identity_of(checkpoint: Checkpoint, run: "Run", token_hash: str) -> str:
    """The identity of a checkpoint's rows in a run, under one calibration; its commit must be known."""
    from redundancy_trace import store

    assert checkpoint.commit is not None
    number_settings = {"dtype": run.dtype, "trust_remote_code": run.trust_remote_code}
    return store.row_identity(checkpoint.commit, token_hash, number_settings, checkpoint.subfolder)


def open_tasks(listing: Listing, run: "Run", calibrations: "Sequence[Calibration]") -> tuple[list[Task], int]:
    """The chosen checkpoints that are not stored yet on all calibrations, and how many are."""
    from redundancy_trace import store

    labels = [calibration_label(run, calibration) for calibration in calibrations]
    finished = store.finished_parts(run.folder)
    tasks: list[Task] = []
    kept = 0
    seen: set[str] = set()
    for checkpoint in listing.chosen:
        commit = checkpoint.commit
        if commit is None:
            continue  # among the failures
        parts = {}
        for calibration, label in zip(calibrations, labels, strict=True):
            identity = identity_of(checkpoint, run, calibration.sha256)
            name = store.part_name(commit, identity)
            parts[name] = Part(calibration, labels_of(checkpoint, run, label, identity))
        if seen.issuperset(parts):
            continue  # the same commit (and folder) under another name: one set of rows
        seen.update(parts)
        if left := tuple(part for name, part in parts.items() if name not in finished):
            tasks.append(Task(checkpoint, left))
        else:
            kept += 1
    # Spread over the training from the start, so that a sweep that is stopped shows the whole curve.
    return [tasks[index] for index in endpoints_first(len(tasks))], kept


def labels_of(checkpoint: Checkpoint, run: "Run", calibration: str, identity: str | None = None) -> "Labels":
    """What a row, or the note of a failure, says of where it comes from."""
    from redundancy_trace.store import Labels

    return Labels(
        model=run.model,
        revision=checkpoint.name,
        commit=checkpoint.commit,
        kind=checkpoint.kind,
        stage=checkpoint.stage,
        ingredient=checkpoint.ingredient,
        seed=checkpoint.seed,
        step=checkpoint.step,
        tokens=checkpoint.tokens,
        calibration=calibration,
        identity=identity,
    )
