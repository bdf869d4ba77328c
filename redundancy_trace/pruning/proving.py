"""The proof of an export: loaded back in a fresh process, it computes what the drop in place does."""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from redundancy_trace.errors import CheckpointError
from redundancy_trace.pruning import reload

PROBE_SEQUENCES = 2
PROBE_TOKENS = 64
PROMPT_TOKENS = 16
NEW_TOKENS = 32
TOLERANCE = 1e-5  # of the largest logit; both sides do the same arithmetic
_SEED = 20240622
# Of the free memory, so much may be taken by a copy in float32.
_SHARE_OF_MEMORY = 0.5


@dataclass(frozen=True)
class Probe:
    """What two models are compared on.

    Attributes:
        ids: Token ids, shape (N, T).
        prompt: Where greedy decoding starts, shape (1, P).
        new_tokens: How many are decoded.
    """

    ids: np.ndarray
    prompt: np.ndarray
    new_tokens: int


@dataclass(frozen=True)
class Reference:
    """What the drop in place computes, and on what.

    Attributes:
        probe: On what.
        logits: Shape (N, T, V), float32.
        tokens: Greedily decoded with a cache, shape (new,).
        dtype: What it was computed in.
        n_parameters: Of the pruned model.
        cache_bytes: Bytes of keys and values of one token, in that dtype.
    """

    probe: Probe
    logits: np.ndarray
    tokens: np.ndarray
    dtype: str
    n_parameters: int
    cache_bytes: float


@dataclass(frozen=True)
class Proof:
    """How far an export, loaded back, is from the drop in place.

    Attributes:
        engine: What loaded it.
        what: What is compared.
        error: Largest difference.
        tolerance: What is allowed.
        equal_tokens: Greedily decoded tokens that are the same, from the first on; None where nothing was decoded.
        n_tokens: How many were decoded.
        n_parameters: Of the export, as the engine holds it.
        cache_bytes: Bytes of keys and values that a token takes there, in the dtype of the reference.
        note: What else is to be known.
        parted_at_a_tie: Whether the first other token was as likely, within the tolerance.
    """

    engine: str
    what: str
    error: float
    tolerance: float
    equal_tokens: int | None
    n_tokens: int
    n_parameters: int
    cache_bytes: float
    note: str = ""
    parted_at_a_tie: bool = False

    @property
    def holds(self) -> bool:
        """Whether the export is what it should be."""
        decoded = self.equal_tokens in (None, self.n_tokens) or self.parted_at_a_tie
        return self.error <= self.tolerance and decoded

    def told(self) -> str:
        """The figures in a line."""
        decoded = "" if self.equal_tokens is None else f"; {self.equal_tokens} of {self.n_tokens} decoded tokens equal"
        decoded += ", then a tie" if self.parted_at_a_tie else ""
        note = f"; {self.note}" if self.note else ""
        return (
            f"{self.engine}, fresh process: {self.what} {self.error:.1e} (allowed {self.tolerance:.0e}){decoded}{note}"
        )


def proof_dtype(n_parameters: int, stored: torch.dtype) -> torch.dtype:
    """float32 where a copy in it fits the memory easily, else the dtype of the files, which are mapped into memory."""
    import psutil

    return torch.float32 if 4 * n_parameters < _SHARE_OF_MEMORY * psutil.virtual_memory().available else stored


def probe(vocabulary: int, positions: int | None) -> Probe:
    """What to compare on, random, so that it fits a model of so many tokens and positions.

    Example:
        >>> small = probe(100, 20)
        >>> small.ids.shape, small.prompt.shape, small.new_tokens
        ((2, 20), (1, 1), 19)
    """
    room = max(2, positions or PROBE_TOKENS)
    ids = np.random.default_rng(_SEED).integers(0, vocabulary, (PROBE_SEQUENCES, min(PROBE_TOKENS, room)))
    prompt = ids[:1, : max(1, min(PROMPT_TOKENS, room - NEW_TOKENS))]
    return Probe(ids, prompt, min(NEW_TOKENS, room - prompt.shape[1]))


def reference_of(model: Any, asked: Probe, dtype: torch.dtype) -> Reference:
    """What a model in memory computes on a probe, in a dtype that may be wider than that of its weights."""
    found = reload.computed(model, asked.ids, asked.prompt, asked.new_tokens)
    return Reference(
        probe=asked,
        logits=found["logits"],
        tokens=found["tokens"],
        dtype=str(dtype).removeprefix("torch."),
        n_parameters=int(found["n_parameters"]),
        cache_bytes=float(found["cache_bytes"]),
    )


def prove_in_transformers(folder: Path, reference: Reference) -> Proof:
    """Load a folder with plain transformers in a fresh process, without this package, and compare.

    Raises:
        CheckpointError: It does not load.
    """
    answer = ask_fresh_process(Path(reload.__file__), folder, reference, reference.dtype)
    return compared("transformers", answer, reference, TOLERANCE)


def compared(
    engine: str, answer: dict[str, np.ndarray], reference: Reference, tolerance: float, note: str = ""
) -> Proof:
    """The proof from what another process computed."""
    largest = float(np.abs(reference.logits).max())
    error = float(np.abs(answer["logits"] - reference.logits).max()) / largest
    # What is not a number is not equal.
    error = error if np.isfinite(error) else float("inf")
    same = answer["tokens"] == reference.tokens
    equal = len(same) if same.all() else int(np.argmin(same))
    return Proof(
        engine=engine,
        what="largest difference of logits, relative,",
        error=error,
        tolerance=tolerance,
        equal_tokens=equal,
        n_tokens=len(same),
        n_parameters=int(answer["n_parameters"]),
        cache_bytes=float(answer["cache_bytes"]),
        note=note,
    )


def ask_fresh_process(script: Path, folder: Path, reference: Reference, *arguments: str) -> dict[str, np.ndarray]:
    """Run a script that stands alone on a folder and the reference's probe; what it wrote.

    Raises:
        CheckpointError: It fails; the last line that it says is told.
    """
    with tempfile.TemporaryDirectory(prefix="redundancy-trace-") as work:
        request, answer = Path(work) / "request.npz", Path(work) / "answer.npz"
        asked: dict[str, Any] = vars(reference.probe)
        np.savez(request, **asked)
        done = subprocess.run(
            # Without the script's own folder on the path: nothing of this package may help.
            [sys.executable, "-P", str(script), str(folder.absolute()), str(request), str(answer), *arguments],
            env={**os.environ, "HF_MODULES_CACHE": work, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            cwd=work,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not answer.is_file():
            said = [line for line in done.stderr.splitlines() if line.strip()]
            reason = said[-1] if said else f"exit code {done.returncode}"
            raise CheckpointError(f"What was written does not load in a fresh process: {reason}")
        with np.load(answer) as held:
            return dict(held)
