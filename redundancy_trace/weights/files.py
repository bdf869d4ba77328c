"""The tensors of a checkpoint folder by name: safetensors and torch zip, single or sharded, read when asked for."""

import json
import pickle
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from redundancy_trace.errors import CheckpointError, first_line

# One format is read, the first that is there: (single file, index of shards).
_FORMATS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)

MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, as the format itself has it


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of one checkpoint; nothing but headers is read until a tensor is asked for.

    Attributes:
        folder: Where the files are.
        info: Name to shape and dtype of every tensor, in file order.
    """

    folder: Path
    info: Mapping[str, TensorInfo]
    _slices: Mapping[str, Any]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors on the CPU in their stored dtype; memory-mapped where the format allows."""
        return {name: self._slices[name][...] for name in names}

    def slices(self, names: Iterable[str]) -> dict[str, Any]:
        """The named tensors as objects that read themselves when indexed, `x[...]`."""
        return {name: self._slices[name] for name in names}

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """The given rows of a matrix, shape (len(rows), ...), touching as little of the file as the format allows."""
        stored = self._slices[name]
        if isinstance(stored, Tensor):
            return stored[rows]
        return torch.cat([stored[int(row) : int(row) + 1] for row in rows])


def open_weights(folder: Path) -> WeightFiles:
    """Open the weights of a checkpoint folder.

    Args:
        folder: Holds `model.safetensors`, `pytorch_model.bin`, or the index and shards of one of them.

    Raises:
        CheckpointError: If there are no weights, a shard is missing, or a file is truncated or no weight file.
    """
    for single, index in _FORMATS:
        if (folder / single).is_file():
            return _open(folder, [folder / single])
        if (folder / index).is_file():
            return _open(folder, _shards(folder / index))
    raise CheckpointError(
        f"{folder} has no weights: none of {', '.join(name for pair in _FORMATS for name in pair)} is there."
    )


def _shards(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is no index of weight shards ({error}); fetch it again.") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of its {len(names)} weight shards: {', '.join(missing[:5])}."
        )
    return [index.parent / name for name in names]


def _open(folder: Path, files: list[Path]) -> WeightFiles:
    slices: dict[str, Any] = {}
    info: dict[str, TensorInfo] = {}
    for file in files:
        for name, stored in (_open_safetensors if file.suffix == ".safetensors" else _open_bin)(file).items():
            slices[name] = stored
            if isinstance(stored, Tensor):
                info[name] = TensorInfo(tuple(stored.shape), stored.dtype)
            else:
                info[name] = TensorInfo(tuple(stored.get_shape()), SAFETENSORS_DTYPES[stored.get_dtype()])
    if not info:
        raise CheckpointError(f"{files[0]} holds no tensors.")
    return WeightFiles(folder, info, slices)


SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _open_safetensors(file: Path) -> dict[str, Any]:
    try:
        opened = safe_open(file, framework="pt", device="cpu")
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} ({file.stat().st_size:,} bytes) is truncated or no safetensors file: {error}. Fetch it again."
        ) from error
    unknown = {name: s.get_dtype() for name, s in slices.items() if s.get_dtype() not in SAFETENSORS_DTYPES}
    if unknown:
        name, dtype = next(iter(unknown.items()))
        raise CheckpointError(
            f"{file}: tensor {name} is stored as {dtype}; quantised weights are not scored, only F64, F32, F16, BF16."
        )
    return slices


def _open_bin(file: Path) -> dict[str, Tensor]:
    # Never anything but weights_only: a pickle runs code.
    load: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        with file.open("rb") as opened:
            zipped = opened.read(2) == b"PK"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles in odd forms, which are read or refused all the same
            state = torch.load(file, mmap=zipped, **load)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} ({file.stat().st_size:,} bytes) cannot be read with torch's safe loader: {first_line(error)} "
            "It is truncated, or holds more than tensors and is not opened for that reason."
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} holds a {type(state).__name__}, not tensors by name: no model's weights.")
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if len(tensors) < len(state):
        others = [str(name) for name in state if name not in tensors]
        raise CheckpointError(f"{file} holds more than tensors ({', '.join(others[:5])}): no model's weights.")
    return tensors
