"""A Hub on 127.0.0.1 for tests: the reading half of the Hub's HTTP API, request log and injected faults.

with LoopbackHub() as hub:
    hub.add_repo("org/model", revisions={"main": folder, "step0": {"config.json": b"{}"}})
    hub.fault("*/refs", status=503, times=2)
    HfApi(endpoint=hub.url).list_repo_refs("org/model")
    assert hub.count("GET", "*/refs") == 3
    hub.chaos(random.Random(7), rate=0.2)  # from now on any request may meet any fault
    hub.calm()
"""

import fnmatch
import hashlib
import json
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

Content = Path | str | Mapping[str, "bytes | Path"]
LFS_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".h5",
    ".gguf",
    ".npy",
    ".parquet",
    ".gz",
    ".zst",
    ".msgpack",
)


@dataclass(frozen=True)
class Blob:
    """One file of a commit; `sha256` only where the Hub would keep it as LFS."""

    source: bytes | Path
    size: int
    oid: str
    sha256: str | None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    def read(self, first: int = 0, stop: int | None = None) -> bytes:
        stop = self.size if stop is None else stop
        if isinstance(self.source, bytes):
            return self.source[first:stop]
        with self.source.open("rb") as file:
            file.seek(first)
            return file.read(stop - first)


@dataclass
class Repo:
    kind: str
    gated: bool = False
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    converts: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)

    def commit_of(self, revision: str) -> str | None:
        for names in (self.branches, self.tags, self.converts):
            if revision in names:
                return names[revision]
        return revision if revision in self.commits else None


@dataclass(frozen=True)
class Request:
    """One request as it came in; `path` is decoded and has no query."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose path matches."""

    pattern: str
    method: str | None
    times: int
    status: int | None
    error_code: str | None
    headers: dict[str, str]
    cut_at: float | None
    bytes_per_second: float | None
    body: bytes | None
    corrupt_at: float | None
    length_off: int
    whole: bool
    hang_up: bool
    kind: str = "given"

    def matches(self, method: str, path: str) -> bool:
        return self.times > 0 and self.method in (None, method) and fnmatch.fnmatchcase(path, self.pattern)


@dataclass
class Body:
    """One body as it went out, or as much of it as the client took."""

    path: str
    sent: int
    fault: str | None
    began: float = field(default_factory=time.monotonic)
    ended: float | None = None


_Drawn = Callable[[random.Random], dict[str, Any]]
# What a fault of each kind is, drawn anew each time; lengths as shares of the body.
_KINDS: dict[str, _Drawn] = {
    "429": lambda chance: {"status": 429, "retry_after": chance.choice((None, 0, 0, 0, 1))},
    "503": lambda chance: {"status": 503, "retry_after": chance.choice((None, 0))},
    "cut": lambda chance: {"cut_at": chance.random()},
    "hang up": lambda _: {"hang_up": True},
    "length": lambda chance: {"length_off": chance.choice((-1, 1)) * chance.randrange(1, 200)},
    "trickle": lambda chance: {"bytes_per_second": chance.uniform(50_000, 500_000)},
    "whole": lambda _: {"whole": True},
    "401": lambda _: {"status": 401},
    "403": lambda _: {"status": 403},
    "corrupt": lambda chance: {"corrupt_at": chance.random()},
}
# How often each is drawn: those that end a sweep, or cost a file by design, are rarer.
CHAOS = {
    "429": 4, "503": 4, "cut": 8, "hang up": 4, "length": 4, "trickle": 4, "whole": 0.5, "401": 0.5, "403": 0.5,
    "corrupt": 0.5,
}  # fmt: skip


@dataclass
class _Chaos:
    """Faults at random: which one the n-th request for a thing meets is the seed's, whatever was asked in between."""

    seed: int
    rate: float
    kinds: Mapping[str, float]
    pattern: str
    asked: Counter[str] = field(default_factory=Counter)
    corrupted: set[str] = field(default_factory=set)

    def fault(self, method: str, path: str, span: str) -> Fault | None:
        asked = f"{method} {path} {span}"
        self.asked[asked] += 1
        chance = random.Random(f"{self.seed} {asked} {self.asked[asked]}")
        if chance.random() >= self.rate or not fnmatch.fnmatchcase(path, self.pattern):
            return None
        (kind,) = chance.choices(list(self.kinds), list(self.kinds.values()))
        if kind == "corrupt":
            if path in self.corrupted:
                return None  # a file that arrives wrong twice is given up
            self.corrupted.add(path)
        return _fault(path, kind=kind, **_KINDS[kind](chance))


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tell what went wrong, unless a client has gone."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class LoopbackHub:
    """The server; every test has its own. Use it as a context manager or call `start` and `stop`."""

    def __init__(self, *, page_size: int = 1000, cdn: bool = False) -> None:
        """Make a Hub without repositories.

        Args:
            page_size: Entries on one page of the tree.
            cdn: Large files are answered by a redirect to another origin, as the real Hub does.
        """
        self.page_size = page_size
        self.cdn = cdn
        self.repos: dict[tuple[str, str], Repo] = {}
        self.renamed: dict[str, str] = {}
        self.requests: list[Request] = []
        self.bodies: list[Body] = []
        self.faults: list[Fault] = []
        self.met: Counter[str] = Counter()  # faults of the chaos, by kind
        self.bytes_per_second: float | None = None  # of every body; None = at once
        self.bytes_per_second_of_all: float | None = None  # of all bodies together, as one cable has it
        self._cable_free = 0.0
        self._chaos: _Chaos | None = None
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def start(self) -> "LoopbackHub":
        self._thread.start()
        return self

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "LoopbackHub":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables for a process of its own that shall use this Hub and a cache under `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
        }

    # Content

    def add_repo(
        self,
        name: str,
        revisions: Mapping[str, Content] | None = None,
        tags: Mapping[str, Content] | None = None,
        converts: Mapping[str, Content] | None = None,
        *,
        kind: str = "model",
        gated: bool = False,
        private: bool = False,
    ) -> Repo:
        """Add a repository.

        Args:
            name: `org/name`.
            revisions: Branch -> a folder, or path -> bytes (or file), or the name of another revision.
            tags: Tag -> the same.
            converts: Name of a `refs/convert/...` ref -> the same.
            kind: `model` or `dataset`.
            gated: Files are refused with 403 GatedRepo, the API answers.
            private: Without a token nothing is there.
        """
        repo = self.repos[kind, name] = Repo(kind=kind, gated=gated, private=private)
        for group, given in (
            (repo.branches, revisions),
            (repo.tags, tags),
            (repo.converts, converts),
        ):
            for revision, content in (given or {}).items():
                group[revision] = self._commit(repo, name, revision, content)
        return repo

    def set_revision(self, name: str, revision: str, content: Content, *, kind: str = "model") -> str:
        """Add a branch or move it; commits that were there stay reachable by SHA. Returns the new SHA."""
        repo = self.repos[kind, name]
        repo.branches[revision] = self._commit(repo, name, revision, content)
        return repo.branches[revision]

    def commit(self, name: str, revision: str, *, kind: str = "model") -> str:
        """The SHA that a branch or tag points at."""
        sha = self.repos[kind, name].commit_of(revision)
        assert sha is not None, f"{name} has no revision {revision}"
        return sha

    def rename(self, old: str, new: str) -> None:
        """Answer what is asked of a model under its old name with a redirect to the new one."""
        self.renamed[old] = new

    def search(self, author: str, text: str, limit: int) -> list[dict[str, str]]:
        """What `/api/models` answers: models of an author whose name contains a text, in any case."""
        names = [name for kind, name in self.repos if kind == "model" and name.startswith(f"{author}/")]
        return [{"_id": name, "id": name} for name in names if text.lower() in name.lower()][:limit]

    def _commit(self, repo: Repo, name: str, revision: str, content: Content) -> str:
        if isinstance(content, str):
            sha = repo.commit_of(content)
            assert sha is not None, f"{name} has no revision {content}"
            return sha
        blobs = {path: _blob(path, source) for path, source in _sources(content).items()}
        listing = "".join(f"{path} {blobs[path].etag}\n" for path in sorted(blobs))
        sha = hashlib.sha1(f"{name}@{revision}\n{listing}".encode()).hexdigest()
        repo.commits[sha] = blobs
        return sha

    # Faults and the log of requests

    def fault(
        self,
        pattern: str,
        *,
        status: int | None = None,
        times: int = 1,
        method: str | None = None,
        error_code: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
        cut_at: float | None = None,
        bytes_per_second: float | None = None,
        body: bytes | None = None,
        corrupt_at: float | None = None,
        length_off: int = 0,
        whole: bool = False,
        hang_up: bool = False,
    ) -> None:
        """Let the next `times` requests to a path like `pattern` (glob, decoded path) fail.

        Args:
            pattern: Glob over the path, such as `*/refs` or `*/model.safetensors`.
            status: Answer with this status instead of the content.
            times: How many requests are hit.
            method: Only requests of this method.
            error_code: `X-Error-Code` of the answer.
            retry_after: `Retry-After` of the answer, in seconds.
            headers: Further headers of the answer.
            cut_at: Close the connection after so many bytes of the body; below 1, that share of it.
            bytes_per_second: Send the body in a slow trickle.
            body: Answer with this body.
            corrupt_at: Send another byte there; below 1, at that share of the body.
            length_off: Claim so many bytes more than there are (or fewer), and close the connection behind the body.
            whole: Answer a request for a range with the whole file.
            hang_up: Close the connection without an answer.
        """
        given = locals()
        self.faults.append(_fault(**{name: value for name, value in given.items() if name != "self"}))

    def chaos(
        self, chance: random.Random, *, rate: float, kinds: Mapping[str, float] = CHAOS, pattern: str = "*"
    ) -> None:
        """Let requests to paths like `pattern` meet faults at random, until `calm`.

        Args:
            chance: Where the seed is drawn from.
            rate: Share of the requests.
            kinds: Which faults (see `CHAOS`), and how often each in proportion to the others.
            pattern: Glob over the path.
        """
        self._chaos = _Chaos(chance.getrandbits(64), rate, kinds, pattern)

    def calm(self) -> None:
        """End the chaos; faults that were asked for one by one stay."""
        self._chaos = None

    def take_fault(self, method: str, path: str, span: str = "") -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.matches(method, path):
                    fault.times -= 1
                    return fault
            return self._chaos.fault(method, path, span) if self._chaos else None

    def pass_cable(self, count: int) -> None:
        """Wait until so many bytes are through the cable that all bodies share."""
        rate = self.bytes_per_second_of_all
        if rate is None:
            return
        with self.lock:
            self._cable_free = max(self._cable_free, time.monotonic()) + count / rate
            through = self._cable_free
        time.sleep(max(0.0, through - time.monotonic()))

    def meet(self, fault: Fault) -> None:
        with self.lock:
            self.met[fault.kind] += 1

    def log(self, request: Request) -> None:
        with self.lock:
            self.requests.append(request)

    def count(self, method: str | None = None, pattern: str = "*") -> int:
        """How many requests came in with this method and a path like the glob `pattern`."""
        return len(self.matching(method, pattern))

    def matching(self, method: str | None = None, pattern: str = "*") -> list[Request]:
        with self.lock:
            return [
                request
                for request in self.requests
                if method in (None, request.method) and fnmatch.fnmatchcase(request.path, pattern)
            ]

    def forget_requests(self) -> None:
        with self.lock:
            self.requests.clear()


def _fault(
    pattern: str,
    *,
    status: int | None = None,
    times: int = 1,
    method: str | None = None,
    error_code: str | None = None,
    retry_after: int | None = None,
    headers: Mapping[str, str] | None = None,
    kind: str = "given",
    **content: Any,
) -> Fault:
    """A fault from the arguments of `LoopbackHub.fault`."""
    extra = dict(headers or {}) | ({} if retry_after is None else {"Retry-After": str(retry_after)})
    nothing: dict[str, Any] = {
        "cut_at": None, "bytes_per_second": None, "body": None, "corrupt_at": None, "length_off": 0, "whole": False,
        "hang_up": False,
    }  # fmt: skip
    return Fault(pattern, method, times, status, error_code, extra, kind=kind, **(nothing | content))


def _place(at: float, length: int) -> int:
    """A place in a body, given as bytes or as a share of it."""
    return int(at * length) if 0 < at < 1 else int(at)


def _sources(content: Path | Mapping[str, bytes | Path]) -> dict[str, bytes | Path]:
    if isinstance(content, Path):
        return {
            file.relative_to(content).as_posix(): file
            for file in sorted(content.rglob("*"))
            if file.is_file() and ".cache" not in file.parts
        }
    return dict(content)


def _blob(path: str, source: bytes | Path) -> Blob:
    data = source if isinstance(source, bytes) else source.read_bytes()
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    lfs = path.endswith(LFS_SUFFIXES)
    return Blob(source, len(data), oid, hashlib.sha256(data).hexdigest() if lfs else None)


def _entry(path: str, blob: Blob) -> dict[str, object]:
    """A file as tree and paths-info show it."""
    entry: dict[str, object] = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
    if blob.sha256:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
    return entry


def _sibling(path: str, blob: Blob, *, blobs: bool) -> dict[str, object]:
    """A file as repo info shows it: the same hash under another key."""
    sibling: dict[str, object] = {"rfilename": path}
    if blobs:
        sibling |= {"size": blob.size, "blobId": blob.oid}
        if blob.sha256:
            sibling["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": 134}
    return sibling


class _Refusal(Exception):
    """An error answer of the Hub."""

    def __init__(self, status: int, code: str | None, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {}) | {"X-Error-Message": message}
        if code:
            self.headers["X-Error-Code"] = code


EXPIRED_TOKEN = "hf_expired"
# Valid, of a user who has no right to any private repository.
STRANGERS_TOKEN = "hf_stranger"
_API = re.compile(r"/api/(model|dataset)s/([^/]+/[^/]+?)(?:/(refs|revision|tree|paths-info|auth-check)(?:/(.*))?)?")
_RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


def _handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30
        disable_nagle_algorithm = True
        fault: Fault | None = None

        def do_GET(self) -> None:
            self.handle_request()

        def do_HEAD(self) -> None:
            self.handle_request()

        def do_POST(self) -> None:
            self.handle_request()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name in the base class
            """Tests read `hub.requests` instead."""

        def handle_request(self) -> None:
            parts = urlsplit(self.path)
            path = unquote(parts.path)
            posted = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            hub.log(Request(self.command, path, parts.query, dict(self.headers.items())))
            self.path_asked = path
            self.fault = hub.take_fault(self.command, path, self.headers.get("Range") or "")
            try:
                if self.fault and self.fault.hang_up:
                    hub.meet(self.fault)
                    self.close_connection = True
                elif self.fault and (self.fault.status or self.fault.body is not None):
                    status = self.fault.status or 200
                    code = {"X-Error-Code": self.fault.error_code} if self.fault.error_code else {}
                    self.answer(status, self.fault.body or b'{"error": "injected"}', self.fault.headers | code)
                elif moved := self.moved(parts.path):
                    self.answer(307, b"", {"Location": moved + (f"?{parts.query}" if parts.query else "")})
                elif parts.path == "/api/models":
                    asked = {key: values[0] for key, values in parse_qs(parts.query).items()}
                    self.answer_json(hub.search(asked["author"], asked["search"], int(asked["limit"])))
                elif parts.path.startswith("/cdn/"):
                    self.answer_cdn(path.removeprefix("/cdn/"))
                elif match := _API.fullmatch(parts.path):
                    kind, name, call, rest = match.groups()
                    query = parse_qs(parts.query) | parse_qs(posted)
                    self.answer_api(kind, unquote(name), call, rest, query)
                elif match := _RESOLVE.fullmatch(parts.path):
                    dataset, name, revision, file = match.groups()
                    self.answer_file("dataset" if dataset else "model", name, unquote(revision), unquote(file))
                else:
                    self.answer(404, b'{"error": "no such page"}', {})
            except _Refusal as refusal:
                self.answer(refusal.status, json.dumps({"error": str(refusal)}).encode(), refusal.headers)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def moved(self, path: str) -> str | None:
            for old, new in hub.renamed.items():
                for prefix in ("/api/models/", "/"):
                    if path.startswith(f"{prefix}{old}/"):
                        return f"{prefix}{new}/{path.removeprefix(f'{prefix}{old}/')}"
            return None

        def repo(self, kind: str, name: str) -> Repo:
            repo = hub.repos.get((kind, name))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token == EXPIRED_TOKEN:
                raise _Refusal(401, None, "Invalid credentials in Authorization header")
            if repo is None or (repo.private and token in ("", STRANGERS_TOKEN)):
                raise _Refusal(404 if token else 401, "RepoNotFound" if token else None, "Repository not found")
            return repo

        def commit(self, repo: Repo, revision: str) -> tuple[str, dict[str, Blob]]:
            sha = repo.commit_of(revision)
            if sha is None:
                raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return sha, repo.commits[sha]

        def answer_api(
            self, kind: str, name: str, call: str | None, rest: str | None, query: Mapping[str, list[str]]
        ) -> None:
            repo = self.repo(kind, name)
            if call == "refs":
                self.answer_json(
                    {
                        "branches": _refs(repo.branches, "refs/heads/"),
                        "tags": _refs(repo.tags, "refs/tags/"),
                        "converts": _refs(repo.converts, "refs/convert/"),
                        "pullRequests": [],
                    }
                )
            elif call == "tree":
                encoded, _, folder = (rest or "").partition("/")
                _, files = self.commit(repo, unquote(encoded))
                self.answer_tree(files, unquote(folder), query)
            elif call == "paths-info":
                _, files = self.commit(repo, unquote(rest or ""))
                wanted = query.get("paths", [])
                self.answer_json([_entry(path, files[path]) for path in wanted if path in files])
            else:
                sha, files = self.commit(repo, unquote(rest or "main"))
                blobs = "blobs" in query
                siblings = [_sibling(path, blob, blobs=blobs) for path, blob in sorted(files.items())]
                gated = "auto" if repo.gated else False
                self.answer_json(
                    {
                        "_id": sha,
                        "id": name,
                        "sha": sha,
                        "gated": gated,
                        "private": repo.private,
                        "siblings": siblings,
                    }
                    | {"author": name.split("/")[0], "downloads": 0, "likes": 0, "tags": []}
                )

        def answer_tree(self, files: Mapping[str, Blob], folder: str, query: Mapping[str, list[str]]) -> None:
            prefix = f"{folder}/" if folder else ""
            inside = {path: blob for path, blob in sorted(files.items()) if path.startswith(prefix)}
            folders = {
                prefix + "/".join(parts[:depth])
                for parts in (path.removeprefix(prefix).split("/") for path in inside)
                for depth in range(1, len(parts))
            }
            entries: list[dict[str, object]] = [
                {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
                for path in sorted(folders)
            ]
            entries += [_entry(path, blob) for path, blob in inside.items()]
            if query.get("recursive", ["false"])[0].lower() != "true":
                entries = [e for e in entries if "/" not in str(e["path"]).removeprefix(prefix)]
            start = int(query.get("cursor", ["0"])[0])
            headers = {}
            if start + hub.page_size < len(entries):
                cursor = f"recursive={query.get('recursive', ['false'])[0]}&cursor={start + hub.page_size}"
                headers["Link"] = f'<{hub.url}{urlsplit(self.path).path}?{cursor}>; rel="next"'
            self.answer_json(entries[start : start + hub.page_size], headers)

        def answer_file(self, kind: str, name: str, revision: str, path: str) -> None:
            repo = self.repo(kind, name)
            sha, files = self.commit(repo, revision)
            if repo.gated and "Authorization" not in self.headers:
                raise _Refusal(403, "GatedRepo", f"Access to {kind} {name} is restricted")
            if path not in files:
                raise _Refusal(404, "EntryNotFound", f"{path} does not exist", {"X-Repo-Commit": sha})
            blob = files[path]
            headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
            if hub.cdn and blob.sha256:
                # Another name of the same machine is another origin to the client, as a CDN is.
                headers |= {
                    "Location": f"http://localhost:{hub.port}/cdn/{quote(kind)}/{name}/{sha}/{quote(path)}",
                    "X-Linked-Size": str(blob.size),
                    "X-Linked-ETag": f'"{blob.etag}"',
                }
                self.answer(302, b"", headers)
            else:
                self.answer_bytes(blob, headers)

        def answer_cdn(self, rest: str) -> None:
            kind, org, name, sha, path = rest.split("/", 4)
            blob = hub.repos[kind, f"{org}/{name}"].commits[sha][path]
            self.answer_bytes(blob, {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"})

        def answer_bytes(self, blob: Blob, headers: dict[str, str]) -> None:
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if self.fault and self.fault.whole and not match:
                self.fault = None
            if not match or (self.fault and self.fault.whole):
                self.answer(200, b"" if self.command == "HEAD" else blob.read(), headers, length=blob.size)
                return
            first = int(match[1])
            last = min(int(match[2] or blob.size - 1), blob.size - 1)
            if first >= blob.size:
                raise _Refusal(416, None, "Range", {"Content-Range": f"bytes */{blob.size}"})
            headers["Content-Range"] = f"bytes {first}-{last}/{blob.size}"
            part = b"" if self.command == "HEAD" else blob.read(first, last + 1)
            self.answer(206, part, headers, length=last + 1 - first)

        def answer_json(self, value: object, headers: Mapping[str, str] | None = None) -> None:
            self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"} | dict(headers or {}))

        def answer(self, status: int, body: bytes, headers: Mapping[str, str], *, length: int | None = None) -> None:
            fault = self.fault
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            length = len(body) if length is None else length
            off = max(fault.length_off, -length) if fault else 0
            self.send_header("Content-Length", str(length + off))
            self.end_headers()
            if off:
                self.close_connection = True
            met = bool(fault and (fault.status or off or body))
            if fault and met:
                hub.meet(fault)
            if self.command == "HEAD":
                return
            pace = hub.bytes_per_second
            if fault:
                pace = fault.bytes_per_second or pace
                if fault.corrupt_at is not None and (at := _place(fault.corrupt_at, len(body))) < len(body):
                    body = body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :]
                if fault.cut_at is not None:
                    body = body[: _place(fault.cut_at, len(body))]
                    self.close_connection = True
            out = Body(self.path_asked, 0, fault.kind if fault and met else None)
            with hub.lock:
                hub.bodies.append(out)
            step = 4096 if pace else 2**16 if hub.bytes_per_second_of_all else max(1, len(body))
            try:
                for start in range(0, len(body), step):
                    piece = memoryview(body)[start : start + step]
                    hub.pass_cable(len(piece))
                    self.wfile.write(piece)
                    out.sent += len(piece)
                    if pace:
                        time.sleep(step / pace)
            finally:
                out.ended = time.monotonic()

    return Handler


def _refs(names: Mapping[str, str], prefix: str) -> list[dict[str, str]]:
    return [{"name": name, "ref": prefix + name, "targetCommit": sha} for name, sha in names.items()]
