"""Pieces of the files of a commit, read over HTTP into memory; nothing touches the disk."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing

from redundancy_trace.errors import CheckpointError
from redundancy_trace.hub.failures import persisted
from redundancy_trace.hub.progress import Meter
from redundancy_trace.hub.ranges import RangesIgnored, RemoteFile

PIECE_BYTES = 16 * 1024 * 1024
PARALLEL_PIECES = 8

Span = tuple[int, int]


class RemoteFolder:
    """Files of one commit that are read by spans of bytes, several at a time."""

    def __init__(
        self, files: Mapping[str, RemoteFile], meter: Meter, told: Callable[[Callable[[], None]], None]
    ) -> None:
        """Take files by path; `told` runs a call and turns what fails into a `CheckpointError`."""
        self._files = files
        self._meter = meter
        self._told = told

    @property
    def paths(self) -> tuple[str, ...]:
        """The files there are."""
        return tuple(self._files)

    def size(self, path: str) -> int:
        """Bytes of a file."""
        return self._files[path].size

    def read(self, path: str, spans: Sequence[Span]) -> list[bytearray]:
        """The bytes of each span (first, behind the last) of a file; one request a span, two or more of a large one.

        Raises:
            CheckpointError: They cannot be had, or the server serves no ranges.
        """
        found = [bytearray(stop - start) for start, stop in spans]
        pieces = [
            (at, min(at + PIECE_BYTES, stop), memoryview(buffer)[at - start : min(at + PIECE_BYTES, stop) - start])
            for (start, stop), buffer in zip(spans, found, strict=True)
            for at in range(start, stop, PIECE_BYTES)
        ]
        self._told(lambda: self._read_pieces(path, pieces))
        return found

    def _read_pieces(self, path: str, pieces: Sequence[tuple[int, int, memoryview]]) -> None:
        if len(pieces) == 1:
            self._read_piece(path, *pieces[0])
            return
        pool = ThreadPoolExecutor(PARALLEL_PIECES, "reading")
        try:
            futures = [pool.submit(self._read_piece, path, *piece) for piece in pieces]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()

    def _read_piece(self, path: str, start: int, stop: int, into: memoryview) -> None:
        """Read one piece; what has arrived before a connection broke is kept."""
        position = start

        def attempt() -> None:
            nonlocal position
            with closing(self._files[path].chunks(position, stop, stopped=self._meter.stopped)) as chunks:
                for chunk in chunks:
                    self._meter.add(len(chunk))
                    into[position - start : position - start + len(chunk)] = chunk
                    position += len(chunk)

        try:
            persisted(attempt, lambda: position, stop, self._meter.stopped)
        except RangesIgnored:
            raise CheckpointError(
                f"The server does not serve ranges of {path}, so it cannot be streamed; use --fetch file."
            ) from None
