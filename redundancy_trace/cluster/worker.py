"""The other end of `workers`: a process that scores what it is handed over its standard input."""

import os
import pickle
import queue
import sys
import threading
from typing import Any

from redundancy_trace.cluster.jobs import Job, Scorer, Watch, import_engine, told
from redundancy_trace.errors import TraceError
from redundancy_trace.metrics import ModelScores


def main() -> None:
    """Score jobs until the input ends, which is when the process at its other end does."""
    messages = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what model code prints is no message
    sending = threading.Lock()
    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # On a thread of its own, so that the end is noticed in the middle of a checkpoint, too.
    threading.Thread(target=_receive, args=(jobs,), daemon=True).start()

    def send(*message: Any) -> None:
        try:
            with sending:
                pickle.dump(message, messages)
                messages.flush()
        except OSError:
            os._exit(1)  # the other end has gone

    import_engine()
    device, scoring, beside = jobs.get()
    _share_cores(device, beside)
    watch = Watch(lambda *step: send("step", *step), lambda count: send("bytes", count), threading.Event())
    scorer = Scorer(scoring, device)
    while True:
        send("done", _scored(scorer, jobs.get(), watch))


def _scored(scorer: Scorer, job: Job, watch: Watch) -> ModelScores | TraceError:
    try:
        return scorer.score(job, watch)
    except Exception as error:
        return told(error)


def _receive(jobs: "queue.SimpleQueue[Any]") -> None:
    while True:
        try:
            jobs.put(pickle.load(sys.stdin.buffer))
        except (EOFError, OSError, pickle.UnpicklingError):
            os._exit(1)


def _share_cores(device: str, beside: int) -> None:
    """On CPUs, take this worker's share of the cores, unless the user has said how many threads there are to be."""
    import torch

    if device.startswith("cpu") and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // beside))
