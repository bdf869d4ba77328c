"""What of a sweep is left to do: one task for each chosen checkpoint without stored scores."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from redundancy_trace.checkpoints import Checkpoint, Listing
from redundancy_trace.sweep.calibrating import calibration_label

if TYPE_CHECKING:
    from redundancy_trace.calibration import Calibration
    from redundancy_trace.store import Labels, Run


@dataclass(frozen=True)
class Task:
    """One checkpoint to be scored, and what its rows will say of it."""

    checkpoint: Checkpoint
    labels: "Labels"


def open_tasks(listing: Listing, run: "Run", calibration: "Calibration") -> tuple[list[Task], int]:
    """The chosen checkpoints that are not stored yet, and how many are."""
    from redundancy_trace import store

    label = calibration_label(run, calibration)
    number_settings = {"dtype": run.dtype, "trust_remote_code": run.trust_remote_code}
    finished = store.finished_parts(run.folder)
    tasks: list[Task] = []
    kept = 0
    seen: set[str] = set()
    for checkpoint in listing.chosen:
        commit = checkpoint.commit
        if commit is None:
            continue  # among the failures
        identity = store.row_identity(commit, calibration.sha256, number_settings, checkpoint.subfolder)
        part = store.part_name(commit, identity)
        if part in seen:
            continue  # the same commit (and folder) under another name: one set of rows
        seen.add(part)
        if part in finished:
            kept += 1
            continue
        labels = store.Labels(
            model=run.model,
            revision=checkpoint.name,
            commit=commit,
            kind=checkpoint.kind,
            stage=checkpoint.stage,
            ingredient=checkpoint.ingredient,
            seed=checkpoint.seed,
            step=checkpoint.step,
            tokens=checkpoint.tokens,
            calibration=label,
            identity=identity,
        )
        tasks.append(Task(checkpoint, labels))
    return tasks, kept
