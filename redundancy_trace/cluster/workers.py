"""A process a device on this machine: each scores one checkpoint at a time, and may die without ending the sweep."""

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from redundancy_trace.cluster.devices import named_devices
from redundancy_trace.cluster.jobs import Job, Scoring, Watch
from redundancy_trace.errors import CheckpointError, TraceError
from redundancy_trace.metrics import ModelScores

# A checkpoint whose worker dies is tried once more; a device that lost so many is left out while there are others.
_TRIES = 2
_MOST_LOST = 2
# A fresh interpreter, not a fork (CUDA) nor multiprocessing's spawn (it runs the user's script again).
_CODE = "import sys; sys.path[:] = sys.argv[1:]; from redundancy_trace.cluster.worker import main; main()"


@dataclass
class _Turn:
    """A job on its way through the workers, and the places where a worker died of it."""

    job: Job
    watch: Watch
    future: Future[ModelScores] = field(default_factory=Future)
    died: list[int] = field(default_factory=list)


class _Died(Exception):
    """A worker has ended in the middle; says how."""


class Workers:
    """A worker process for each device; a thread of this process looks after each."""

    def __init__(self, devices: str, tell: Callable[[str], None]) -> None:
        """Take devices as `--devices` names them; `tell` is told of a worker that dies."""
        self._given = devices
        self._tell = tell
        self._names: tuple[str, ...] = ()
        self._changed = threading.Condition()
        self._pending: list[_Turn] = []
        self._processes: dict[int, _Process] = {}
        self._places: set[int] = set()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def count(self) -> int:
        """One checkpoint a device."""
        self._names = self._names or named_devices(self._given)
        return len(self._names)

    def dtype(self, name: str) -> str:
        """The compute dtype that a name stands for on the devices."""
        from redundancy_trace.engine import choose_device, choose_dtype

        self.count()
        return str(choose_dtype(name, choose_device(self._names[0]))).removeprefix("torch.")

    def start(self, scoring: Scoring) -> None:
        """Start the processes; they import what they need meanwhile."""
        self._places = set(range(self.count()))
        for place in self._places.copy():
            thread = threading.Thread(target=self._look_after, args=(place, scoring), daemon=True)
            self._threads.append(thread)
            thread.start()

    def submit(self, job: Job, watch: Watch) -> Future[ModelScores]:
        """Score a checkpoint on a device that is free."""
        turn = _Turn(job, watch)
        with self._changed:
            self._pending.append(turn)
            self._changed.notify_all()
        return turn.future

    def close(self) -> None:
        """Kill the workers."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            processes = list(self._processes.values())
        for process in processes:
            process.kill()
        for thread in self._threads:
            thread.join()

    def _look_after(self, place: int, scoring: Scoring) -> None:
        """Hand one checkpoint after another to the worker of a place; start another when it has died."""
        name, lost = self._names[place], 0
        while (process := self._started(place, scoring)) is not None:
            turn: _Turn | None = None
            try:
                while (turn := self._next(place)) is not None:
                    _settle(turn.future, process.score(turn.job, turn.watch))
            except _Died as death:
                lost += 1
                self._after_death(place, turn, f"The worker on {name} {death}", leave_out=lost >= _MOST_LOST)
            finally:
                process.close()

    def _started(self, place: int, scoring: Scoring) -> "_Process | None":
        with self._changed:
            if self._closed or place not in self._places:
                return None
            self._processes[place] = _Process(self._names[place], scoring, len(self._names))
            return self._processes[place]

    def _next(self, place: int) -> _Turn | None:
        """The next job for a place: not one that a worker died of there, as long as there are other places."""
        with self._changed:
            while not self._closed:
                for turn in self._pending:
                    if place not in turn.died or self._places <= set(turn.died):
                        self._pending.remove(turn)
                        return turn
                self._changed.wait()
            return None

    def _after_death(self, place: int, turn: _Turn | None, what: str, *, leave_out: bool) -> None:
        with self._changed:
            if self._closed:
                return
            left_out = ""
            if leave_out and len(self._places) > 1:
                self._places.discard(place)
                left_out = "; the device is left out from now on"
            again = turn is not None and len(turn.died) + 1 < _TRIES
            if turn is not None:
                turn.died.append(place)
            if turn is not None and again:
                self._pending.insert(0, turn)
            self._changed.notify_all()
        if turn is None:
            self._tell(f"{what}{left_out}.")
        elif again:
            self._tell(f"{what}; {turn.job.name} is tried once more{left_out}.")
        else:
            _settle(turn.future, CheckpointError(f"{what}, the second to die of this checkpoint{left_out}."))


class _Process:
    """One worker, spoken to by pickles over its standard input and output."""

    def __init__(self, device: str, scoring: Scoring, beside: int) -> None:
        """Start it; `beside` workers share the machine's cores."""
        environment = {**os.environ, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
        self._begin: tuple[str, Scoring, int] | None = (device, scoring, beside)
        # In a group of its own: Ctrl-C on the terminal is this process's affair, and ends the worker through it.
        group = {} if sys.platform == "win32" else {"process_group": 0}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            **group,  # type: ignore[call-overload]
        )

    def score(self, job: Job, watch: Watch) -> ModelScores | TraceError:
        """What comes of a job.

        Raises:
            _Died: The process has ended.
        """
        try:
            if self._begin is not None:
                self._send(self._begin)
                self._begin = None
            self._send(job)
            while True:
                kind, *content = pickle.load(self._process.stdout)
                if kind == "step":
                    watch.on_step(*content)
                elif kind == "bytes":
                    watch.on_bytes(*content)
                else:
                    result: ModelScores | TraceError = content[0]
                    return result
        except (EOFError, OSError, pickle.UnpicklingError):
            raise _Died(_ending(self._process.wait())) from None

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End it, and give its pipes back; for the thread that speaks to it."""
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):  # what was still to be sent
                pipe.close()

    def _send(self, message: Any) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        pickle.dump(message, stdin)
        stdin.flush()


def _settle(future: Future[ModelScores], answer: ModelScores | TraceError) -> None:
    if isinstance(answer, TraceError):
        future.set_exception(answer)
    else:
        future.set_result(answer)


def _ending(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = str(-code)
    with suppress(ValueError):
        name = signal.Signals(-code).name
    return f"was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
