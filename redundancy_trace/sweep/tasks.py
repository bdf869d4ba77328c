"""What a sweep has to do: one task for each chosen checkpoint; which are left, and which of them are a shard's."""

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from redundancy_trace.checkpoints import Checkpoint, Listing, endpoints_first
from redundancy_trace.settings import parse_shard
from redundancy_trace.sweep.calibrating import calibration_label

if TYPE_CHECKING:
    from redundancy_trace.calibration import Calibration
    from redundancy_trace.store import Labels, Run

_T = TypeVar("_T")


@dataclass(frozen=True)
class Part:
    """The token ids that a checkpoint is scored on, and what the rows will say of it."""

    calibration: "Calibration"
    labels: "Labels"

    @property
    def name(self) -> str:
        """What the store calls it."""
        from redundancy_trace.store import part_name

        assert self.labels.commit is not None
        assert self.labels.identity is not None
        return part_name(self.labels.commit, self.labels.identity)


@dataclass(frozen=True)
class Task:
    """One checkpoint to be scored: its weights are fetched once, whatever it is scored on."""

    checkpoint: Checkpoint
    parts: tuple[Part, ...]

    def parts_left(self, finished: Set[str]) -> tuple[Part, ...]:
        """Those that are not among the names of the store's finished parts."""
        return tuple(part for part in self.parts if part.name not in finished)


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


def all_tasks(listing: Listing, run: "Run", calibrations: "Sequence[Calibration]") -> list[Task]:
    """The chosen checkpoints, stored or not, in training order."""
    labels = [calibration_label(run, calibration) for calibration in calibrations]
    tasks: dict[tuple[str, str | None], Task] = {}
    for checkpoint in listing.chosen:
        commit = checkpoint.commit
        if commit is None:
            continue  # among the failures
        parts = tuple(
            Part(calibration, labels_of(checkpoint, run, label, identity_of(checkpoint, run, calibration.sha256)))
            for calibration, label in zip(calibrations, labels, strict=True)
        )
        # The same commit (and folder) under another name: one set of rows.
        tasks.setdefault((commit, checkpoint.subfolder), Task(checkpoint, parts))
    return list(tasks.values())


def open_tasks(tasks: Sequence[Task], finished: Set[str], shard: str | None = None) -> tuple[list[Task], int]:
    """Of this process's share of the work, what is not stored yet on all calibrations, and how many are.

    Args:
        tasks: All of the work.
        finished: Names of the parts that the store has.
        shard: `i/n`; None = all of it.
    """
    share = [replace(task, parts=task.parts_left(finished)) for task in share_of(tasks, shard)]
    left = [task for task in share if task.parts]
    # Spread over the training from the start, so that a sweep that is stopped shows the whole curve.
    return [left[index] for index in endpoints_first(len(left))], len(share) - len(left)


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
