"""The tensors of a checkpoint folder by name: safetensors and torch zip, single or sharded, read when asked for."""

import json
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
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
# A file beside the index: no folder, no drive, nothing that a terminal or file system takes for more than a letter.
_PLAIN_NAME = re.compile(r"[\w.+=@-][\w.+=@ -]{0,199}")
# What safetensors allows its own header.
MAX_HEADER_BYTES = 100_000_000
# How torch's safe loader names what it would have to run, and what else it stumbles over.
_FORBIDDEN = re.compile(r"[Uu]nsupported (?:global: )?(?:GLOBAL|class) (\S+)")
_STUMBLED = re.compile(r"WeightsUnpickler error:\s*(.+)")


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
        return torch.cat([stored[run[0] : run[-1] + 1][torch.tensor(run) - run[0]] for run in _runs(rows.tolist())])


# Rows that are so few apart are read at once, so many at most: a read takes longer than the rows between.
_APART, _AT_ONCE = 8, 4096


def _runs(rows: list[int]) -> Iterator[list[int]]:
    """Rows in their order, cut where the next lies before or far behind."""
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or not rows[end - 1] <= rows[end] <= rows[end - 1] + _APART or end - start == _AT_ONCE:
            yield rows[start:end]
            start = end


def open_weights(folder: Path) -> WeightFiles:
    """Open the weights of a checkpoint folder: the first set of them that is whole.

    Args:
        folder: Holds `model.safetensors`, `pytorch_model.bin`, or the index and shards of one of them.

    Raises:
        CheckpointError: If there are no weights, shards of every set are missing, or a file is truncated or no weight
            file.
    """
    lacking: CheckpointError | None = None
    for single, index in _FORMATS:
        if (folder / single).is_file():
            return _weight_files(folder, {folder / single: _open(folder / single)})
        if (folder / index).is_file():
            places = _places(folder / index)
            if (reason := _lacking(folder, places)) is None:
                return _open_shards(folder / index, places)
            lacking = lacking or CheckpointError(reason)
    if lacking is not None:
        raise lacking
    raise CheckpointError(
        f"{folder} has no weights: none of {', '.join(name for pair in _FORMATS for name in pair)} is there."
    )


def _parse_json(text: bytes) -> Any:
    """JSON that somebody else has written; ValueError too where a name is twice in one object."""
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for i, name in enumerate(names) if name in names[:i])!r} twice")
    return found


def _lacking(folder: Path, places: Mapping[str, str]) -> str | None:
    """What is to be told of an index whose shards are not all there."""
    names = sorted(set(places.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    return (
        f"{folder} lacks {len(missing)} of its {len(names)} weight shards: {', '.join(missing[:5])}."
        if missing
        else None
    )


def _open_shards(index: Path, places: Mapping[str, str]) -> WeightFiles:
    """Open all shards of an index. What it says and what they hold must agree, tensor by tensor."""
    folder, names = index.parent, sorted(set(places.values()))
    shards = {folder / name: _open(folder / name) for name in names}
    absent = [name for name, shard in places.items() if name not in shards[folder / shard]]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise CheckpointError(
            f"{index} says that {places[absent[0]]} holds tensor {absent[0]}{more}, which it does not; the index and "
            "the shards are not of one checkpoint."
        )
    return _weight_files(folder, shards)


def _places(index: Path) -> dict[str, str]:
    """Name of every tensor to the name of its shard, a file beside the index."""
    if index.stat().st_size > MAX_HEADER_BYTES:
        raise CheckpointError(f"{_sized(index)} is no index of weight shards: that would be far smaller.")
    try:
        places = dict(_parse_json(index.read_bytes())["weight_map"].items())
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise CheckpointError(
            f"{_sized(index)} is no index of weight shards, or still being written: {first_line(error)}. Try again "
            "when it is whole."
        ) from error
    suffix = index.name.removesuffix(".index.json").rpartition(".")[2]
    strange = {
        repr(name)
        for name in places.values()
        if not (isinstance(name, str) and _PLAIN_NAME.fullmatch(name) and name.endswith(f".{suffix}"))
    }
    if strange:
        raise CheckpointError(
            f"{index} names weight shards that are no .{suffix} files beside it: {', '.join(sorted(strange)[:5])}. "
            "Nothing of this checkpoint is read."
        )
    return places


def _weight_files(folder: Path, files: Mapping[Path, Mapping[str, Any]]) -> WeightFiles:
    slices: dict[str, Any] = {}
    info: dict[str, TensorInfo] = {}
    places: dict[str, Path] = {}
    for file, stored in files.items():
        for name, tensor in stored.items():
            if name in places:
                raise CheckpointError(f"{folder}: tensor {name} is both in {places[name].name} and in {file.name}.")
            places[name], slices[name] = file, tensor
            if isinstance(tensor, Tensor):
                info[name] = TensorInfo(tuple(tensor.shape), tensor.dtype)
            else:
                info[name] = TensorInfo(tuple(tensor.get_shape()), SAFETENSORS_DTYPES[tensor.get_dtype()])
    if not info:
        raise CheckpointError(f"{next(iter(files))} holds no tensors.")
    return WeightFiles(folder, info, slices)


def _open(file: Path) -> Mapping[str, Any]:
    return (_open_safetensors if file.suffix == ".safetensors" else _open_bin)(file)


def _open_safetensors(file: Path) -> dict[str, Any]:
    try:
        # Checks lengths, offsets and shapes against the file before it takes any memory.
        opened = safe_open(file, framework="pt", device="cpu")
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        with file.open("rb") as raw:
            # Of a name that is there twice, safetensors takes the last.
            _parse_json(raw.read(int.from_bytes(raw.read(8), "little")))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{_sized(file)} is truncated, still being written, or no safetensors file: {first_line(error)}. Try again "
            "when it is whole."
        ) from error
    for name, stored in slices.items():
        if stored.get_dtype() not in SAFETENSORS_DTYPES:
            raise _unreadable(file, name, stored.get_dtype())
    return slices


def _open_bin(file: Path) -> dict[str, Tensor]:
    # Never anything but weights_only: a pickle runs code.
    load: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        with file.open("rb") as opened:
            zipped = opened.read(2) == b"PK"
        if zipped:
            _refuse_compressed(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles in odd forms, which are read or refused all the same
            state = torch.load(file, mmap=zipped, **load)
    except CheckpointError:
        raise
    except Exception as error:  # a broken pickle raises what it likes
        if forbidden := _FORBIDDEN.search(str(error)):
            raise CheckpointError(
                f"{_sized(file)} asks for {forbidden[1]} when it is opened, which no file of tensors needs. It is not "
                "opened for that reason; nothing of it was run."
            ) from error
        stumbled = _STUMBLED.search(str(error))
        told = stumbled[1] if stumbled else first_line(error)
        raise CheckpointError(
            f"{_sized(file)} is truncated, still being written, or holds more than tensors and is not opened for that "
            f"reason (torch's safe loader: {told[:200].rstrip('. ')})."
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} holds a {type(state).__name__}, not tensors by name: no model's weights.")
    others = [str(name) for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if others:
        raise CheckpointError(f"{file} holds more than tensors ({', '.join(others[:5])}): no model's weights.")
    for name, tensor in state.items():
        if tensor.is_meta or tensor.layout != torch.strided:
            raise _unreadable(file, name, "meta" if tensor.is_meta else str(tensor.layout))
        if tensor.dtype not in SAFETENSORS_DTYPES.values():
            raise _unreadable(file, name, str(tensor.dtype))
    # Parameters and tensors with attributes of their own become plain ones.
    return {name: tensor.detach() for name, tensor in state.items()}


def _refuse_compressed(file: Path) -> None:
    """Torch maps what is stored into memory as it is: of compressed tensors it would make wrong numbers."""
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise CheckpointError(f"{_sized(file)} is compressed, which torch's own files are not; it is not read.")


def _unreadable(file: Path, name: str, kind: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: tensor {name} is stored as {kind}; quantised weights are not scored, only F64, F32, F16, BF16."
    )


def _sized(file: Path) -> str:
    try:
        return f"{file} ({file.stat().st_size:,} bytes)"
    except OSError:  # gone in the meantime
        return str(file)
