"""A Hub on 127.0.0.1 for tests: the reading half of the Hub's HTTP API, request log and injected faults.

with LoopbackHub() as hub:
    hub.add_repo("org/model", revisions={"main": folder, "step0": {"config.json": b"{}"}})
    hub.fault("*/refs", status=503, times=2)
    HfApi(endpoint=hub.url).list_repo_refs("org/model")
    assert hub.count("GET", "*/refs") == 3
"""

import fnmatch
import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
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

    def read(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


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
    cut_at: int | None
    bytes_per_second: float | None
    body: bytes | None
    corrupt_at: int | None
    length_off: int
    whole: bool

    def matches(self, method: str, path: str) -> bool:
        return self.times > 0 and self.method in (None, method) and fnmatch.fnmatchcase(path, self.pattern)


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
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
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
        cut_at: int | None = None,
        bytes_per_second: float | None = None,
        body: bytes | None = None,
        corrupt_at: int | None = None,
        length_off: int = 0,
        whole: bool = False,
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
            cut_at: Close the connection after so many bytes of the body.
            bytes_per_second: Send the body in a slow trickle.
            body: Answer with this body.
            corrupt_at: Send another byte there.
            length_off: Claim so many bytes more than there are, and close the connection behind the body.
            whole: Answer a request for a range with the whole file.
        """
        extra = dict(headers or {}) | ({} if retry_after is None else {"Retry-After": str(retry_after)})
        content = (cut_at, bytes_per_second, body, corrupt_at, length_off, whole)
        self.faults.append(Fault(pattern, method, times, status, error_code, extra, *content))

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.matches(method, path):
                    fault.times -= 1
                    return fault
        return None

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


_API = re.compile(r"/api/(model|dataset)s/([^/]+/[^/]+?)(?:/(refs|revision|tree|paths-info|auth-check)(?:/(.*))?)?")
_RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


def _handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30
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
            self.fault = hub.take_fault(self.command, path)
            try:
                if self.fault and (self.fault.status or self.fault.body is not None):
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
            if repo is None or (repo.private and "Authorization" not in self.headers):
                raise _Refusal(401 if repo else 404, "RepoNotFound", "Repository not found")
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
            if not match or (self.fault and self.fault.whole):
                self.answer(200, b"" if self.command == "HEAD" else blob.read(), headers, length=blob.size)
                return
            first = int(match[1])
            last = min(int(match[2] or blob.size - 1), blob.size - 1)
            if first >= blob.size:
                raise _Refusal(416, None, "Range", {"Content-Range": f"bytes */{blob.size}"})
            headers["Content-Range"] = f"bytes {first}-{last}/{blob.size}"
            part = b"" if self.command == "HEAD" else blob.read()[first : last + 1]
            self.answer(206, part, headers, length=last + 1 - first)

        def answer_json(self, value: object, headers: Mapping[str, str] | None = None) -> None:
            self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"} | dict(headers or {}))

        def answer(self, status: int, body: bytes, headers: Mapping[str, str], *, length: int | None = None) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            off = self.fault.length_off if self.fault else 0
            if off:
                self.close_connection = True
            self.send_header("Content-Length", str((len(body) if length is None else length) + off))
            self.end_headers()
            if self.command == "HEAD":
                return
            if self.fault and self.fault.corrupt_at is not None and self.fault.corrupt_at < len(body):
                at = self.fault.corrupt_at
                body = body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :]
            if self.fault and self.fault.cut_at is not None:
                self.wfile.write(body[: self.fault.cut_at])
                self.wfile.flush()
                self.close_connection = True
            elif self.fault and self.fault.bytes_per_second:
                for start in range(0, len(body), 4096):
                    self.wfile.write(body[start : start + 4096])
                    time.sleep(4096 / self.fault.bytes_per_second)
            else:
                self.wfile.write(body)

    return Handler


def _refs(names: Mapping[str, str], prefix: str) -> list[dict[str, str]]:
    return [{"name": name, "ref": prefix + name, "targetCommit": sha} for name, sha in names.items()]
