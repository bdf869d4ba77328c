"""Fetching and scoring: one checkpoint is scored while the next is being fetched."""

import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from redundancy_trace.checkpoints import Listing
from redundancy_trace.errors import InputError, TraceError
from redundancy_trace.fetching import Fetched, Room, abandon, close_transit, discard, fetch, keep, leave, place_of
from redundancy_trace.hub import Hub
from redundancy_trace.progress import Reporter
from redundancy_trace.settings import TraceSettings, parse_bytes
from redundancy_trace.sweep.interrupting import interrupts_kept
from redundancy_trace.sweep.tasks import Task

if TYPE_CHECKING:
    from redundancy_trace.metrics import ModelScores
    from redundancy_trace.store import Run

_PATIENCE_SECONDS = 2.0


def score_all(
    settings: TraceSettings,
    listing: Listing,
    run: "Run",
    tasks: list[Task],
    hub: Hub,
    reporter: Reporter,
    *,
    any_stored: bool,
) -> tuple[int, dict[str, str]]:
    """Score the tasks in order, the next one being fetched meanwhile; returns how many, and the failures."""
    import torch

    from redundancy_trace import store
    from redundancy_trace.engine import choose_device, score_checkpoint
    from redundancy_trace.weights import ModelBuilder, open_remote_weights

    built = ModelBuilder()
    device = choose_device(settings.device)
    let_go = keep if settings.keep else discard
    scored, failures = 0, {}
    with interrupts_kept() as look, fetching_ahead(settings, listing, run.folder, hub, reporter) as begin:
        ahead = begin(tasks[0])
        for number, task in enumerate(tasks):
            look()
            name = task.checkpoint.name
            started = time.monotonic()
            fetched: Fetched | None = None
            scores: list[ModelScores] = []
            try:
                fetched = awaited(ahead)
                if number + 1 < len(tasks):
                    ahead = begin(tasks[number + 1])
                reporter.scoring(name)
                for part in task.parts:
                    scores.append(  # noqa: PERF401 - what comes before one that fails is kept
                        score_checkpoint(
                            fetched.folder,
                            part.calibration.token_ids,
                            device=device,
                            dtype=getattr(torch, run.dtype),
                            batch_size=settings.batch_size,
                            engine=settings.engine,
                            trust_remote_code=settings.trust_remote_code,
                            on_progress=reporter.step,
                            weights=open_remote_weights(fetched.folder, fetched.remote) if fetched.remote else None,
                            kept=built,
                        )
                    )
            except Exception as error:
                # Input that fits none is told at once; what others bore is a fault of this one, and they go on.
                if isinstance(error, InputError) and not (scored or any_stored):
                    raise
                failures[name] = reason_of(error)
                if fetched is None and number + 1 < len(tasks):
                    ahead = begin(tasks[number + 1])
            # Stored before its weights go: whatever ends the sweep before that leaves them to be gone on with.
            for part, found in zip(task.parts, scores, strict=False):
                store.write_part(run.folder, part.labels, found)
            for part in task.parts[len(scores) :]:
                store.write_failure(run.folder, part.labels, failures[name])
            if fetched is not None:
                let_go(fetched)
            if name in failures:
                reporter.finished(not_scored(name, failures[name]))
                continue
            scored += 1
            reporter.finished(f"{name} scored in {time.monotonic() - started:.1f} s")
    return scored, failures


def not_scored(name: str, reason: str) -> str:
    """How it is told that a checkpoint has no scores."""
    return f"{name}: not scored: {reason}"


def awaited(future: "Future[Fetched]") -> Fetched:
    """The result, waited for in short turns: once polars has run, a signal no longer ends the wait for a lock."""
    while not wait([future], timeout=0.2).done:
        pass
    return future.result()


@contextmanager
def fetching_ahead(
    settings: TraceSettings, listing: Listing, folder: Path, hub: Hub, reporter: Reporter
) -> Iterator[Callable[[Task], Future[Fetched]]]:
    """A thread that fetches one checkpoint at a time.

    When the sweep is interrupted, what has arrived stays for the next one; when it fails, it is deleted at once.
    """
    room = Room(parse_bytes(settings.disk_budget) if settings.disk_budget else None)
    # The whole model is loaded from files.
    how: Any = "file" if settings.keep or settings.engine == "whole" else settings.fetch
    started: list[tuple[Task, Future[Fetched], Event]] = []

    def work(task: Task, stopped: Event) -> Fetched:
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
        )

    def begin(task: Task) -> "Future[Fetched]":
        stopped = Event()
        future = pool.submit(work, task, stopped)
        started.append((task, future, stopped))
        return future

    pool = ThreadPoolExecutor(1, "fetching")
    try:
        yield begin
    except BaseException as error:
        for _, _, stopped in started:
            stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
        # A download ends at its next chunk; one that waits for a busy server is not waited for.
        wait([future for _, future, _ in started], timeout=_PATIENCE_SECONDS)
        stays = settings.keep or not isinstance(error, Exception)
        for task, future, _ in started:
            if future.done() and not future.cancelled() and future.exception() is None:
                (leave if stays else discard)(future.result())
            elif not stays:
                abandon(place_of(folder, task.checkpoint))
        raise
    else:
        pool.shutdown()
    finally:
        close_transit(folder)


def reason_of(error: Exception) -> str:
    """Why a checkpoint has no scores; of a fault that nobody foresaw, what it was and where."""
    if isinstance(error, TraceError):
        return str(error)
    lines = str(error).strip().splitlines()
    place = traceback.extract_tb(error.__traceback__)[-1]
    told = (
        f"{type(error).__name__}{f': {lines[0]}' if lines else ''} (in {place.name}, {place.filename}:{place.lineno})"
    )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        told += ". Not even one sequence fits: try a shorter --sequence-length, --engine stream, or --device cpu"
    return told
