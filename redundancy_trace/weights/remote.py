"""The tensors of a checkpoint that is on a server: their places from the headers, their bytes when asked for."""

import bisect
import io
import itertools
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redundancy_trace.errors import CheckpointError, first_line
from redundancy_trace.hub import RemoteFolder
from redundancy_trace.weights.files import MAX_HEADER_BYTES, SAFETENSORS_DTYPES, TensorInfo, WeightFiles

# Of all bytes of the weights, so much may be read in vain, between pieces that are wanted, to ask less often.
_WASTE = 0.01
_HEADER_GUESS = (1024, 64 * 1024)  # least and most that is read at once where the length of a header is not known
_ZIP_HEADER = struct.Struct("<4s22xHH")  # of a record: signature, length of the name, of the extra field
_ZIP_EXTRA_MOST = 256  # torch pads records to 64 bytes with an extra field


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies.

    Attributes:
        path: Its file.
        start: First byte of its storage; in a torch zip that of the record's header, in front of the storage.
        size: Bytes of its storage.
        dtype: Stored dtype.
        shape: Shape.
        stride: Stride, in elements.
        offset: First element in the storage.
        name_bytes: Length of the record's name in a torch zip, None in safetensors.
    """

    path: str
    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0
    name_bytes: int | None = None

    @property
    def stop(self) -> int:
        """The byte behind the last that has to be read."""
        in_front = 0 if self.name_bytes is None else _ZIP_HEADER.size + self.name_bytes + _ZIP_EXTRA_MOST
        return self.start + in_front + self.size

    def in_front(self, piece: memoryview | bytearray) -> int:
        """Bytes of a torch zip's record in front of its storage, as the header there tells; 0 in safetensors."""
        if self.name_bytes is None:
            return 0
        signature, name, extra = _ZIP_HEADER.unpack_from(piece)
        if signature != b"PK\3\4" or name != self.name_bytes or extra > _ZIP_EXTRA_MOST:
            raise CheckpointError(f"{self.path} is no torch file that can be streamed; use --fetch file.")
        return _ZIP_HEADER.size + int(name) + int(extra)

    def tensor(self, piece: memoryview) -> Tensor:
        """The tensor in the bytes from `start`, without a copy."""
        skipped = self.in_front(piece)
        if not self.size:
            return torch.empty(self.shape, dtype=self.dtype)
        flat = torch.frombuffer(piece[skipped : skipped + self.size], dtype=self.dtype)
        found = flat.as_strided(self.shape, self.stride, self.offset)
        # In a zip the bytes in front have any length.
        return found.clone() if found.data_ptr() % self.dtype.itemsize else found


@dataclass(frozen=True)
class RemoteWeights(WeightFiles):
    """The tensors of a checkpoint on a server; pieces that lie near each other are read together."""

    _remote: RemoteFolder
    _places: Mapping[str, _Place]
    _rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, in as few requests as lie near each other."""
        names = list(names)
        found = {name: self._completed(name) for name in names if name in self._rows}
        places = {name: self._places[name] for name in names if name not in found}
        waste = int(_WASTE * sum(place.size for place in places.values()))
        for path in dict.fromkeys(place.path for place in places.values()):
            here = {name: place for name, place in places.items() if place.path == path}
            size = self._remote.size(path)
            spans = [(place.start, min(place.stop, size)) for place in here.values()]
            pieces = self._pieces(path, spans, waste)
            found |= {name: place.tensor(piece) for (name, place), piece in zip(here.items(), pieces, strict=True)}
        return found

    def slices(self, names: Iterable[str]) -> dict[str, Any]:
        """The named tensors, read at once: one by one they would take a request each."""
        return dict(self.read(names))

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """The given rows of a matrix; those that lie near each other are read together."""
        place = self._places[name]
        if place.name_bytes is not None and (place.offset or not _is_contiguous(place)):
            return self.read([name])[name][rows]
        found = self._read_rows(place, rows)
        self._rows[name] = (rows, found)
        return found

    def _completed(self, name: str) -> Tensor:
        """A matrix some of whose rows have been read already: only the others are read."""
        place = self._places[name]
        rows, known = self._rows[name]
        missing = torch.ones(place.shape[0], dtype=torch.bool)
        missing[rows] = False
        whole = torch.empty(place.shape, dtype=place.dtype)
        whole[rows] = known
        others = missing.nonzero().flatten()
        whole[others] = self._read_rows(place, others)
        return whole

    def _read_rows(self, place: _Place, rows: Tensor) -> Tensor:
        width = place.size // max(1, place.shape[0])
        start = self._start_of_storage(place)
        spans = [(start + row * width, start + (row + 1) * width) for row in rows.tolist()]
        found = torch.empty((len(spans), *place.shape[1:]), dtype=place.dtype)
        flat = found.view(len(spans), -1).view(torch.uint8)
        for number, piece in enumerate(self._pieces(place.path, spans, int(_WASTE / 4 * self._size))):
            flat[number] = torch.frombuffer(piece, dtype=torch.uint8)
        return found

    def _pieces(self, path: str, spans: Sequence[tuple[int, int]], waste: int) -> list[memoryview]:
        """The bytes of each span, asked for together with their neighbours."""
        merged = merge_spans(spans, waste)
        pieces = self._remote.read(path, merged)
        starts = [first for first, _ in merged]
        found = []
        for start, stop in spans:
            at = bisect.bisect_right(starts, start) - 1
            found.append(memoryview(pieces[at])[start - starts[at] : stop - starts[at]])
        return found

    @property
    def _size(self) -> int:
        return sum(place.size for place in self._places.values())

    def _start_of_storage(self, place: _Place) -> int:
        if place.name_bytes is None:
            return place.start
        (header,) = self._remote.read(place.path, [(place.start, place.start + _ZIP_HEADER.size)])
        return place.start + place.in_front(header)


def open_remote_weights(folder: Path, remote: RemoteFolder) -> RemoteWeights:
    """Open weights on a server, by their headers alone.

    Args:
        folder: Where the checkpoint's config is on this machine.
        remote: The weight files: safetensors, or the zip form of torch files.

    Raises:
        CheckpointError: A file is neither, is damaged, or cannot be had.
    """
    places: dict[str, _Place] = {}
    for path in remote.paths:
        found = _safetensors_places(remote, path) if path.endswith(".safetensors") else _zip_places(remote, path)
        if twice := places.keys() & found.keys():
            raise CheckpointError(f"{path}: tensor {min(twice)} is in another file of the checkpoint too.")
        places |= found
    if not places:
        raise CheckpointError(f"{', '.join(remote.paths) or folder} holds no tensors.")
    info = {name: TensorInfo(place.shape, place.dtype) for name, place in places.items()}
    return RemoteWeights(folder, info, {}, remote, places)


def merge_spans(spans: Sequence[tuple[int, int]], waste: int) -> list[tuple[int, int]]:
    """Join spans, the nearest ones first, as long as no more than `waste` bytes between them are read in vain.

    Example:
        >>> merge_spans([(0, 10), (12, 20), (50, 60)], waste=5)
        [(0, 20), (50, 60)]
    """
    ordered = sorted(spans)
    gaps = sorted((max(0, b[0] - a[1]), i) for i, (a, b) in enumerate(itertools.pairwise(ordered)))
    joined = set()
    for gap, i in gaps:
        if gap > waste:
            break
        waste -= gap
        joined.add(i)
    merged: list[tuple[int, int]] = []
    for i, (start, stop) in enumerate(ordered):
        if i and i - 1 in joined:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _is_contiguous(place: _Place) -> bool:
    return place.stride == torch.empty(place.shape, device="meta").stride()


def _guess(size: int) -> int:
    """Bytes that probably hold a header of a file, and are few beside it."""
    least, most = _HEADER_GUESS
    return min(most, max(least, size // 1000))


def _safetensors_places(remote: RemoteFolder, path: str) -> dict[str, _Place]:
    size = remote.size(path)
    (head,) = remote.read(path, [(0, min(size, _guess(size)))])
    length = int.from_bytes(head[:8], "little")
    if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(f"{path} is no safetensors file: its header would have {length:,} bytes of {size:,}.")
    if 8 + length > len(head):
        head += remote.read(path, [(len(head), 8 + length)])[0]
    try:
        header = json.loads(head[8 : 8 + length])
        places = {}
        for name, told in header.items():
            if name == "__metadata__":
                continue
            start, stop = (int(at) for at in told["data_offsets"])
            shape = tuple(int(side) for side in told["shape"])
            dtype = SAFETENSORS_DTYPES.get(told["dtype"])
            if dtype is None:
                raise CheckpointError(
                    f"{path}: tensor {name} is stored as {told['dtype']}; quantised weights are not scored, only "
                    "F64, F32, F16, BF16."
                )
            bytes_right = stop - start == math.prod(shape) * dtype.itemsize
            if not (0 <= start <= stop <= size - 8 - length) or min(shape, default=0) < 0 or not bytes_right:
                raise CheckpointError(f"{path}: tensor {name} lies outside of the file, or has another size there.")
            stride = torch.empty(shape, device="meta").stride()
            places[name] = _Place(path, 8 + length + start, stop - start, dtype, shape, stride)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no safetensors file: its header cannot be read ({error}).") from error
    return places


def _zip_places(remote: RemoteFolder, path: str) -> dict[str, _Place]:
    """Places in a torch zip: names and shapes by torch's safe loader from the pickle alone, which is small."""
    try:
        with zipfile.ZipFile(_RemoteStream(remote, path)) as whole:
            records = {record.filename.partition("/")[2]: record for record in whole.infolist()}
            state, names = _without_data(whole, records)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be streamed: {first_line(error)} Only torch files in zip form that hold nothing but "
            "tensors are; try --fetch file."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds more than tensors by name: no model's weights.")
    places = {}
    for name, tensor in state.items():
        storage = tensor.untyped_storage()
        record = records[names[storage._checkpoint_offset]]
        if record.compress_type != zipfile.ZIP_STORED or record.file_size < storage.nbytes():
            raise CheckpointError(f"{path}: tensor {name} is packed or cut short; use --fetch file.")
        places[str(name)] = _Place(
            path,
            record.header_offset,
            record.file_size,
            tensor.dtype,
            tuple(tensor.shape),
            tensor.stride(),
            int(tensor.storage_offset()),
            len(record.filename.encode()),
        )
    return places


def _without_data(whole: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo]) -> tuple[Any, dict[int, str]]:
    """What the pickle of a torch zip says, read from a copy without data; and the offset in it → name of the record."""
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w") as small:
        for name, record in records.items():
            if name.startswith("data/"):
                small.writestr(record.filename, b"")
            elif name in ("data.pkl", "version", "byteorder"):
                small.writestr(record.filename, whole.read(record))
    reader: Any = torch._C.PyTorchFileReader(io.BytesIO(copy.getvalue()))
    names = {int(reader.get_record_offset(name)): name for name in records if name.startswith("data/")}
    copy.seek(0)
    return torch.load(copy, map_location="meta", weights_only=True), names


class _RemoteStream(io.RawIOBase):
    """A remote file as one that can be sought in, for `zipfile`; the block that was read last is kept."""

    def __init__(self, remote: RemoteFolder, path: str) -> None:
        self._remote = remote
        self._path = path
        self._size = remote.size(path)
        self._at = 0
        self._block: tuple[int, bytearray] = (0, bytearray())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, count: int = -1) -> bytes:
        stop = self._size if count is None or count < 0 else min(self._at + count, self._size)
        if self._at >= stop:
            return b""
        start, block = self._block
        if not (start <= self._at and stop <= start + len(block)):
            # The directory stands at the end, and is asked for in steps.
            guess = _guess(self._size)
            first = min(self._at, max(0, self._size - guess))
            last = min(self._size, max(stop, first + guess))
            start, block = first, self._remote.read(self._path, [(first, last)])[0]
            self._block = (start, block)
        found = bytes(block[self._at - start : stop - start])
        self._at = stop
        return found
