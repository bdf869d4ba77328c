"""Scoring in a process of its own, with the most memory that it took: `python -m benchmarks.peaks REQUEST.json`."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parents[1]
_SAMPLE_SECONDS = 0.005


@dataclass(frozen=True)
class Peaks:
    """What scoring took, in bytes and seconds.

    Attributes:
        anonymous: Most anonymous memory of the process; what no file stands behind.
        anonymous_before: The same when the libraries were imported and nothing was scored.
        file: Most pages of files in memory, which the system takes back when it needs them: mapped weights, libraries.
        resident: Most of both together.
        seconds: Wall time of scoring.
        loss: Mean loss of the last checkpoint that was scored, in nats per token; None of the naive way, which has no
            head to run.
    """

    anonymous: int
    anonymous_before: int
    file: int
    resident: int
    seconds: float
    loss: float | None

    @property
    def taken(self) -> int:
        """Most anonymous memory that scoring itself took."""
        return self.anonymous - self.anonymous_before


def score_apart(folders: Sequence[Path], ids: np.ndarray, *, dtype: str = "float32", engine: str = "stream") -> Peaks:
    """Score checkpoint folders one after another in a fresh process.

    Args:
        folders: The checkpoints.
        ids: Calibration, shape (N, T).
        dtype: Compute dtype.
        engine: `stream` or `whole`; or `naive`, one of the three passes of `benchmarks.naive` over the loaded model.

    Raises:
        RuntimeError: The process failed; says what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-peaks-") as name:
        request = Path(name) / "request.json"
        np.save(request.with_suffix(".npy"), ids)
        asked = {"folders": [str(folder) for folder in folders], "dtype": dtype, "engine": engine}
        request.write_text(json.dumps(asked), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.peaks", str(request)]
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"Scoring failed: {done.stderr.strip()[-2000:]}")
    return Peaks(**json.loads(done.stdout.splitlines()[-1]))


def resident_bytes() -> dict[str, int]:
    """Memory of this process now, in bytes: `RssAnon`, `RssFile` and `VmRSS` of /proc/self/status."""
    lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return {
        fields[0][:-1]: 1024 * int(fields[1]) for fields in lines if fields[0] in ("RssAnon:", "RssFile:", "VmRSS:")
    }


@contextmanager
def most_resident() -> Iterator[dict[str, int]]:
    """While open, a thread keeps the most of each of `resident_bytes`."""
    most = resident_bytes()
    stopped = threading.Event()

    def watch() -> None:
        while not stopped.wait(_SAMPLE_SECONDS):
            for name, count in resident_bytes().items():
                most[name] = max(most[name], count)

    thread = threading.Thread(target=watch, name="watching-memory")
    thread.start()
    try:
        yield most
    finally:
        stopped.set()
        thread.join()


def _score(request: Path) -> Peaks:
    import torch
    import transformers.modeling_utils  # noqa: F401 - what scoring imports is no memory of its own

    asked = json.loads(request.read_text(encoding="utf-8"))
    ids = np.load(request.with_suffix(".npy"))
    way = _naive if asked["engine"] == "naive" else _scoring
    run = way(getattr(torch, asked["dtype"]), asked["engine"])
    before = resident_bytes()["RssAnon"]
    started = time.perf_counter()
    with most_resident() as most:
        for folder in asked["folders"]:
            loss = run(Path(folder), ids)
    seconds = time.perf_counter() - started
    return Peaks(most["RssAnon"], before, most["RssFile"], most["VmRSS"], seconds, loss)


Run = Callable[[Path, np.ndarray], float | None]


def _scoring(dtype: "torch.dtype", engine: str) -> Run:
    """Score a folder as the checkpoints of one run are, and give its loss."""
    import torch

    from redundancy_trace.engine import Kept, score_checkpoint

    kept, cpu = Kept(), torch.device("cpu")

    def run(folder: Path, ids: np.ndarray) -> float | None:
        scores = score_checkpoint(folder, ids, device=cpu, dtype=dtype, engine=engine, kept=kept)
        (loss,) = (value.value for value in scores.values if value.metric == "loss")
        return loss

    return run


def _naive(dtype: "torch.dtype", _engine: str) -> Run:
    import torch

    from benchmarks.naive import naive_pass
    from redundancy_trace.weights import load_whole_model

    def run(folder: Path, ids: np.ndarray) -> None:
        model = load_whole_model(folder, device=torch.device("cpu"), dtype=dtype)
        with torch.inference_mode():
            naive_pass(model, torch.as_tensor(ids), "block")

    return run


if __name__ == "__main__":
    print(json.dumps(asdict(_score(Path(sys.argv[1])))))
