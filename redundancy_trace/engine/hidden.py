"""The hidden states of the calibration between two layers: in memory, or in a mapped file where they are too large."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from redundancy_trace.engine.kept import Kept
from redundancy_trace.errors import CheckpointError

# Most bytes of states that stay in memory, and the share of a GPU's. Not what is free at the moment: a run repeats.
STATES_BYTES, _CUDA_SHARE = 4 * 2**30, 0.25


class HiddenStates:
    """The residual state of every batch, each of shape (B, T, D); given out on the device that they are for.

    Args:
        sizes: Sequences of each batch.
        room: A flat tensor that all of them are written to, or None to keep them as they come.
        device: Where they are handed out.
    """

    def __init__(self, sizes: Sequence[int], room: Tensor | None, device: torch.device) -> None:
        self._sizes = list(sizes)
        self._room = room
        self._device = device
        self._states: list[Tensor | None] = [None] * len(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, number: int) -> Tensor:
        state = self._states[number]
        if state is None:
            raise IndexError(number)
        return state.to(self._device)

    def __setitem__(self, number: int, state: Tensor) -> None:
        if self._room is None:
            self._states[number] = state
            return
        if self._states[number] is None:
            before, size = sum(self._sizes[:number]), self._sizes[number]
            each = state.numel() // size
            self._states[number] = self._room[before * each : (before + size) * each].view(state.shape)
        kept = self._states[number]
        assert kept is not None
        kept.copy_(state)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[number] for number in range(len(self)))


@contextmanager
def hidden_states(
    sizes: Sequence[int], length: int, width: int, dtype: torch.dtype, device: torch.device, kept: Kept
) -> Iterator[HiddenStates]:
    """Room for the states of all batches, which is given back at the end.

    Args:
        sizes: Sequences of each batch.
        length: Tokens of a sequence.
        width: Of the residual stream.
        dtype: Compute dtype.
        device: Where they are used.
        kept: Has the room from the checkpoint before.

    Raises:
        CheckpointError: They are too large for memory, and the temporary folder has no room for them.
    """
    count = sum(sizes) * length * width
    if count * dtype.itemsize <= _most_bytes(device):
        # On the CPU in one block: states that come and go one by one leave holes in the heap that nothing fits.
        room = kept.room("states", count, dtype) if device.type == "cpu" else None
        yield HiddenStates(sizes, room, device)
        return
    with tempfile.TemporaryDirectory(prefix="redundancy-trace-states-") as name:
        file = Path(name) / "states"
        try:
            _take_room(file, count * dtype.itemsize)
        except OSError as error:
            raise CheckpointError(
                f"The hidden states of {sum(sizes)} sequences take {count * dtype.itemsize / 1e9:.1f} GB, for which "
                f"{tempfile.gettempdir()} has no room ({error.strerror}); set TMPDIR to a folder on a larger disk, or "
                "take fewer --samples."
            ) from error
        yield HiddenStates(sizes, torch.from_file(str(file), shared=True, size=count, dtype=dtype), device)


def _most_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return STATES_BYTES
    return int(_CUDA_SHARE * torch.cuda.get_device_properties(device).total_memory)


def _take_room(file: Path, count: int) -> None:
    """Take the room at once where the system can: what a mapped page finds no room for ends the process."""
    with file.open("wb") as opened:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(opened.fileno(), 0, count)
        else:
            opened.truncate(count)
