"""The unit of work: one checkpoint, whose bytes are at hand, in; its numbers out. The same wherever it is done."""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from redundancy_trace.errors import CheckpointError, TraceError
from redundancy_trace.fetching import Remote
from redundancy_trace.metrics import ModelScores

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Scoring:
    """What all checkpoints of a sweep have in common.

    Attributes:
        token_ids: Calibrations by their hash, each of shape (N, T), integers.
        dtype: Compute dtype, `float32` or `bfloat16`.
        batch_size: Sequences a forward; None = from the sequence length.
        engine: `stream` or `whole`.
        trust_remote_code: Whether model code beside the weights may be run.
    """

    token_ids: "Mapping[str, np.ndarray]" = field(repr=False)
    dtype: str
    batch_size: int | None
    engine: str
    trust_remote_code: bool


@dataclass(frozen=True)
class Job:
    """One checkpoint to be scored on one calibration.

    Attributes:
        name: What it is called.
        folder: Holds its config and, unless they are read from their server, its weights.
        calibration: The hash of the token ids.
        remote: Weights that are read from their server.
    """

    name: str
    folder: Path
    calibration: str
    remote: Remote | None = None


@dataclass(frozen=True)
class Watch:
    """Who is told how far a job is, and how it is stopped.

    Attributes:
        on_step: Told layers (or batches) done and in all.
        on_bytes: Told the bytes that come from a server, as they arrive.
        stopped: Once set, no more of them are read.
    """

    on_step: Callable[[int, int], None]
    on_bytes: Callable[[int], None]
    stopped: Event


class Scorer:
    """Scores one checkpoint after another, in the process and on the device that it was made in and for."""

    def __init__(self, scoring: Scoring, device: str) -> None:
        """Take a device by name, as `--device` does.

        Raises:
            InputError: There is no such device.
        """
        import torch

        from redundancy_trace.engine import Kept, choose_device

        self._scoring = scoring
        self._kept = Kept()
        self._device = choose_device(device)
        self._dtype = getattr(torch, scoring.dtype)

    def score(self, job: Job, watch: Watch) -> ModelScores:
        """The numbers of one checkpoint.

        Raises:
            InputError: The token ids do not fit the model.
            Exception: Whatever goes wrong with this one; `told` puts it in words.
        """
        from redundancy_trace.engine import score_checkpoint
        from redundancy_trace.weights import open_remote_weights

        weights = None
        if job.remote is not None:
            weights = open_remote_weights(job.folder, job.remote.open(watch.on_bytes, watch.stopped))
        return score_checkpoint(
            job.folder,
            self._scoring.token_ids[job.calibration],
            device=self._device,
            dtype=self._dtype,
            batch_size=self._scoring.batch_size,
            engine=self._scoring.engine,
            trust_remote_code=self._scoring.trust_remote_code,
            on_progress=watch.on_step,
            weights=weights,
            kept=self._kept,
        )


def import_engine() -> None:
    """Import what the first checkpoint would, while there is nothing else to do: it takes seconds."""
    from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: F401 - their modules are what is wanted

    import redundancy_trace.engine  # noqa: F401


def told(error: Exception) -> TraceError:
    """Why a checkpoint has no scores, in words; of a fault that nobody foresaw, what it was and where."""
    if isinstance(error, TraceError):
        return error
    lines = str(error).strip().splitlines()
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = (
        f"{type(error).__name__}{f': {lines[0]}' if lines else ''} (in {place.name}, {place.filename}:{place.lineno})"
    )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        text += ". Not even one sequence fits: try a shorter --sequence-length, --engine stream, or --device cpu"
    return CheckpointError(text)
