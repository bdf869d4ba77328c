"""Fetching and scoring: the network brings the next checkpoints while others are scored."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from redundancy_trace.checkpoints import Listing
from redundancy_trace.cluster import Job, Places, Scoring, Watch, told
from redundancy_trace.errors import InputError
from redundancy_trace.fetching import Fetched, Room, abandon, close_transit, discard, fetch, keep, leave, place_of
from redundancy_trace.hub import Hub, Stopped
from redundancy_trace.progress import Reporter
from redundancy_trace.settings import TraceSettings, parse_bytes
from redundancy_trace.sweep.interrupting import interrupts_kept
from redundancy_trace.sweep.tasks import Task

if TYPE_CHECKING:
    from redundancy_trace.metrics import ModelScores
    from redundancy_trace.store import Run

# Fetched beside those that are scored: one that waits for its turn, one that is on its way.
AHEAD = 2
_PATIENCE_SECONDS = 2.0
_TURN_SECONDS = 0.2


@dataclass
class Turn:
    """One checkpoint on its way through the sweep."""

    task: Task
    fetching: "Future[Fetched]"
    stopped: Event
    started: float = 0.0
    scores: "list[ModelScores]" = field(default_factory=list)  # of its parts, in order

    @property
    def name(self) -> str:
        """What the checkpoint is called."""
        return self.task.checkpoint.name


def score_all(
    settings: TraceSettings,
    listing: Listing,
    run: "Run",
    tasks: list[Task],
    hub: Hub,
    reporter: Reporter,
    places: Places,
    *,
    any_stored: bool,
) -> tuple[int, dict[str, str]]:
    """Score the tasks, in order but for what fails, the next ones being fetched meanwhile.

    No more than `places.count() + AHEAD` checkpoints lie on the disk at a time, and no more than there is room for.

    Returns:
        How many were scored, and the reasons of those that were not.
    """
    calibrations = {part.calibration.sha256: part.calibration.token_ids for task in tasks for part in task.parts}
    scoring = Scoring(calibrations, run.dtype, settings.batch_size, settings.engine, settings.trust_remote_code)
    with (
        interrupts_kept() as look,
        fetching_ahead(settings, listing, run.folder, hub, reporter) as begin,
        closing(places),
    ):
        flow = _Flow(run.folder, deque(tasks), places, begin, keep if settings.keep else discard, reporter, any_stored)
        flow.fetch_ahead()
        places.start(scoring)
        while flow.goes_on():
            flow.collect()
            look()
            flow.hand_out()
            flow.wait()
    return flow.scored, flow.failures


@dataclass
class _Flow:
    """The checkpoints of a sweep: those left, those that are fetched ahead, those that are scored, those done."""

    run: Path
    left: deque[Task]
    places: Places
    begin: Callable[[Task], Turn]
    let_go: Callable[[Fetched], None]
    reporter: Reporter
    any_stored: bool
    ahead: list[Turn] = field(default_factory=list)
    at_work: "dict[Future[ModelScores], Turn]" = field(default_factory=dict)
    scored: int = 0
    failures: dict[str, str] = field(default_factory=dict)

    def goes_on(self) -> bool:
        """Whether a checkpoint is still on its way."""
        return bool(self.ahead or self.at_work)

    def fetch_ahead(self) -> None:
        """Begin to fetch as many as may lie on the disk."""
        while self.left and len(self.ahead) + len(self.at_work) < self.places.count() + AHEAD:
            self.ahead.append(self.begin(self.left.popleft()))

    def hand_out(self) -> None:
        """Hand what is fetched to the places that are free."""
        while len(self.at_work) < self.places.count():
            turn = next((turn for turn in self.ahead if turn.fetching.done()), None)
            if turn is None:
                return
            self.ahead.remove(turn)
            if error := turn.fetching.exception():
                self._fail(turn, error)
                self.fetch_ahead()
                continue
            turn.started = time.monotonic()
            self.reporter.scoring(turn.name)
            self._submit(turn)

    def collect(self) -> None:
        """Take the scores that have come, and store those of the checkpoints that are through."""
        for future in [future for future in self.at_work if future.done()]:
            turn = self.at_work.pop(future)
            if error := future.exception():
                self._fail(turn, error)
            else:
                turn.scores.append(future.result())
                if len(turn.scores) < len(turn.task.parts):
                    self._submit(turn)
                    continue
                self._store(turn)
                self.scored += 1
                self.reporter.finished(turn.name, f"{turn.name} scored in {time.monotonic() - turn.started:.1f} s")
            self.let_go(turn.fetching.result())
            self.fetch_ahead()

    def wait(self) -> None:
        """Wait for something to do, in short turns: once polars has run, a signal does not end a wait for a lock."""
        wanted: list[Future[Any]] = list(self.at_work)
        if len(self.at_work) < self.places.count():
            wanted += [turn.fetching for turn in self.ahead]
        if wanted:
            wait(wanted, timeout=_TURN_SECONDS, return_when=FIRST_COMPLETED)

    def _submit(self, turn: Turn) -> None:
        """Have the next part of a checkpoint scored."""
        fetched = turn.fetching.result()
        calibration = turn.task.parts[len(turn.scores)].calibration.sha256
        watch = Watch(partial(self.reporter.step, turn.name), self.reporter.moved, turn.stopped)
        job = Job(turn.name, fetched.folder, calibration, fetched.remote)
        self.at_work[self.places.submit(job, watch)] = turn

    def _store(self, turn: Turn) -> None:
        """Store what is scored, before its weights go: whatever ends the sweep before leaves them to go on with."""
        from redundancy_trace import store

        for part, scores in zip(turn.task.parts, turn.scores, strict=False):
            store.write_part(self.run, part.labels, scores)

    def _fail(self, turn: Turn, error: BaseException) -> None:
        from redundancy_trace import store

        # Input that fits none is told at once; what others bore is a fault of this one, and they go on.
        if not isinstance(error, Exception) or (isinstance(error, InputError) and not (self.scored or self.any_stored)):
            raise error
        reason = str(told(error))
        self.failures[turn.name] = reason
        self._store(turn)  # what came before the part that failed
        for part in turn.task.parts[len(turn.scores) :]:
            store.write_failure(self.run, part.labels, reason)
        self.reporter.finished(turn.name, not_scored(turn.name, reason))


def not_scored(name: str, reason: str) -> str:
    """How it is told that a checkpoint has no scores."""
    return f"{name}: not scored: {reason}"


def awaited(turn: Turn) -> Fetched:
    """What is fetched, waited for in short turns: once polars has run, a signal does not end a wait for a lock."""
    while not wait([turn.fetching], timeout=_TURN_SECONDS).done:
        pass
    return turn.fetching.result()


@contextmanager
def fetching_ahead(
    settings: TraceSettings, listing: Listing, folder: Path, hub: Hub, reporter: Reporter
) -> Iterator[Callable[[Task], Turn]]:
    """A thread that fetches one checkpoint at a time, while another checks the hashes of the one before.

    When the sweep is interrupted, what has arrived stays for the next one; when it fails, it is deleted at once.
    """
    room = Room(parse_bytes(settings.disk_budget) if settings.disk_budget else None)
    # The whole model is loaded from files.
    how: Any = "file" if settings.keep or settings.engine == "whole" else settings.fetch
    turns: list[Turn] = []
    free = Event()  # of the network: set when the last download has all its bytes
    free.set()

    def work(task: Task, stopped: Event, before: Event, arrived: Event) -> Fetched:
        try:
            while not before.wait(_TURN_SECONDS):
                if stopped.is_set():
                    raise Stopped
            reporter.fetching(task.checkpoint.name, task.checkpoint.bytes if task.checkpoint.path is None else None)
            return fetch(
                listing.model,
                task.checkpoint,
                hub,
                place_of(folder, task.checkpoint),
                reporter.moved,
                stopped,
                room,
                how,
                code=settings.trust_remote_code,
                on_arrival=arrived.set,
            )
        finally:
            arrived.set()

    def begin(task: Task) -> Turn:
        nonlocal free
        stopped, before, free = Event(), free, Event()
        turns.append(Turn(task, pool.submit(work, task, stopped, before, free), stopped))
        return turns[-1]

    pool = ThreadPoolExecutor(2, "fetching")
    try:
        yield begin
    except BaseException as error:
        for turn in turns:
            turn.stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
        # A download ends at its next chunk; one that waits for a busy server is not waited for.
        wait([turn.fetching for turn in turns], timeout=_PATIENCE_SECONDS)
        stays = settings.keep or not isinstance(error, Exception)
        for turn in turns:
            future = turn.fetching
            if future.done() and not future.cancelled() and future.exception() is None:
                (leave if stays else discard)(future.result())
            elif not stays:
                abandon(place_of(folder, turn.task.checkpoint))
        raise
    else:
        pool.shutdown()
    finally:
        close_transit(folder)
