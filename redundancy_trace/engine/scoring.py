"""Which device, dtype and batch size a run has, and which engine scores a folder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from redundancy_trace.engine.kept import Kept
from redundancy_trace.engine.streaming import score_folder
from redundancy_trace.engine.whole import score_module
from redundancy_trace.errors import CheckpointError, InputError
from redundancy_trace.heap import keep_freed_memory
from redundancy_trace.metrics import ModelScores
from redundancy_trace.weights import WeightFiles, load_whole_model

# Tokens in one forward: enough to keep a matrix product busy, small beside the weights. On the CPU fewer will do, and
# what a batch takes is then small enough for glibc to keep rather than to map, and fault in, for every batch anew.
_BATCH_TOKENS, _CPU_BATCH_TOKENS = 4096, 1024


def choose_device(name: str, flag: str = "--device") -> torch.device:
    """`auto` or a torch device name → a device that is there.

    Args:
        name: The name.
        flag: Where the user gave it, for messages.

    Raises:
        InputError: If the name is unknown or this machine has no such device.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"{flag} {name!r} is no device; try auto, cpu, cuda, cuda:1 or mps.") from error
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(has_mps)}.get(device.type)
    if count is None:
        raise InputError(f"{flag} {name!r} is not supported; try auto, cpu, cuda, cuda:1 or mps.")
    if (device.index or 0) >= count:
        found = f"{count} {device.type} devices" if count else f"no {device.type} device"
        raise InputError(f"{flag} {name}: this machine has {found}; try --device auto or --device cpu.")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on CUDA that computes in it, else float32; never float16, never the file's own."""
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def choose_batch_size(batch_size: int | None, sequence_length: int, samples: int, device: torch.device) -> int:
    """The user's, else what gives about 4096 tokens, on the CPU 1024; never more than there are sequences."""
    tokens = _CPU_BATCH_TOKENS if device.type == "cpu" else _BATCH_TOKENS
    return min(batch_size or max(1, tokens // sequence_length), samples)


def score_checkpoint(
    folder: Path,
    token_ids: np.ndarray,
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int | None = None,
    engine: str = "stream",
    trust_remote_code: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    weights: WeightFiles | None = None,
    kept: Kept | None = None,
) -> ModelScores:
    """Score a checkpoint folder (config.json and weights) with one of the two engines.

    Args:
        folder: The checkpoint.
        token_ids: Calibration, shape (N, T), integers.
        device: Where the arithmetic is done.
        dtype: Compute dtype, float32 or bfloat16.
        batch_size: Sequences a forward; None = from the sequence length.
        engine: `stream` or `whole`.
        trust_remote_code: Whether model code in the folder may be run.
        on_progress: Called with (done, in all): layers of `stream`, batches of `whole`.
        weights: The weights, where they are not in the folder; for `stream` alone.
        kept: What the checkpoints of a run share: `stream` builds its empty model, and takes the memory of states, once
            if each is given the same.

    Raises:
        CheckpointError: If this checkpoint cannot be scored: incomplete weights, failed proof, a state not finite, or
            not even one sequence at a time fits the device.
        InputError: If the token ids do not fit the model.
    """
    kept = kept or Kept()
    keep_freed_memory()

    def score(size: int) -> ModelScores:
        if engine == "stream":
            return score_folder(
                folder,
                token_ids,
                device=device,
                dtype=dtype,
                batch_size=size,
                trust_remote_code=trust_remote_code,
                on_layer=on_progress,
                weights=weights,
                kept=kept,
            )
        model = load_whole_model(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        return score_module(model, token_ids, batch_size=size, on_batch=on_progress)

    size = choose_batch_size(batch_size, token_ids.shape[1], len(token_ids), device)
    while True:
        try:
            return score(size)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if size == 1:
                raise CheckpointError(
                    f"One sequence of {token_ids.shape[1]:,} tokens does not fit the memory of {device}; try --engine "
                    "stream, a shorter --sequence-length or --device cpu."
                ) from error
            # Halved, not fitted to what is free at the moment: a run repeats.
            size = (size + 1) // 2


def _is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the CPU, had no more memory; of CUDA alone, torch makes a kind of error of its own."""
    told = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in told for words in ("out of memory", "can't allocate memory")
    )
