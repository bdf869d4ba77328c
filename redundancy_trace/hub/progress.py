"""Counting the bytes of a download while they arrive."""

import threading
from collections.abc import Callable


class Stopped(Exception):
    """Ends the other files of a download once one of them has failed, or the sweep has ended."""


class Meter:
    """Hands on the bytes of all files of one download, one thread at a time."""

    def __init__(self, on_bytes: Callable[[int], None] | None, stopped: threading.Event | None = None) -> None:
        self._on_bytes = on_bytes
        self._lock = threading.Lock()
        self.stopped = stopped or threading.Event()

    def stop(self) -> None:
        """Let every file that is still arriving fail at its next chunk."""
        self.stopped.set()

    def add(self, count: int) -> None:
        """Tell that `count` bytes have arrived (negative: are to be fetched again)."""
        if self.stopped.is_set():
            raise Stopped
        if self._on_bytes and count:
            with self._lock:
                self._on_bytes(count)
