"""A Ray cluster: one task a checkpoint, a GPU each where there are some; what is lost with a node runs elsewhere.

The process that sweeps fetches, into a run folder that all nodes see; with `--fetch stream` each task reads from the
server by itself.
"""

import os
import socket
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from threading import Event
from typing import Any
from urllib.parse import urlsplit

from redundancy_trace.cluster.jobs import Job, Scorer, Scoring, Watch, told
from redundancy_trace.errors import CheckpointError, InputError, TraceError, first_line
from redundancy_trace.metrics import ModelScores

# How often a checkpoint is tried elsewhere when its worker or its node is lost.
_RETRIES = 3
_PATIENCE_SECONDS = 5.0


class RayTasks:
    """Tasks of a Ray cluster; one is started on this machine if none runs and none is named."""

    def __init__(self, cluster: str, device: str, tell: Callable[[str], None]) -> None:
        """Take a cluster as `--cluster` names it, `ray` or `ray:ADDRESS`; nothing is asked yet."""
        self._address = cluster.partition(":")[2] or None
        self._device = device
        self._tell = tell
        self._ray: Any = None
        self._is_ours = False
        self._task: Any = None
        self._at_work: set[Any] = set()

    def count(self) -> int:
        """As many as there are GPUs; without any, as many as the nodes have room for tasks of the smallest's cores."""
        gpus, cores = self._resources()
        return gpus or sum(count // min(cores) for count in cores)

    def dtype(self, name: str) -> str:
        """The compute dtype that a name stands for on the nodes; `auto` is asked of one that has a GPU."""
        gpus, _ = self._resources()
        if name != "auto" or not gpus:
            return "float32" if name == "auto" else name
        asked = self._ray.remote(_chosen_dtype).options(num_gpus=1).remote(self._device)
        return str(self._ray.get(asked))

    def start(self, scoring: Scoring) -> None:
        """Hand the nodes what all checkpoints have in common."""
        gpus, cores = self._resources()
        share = {"num_gpus": 1} if gpus else {"num_cpus": min(cores)}
        shared = self._ray.put(scoring)
        task = self._ray.remote(_scored).options(**share, max_retries=_RETRIES)
        self._task = partial(task.remote, uuid.uuid4().hex, shared, self._device, None if gpus else min(cores))

    def submit(self, job: Job, watch: Watch) -> Future[ModelScores]:  # noqa: ARG002 - as the others have it
        """Score a checkpoint on a node that is free; layers and bytes are not told."""
        future: Future[ModelScores] = Future()
        task = self._task(replace(job, folder=job.folder.resolve()))
        self._at_work.add(task)
        task.future().add_done_callback(partial(self._settle, task, future))
        return future

    def close(self) -> None:
        """Cancel what is at work, and leave the cluster."""
        if self._ray is None:
            return
        for task in self._at_work.copy():
            self._ray.cancel(task, force=True)
        if self._is_ours:
            self._ray.shutdown()

    def _settle(self, task: Any, future: Future[ModelScores], done: "Future[ModelScores | TraceError]") -> None:
        self._at_work.discard(task)
        error = done.exception()
        answer = CheckpointError(f"Its task on the cluster was lost: {first_line(error)}") if error else done.result()
        if isinstance(answer, TraceError):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def _resources(self) -> tuple[int, list[int]]:
        """GPUs in all, and the cores of each node that has some."""
        ray = self._connected()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = int(sum(node.get("GPU", 0) for node in nodes))
        cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
        if not gpus and not cores:
            raise InputError(f"--cluster: the Ray cluster at {self._address or 'this machine'} has no GPU and no CPU.")
        return gpus, cores

    def _connected(self) -> Any:
        if self._ray is not None:
            return self._ray
        # Read when Ray is imported: no report to its makers, and GPUs are left visible where a task takes none.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError as error:
            raise InputError("--cluster ray needs Ray: pip install 'redundancy-trace[ray]'.") from error
        if not ray.is_initialized():
            self._join(ray)
            self._is_ours = True
        self._ray = ray
        return ray

    def _join(self, ray: Any) -> None:
        quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
        if self._address is None:
            try:
                ray.init(address="auto", **quiet)
            except ConnectionError:
                ray.init(address="local", include_dashboard=False, **quiet)
            return
        try:
            _check_answers(self._address)
            ray.init(address=self._address, **quiet)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"--cluster ray:{self._address}: no Ray cluster is reached there ({first_line(error)}). `ray start` "
                "tells the address on the head node, such as 10.0.0.1:6379; --cluster ray alone takes the cluster that "
                "runs on this machine, or starts one."
            ) from error


def _check_answers(address: str) -> None:
    """Try the port of an address: Ray itself would wait for minutes."""
    if address == "auto":
        return
    place = urlsplit(address if "://" in address else f"ray://{address}")
    if place.hostname is None or place.port is None:
        raise ValueError("it is no HOST:PORT")
    socket.create_connection((place.hostname, place.port), _PATIENCE_SECONDS).close()


# On the nodes


_scorers: dict[str, Scorer] = {}


def _scored(sweep: str, scoring: Scoring, device: str, threads: int | None, job: Job) -> ModelScores | TraceError:
    """Score a job in a worker of Ray's, which goes on with what it made for the last one of the same sweep."""
    if not job.folder.is_dir():
        return CheckpointError(
            f"{job.folder} is not there on node {socket.gethostname()}: with --cluster, the run folder and local "
            "checkpoints have to be on a file system that all nodes share, under the same path."
        )
    try:
        if sweep not in _scorers:
            _scorers.clear()
            _scorers[sweep] = _scorer(scoring, device, threads)
        return _scorers[sweep].score(job, Watch(lambda *_: None, lambda _: None, Event()))
    except Exception as error:
        return told(error)


def _scorer(scoring: Scoring, device: str, threads: int | None) -> Scorer:
    import torch

    if threads is not None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    # Arrays come read-only out of Ray's store, which torch warns of.
    token_ids = {name: ids.copy() for name, ids in scoring.token_ids.items()}
    return Scorer(replace(scoring, token_ids=token_ids), device)


def _chosen_dtype(device: str) -> str:
    from redundancy_trace.engine import choose_device, choose_dtype

    return str(choose_dtype("auto", choose_device(device))).removeprefix("torch.")
