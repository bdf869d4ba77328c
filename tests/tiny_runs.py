"""A really trained small run for the tests of the sweep: how it is published, and processes that can be killed."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO

import numpy as np
import polars as pl
from loopback_hub import LoopbackHub

from redundancy_trace.calibration.texts import pydoc_topics
from redundancy_trace.demo import Recipe

STEPS = (0, 1, 2, 4, 8)
RECIPE = Recipe(
    layers=3, width=32, heads=2, vocabulary=320, positions=64, sequence_length=32, batch_size=4, steps=8,
    saved=STEPS, warmup=2, held_out_tokens=64 * 32,
)  # fmt: skip
SHAPE = ("--samples", "4", "--sequence-length", "32")
PYDOC = ("--calibration", "pydoc", *SHAPE)
MODEL_FILES = ("config.json", "model.safetensors")


def checkpoint_files(run: Path, step: int, *, tokenizer: bool = True) -> dict[str, Path]:
    """Path in the repository -> file, of one checkpoint."""
    folder = run / f"checkpoint-{step}"
    return {file.name: file for file in sorted(folder.iterdir()) if tokenizer or file.name in MODEL_FILES}


def branches(run: Path) -> dict[str, dict[str, Path]]:
    """The run as EleutherAI publishes one: a branch a checkpoint, the last on `main` too, where the tokenizer is."""
    steps = {f"step{step}": checkpoint_files(run, step, tokenizer=False) for step in STEPS}
    return {"main": checkpoint_files(run, STEPS[-1]), **steps}


def c4() -> dict[str, bytes]:
    """A small allenai/c4, with English of its own."""
    import gzip

    rows = "".join(json.dumps({"text": topic, "url": ""}) + "\n" for topic in pydoc_topics())
    return {"README.md": b"no card", "en/c4-validation.00000-of-00001.json.gz": gzip.compress(rows.encode())}


def numbers(scores: pl.DataFrame) -> pl.DataFrame:
    """What must not depend on how the checkpoints were reached or called."""
    order = ["step", "layer", "component", "metric"]
    return scores.select(*order, "value", "stderr", "n_sequences", "n_tokens").sort(order, nulls_last=False)


def leftovers(out: Path) -> list[str]:
    """Files that no finished sweep leaves."""
    return [str(path) for path in out.rglob("*") if path.name.endswith(".part") or path.name == ".fetched"]


def token_file(path: Path, high: int = 320, seed: int = 0) -> str:
    """A calibration of random token ids below `high`, as `--calibration` takes it."""
    np.save(path, np.random.default_rng(seed).integers(0, high, size=(4, 32)))
    return f"tokens:{path}"


def weights_asked(hub: LoopbackHub, pattern: str = "*/model.safetensors") -> list[str]:
    """Paths of the requests for weights, but for the one that a sweep measures the rate with: some first kilobytes."""

    def measures(span: str) -> bool:
        first, last = span.removeprefix("bytes=").split("-") if span else ("", "")
        return first == "0" and last != "" and int(last) < 2**14

    return [one.path for one in hub.matching("GET", pattern) if not measures(one.headers.get("Range", ""))]


@contextmanager
def without_figures() -> Iterator[None]:
    """Sweeps that draw nothing: drawing takes longer than scoring a model this small."""
    import pytest  # not at the top: the processes that are killed do without

    from redundancy_trace.sweep import running

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "_draw", lambda *_: ())
        patch.setattr(running, "_turn_to_draw", nullcontext)
        yield


class Sweeps:
    """Sweeps in processes of their own, which can be killed; each is forked from one that has imported everything."""

    def __init__(self, run: Path, part_bytes: int | None = None) -> None:
        """Make ready to sweep; files are downloaded in parts of `part_bytes`, None = as everywhere."""
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(run), str(part_bytes or "")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def start(self, *arguments: str, told: Path) -> int:
        """Start `trace` with these arguments; all that it prints goes to the file `told`. Returns the process id."""
        return int(self._ask({"start": arguments, "told": str(told)}))

    def wait(self, pid: int) -> int:
        """The exit code of a started process once it has ended; -9 if it was killed."""
        return int(self._ask({"wait": pid}))

    def waited(self, pid: int, seconds: float) -> int | None:
        """The same, but None if it has not ended within so many seconds."""
        until = time.monotonic() + seconds
        while not (answer := self._ask({"ended": pid})):
            if time.monotonic() > until:
                return None
            time.sleep(0.01)
        return int(answer)

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait()

    def _ask(self, question: dict[str, object]) -> str:
        stdin: IO[str] | None = self._process.stdin
        assert stdin is not None
        stdin.write(json.dumps(question) + "\n")
        stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def _serve(run: Path, part_bytes: str) -> None:
    import importlib
    import os
    import signal

    import torch

    from redundancy_trace import cli
    from redundancy_trace.engine import score_checkpoint
    from redundancy_trace.hub import failures, partial
    from redundancy_trace.sweep import running

    torch.set_num_threads(1)  # a fork would lose a pool of threads; those of polars and tokenizers are not begun here
    failures.RETRY_BASE_SECONDS = 0.01
    partial.PART_BYTES = int(part_bytes or partial.PART_BYTES)
    running._draw = lambda *_: ()
    cpu, ids = torch.device("cpu"), np.zeros((1, 8), dtype=np.int64)
    score_checkpoint(run / f"checkpoint-{STEPS[-1]}", ids, device=cpu, dtype=torch.float32)  # imports what others need
    for name in ("store", "calibration", "calibration.tokenizers", "analysis", "progress", "sweep.pipeline"):
        importlib.import_module(f"redundancy_trace.{name}")
    for name in ("rich.progress", "pydoc_data.topics", "tenacity", "httpx2", "polars"):
        importlib.import_module(name)
    answers = os.dup(1)
    with os.fdopen(answers, "w") as answer:
        print("ready", file=answer, flush=True)
        for line in sys.stdin:
            question = json.loads(line)
            if "wait" in question or "ended" in question:
                pid, status = os.waitpid(
                    question.get("wait") or question["ended"], 0 if "wait" in question else os.WNOHANG
                )
                print(os.waitstatus_to_exitcode(status) if pid else "", file=answer, flush=True)
                continue
            pid = os.fork()
            if pid == 0:
                with Path(question["told"]).open("w") as told:
                    os.dup2(told.fileno(), 1)
                    os.dup2(told.fileno(), 2)
                signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, if this runs in the background
                code = cli.INTERRUPTED
                try:
                    code = cli.run(question["start"])
                    sys.stdout.flush()
                finally:
                    os._exit(code)
            print(pid, file=answer, flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), sys.argv[2])
