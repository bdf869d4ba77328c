"""Ranged downloads: in parts, taken up again where they stopped, right whatever the server does."""

import hashlib
import random
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub

from redundancy_trace.errors import CheckpointError
from redundancy_trace.hub import Hub, RepoFile, partial, rate
from redundancy_trace.hub.partial import PartialFile

DATA = random.Random(0).randbytes(100_003)
FILE = RepoFile("model.safetensors", len(DATA), hashlib.sha256(DATA).hexdigest())
PART = 10_000


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial, "PART_BYTES", PART)


@pytest.fixture
def served(loopback_hub: LoopbackHub, small_parts: None) -> LoopbackHub:
    loopback_hub.add_repo("org/model", revisions={"main": {FILE.path: DATA}})
    return loopback_hub


def download(served: LoopbackHub, folder: Path) -> int:
    """Bytes that were told as arrived."""
    folder = folder / "files"
    arrived: list[int] = []
    Hub(served.url).download("org/model", served.commit("org/model", "main"), [FILE], folder, arrived.append)
    assert (folder / FILE.path).read_bytes() == DATA
    assert [path.name for path in folder.iterdir()] == [FILE.path]
    return sum(max(0, count) for count in arrived)


def test_parts_are_asked_for_in_parallel(served: LoopbackHub, tmp_path: Path) -> None:
    assert download(served, tmp_path) == len(DATA)
    asked = sorted(int(r.headers["Range"].removeprefix("bytes=").split("-")[0]) for r in served.matching("GET"))
    assert asked == list(range(0, len(DATA), PART))


def test_the_address_behind_a_redirect_is_used_again(served: LoopbackHub, tmp_path: Path) -> None:
    served.cdn = True
    assert download(served, tmp_path / "one") == len(DATA)
    assert served.count("GET", "*/resolve/*") <= 8, "only parts that started together asked the Hub itself"
    assert served.count("GET", "/cdn/*") == 11
    for request in served.matching("GET", "/cdn/*"):
        assert "Authorization" not in request.headers


def test_an_outdated_address_is_asked_for_again(
    served: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redundancy_trace.hub.transfer.PARALLEL_PARTS", 1)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    served.cdn = True
    for _ in range(2):
        served.fault("/cdn/*", status=403, method="GET")  # the first comes by redirect, and is refused as it is
    with pytest.raises(CheckpointError, match="403"):
        download(served, tmp_path)
    served.faults.clear()
    while [thread for thread in threading.enumerate() if thread.name.startswith("download")]:
        time.sleep(0.01)
    served.forget_requests()
    remote = Hub(served.url).remote_file("org/model", served.commit("org/model", "main"), FILE)
    assert b"".join(remote.chunks(0, 10)) == DATA[:10]
    served.fault("/cdn/*", status=403, method="GET")
    assert b"".join(remote.chunks(10, 30)) == DATA[10:30]
    assert b"".join(remote.chunks(30, 31)) == DATA[30:31]
    assert served.count("GET", "*/resolve/*") == 2
    assert served.count("GET", "/cdn/*") == 4
    for request in served.matching("GET", "/cdn/*"):
        assert "Authorization" not in request.headers, "the token is the Hub's alone"


@pytest.mark.parametrize("seed", range(5))
def test_cut_anywhere_nothing_is_fetched_twice(served: LoopbackHub, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(12):
        served.fault("*/model.safetensors", cut_at=chance.randrange(PART))
    served.fault("*/model.safetensors", status=503, body=b"not now", times=2)
    assert download(served, tmp_path) == len(DATA)
    sent = sum(body.sent for body in served.bodies if body.path.endswith(FILE.path))
    assert sent == len(DATA) + 2 * len(b"not now")


def test_a_server_that_ignores_ranges(served: LoopbackHub, tmp_path: Path) -> None:
    served.fault("*/model.safetensors", whole=True, cut_at=45_000, times=12)
    served.fault("*/model.safetensors", whole=True, times=99)
    assert download(served, tmp_path) == len(DATA), "what is there already is read over"


def test_a_file_of_another_length_is_told(served: LoopbackHub, tmp_path: Path) -> None:
    wrong = RepoFile(FILE.path, len(DATA) + 7, None)
    with pytest.raises(CheckpointError, match=r"is not what .* lists: it has 100,003 bytes there, 100,010 in the list"):
        Hub(served.url).download("org/model", served.commit("org/model", "main"), [wrong], tmp_path)


def test_a_slow_trickle_is_waited_for(served: LoopbackHub, tmp_path: Path) -> None:
    served.fault("*/model.safetensors", bytes_per_second=30_000, times=3)
    assert download(served, tmp_path) == len(DATA)


def test_a_stopped_download_goes_on_where_it_was(served: LoopbackHub, tmp_path: Path) -> None:
    stopped = threading.Event()
    arrived: list[int] = []

    def on_bytes(count: int) -> None:
        arrived.append(count)
        if sum(arrived) > 50_000:
            stopped.set()

    hub, commit = Hub(served.url), served.commit("org/model", "main")
    with pytest.raises(Exception):  # noqa: B017, PT011 - whichever thread notices first
        hub.download("org/model", commit, [FILE], tmp_path / "files", on_bytes, stopped)
    assert not (tmp_path / "files" / FILE.path).exists()
    rest = download(served, tmp_path)
    assert rest < len(DATA) - 40_000


def test_what_is_counted_is_there(tmp_path: Path, small_parts: None) -> None:
    """Chunks in any order of parts, the process gone after any of them."""
    chance = random.Random(1)
    target = tmp_path / FILE.path
    opened = ExitStack()
    while True:
        part_file = PartialFile(target, FILE)  # a process that was killed has closed nothing
        opened.callback(part_file.close)
        for _ in range(chance.randrange(1, 6)):
            open_parts = [p for p in part_file.parts if part_file.position(p) < part_file.stop(p)]
            if not open_parts:
                break
            part = chance.choice(open_parts)
            start = part_file.position(part)
            part_file.write(start, DATA[start : min(start + chance.randrange(1, 4000), part_file.stop(part))], part)
        if all(part_file.position(p) == part_file.stop(p) for p in part_file.parts):
            break
    assert part_file.is_right()
    part_file.finish()
    opened.close()
    assert target.read_bytes() == DATA


def test_what_is_left_of_another_file_is_not_gone_on_with(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def present(file: RepoFile, more: bytes = b"") -> int:
        """Bytes that are taken up, before `more` is written."""
        with closing(PartialFile(tmp_path / FILE.path, file)) as opened:
            found = opened.present()
            opened.write(0, more, 0)
            return found

    assert present(FILE, DATA[:500]) == 0
    assert present(FILE) == 500
    monkeypatch.setattr(partial, "PART_BYTES", PART * 2)
    assert present(FILE, DATA[:500]) == 0
    other = RepoFile(FILE.path, FILE.size, "0" * 64)
    assert present(other, DATA[:500]) == 0
    assert present(other) == 500
    (tmp_path / f"{FILE.path}.part").write_bytes(b"short")
    assert present(other) == 0


def test_an_empty_file(loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    loopback_hub.add_repo("org/empty", revisions={"main": {"config.json": b""}})
    hub = Hub(loopback_hub.url)
    commit = loopback_hub.commit("org/empty", "main")
    hub.download("org/empty", commit, hub.files("org/empty", commit), tmp_path)
    assert (tmp_path / "config.json").read_bytes() == b""


# Rate limits


def test_no_window_sees_more_requests_than_allowed() -> None:
    allowance = rate.Allowance(10, window=0.3)
    moments = []
    for _ in range(20):
        allowance.take()
        moments.append(time.monotonic())
    for first, ninth in zip(moments, moments[8:], strict=False):
        assert ninth - first >= 0.29, "80 % of 10 in each window"


def test_the_servers_headers_set_the_limit(loopback_hub: LoopbackHub) -> None:
    allowance = rate.allowance(loopback_hub.url, "api")
    loopback_hub.add_repo("org/model", revisions={"main": {}})
    headers = {"RateLimit": '"api";r=4;t=1', "RateLimit-Policy": '"fixed window";"api";q=5;w=1'}
    loopback_hub.fault("*/refs", status=503, headers=headers)
    hub = Hub(loopback_hub.url)
    start = time.monotonic()
    for _ in range(8):
        hub.refs("org/model")
    assert time.monotonic() - start >= 1, "4 of 5 in each second"
    allowance.observe(None, None, remaining=0, reset=-0.5)
    start = time.monotonic()
    allowance.take()
    assert time.monotonic() - start >= 0.4, "used up by others: waited for"


def test_huggingface_is_held_back_before_its_first_answer() -> None:
    assert rate.allowance("https://huggingface.co", "api")._limit == 500
    assert rate.allowance("https://hub.example", "api")._limit is None
    stopped = threading.Event()
    stopped.set()
    full = rate.Allowance(1, window=60)
    full.take()
    full.take(stopped)  # does not wait
