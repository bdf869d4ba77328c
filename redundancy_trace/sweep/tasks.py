"""What of a sweep is left to do: one task for each chosen checkpoint without stored scores, or a share of them."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from redundancy_trace.checkpoints import Checkpoint, Listing, endpoints_first
from redundancy_trace.settings import parse_shard
from redundancy_trace.sweep.calibrating import calibration_label

if TYPE_CHECKING:
    from redundancy_trace.calibration import Calibration
    from redundancy_trace.store import Labels, Run

_T = TypeVar("_T")


@dataclass(frozen=True)
class Task:
    """One checkpoint to be scored, and what its rows will say of it."""

    checkpoint: Checkpoint
    labels: "Labels"


def identity_of(checkpoint: Checkpoint, run: "Run", token_hash: str) -> str:
    """The identity of a checkpoint's rows in a run, under one calibration; its commit must be known."""
    from redundancy_trace import store

    assert checkpoint.commit is not None
    number_settings = {"dtype": run.dtype, "trust_remote_code": run.trust_remote_code}
    return store.row_identity(checkpoint.commit, token_hash, number_settings, checkpoint.subfolder)


def share_of(work: Sequence[_T], shard: str | None) -> list[_T]:
    """This process's share of the work, `i/n` of `--shard`; all of it without one.

    Who takes what hangs on what is chosen alone, not on what is stored: shares that start at any time are apart, and
    together the whole. The ends of the training, then the middles of the gaps are dealt out in turn.

    Example:
        >>> share_of("abcdefg", "1/2"), share_of("abcdefg", "2/2")
        (['a', 'd', 'e', 'f'], ['b', 'c', 'g'])
    """
    if shard is None:
        return list(work)
    number, count = parse_shard(shard)
    mine = set(endpoints_first(len(work))[number - 1 :: count])
    return [one for index, one in enumerate(work) if index in mine]


def all_work(listing: Listing, run: "Run", calibration: "Calibration") -> dict[str, Task]:
    """The chosen checkpoints by the name of their part of the store, stored or not, in training order."""
    from redundancy_trace import store

    label = calibration_label(run, calibration)
    work: dict[str, Task] = {}
    for checkpoint in listing.chosen:
        commit = checkpoint.commit
        if commit is None:
            continue  # among the failures
        identity = identity_of(checkpoint, run, calibration.sha256)
        # The same commit (and folder) under another name: one set of rows.
        work.setdefault(
            store.part_name(commit, identity), Task(checkpoint, labels_of(checkpoint, run, label, identity))
        )
    return work


def open_tasks(work: Mapping[str, Task], finished: Set[str], shard: str | None = None) -> tuple[list[Task], int]:
    """Of this process's share of the work, what is not finished yet, and how many are."""
    share = share_of(list(work.items()), shard)
    tasks = [task for part, task in share if part not in finished]
    kept = len(share) - len(tasks)
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
