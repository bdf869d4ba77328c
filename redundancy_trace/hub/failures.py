"""What is tried again after which wait, and the one message that a failure becomes."""

import email.utils
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from redundancy_trace.errors import first_line, nearest
from redundancy_trace.hub.ranges import WrongContent, WrongLength
from redundancy_trace.hub.records import RepoKind

T = TypeVar("T")

RETRY_ATTEMPTS = 6
# A listing that cannot even connect is told sooner: likely causes are a wrong endpoint and no network at all.
RETRY_ATTEMPTS_UNREACHABLE = 3
RETRY_BASE_SECONDS = 1.0  # doubled each time
RETRY_LONGEST_SECONDS = 30.0
RATE_WINDOW_SECONDS = 301.0  # the Hub counts requests per five minutes: no honest Retry-After is longer
_PASSING_STATUS = (408, 429, 500, 502, 503, 504)


def retried(call: Callable[[], T], *, patient: bool, stopped: threading.Event | None = None) -> T:
    """The call's result, tried again with growing waits while the fault may pass.

    Args:
        call: What to do; safe to repeat.
        patient: Whether an unreachable server is waited for as long as a busy one (a sweep under way) or is
            told soon (the first call of a run).
        stopped: Once set, nothing is tried again and a wait ends.

    Raises:
        Exception: The last failure, as it came.
    """
    import httpx2
    from tenacity import Retrying, retry_if_exception, sleep_using_event

    stopped = stopped or threading.Event()

    def give_up(state: Any) -> bool:
        error = state.outcome.exception()
        if stopped.is_set() or (seconds_asked(error) or 0.0) > RATE_WINDOW_SECONDS:
            return True
        unreachable = isinstance(root_of(error), httpx2.ConnectError | httpx2.ConnectTimeout)
        most = RETRY_ATTEMPTS_UNREACHABLE if unreachable and not patient else RETRY_ATTEMPTS
        return bool(state.attempt_number >= most)

    def wait(state: Any) -> float:
        grown = min(RETRY_BASE_SECONDS * float(2 ** (state.attempt_number - 1)), RETRY_LONGEST_SECONDS)
        return max(grown, seconds_asked(state.outcome.exception()) or 0.0)

    retrying = Retrying(
        retry=retry_if_exception(may_pass),
        stop=give_up,
        wait=wait,
        sleep=sleep_using_event(stopped),
        reraise=True,
    )
    return retrying(call)


def persisted(attempt: Callable[[], None], position: Callable[[], int], stop: int, stopped: threading.Event) -> None:
    """Attempt again until `position` has reached `stop`; as long as something arrives, it is gone on with.

    Raises:
        Exception: The last failure, as it came, once nothing has arrived since the one before or it cannot pass.
    """
    while (before := position()) < stop:
        try:
            retried(attempt, patient=True, stopped=stopped)
        except Exception as error:
            if position() == before or not may_pass(error) or stopped.is_set():
                raise


def root_of(error: BaseException | None) -> BaseException | None:
    """What really happened: huggingface_hub wraps a failed HEAD in LocalEntryNotFoundError."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def may_pass(error: BaseException | None) -> bool:
    """Whether a fault may be gone when the call is made again: a busy server, a broken connection."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    root = root_of(error)
    if isinstance(root, WrongLength):  # a page of a proxy in between, say
        return True
    if isinstance(root, HfHubHTTPError):
        return root.response.status_code in _PASSING_STATUS
    if isinstance(root, httpx2.TransportError):
        return not isinstance(root, httpx2.UnsupportedProtocol)
    # A body of the wrong length is a bare OSError; faults of the disk carry a number.
    return type(root) is OSError and root.errno is None


def is_refused(error: BaseException | None) -> bool:
    """Whether a server refused the user: a token that has expired, or lacks a right; he may mend it and go on."""
    from huggingface_hub.errors import HfHubHTTPError

    root = root_of(error)
    return isinstance(root, HfHubHTTPError) and root.response.status_code in (401, 403)


def seconds_asked(error: BaseException | None) -> float | None:
    """Seconds the server asks to wait: `RateLimit` with nothing left, else `Retry-After`, else None."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    root = root_of(error)
    if not isinstance(root, HfHubHTTPError):
        return None
    headers = root.response.headers
    rate = parse_ratelimit_headers(headers)
    if root.response.status_code == 429 and rate is not None and rate.remaining == 0:
        return float(rate.reset_in_seconds) + 1.0  # the header is rounded down
    asked = str(headers.get("Retry-After", "")).strip()
    if asked.isdigit():
        return float(asked)
    try:
        moment = email.utils.parsedate_to_datetime(asked)
    except ValueError:
        return None
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def explained(error: BaseException, repo: str, url: str, kind: RepoKind = "model") -> str:
    """One message for a failed call: what is wrong, and what to do about it."""
    import httpx2
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
    )

    root = root_of(error)
    status = root.response.status_code if isinstance(root, HfHubHTTPError) else None
    if isinstance(root, GatedRepoError):  # a RepositoryNotFoundError too, so it comes first
        return (
            f"{repo} is gated: accept its conditions at {url}/{repo}, then log in with `hf auth login` or set HF_TOKEN."
        )
    if isinstance(root, RepositoryNotFoundError) or status == 401:
        return f"{_not_seen(root, status, repo, url)}{_no_folder(repo) if kind == 'model' else ''}"
    if isinstance(root, EntryNotFoundError) and isinstance(root, HfHubHTTPError):
        return f"{repo} has no such file: {root.response.url}"
    if status == 429:
        wait = seconds_asked(root)
        moment = f"{wait:.0f} s" if wait else "5 minutes"
        return (
            f"The rate limit of {url} is used up (429). Try again in {moment}; `hf auth login` or HF_TOKEN "
            "gives a larger one. What is finished stays."
        )
    if status == 403:
        return f"{url} refuses access to {repo} (403); check the rights of the token. {first_line(root)}"
    if status is not None:
        return f"{url} answered {status} for {repo}; try again later. {first_line(root)}"
    if isinstance(root, httpx2.UnsupportedProtocol | httpx2.InvalidURL):
        return f"The endpoint {url!r} is no address ({first_line(root)}); see --endpoint and HF_ENDPOINT."
    if isinstance(root, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
        return (
            f"Cannot reach {url} ({first_line(root)}). Check the network, --endpoint and HF_ENDPOINT; "
            f"--offline uses local folders and the Hub cache only.{_no_folder(repo) if kind == 'model' else ''}"
        )
    if isinstance(root, httpx2.TransportError):
        return f"The connection to {url} broke off ({first_line(root)}). Run again: what is finished stays."
    if isinstance(root, WrongLength):
        return f"A file of {repo} is not what {url} lists: {first_line(root)}. Run again, which lists anew."
    if isinstance(root, WrongContent):
        return (
            f"{first_line(root)} of {repo} arrived twice with another hash than {url} tells: damaged there, or changed "
            "on the way (a proxy, a mirror)."
        )
    return f"{repo}: {first_line(root)}"


def _not_seen(error: Any, status: int | None, repo: str, url: str) -> str:
    """Why a repository is not seen; a Hub tells strangers of a private one what it tells of one that is not there."""
    if "Authorization" not in error.response.request.headers:
        return (
            f"{repo} was not found at {url}: there is none of that name, or it is private. If you have access, log in "
            "with `hf auth login` or set HF_TOKEN."
        )
    if status == 401:
        return (
            f"{repo} was not found at {url}, which does not accept your token (401): it has expired or was revoked. "
            "Log in again with `hf auth login`, or set HF_TOKEN."
        )
    return (
        f"{repo} was not found at {url}: there is none of that name, or it is private and your token has no right to "
        "it. `hf auth whoami` tells whose token it is."
    )


def _no_folder(name: str) -> str:
    """What may have been meant by the name of a repository that is none: a folder, mistyped or elsewhere."""
    beside = Path(name).parent
    try:
        folders = [str(path) for path in beside.iterdir() if path.is_dir()]
    except OSError:
        folders = []
    if name in folders:
        return ""
    like = nearest(name, folders, count=1)
    hint = f"did you mean ./{like[0]}?" if like else "a local folder is named by its path."
    return f" There is no folder {name} here either; {hint}"
