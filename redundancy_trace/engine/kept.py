"""What the checkpoints of a run share: the empty model, and the memory that each one's states are written to."""

import torch
from torch import Tensor

from redundancy_trace.weights import ModelBuilder


class Kept:
    """An empty model that is built once, and room for states that is taken once. Not for several threads at a time.

    Attributes:
        models: Builds the empty model, or has it from the checkpoint before.
    """

    def __init__(self) -> None:
        self.models = ModelBuilder()
        self._rooms: dict[str, Tensor] = {}

    def room(self, name: str, count: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor on the CPU, shape (count,): what was taken under that name before, where it is large enough.

        Fresh memory costs a fault for every page that is touched first, which small models notice: a few per cent of
        the time of a checkpoint.
        """
        room = self._rooms.get(name)
        if room is None or room.dtype != dtype or len(room) < count:
            self._rooms.pop(name, None)
            del room  # its memory first
            room = self._rooms[name] = torch.empty(count, dtype=dtype)
        return room[:count]
