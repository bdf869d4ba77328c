"""What a sweep will cost, before it costs it: checkpoints, bytes to move, bytes on disk, time."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from redundancy_trace.checkpoints import Checkpoint, Listing, endpoints_first, needed_files, selector_items
from redundancy_trace.errors import CheckpointError, InputError
from redundancy_trace.hub import Hub
from redundancy_trace.settings import TraceSettings, parse_bytes
from redundancy_trace.sweep.calibrating import asked_for
from redundancy_trace.sweep.pipeline import AHEAD
from redundancy_trace.sweep.tasks import identity_of, share_of

if TYPE_CHECKING:
    from redundancy_trace.store import Run

# `all` of a large run is terabytes: more than this has to be meant.
BYTES_WITHOUT_YES = 200 * 10**9
# Selectors that say themselves how many checkpoints they choose.
_COUNTED = ("log:", "linear:")
# Most that is read to measure the rate; of little, a hundredth.
_PROBE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep would do.

    Attributes:
        checkpoints: How many are chosen; of a shard, how many are in it.
        stored: How many of them have their scores already.
        bytes_to_move: Bytes of weights that come over the network; upper bound where they are streamed.
        bytes_on_disk: Most bytes of downloads on disk at a time.
        bytes_per_second: As measured just now; None where nothing is to be moved, or the server gave no byte.
        shard: The share of the work that this is the plan of; None = all of it.
    """

    checkpoints: int
    stored: int
    bytes_to_move: int
    bytes_on_disk: int
    bytes_per_second: float | None
    shard: str | None = None

    @property
    def seconds(self) -> float | None:
        """Time to move the bytes at the measured rate."""
        return None if self.bytes_per_second is None else self.bytes_to_move / self.bytes_per_second

    def told(self) -> str:
        """The plan in a line."""
        count = f"{self.checkpoints} checkpoint{'' if self.checkpoints == 1 else 's'}"
        count += f" in shard {self.shard}" if self.shard else ""
        stored = f" ({self.stored} scored already)" if self.stored else ""
        if not self.bytes_to_move:
            return f"{count}{stored}, no bytes to move."
        moved = f"{amount(self.bytes_to_move)} to move, at most {amount(self.bytes_on_disk)} on disk at a time"
        if self.bytes_per_second is None:
            return f"{count}{stored}, {moved}."
        rate = amount(round(self.bytes_per_second))
        return f"{count}{stored}, {moved}, about {_duration(self.seconds or 0)} at {rate}/s as measured now."


def plan_sweep(
    settings: TraceSettings, listing: Listing, run: "Run | None", hub: Hub, places: Callable[[], int] = lambda: 1
) -> SweepPlan:
    """What is left to do of a sweep, and what it takes; the beginning of a file is read to measure the rate.

    Args:
        settings: The settings; those of the calibration tell which scores count as stored.
        listing: The checkpoints.
        run: The run so far, if there is one.
        hub: Where the weights are.
        places: Tells how many checkpoints are scored at a time; asked if bytes are to be moved.
    """
    share = _share(settings, listing)
    left = _left(settings, listing, run, share)
    moving = [checkpoint for checkpoint in left if _moves(checkpoint, listing, hub)]
    # A stream is not kept: what is scored on several calibrations comes as many times.
    times = len(asked_for(settings, listing)) if settings.fetch == "stream" else 1
    total = times * sum(checkpoint.bytes or 0 for checkpoint in moving)
    return SweepPlan(
        checkpoints=len(share),
        stored=len(share) - len(left),
        bytes_to_move=total,
        bytes_on_disk=_on_disk(settings, [moving[index].bytes or 0 for index in endpoints_first(len(moving))], places),
        bytes_per_second=_rate(moving, listing, hub) if total else None,
        shard=settings.shard,
    )


def check_plan(settings: TraceSettings, listing: Listing, plan: SweepPlan) -> None:
    """Refuse a sweep that cannot be meant, or cannot be done, before a byte is moved.

    Raises:
        InputError: More than 200 GB without `--yes`, of a selection that does not say how many it chooses; or one
            checkpoint is larger than `--disk-budget` and may not be streamed.
    """
    names = {checkpoint.name for checkpoint in listing}
    items = selector_items(settings.revisions, tuple(names))
    counted = all(item.startswith(_COUNTED) for item in items)
    named = names.issuperset(items)
    if plan.bytes_to_move > BYTES_WITHOUT_YES and not (settings.yes or settings.dry_run or counted or named):
        raise InputError(
            f"--revisions {settings.revisions} is {plan.told()} Add --yes if that is meant; --revisions log:20 chooses "
            "20 of them, spread over the training."
        )
    if settings.disk_budget is None or settings.fetch != "file":
        return
    budget = parse_bytes(settings.disk_budget)
    largest = max(listing.chosen, key=lambda c: 0 if c.path else c.bytes or 0)
    if largest.path is None and (largest.bytes or 0) > budget:
        raise InputError(
            f"--disk-budget {settings.disk_budget} is less than {largest.name} takes ({largest.bytes:,} bytes). Give "
            "more, or --fetch stream, which needs none."
        )


def amount(count: int) -> str:
    """Bytes for people.

    Example:
        >>> amount(999), amount(551_000_000_000)
        ('999 bytes', '551 GB')
    """
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if count >= 10**power:
            return f"{count / 10**power:.3g} {unit}"
    return f"{count} bytes"


def _duration(seconds: float) -> str:
    for length, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _share(settings: TraceSettings, listing: Listing) -> list[Checkpoint]:
    """The chosen checkpoints; of a shard, those that it would score, as far as the listing tells them apart."""
    if settings.shard is None:
        return list(listing.chosen)
    apart = {(c.commit, c.subfolder) if c.commit else c.name: c for c in reversed(listing.chosen)}
    return share_of(list(reversed(apart.values())), settings.shard)


def _left(settings: TraceSettings, listing: Listing, run: "Run | None", share: list[Checkpoint]) -> list[Checkpoint]:
    """Those of a share without stored scores on all calibrations."""
    from redundancy_trace import store

    hashes: list[list[str]] = []
    finished: frozenset[str] = frozenset()
    if run is not None:
        hashes = [
            [record.sha256 for record in run.calibrations if record.label.startswith(asked.label)]
            for asked in asked_for(settings, listing)
        ]
        finished = store.finished_parts(run.folder)

    def is_stored(checkpoint: Checkpoint, digests: list[str]) -> bool:
        if checkpoint.commit is None or run is None:
            return False
        parts = (store.part_name(checkpoint.commit, identity_of(checkpoint, run, digest)) for digest in digests)
        return any(part in finished for part in parts)

    def is_done(checkpoint: Checkpoint) -> bool:
        return run is not None and all(is_stored(checkpoint, digests) for digests in hashes)

    return [checkpoint for checkpoint in share if not is_done(checkpoint)]


def _moves(checkpoint: Checkpoint, listing: Listing, hub: Hub) -> bool:
    if checkpoint.path is not None or checkpoint.commit is None or checkpoint.files is None or hub.is_offline:
        return False
    below = f"{checkpoint.subfolder}/" if checkpoint.subfolder else ""
    paths = [below + file.path for file in needed_files(checkpoint.files)]
    return hub.cached(checkpoint.repo or listing.model, checkpoint.commit, paths) is None


def _on_disk(settings: TraceSettings, sizes: list[int], places: Callable[[], int]) -> int:
    """The most of those that are scored at a time and those that are fetched ahead, in the order of the sweep."""
    if settings.fetch == "stream" or not sizes:
        return 0
    if settings.keep:
        return sum(sizes)
    together = places() + AHEAD
    most = max(sum(sizes[first : first + together]) for first in range(len(sizes)))
    return most if settings.disk_budget is None else min(most, parse_bytes(settings.disk_budget))


def _rate(moving: list[Checkpoint], listing: Listing, hub: Hub) -> float | None:
    """Bytes a second, from reading the beginning of one weight file."""
    checkpoint = moving[0]
    file = max(needed_files(checkpoint.files or ()), key=lambda file: file.size)
    remote = hub.remote_folder(checkpoint.repo or listing.model, checkpoint.commit or "", [file])
    count = min(file.size, _PROBE_BYTES, sum(one.bytes or 0 for one in moving) // 100 + 1)
    try:
        started = time.monotonic()
        remote.read(file.path, [(0, count)])
    except CheckpointError:
        return None  # it is told when its turn comes
    return count / max(1e-6, time.monotonic() - started)
