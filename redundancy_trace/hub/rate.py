"""Keeping below a Hub's rate limits: how many requests may go out, shared by all that one process does."""

import threading
import time
from collections import deque
from collections.abc import Mapping
from functools import cache
from typing import Literal
from urllib.parse import urlsplit

RequestKind = Literal["api", "resolvers"]
# What the Hub grants an anonymous address in each window, until its answers say otherwise.
ANONYMOUS = {"api": 500, "resolvers": 3000}
WINDOW_SECONDS = 300.0
# Other programs of the same user and address count too.
SHARE = 0.8


class Allowance:
    """At most so many requests in any stretch of time as long as the server's window; those beyond wait.

    A server other than huggingface.co is not held back before one of its answers names a limit.
    """

    def __init__(self, limit: int | None, window: float = WINDOW_SECONDS) -> None:
        self._lock = threading.Lock()
        self._window = window
        self._limit = limit
        self._sent: deque[float] = deque()
        self._blocked_until = 0.0

    def take(self, stopped: threading.Event | None = None) -> None:
        """Wait until one more request may go out; returns at once when `stopped` is set."""
        stopped = stopped or threading.Event()
        while (seconds := self._claim()) > 0 and not stopped.wait(seconds):
            pass

    def observe(self, limit: int | None, window: float | None, remaining: int, reset: float) -> None:
        """Learn from an answer: the limit, and whether the window is used up (by others, too)."""
        with self._lock:
            if limit:
                self._limit = limit
            if window:
                self._window = window
            if remaining == 0:
                self._blocked_until = time.monotonic() + reset + 1.0  # the header is rounded down

    def _claim(self) -> float:
        """Seconds to wait; 0 if the request was counted and may go out."""
        with self._lock:
            now = time.monotonic()
            if now < self._blocked_until:
                return self._blocked_until - now
            while self._sent and self._sent[0] <= now - self._window:
                self._sent.popleft()
            if self._limit is not None and len(self._sent) >= max(1, int(self._limit * SHARE)):
                return self._sent[0] + self._window - now
            self._sent.append(now)
            return 0.0


@cache
def allowance(url: str, kind: RequestKind) -> Allowance:
    """The allowance of this process for one kind of request to one server."""
    host = urlsplit(url).hostname or ""
    known = host == "huggingface.co" or host.endswith(".huggingface.co")
    return Allowance(ANONYMOUS[kind] if known else None)


def observe(url: str, kind: RequestKind, headers: Mapping[str, str]) -> None:
    """Learn from the headers `RateLimit` and `RateLimit-Policy` of an answer."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    if (told := parse_ratelimit_headers(headers)) is not None:
        allowance(url, kind).observe(told.limit, told.window_seconds, told.remaining, told.reset_in_seconds)
