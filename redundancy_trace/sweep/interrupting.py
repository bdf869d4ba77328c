"""An interrupt that is not lost: Python drops one that falls into a callback of its own, such as a weak reference's."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupts_kept() -> Iterator[Callable[[], None]]:
    """While open, Ctrl-C interrupts as always; what is yielded raises an interrupt that was dropped on its way."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: None  # signals are another's here, or ignored
        return
    met = threading.Event()

    def meet(number: int, frame: Any) -> None:
        met.set()
        before(number, frame)

    def look() -> None:
        if met.is_set():
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, meet)
    try:
        yield look
    finally:
        signal.signal(signal.SIGINT, before)
