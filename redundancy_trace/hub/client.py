"""Asking a Hub: refs, commits, trees and files.

The API calls are made here, on huggingface_hub's session and headers, because its own have no time-out and
most give up at the first 429 or 503. So are weights fetched, since its downloader begins a broken file anew; a small
file that is worth keeping goes through it into the user's cache. All by commit.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from redundancy_trace.errors import CheckpointError, InputError, TraceError, first_line, nearest
from redundancy_trace.hub.cache import (
    cached_commit,
    cached_commits,
    cached_files,
    cached_refs,
    cached_snapshot,
    checked_file,
    record_ref,
)
from redundancy_trace.hub.failures import explained, retried
from redundancy_trace.hub.progress import Meter
from redundancy_trace.hub.ranges import REQUEST_TIMEOUT_SECONDS, RemoteFile, WrongContent, WrongLength
from redundancy_trace.hub.rate import allowance, observe
from redundancy_trace.hub.reading import RemoteFolder
from redundancy_trace.hub.records import COMMIT, Ref, RefKind, RepoFile, RepoKind
from redundancy_trace.hub.transfer import download_files

_REF_GROUPS: tuple[tuple[str, RefKind], ...] = (
    ("branches", "branch"),
    ("tags", "tag"),
    ("converts", "other"),
)


@dataclass(frozen=True)
class Hub:
    """One Hub as one user sees it.

    Attributes:
        endpoint: Address of the server; None = `HF_ENDPOINT`, else https://huggingface.co.
        token: Access token; None = what huggingface_hub finds (`HF_TOKEN`, `hf auth login`).
        offline: Never ask the server: there is only what the user's own Hub cache holds.
    """

    endpoint: str | None = None
    token: str | None = None
    offline: bool = False

    def __post_init__(self) -> None:
        address = urlsplit(self.url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise InputError(
                f"The endpoint {self.url!r} is no address; one looks like https://huggingface.co "
                "(--endpoint, HF_ENDPOINT)."
            )

    @property
    def url(self) -> str:
        """Address of the server, without a trailing slash."""
        return (self.endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")

    @property
    def is_offline(self) -> bool:
        """Whether no request may be made: `offline`, or the variable `HF_HUB_OFFLINE`."""
        return self.offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")

    def refs(self, repo: str, kind: RepoKind = "model") -> tuple[Ref, ...]:
        """Branches, tags and converts, in the server's order; one request. Offline: those the cache recorded.

        Raises:
            InputError: No such repository, no access, or no answer.
        """
        return self.refs_and_name(repo, kind)[0]

    def refs_and_name(self, repo: str, kind: RepoKind = "model") -> tuple[tuple[Ref, ...], str]:
        """What `refs` gives, and the name that the repository has now: the server leads on from one it had before.

        Raises:
            InputError: As for `refs`.
        """
        if self.is_offline:
            return cached_refs(_checked(repo), kind), repo
        with self._told(InputError, repo, kind=kind):
            answer, body = self._get_json(f"/api/{kind}s/{_checked(repo)}/refs")
            found = tuple(
                # A convert is only found by its full name.
                Ref(item["ref" if ref_kind == "other" else "name"], ref_kind, item["targetCommit"])
                for group, ref_kind in _REF_GROUPS
                for item in body.get(group, ())
            )
            led_to = re.fullmatch(rf".*/api/{kind}s/([^/]+/[^/]+|[^/]+)/refs", answer.url.path)
            return found, led_to[1] if answer.history and led_to else repo

    def resolve(self, repo: str, revision: str, kind: RepoKind = "model") -> str:
        """The commit (40 hex digits) of a branch, tag or SHA; one request.

        Raises:
            InputError: No such repository or revision (names the nearest), no access, or no answer.
        """
        if self.is_offline:
            return cached_commit(_checked(repo), revision, kind)
        with self._told(InputError, repo, revision, kind=kind):
            _, body = self._get_json(f"/api/{kind}s/{_checked(repo)}/revision/{quote(revision, safe='')}")
            return str(body["sha"])

    def files(self, repo: str, commit: str, kind: RepoKind = "model") -> tuple[RepoFile, ...]:
        """All files of a commit with size and hash; no content is moved. Offline: those that the cache holds.

        Raises:
            InputError: No such repository or commit, no access, or no answer.
        """
        if self.is_offline:
            return cached_files(_checked(repo), commit, kind)
        found: list[RepoFile] = []
        page: str | None = f"/api/{kind}s/{_checked(repo)}/tree/{quote(commit, safe='')}?recursive=true"
        with self._told(InputError, repo, commit, kind=kind):
            while page:
                answer, entries = self._get_json(page)
                page = answer.links.get("next", {}).get("url")
                found += [_file_of(entry) for entry in entries if entry["type"] == "file"]
        return tuple(found)

    def file_facts(self, repo: str, commit: str, path: str) -> RepoFile | None:
        """Size and hash of one file, by a question that counts towards the larger of the Hub's limits; None: not there.

        Raises:
            InputError: As for `files`.
        """
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        address = self._address(repo, commit, path)
        headers = {**build_hf_headers(token=self.token), "Accept-Encoding": "identity"}

        def ask() -> Any:
            allowance(self.url, "resolvers").take()
            answer = get_session().head(
                address, headers=headers, timeout=REQUEST_TIMEOUT_SECONDS, follow_redirects=False
            )
            observe(self.url, "resolvers", answer.headers)
            if answer.status_code >= 400 and answer.status_code != 404:
                hf_raise_for_status(answer)
            return answer

        with self._told(InputError, repo, commit):
            answer = retried(ask, patient=False)
        told = answer.headers
        digest = (told.get("X-Linked-ETag") or told.get("ETag") or "").removeprefix("W/").strip('"')
        size = told.get("X-Linked-Size") or (told.get("Content-Length") if answer.status_code == 200 else None)
        if answer.status_code == 404 or size is None or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest):
            return None
        large = len(digest) == 64
        return RepoFile(path, int(size), digest if large else None, None if large else digest)

    def cached_commits(self, repo: str, kind: RepoKind = "model") -> tuple[str, ...]:
        """The commits of which the user's own Hub cache holds files; they may have no name there."""
        return cached_commits(_checked(repo), kind)

    def cached(self, repo: str, commit: str, paths: Sequence[str], kind: RepoKind = "model") -> Path | None:
        """The folder in the user's own Hub cache that holds all of `paths` at `commit`, else None."""
        return cached_snapshot(_checked(repo), commit, paths, kind)

    def download(
        self,
        repo: str,
        commit: str,
        files: Sequence[RepoFile],
        folder: Path,
        on_bytes: Callable[[int], None] | None = None,
        stopped: Event | None = None,
        on_arrival: Callable[[], None] | None = None,
    ) -> None:
        """Fetch files of a commit into `folder`, up to eight parts at a time, and check their hashes.

        What has arrived of a file stays there when a download ends early (as `<name>.part`), and is gone on with by
        the next call, of another process too.

        Args:
            repo: Repository.
            commit: Its commit, 40 hex digits.
            files: Which; they keep their paths below `folder`.
            folder: Where they go.
            on_bytes: Told the bytes of each chunk that arrives, never by two threads at once; negative when
                a file starts again. An exception that it raises ends the download.
            stopped: Once set, the download ends at its next chunk, and no retry is waited for. It is set by a failure.
            on_arrival: Called when the last byte is there, before the hashes are checked.

        Raises:
            CheckpointError: A file cannot be had: missing, no access, no answer, connection lost, wrong content,
                no space.
        """
        if self.is_offline:
            raise CheckpointError(
                f"{repo} at {commit[:12]} is not in the Hub cache, and the network is not to be used. "
                "Leave out --offline (and HF_HUB_OFFLINE) to download it."
            )
        remotes = [(file, self.remote_file(repo, commit, file), folder / file.path) for file in files]
        with self._told(CheckpointError, repo, commit):
            download_files(remotes, Meter(on_bytes, stopped), on_arrival)

    def remote_file(self, repo: str, commit: str, file: RepoFile) -> RemoteFile:
        """A file of a commit, to be read by ranges; nothing is asked for yet."""
        return RemoteFile(self.url, self._address(repo, commit, file.path), file.size, self.token)

    def _address(self, repo: str, commit: str, path: str) -> str:
        return f"{self.url}/{_checked(repo)}/resolve/{commit}/{quote(path)}"

    def remote_folder(
        self,
        repo: str,
        commit: str,
        files: Sequence[RepoFile],
        on_bytes: Callable[[int], None] | None = None,
        stopped: Event | None = None,
    ) -> RemoteFolder:
        """Files of a commit to be read by spans of bytes; arguments as for `download`, nothing is asked for yet."""

        def told(call: Callable[[], None]) -> None:
            with self._told(CheckpointError, repo, commit):
                call()

        remotes = {file.path: self.remote_file(repo, commit, file) for file in files}
        return RemoteFolder(remotes, Meter(on_bytes, stopped), told)

    def dataset_files(self, repo: str, revision: str = "main") -> tuple[RepoFile, ...]:
        """All files of a dataset repository at a revision.

        Raises:
            InputError: As for `resolve` and `files`.
        """
        return self.files(repo, self.resolve(repo, revision, "dataset"), "dataset")

    def dataset_file(self, repo: str, path: str, revision: str = "main") -> Path:
        """One file of a dataset repository, in the user's own Hub cache; fetched if it is not there.

        Raises:
            InputError: As for `resolve`; or there is no such file.
        """
        return self.cached_file(repo, path, revision, "dataset")

    def cached_file(self, repo: str, path: str, revision: str = "main", kind: RepoKind = "model") -> Path:
        """One file that is worth keeping, in the user's own Hub cache; fetched if it is not there.

        Raises:
            InputError: As for `resolve`; or there is no such file.
        """
        from huggingface_hub import hf_hub_download

        commit = self.resolve(repo, revision, kind)
        if snapshot := self.cached(repo, commit, [path], kind):
            return snapshot / path
        if self.is_offline:
            raise InputError(f"{path} of {repo} is not in the Hub cache; leave out --offline to download it.")
        with self._told(InputError, repo, commit, kind=kind):

            def fetched() -> Path:
                found = hf_hub_download(
                    repo, path, revision=commit, repo_type=kind, endpoint=self.url, token=self.token
                )
                return checked_file(Path(found))

            try:
                return retried(fetched, patient=True)
            except WrongContent:
                return retried(fetched, patient=True)

    def keep_ref(self, repo: str, revision: str, commit: str, kind: RepoKind = "model") -> None:
        """Note in the user's Hub cache what `resolve` said of a revision, for a later call without a network.

        Files that are fetched by commit leave no such note. To be called once there is a file of the repository.
        """
        if not self.is_offline:
            record_ref(_checked(repo), revision, commit, kind)

    def search(self, author: str, text: str, limit: int = 100) -> tuple[str, ...]:
        """Names of an author's model repositories that contain a text; one request. Offline: none.

        Raises:
            InputError: No answer, or none that a Hub gives.
        """
        if self.is_offline:
            return ()
        query = urlencode({"author": author, "search": text, "limit": limit})
        with self._told(InputError, f"{author}/{text}"):
            _, body = self._get_json(f"/api/models?{query}")
            return tuple(str(item["id"]) for item in body)

    def _get_json(self, path: str) -> tuple[Any, Any]:
        """Answer of an API call, and its body read."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
        )

        def get() -> tuple[Any, Any]:
            allowance(self.url, "api").take()
            response = get_session().get(
                path if path.startswith("http") else self.url + path,
                headers=build_hf_headers(token=self.token),
                timeout=REQUEST_TIMEOUT_SECONDS,
            )
            observe(self.url, "api", response.headers)
            hf_raise_for_status(response)
            return response, _json_of(response)

        return retried(get, patient=False)

    @contextmanager
    def _told(
        self, told_as: type[TraceError], repo: str, revision: str = "", *, kind: RepoKind = "model"
    ) -> Iterator[None]:
        """Turn what huggingface_hub and the network raise into one error of ours."""
        import httpx2
        from huggingface_hub.errors import RevisionNotFoundError

        try:
            yield
        except RevisionNotFoundError:
            raise told_as(self._unknown_revision(repo, revision, kind)) from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, WrongLength, WrongContent) as error:
            raise told_as(explained(error, repo, self.url, kind)) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            # A captive portal or a plain web server answers 200 with something else.
            raise told_as(
                f"{self.url} does not answer as a Hub does, asked for {repo} ({first_line(error)}). "
                "Check --endpoint, HF_ENDPOINT and the network."
            ) from error

    def _unknown_revision(self, repo: str, revision: str, kind: RepoKind) -> str:
        if COMMIT.fullmatch(revision):
            return f"{repo} has no commit {revision} (mistyped, or its history was rewritten)."
        names = [ref.name for ref in self.refs(repo, kind)]
        like = nearest(revision, names) or names[:3]
        return f"{repo} has no revision {revision!r}; nearest of its {len(names)}: {', '.join(like)}."


def _json_of(response: Any) -> Any:
    """The JSON of an answer; one that says it is JSON and is not was damaged on the way, and may be asked for again."""
    import httpx2

    try:
        return response.json()
    except ValueError as error:
        if "json" in response.headers.get("Content-Type", ""):
            raise httpx2.RemoteProtocolError(f"half an answer: {first_line(error)}") from error
        raise


def _file_of(entry: dict[str, Any]) -> RepoFile:
    large = (entry.get("lfs") or {}).get("oid")
    return RepoFile(entry["path"], entry["size"], large, None if large else entry.get("oid"))


def _checked(repo: str) -> str:
    """The name, if it can be one of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{repo!r} is no repository name (org/name). {first_line(error)}") from None
    return repo
