import json
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from loopback_hub import EXPIRED_TOKEN, STRANGERS_TOKEN, LoopbackHub

from redundancy_trace.errors import CheckpointError, InputError
from redundancy_trace.hub import Hub, RepoFile, failures

WEIGHTS = bytes(range(256)) * 200
WEIGHT_FILE = RepoFile("model.safetensors", len(WEIGHTS), None)
FILES = {"config.json": b'{"a": 1}', "model.safetensors": WEIGHTS, "original/params.json": b"{}"}


@pytest.fixture
def served(loopback_hub: LoopbackHub) -> LoopbackHub:
    loopback_hub.add_repo(
        "org/model",
        revisions={"main": {"README.md": b"hello"}, "step0": FILES, "step1000": FILES | {"config.json": b"{}"}},
        tags={"v1": "step0"},
        converts={"parquet": {"x": b"y"}},
    )
    return loopback_hub


def test_refs_carry_branches_tags_and_converts(served: LoopbackHub) -> None:
    refs = Hub(served.url).refs("org/model")
    assert [(ref.name, ref.kind) for ref in refs] == [
        ("main", "branch"),
        ("step0", "branch"),
        ("step1000", "branch"),
        ("v1", "tag"),
        ("refs/convert/parquet", "other"),
    ]
    assert refs[1].commit == refs[3].commit == served.commit("org/model", "step0")
    assert served.count() == 1


def test_endpoint_comes_from_the_variable(served: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", served.url + "/")
    assert len(Hub().refs("org/model")) == 5


def test_token_is_sent(loopback_hub: LoopbackHub) -> None:
    loopback_hub.add_repo("org/secret", revisions={"main": FILES}, private=True)
    assert Hub(loopback_hub.url, token="hf_x").resolve("org/secret", "main")
    assert loopback_hub.requests[0].headers["authorization"] == "Bearer hf_x"


def test_files_follow_the_pages(served: LoopbackHub) -> None:
    served.page_size = 2
    hub = Hub(served.url)
    files = hub.files("org/model", hub.resolve("org/model", "step0"))
    assert {file.path: file.size for file in files} == {path: len(data) for path, data in FILES.items()}
    hashed = {file.path for file in files if file.sha256}
    assert hashed == {"model.safetensors"}
    assert served.count("GET", "*/tree/*") == 2


@pytest.mark.parametrize("cdn", [False, True])
def test_download_keeps_paths_and_counts_bytes(served: LoopbackHub, tmp_path: Path, *, cdn: bool) -> None:
    served.cdn = cdn
    hub = Hub(served.url)
    arrived: list[int] = []
    commit = served.commit("org/model", "step0")
    hub.download("org/model", commit, hub.files("org/model", commit), tmp_path, arrived.append)
    for path, data in FILES.items():
        assert (tmp_path / path).read_bytes() == data
    assert sum(arrived) == sum(map(len, FILES.values()))
    files = hub.files("org/model", commit)
    served.forget_requests()
    hub.download("org/model", commit, files, tmp_path, arrived.append)
    assert served.count() == 0, "what is there at that commit is not asked for again"


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("call", ["refs", "tree", "revision"])
def test_listing_calls_are_tried_again(served: LoopbackHub, call: str, status: int) -> None:
    commit = served.commit("org/model", "step0")
    hub = Hub(served.url)
    calls = {
        "refs": lambda: hub.refs("org/model"),
        "tree": lambda: hub.files("org/model", commit),
        "revision": lambda: hub.resolve("org/model", "step0"),
    }
    undisturbed = calls[call]()
    served.fault(f"*/{call}*", status=status, times=3)
    assert calls[call]() == undisturbed
    assert served.count("GET", f"*/{call}*") == 5


def test_retry_after_is_kept(served: LoopbackHub) -> None:
    served.fault("*/refs", status=429, retry_after=1)
    start = time.monotonic()
    Hub(served.url).refs("org/model")
    assert 1.0 <= time.monotonic() - start < 3.0


def test_retry_after_may_be_a_date_or_a_rate_limit(served: LoopbackHub) -> None:
    moment = datetime.now(UTC) + timedelta(seconds=1)
    served.fault("*/refs", status=503, headers={"Retry-After": format_datetime(moment, usegmt=True)})
    served.fault("*/refs", status=429, headers={"RateLimit": '"api";r=0;t=0'})
    start = time.monotonic()
    Hub(served.url).refs("org/model")
    assert 1.0 <= time.monotonic() - start < 5.0


def test_rate_limit_used_up_is_told(served: LoopbackHub) -> None:
    served.fault("*/refs", status=429, retry_after=3000, times=9)
    with pytest.raises(InputError, match=r"rate limit .* used up \(429\). Try again in 3000 s"):
        Hub(served.url).refs("org/model")
    assert served.count() == 1, "nobody waits an hour"


def test_lasting_server_error_is_told(served: LoopbackHub, tmp_path: Path) -> None:
    served.fault("*", status=503, times=100)
    with pytest.raises(InputError, match="answered 503 for org/model; try again later"):
        Hub(served.url).refs("org/model")
    assert served.count() == failures.RETRY_ATTEMPTS


def test_unknown_repository(loopback_hub: LoopbackHub) -> None:
    with pytest.raises(
        InputError, match=r"org/nope was not found .*HF_TOKEN\. There is no folder org/nope here either"
    ):
        Hub(loopback_hub.url).refs("org/nope")


def test_unknown_repository_may_be_a_mistyped_folder(
    loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "my-run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name, meant in (("rnus", "./runs"), ("runs/my-rum", "./runs/my-run")):
        with pytest.raises(InputError, match=f"no folder {name} here either; did you mean {meant}\\?"):
            Hub(loopback_hub.url).refs(name)
    with pytest.raises(InputError, match="was not found") as told:
        Hub(loopback_hub.url).refs("org/text", "dataset")
    assert "folder" not in str(told.value)


def test_private_repository_looks_unknown_to_strangers(loopback_hub: LoopbackHub) -> None:
    loopback_hub.add_repo("org/secret", revisions={"main": FILES}, private=True)
    for name in ("org/secret", "org/nope"):
        with pytest.raises(InputError, match=f"{name} was not found .* none of that name, or it is private.*log in"):
            Hub(loopback_hub.url).refs(name)
        with pytest.raises(InputError, match=f"{name} was not found .* your token has no right to it"):
            Hub(loopback_hub.url, STRANGERS_TOKEN).refs(name)
        with pytest.raises(InputError, match=r"does not accept your token \(401\): it has expired"):
            Hub(loopback_hub.url, EXPIRED_TOKEN).refs(name)
    assert Hub(loopback_hub.url, "hf_owner").refs("org/secret")


def test_a_repository_that_was_renamed(served: LoopbackHub) -> None:
    refs = Hub(served.url).refs("org/model")
    assert Hub(served.url).refs_and_name("org/model") == (refs, "org/model")
    served.rename("old-org/old", "org/model")
    assert Hub(served.url).refs_and_name("old-org/old") == (refs, "org/model")


def test_bare_401_is_told_like_an_unknown_repository(served: LoopbackHub) -> None:
    served.fault("*/refs", status=401)
    with pytest.raises(InputError, match="hf auth login"):
        Hub(served.url).refs("org/model")


def test_unknown_revision_names_the_nearest(served: LoopbackHub) -> None:
    with pytest.raises(InputError, match=r"no revision 'step100'; nearest of its 5: step1000"):
        Hub(served.url).resolve("org/model", "step100")
    with pytest.raises(InputError, match="no commit 0000000"):
        Hub(served.url).files("org/model", "0" * 40)


def test_gated_repository(loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    loopback_hub.add_repo("org/gated", revisions={"main": FILES}, gated=True)
    hub = Hub(loopback_hub.url)
    commit = hub.refs("org/gated")[0].commit
    with pytest.raises(CheckpointError, match=r"org/gated is gated: accept its conditions at http.*/org/gated"):
        hub.download("org/gated", commit, [RepoFile("config.json", 2, None)], tmp_path)
    assert loopback_hub.count("GET", "*/resolve/*") == 1, "not tried again"


def test_forbidden(served: LoopbackHub) -> None:
    served.fault("*/refs", status=403)
    with pytest.raises(InputError, match=r"refuses access to org/model \(403\)"):
        Hub(served.url).refs("org/model")


def test_missing_file_is_named(served: LoopbackHub, tmp_path: Path) -> None:
    commit = served.commit("org/model", "step0")
    with pytest.raises(CheckpointError, match=r"no such file: http.*/nope.json"):
        Hub(served.url).download("org/model", commit, [RepoFile("nope.json", 2, None)], tmp_path)


def test_unreachable_endpoint() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(failures, "RETRY_BASE_SECONDS", 0.01)
        with pytest.raises(InputError, match=r"Cannot reach http://127.0.0.1:9 .*--endpoint.*--offline"):
            Hub("http://127.0.0.1:9").refs("org/model")


@pytest.mark.parametrize("endpoint", ["huggingface.co", "ftp://x", "http://"])
def test_endpoint_that_is_no_address(endpoint: str) -> None:
    with pytest.raises(InputError, match="is no address"):
        Hub(endpoint)


def test_repository_name_that_is_none() -> None:
    with pytest.raises(InputError, match="no repository name"):
        Hub("http://127.0.0.1:9").refs("a/b/c")


@pytest.mark.parametrize("body", [b"<html>log in</html>", b"[]", b'{"branches": [1]}'])
def test_answer_that_is_not_the_hubs(served: LoopbackHub, body: bytes) -> None:
    served.fault("*/refs", body=body)
    with pytest.raises(InputError, match="does not answer as a Hub does"):
        Hub(served.url).refs("org/model")


@pytest.mark.parametrize("fault", [{"length_off": -5}, {"corrupt_at": 40}], ids=["short", "damaged"])
def test_json_that_was_damaged_on_the_way_is_asked_for_again(served: LoopbackHub, fault: dict[str, int]) -> None:
    served.fault("*/refs", times=2, **fault)
    assert len(Hub(served.url).refs("org/model")) == 5
    assert served.count("GET", "*/refs") == 3
    served.fault("*/refs", times=99, **fault)
    with pytest.raises(InputError, match="broke off"):
        Hub(served.url).refs("org/model")


def test_a_small_file_that_was_damaged_on_the_way_does_not_stay_in_the_cache(served: LoopbackHub) -> None:
    hub = Hub(served.url)
    served.fault("*/config.json", method="GET", corrupt_at=3)
    assert hub.cached_file("org/model", "config.json", "step0").read_bytes() == FILES["config.json"]
    served.fault("*/config.json", method="GET", corrupt_at=1, times=2)
    with pytest.raises(InputError, match=r"config\.json of org/model arrived twice with another hash"):
        hub.cached_file("org/model", "config.json", "step1000")
    assert hub.cached_file("org/model", "config.json", "step1000").read_bytes() == b"{}"


def test_on_bytes_can_end_a_download(served: LoopbackHub, tmp_path: Path) -> None:
    def stop(count: int) -> None:
        raise KeyboardInterrupt

    commit = served.commit("org/model", "step0")
    with pytest.raises(KeyboardInterrupt):
        Hub(served.url).download("org/model", commit, [WEIGHT_FILE], tmp_path, stop)
    assert not (tmp_path / "model.safetensors").exists()


def test_one_failed_file_ends_the_others_at_once(served: LoopbackHub, tmp_path: Path) -> None:
    served.fault("*/model.safetensors", status=503, retry_after=60, method="GET", times=9)
    served.fault("*/config.json", status=404, error_code="EntryNotFound", method="GET", times=9)
    start = time.monotonic()
    with pytest.raises(CheckpointError):
        Hub(served.url).download(
            "org/model", served.commit("org/model", "step0"), [RepoFile("config.json", 2, None), WEIGHT_FILE], tmp_path
        )
    assert time.monotonic() - start < 5
    while [thread for thread in threading.enumerate() if thread.name.startswith("download")]:
        assert time.monotonic() - start < 5


def test_parallel_files(loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    files = {f"part-{number}.bin": bytes([number]) * 5000 for number in range(20)}
    loopback_hub.add_repo("org/many", revisions={"main": files})
    lock = threading.Lock()

    def on_bytes(count: int) -> None:
        assert lock.acquire(blocking=False), "never by two threads at once"
        time.sleep(0.001)
        lock.release()

    hub = Hub(loopback_hub.url)
    commit = hub.resolve("org/many", "main")
    hub.download("org/many", commit, hub.files("org/many", commit), tmp_path, on_bytes)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.bin")} == files


def test_dataset_files(loopback_hub: LoopbackHub, hub_cache: Path) -> None:
    lines = b"\n".join(json.dumps({"text": f"line {number}"}).encode() for number in range(9))
    loopback_hub.add_repo("org/data", revisions={"main": {"en/part-0.json": lines}}, kind="dataset")
    hub = Hub(loopback_hub.url)
    assert [file.path for file in hub.dataset_files("org/data")] == ["en/part-0.json"]
    loopback_hub.fault("*/resolve/*", status=503, times=1, method="GET")
    path = hub.dataset_file("org/data", "en/part-0.json")
    assert path.read_bytes() == lines
    assert path.is_relative_to(hub_cache)
    loopback_hub.forget_requests()
    assert hub.dataset_file("org/data", "en/part-0.json") == path
    assert loopback_hub.count(pattern="*/resolve/*") == 0
    assert (
        Hub(offline=True).dataset_file(
            "org/data", "en/part-0.json", loopback_hub.commit("org/data", "main", kind="dataset")
        )
        == path
    )
    with pytest.raises(InputError, match="no such file"):
        hub.dataset_file("org/data", "en/part-1.json")


def test_cached_needs_every_file(served: LoopbackHub, hub_cache: Path) -> None:
    hub = Hub(served.url)
    commit = served.commit("org/model", "step0")
    assert hub.cached("org/model", commit, ["config.json"]) is None
    for path in ("config.json", "original/params.json"):
        hub.cached_file("org/model", path, "step0")
    snapshot = hub.cached("org/model", commit, ["config.json", "original/params.json"])
    assert snapshot == hub_cache / "models--org--model" / "snapshots" / commit
    assert hub.cached("org/model", commit, ["config.json", "model.safetensors"]) is None


def test_offline_sees_the_cache_only(served: LoopbackHub, hub_cache: Path, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download("org/model", revision="step0", endpoint=served.url)
    served.forget_requests()
    hub = Hub(served.url, offline=True)
    commit = served.commit("org/model", "step0")
    assert [(ref.name, ref.commit) for ref in hub.refs("org/model")] == [("step0", commit)]
    assert hub.resolve("org/model", "step0") == hub.resolve("org/model", commit) == commit
    files = {file.path: file for file in hub.files("org/model", commit)}
    assert set(files) == set(FILES)
    assert files["model.safetensors"].sha256
    assert files["config.json"].sha256 is None
    with pytest.raises(InputError, match=r"no revision 'step1' in the Hub cache \(there: step0\)"):
        hub.resolve("org/model", "step1")
    with pytest.raises(InputError, match=r"org/other is not in the Hub cache .*--offline"):
        hub.refs("org/other")
    with pytest.raises(CheckpointError, match="Leave out --offline"):
        hub.download("org/model", commit, [RepoFile("x", 1, None)], tmp_path)
    with pytest.raises(InputError, match="leave out --offline"):
        hub.cached_file("org/model", "nope.txt", commit)
    assert served.count() == 0


def test_offline_by_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert Hub().is_offline
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert not Hub().is_offline


def test_import_is_lazy() -> None:
    import subprocess
    import sys

    code = (
        "import sys, redundancy_trace.fetching; "
        "print([m for m in ('huggingface_hub', 'torch', 'polars', 'transformers', 'httpx2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
