"""A file that is being downloaded in parts: what has arrived survives the process, and is checked at the end."""

import hashlib
import threading
from pathlib import Path

from redundancy_trace.hub.records import RepoFile

PART_BYTES = 32 * 1024 * 1024
_COUNTER_BYTES = 8
_KEY_BYTES = 32


class PartialFile:
    """`<name>.part` with the bytes, and beside it `<name>.part.done` with how far each part of it is.

    A chunk is written before its counter, so that what is counted is there, whenever the process is killed. Both are
    begun anew if they are of another file, or were cut in parts of another size.
    """

    def __init__(self, target: Path, file: RepoFile) -> None:
        """Open what is there of the file, or begin.

        Args:
            target: Where the finished file will be.
            file: What it will be; its hash tells whether what is there belongs to it.

        Raises:
            OSError: No space, no right to write.
        """
        self.target = target
        self.file = file
        self.whole = threading.Lock()  # held by a thread that fetches the file in one go
        self._lock = threading.Lock()
        self._size = PART_BYTES
        self._count = max(1, -(-file.size // self._size))
        identity = f"{file.path}\n{file.size}\n{file.sha256 or file.git_sha1}\n{self._size}"
        self._key = hashlib.sha256(identity.encode()).digest()
        target.parent.mkdir(parents=True, exist_ok=True)
        self._data_path = target.with_name(f"{target.name}.part")
        self._done_path = target.with_name(f"{target.name}.part.done")
        self._done = self._kept()
        if self._done is None:
            self._begin()
        self._open()

    @property
    def parts(self) -> range:
        """Numbers of the parts."""
        return range(self._count)

    def position(self, part: int) -> int:
        """The first byte of a part that is not there yet."""
        assert self._done is not None
        return part * self._size + self._done[part]

    def stop(self, part: int) -> int:
        """The byte behind the last of a part."""
        return min((part + 1) * self._size, self.file.size)

    def present(self) -> int:
        """Bytes that are there."""
        return sum(self.position(part) - part * self._size for part in self.parts)

    def write(self, position: int, chunk: bytes, part: int | None = None) -> int:
        """Take of a chunk what is not there yet; two threads may bring the same bytes.

        Args:
            position: Where in the file the chunk starts.
            chunk: The bytes.
            part: The part it belongs to; None = it may reach over several.

        Returns:
            How many bytes were taken.
        """
        assert self._done is not None
        taken = 0
        with self._lock:
            for number in self.parts if part is None else (part,):
                first, last = self.position(number), min(self.stop(number), position + len(chunk))
                if not position <= first < last:
                    continue
                self._data.seek(first)
                view = memoryview(chunk)[first - position : last - position]
                while view:
                    view = view[self._data.write(view) :]
                taken += last - first
                self._done[number] += last - first
                self._ledger.seek(_KEY_BYTES + number * _COUNTER_BYTES)
                self._ledger.write(self._done[number].to_bytes(_COUNTER_BYTES, "little"))
        return taken

    def is_right(self) -> bool:
        """Whether the bytes have the hash that the repository tells; True where it tells none."""
        self._data.seek(0)
        return self.file.is_content(self._data)

    def restart(self) -> None:
        """Forget what has arrived."""
        self.close()
        self._begin()
        self._open()

    def finish(self) -> None:
        """Give the whole file its name."""
        self.close()
        self._data_path.replace(self.target)
        self._done_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files; what has arrived stays."""
        self._data.close()
        self._ledger.close()

    def leave(self) -> None:
        """Close the files, and delete them if nothing has arrived."""
        self.close()
        if not self.present():
            self._data_path.unlink(missing_ok=True)
            self._done_path.unlink(missing_ok=True)

    def _kept(self) -> list[int] | None:
        """How far each part is, if what is there belongs to this file."""
        try:
            ledger = self._done_path.read_bytes()
            size = self._data_path.stat().st_size
        except OSError:
            return None
        counters = ledger[_KEY_BYTES:]
        if ledger[:_KEY_BYTES] != self._key or len(counters) != self._count * _COUNTER_BYTES or size != self.file.size:
            return None
        done = [
            int.from_bytes(counters[at : at + _COUNTER_BYTES], "little")
            for at in range(0, len(counters), _COUNTER_BYTES)
        ]
        return done if all(n <= self.stop(part) - part * self._size for part, n in enumerate(done)) else None

    def _open(self) -> None:
        self._data = self._data_path.open("r+b", buffering=0)
        self._ledger = self._done_path.open("r+b", buffering=0)

    def _begin(self) -> None:
        self._done = [0] * self._count
        self._done_path.unlink(missing_ok=True)
        with self._data_path.open("wb") as data:
            data.truncate(self.file.size)
        self._done_path.write_bytes(self._key + bytes(self._count * _COUNTER_BYTES))
