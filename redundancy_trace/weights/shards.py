"""Tensors to safetensors files, one at a time: no more than one is ever in memory."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redundancy_trace.weights.files import SAFETENSORS_DTYPES, TensorInfo

SHARD_BYTES = 5 * 10**9
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def write_shards(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    *,
    shard_bytes: int = SHARD_BYTES,
    on_bytes: Callable[[int], None] | None = None,
) -> int:
    """Write `model.safetensors`, or its shards and their index, as transformers names them.

    Args:
        folder: Where to; it is there.
        tensors: Name to shape and dtype of every tensor, in the order in which they are written.
        read: Gives a tensor by name, in that shape and dtype.
        shard_bytes: Most bytes of tensors in one file, unless a single one is larger.
        on_bytes: Told the bytes of each tensor that is written.

    Returns:
        Bytes of all tensors.
    """
    shards = _in_shards(tensors, shard_bytes)
    single = len(shards) == 1
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / file, {name: tensors[name] for name in names}, read, on_bytes)
        places |= dict.fromkeys(names, file)
    total = sum(map(_size, tensors.values()))
    if not single:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _in_shards(tensors: Mapping[str, TensorInfo], most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    held = 0
    for name, info in tensors.items():
        size = _size(info)
        if shards[-1] and held + size > most:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _write(
    file: Path,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    on_bytes: Callable[[int], None] | None,
) -> None:
    header = _header(tensors.items())
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little"))
        out.write(header)
        for name, info in tensors.items():
            tensor = read(name)
            if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
                raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not {info}")
            # Bytes as they are: numpy knows no bfloat16.
            raw: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
            out.write(raw.data)
            if on_bytes is not None:
                on_bytes(_size(info))


def _header(tensors: Iterable[tuple[str, TensorInfo]]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, info in tensors:
        size = _size(info)
        header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight


def _size(info: TensorInfo) -> int:
    return torch.Size(info.shape).numel() * info.dtype.itemsize
