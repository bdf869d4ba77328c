"""The places where checkpoints are scored, as the sweep sees them, whichever they are."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Protocol

from redundancy_trace.cluster.jobs import Job, Scoring, Watch
from redundancy_trace.metrics import ModelScores


class Places(Protocol):
    """Where checkpoints are scored. Nothing is imported, started or asked before it has to be."""

    def count(self) -> int:
        """How many checkpoints are scored at a time.

        Raises:
            InputError: A device is not there, or a cluster cannot be reached.
        """

    def dtype(self, name: str) -> str:
        """The compute dtype that `auto`, `float32` or `bfloat16` stands for there.

        Raises:
            InputError: A device is not there, or a cluster cannot be reached.
        """

    def start(self, scoring: Scoring) -> None:
        """Get ready: jobs are about to come."""

    def submit(self, job: Job, watch: Watch) -> Future[ModelScores]:
        """Score a checkpoint; at most `count` may be at work. Whatever fails is the future's exception."""

    def close(self) -> None:
        """End what is at work, at once."""


@contextmanager
def open_places(device: str, devices: str | None, cluster: str | None, tell: Callable[[str], None]) -> Iterator[Places]:
    """The places that the settings name; they are closed at the end.

    Args:
        device: `--device`: one, in this process.
        devices: `--devices`: several, a process each.
        cluster: `--cluster`: a Ray cluster's.
        tell: Told what goes wrong with a place.
    """
    places: Places
    if cluster is not None:
        from redundancy_trace.cluster.ray_tasks import RayTasks

        places = RayTasks(cluster, device, tell)
    elif devices is not None:
        from redundancy_trace.cluster.workers import Workers

        places = Workers(devices, tell)
    else:
        from redundancy_trace.cluster.here import Here

        places = Here(device)
    try:
        yield places
    finally:
        places.close()
