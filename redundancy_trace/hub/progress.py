"""Counting the bytes of a download while they arrive."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(Exception):
    """Ends the other files of a download once one of them has failed."""


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

    @contextmanager
    def one_file(self) -> Iterator[type[Any]]:
        """The progress-bar class for one attempt at one file; if it fails, its bytes are taken back."""
        arrived = 0

        def count(number: int) -> None:
            nonlocal arrived
            arrived += number
            self.add(number)

        class Counting(_SilentBar):
            on_update = staticmethod(count)

        try:
            yield Counting
        except Exception:
            if not self.stopped.is_set():
                self.add(-arrived)
            raise


class _SilentBar:
    """What huggingface_hub calls on a progress bar; nothing is drawn."""

    on_update: Callable[[int], None]

    def __init__(self, *_: Any, total: int | None = None, **__: Any) -> None:
        self.total = total
        self.n = 0

    def __enter__(self) -> "_SilentBar":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def update(self, count: float | None = 1) -> None:
        self.n += int(count or 0)
        self.on_update(int(count or 0))

    def ignore(self, *_: Any, **__: Any) -> None:
        """Nothing is drawn."""

    # Xet reports transferred bytes beside written ones; only the written ones are counted.
    update_transfer = set_postfix_str = set_transfer_postfix_str = set_description = refresh = close = ignore
