"""One file of a commit over HTTP, read by ranges; every answer is checked to be the range that was asked for."""

import re
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from redundancy_trace.hub.rate import allowance, observe

REQUEST_TIMEOUT_SECONDS = 30.0
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_OUTDATED = (401, 403, 404, 410)


class RangesIgnored(Exception):
    """The server answers a request for a range with the whole file."""


class WrongLength(Exception):
    """The server's file is not as long as the repository says."""


class WrongContent(Exception):
    """What arrived has another hash than the repository tells."""


@dataclass
class RemoteFile:
    """A file of a repository.

    Attributes:
        server: Address of the Hub, whose rate limit counts.
        address: The `/resolve/<commit>/` address of the file.
        size: Bytes, as the repository says.
        token: Access token, None = what huggingface_hub finds.
    """

    server: str
    address: str
    size: int
    token: str | None = None
    # Where the Hub redirects to: asked directly from then on, which costs the Hub no request.
    _direct: str | None = field(default=None, repr=False)

    def chunks(
        self, start: int, stop: int, *, ranged: bool = True, stopped: Any = None
    ) -> Generator[bytes, None, None]:
        """The bytes from `start` to before `stop`, as they arrive.

        Args:
            start: First byte.
            stop: Byte behind the last.
            ranged: Whether to ask for the range alone; else the whole file is asked for and read up to `stop`.
            stopped: Event that ends a wait for the rate limit.

        Raises:
            RangesIgnored: The server sends the whole file although a range is asked for, and it is not the start of it.
            WrongLength: The file there has another size.
            httpx2.HTTPError, HfHubHTTPError: As usual; a body that ends too early is a `RemoteProtocolError`.
        """
        if start >= stop:
            return
        direct = self._direct
        if direct is not None:
            try:
                yield from self._request(direct, start, stop, ranged=ranged, token=False)
            except _Outdated:
                self._direct = None
            else:
                return
        allowance(self.server, "resolvers").take(stopped)
        yield from self._request(self.address, start, stop, ranged=ranged, token=self.token)

    def _request(
        self, address: str, start: int, stop: int, *, ranged: bool, token: Any
    ) -> Generator[bytes, None, None]:
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        # Compressed on the way, a body would not have the length that is checked.
        headers = {**build_hf_headers(token=token), "Accept-Encoding": "identity"}
        if ranged:
            headers["Range"] = f"bytes={start}-{stop - 1}"
        with get_session().stream("GET", address, headers=headers, timeout=REQUEST_TIMEOUT_SECONDS) as response:
            if address != self.address and response.status_code in _OUTDATED:
                raise _Outdated
            for answer in (*response.history, response):
                observe(self.server, "resolvers", answer.headers)
            if response.status_code == 416:
                raise WrongLength(f"it has no bytes {start:,} to {stop:,}")
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            if response.history:
                self._direct = str(response.url)
            yield from self._checked(response, start, stop, ranged=ranged)

    def _checked(self, response: Any, start: int, stop: int, *, ranged: bool) -> Generator[bytes, None, None]:
        import httpx2

        position = self._first_byte(response, start, stop, ranged=ranged)
        for chunk in response.iter_raw():  # as it comes: what a buffer held would be lost when the connection breaks
            wanted = chunk[max(0, start - position) : max(0, stop - position)]
            position += len(chunk)
            if wanted:
                yield wanted
            if position >= stop:
                return
        raise httpx2.RemoteProtocolError(f"the body ended {stop - position:,} bytes too early")

    def _first_byte(self, response: Any, start: int, stop: int, *, ranged: bool) -> int:
        """Where in the file the body starts."""
        if response.status_code == 206:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != start or int(match[2]) != stop - 1:
                raise RangesIgnored
            if match[3] not in ("*", str(self.size)):
                raise WrongLength(f"it has {int(match[3]):,} bytes there, {self.size:,} in the listing")
            return start
        length = response.headers.get("Content-Length")
        if length is not None and int(length) != self.size:
            raise WrongLength(f"it has {int(length):,} bytes there, {self.size:,} in the listing")
        if ranged and start > 0:
            raise RangesIgnored
        return 0


class _Outdated(Exception):
    """The address that the Hub redirected to is no longer good."""
