import errno
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub

from redundancy_trace.checkpoints import Checkpoint, list_checkpoints
from redundancy_trace.errors import CheckpointError
from redundancy_trace.fetching import Fetched, Room, discard, fetch, leave
from redundancy_trace.hub import Hub

FILES = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 100,
    "pytorch_model.bin": b"x" * 50_000,
    "optimizer.pt": b"y" * 50_000,
    "tokenizer.json": b"{}",
}
NEEDED = {"config.json", "generation_config.json", "model.safetensors"}


@pytest.fixture
def step(loopback_hub: LoopbackHub) -> Checkpoint:
    loopback_hub.add_repo("org/model", revisions={"main": {"README.md": b""}, "step5": FILES})
    found = list_checkpoints("org/model", "all", endpoint=loopback_hub.url).chosen[0]
    loopback_hub.forget_requests()
    return found


@pytest.fixture
def hub(loopback_hub: LoopbackHub) -> Hub:
    return Hub(loopback_hub.url)


@pytest.fixture
def into(tmp_path: Path, step: Checkpoint) -> Path:
    return tmp_path / "run" / ".fetched" / str(step.commit)


def content(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_fetches_what_is_needed_and_no_more(loopback_hub: LoopbackHub, step: Checkpoint, hub: Hub, into: Path) -> None:
    arrived: list[int] = []
    fetched = fetch("org/model", step, hub, into, arrived.append)
    assert fetched.temporary
    assert fetched.folder.is_relative_to(into)
    assert content(fetched.folder) == NEEDED
    assert (fetched.folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert fetched.bytes_moved == sum(arrived) == sum(len(FILES[name]) for name in NEEDED)
    paths = {request.path for request in loopback_hub.requests}
    assert paths == {f"/org/model/resolve/{step.commit}/{name}" for name in NEEDED}, "pinned to the commit"
    discard(fetched)
    assert not into.exists()
    discard(fetched)


def test_pinned_to_the_commit_when_the_branch_moves(
    loopback_hub: LoopbackHub, step: Checkpoint, hub: Hub, into: Path
) -> None:
    loopback_hub.set_revision("org/model", "step5", {"config.json": b"{}", "model.safetensors": b"other"})
    fetched = fetch("org/model", step, hub, into)
    assert (fetched.folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_users_cache_is_used_and_never_deleted_from(
    loopback_hub: LoopbackHub, step: Checkpoint, hub: Hub, into: Path, hub_cache: Path
) -> None:
    from huggingface_hub import snapshot_download

    snapshot = snapshot_download("org/model", revision="step5", endpoint=loopback_hub.url)
    before = sorted(hub_cache.rglob("*"))
    loopback_hub.forget_requests()
    fetched = fetch("org/model", step, hub, into)
    assert fetched == Fetched(Path(snapshot), temporary=False, bytes_moved=0)
    assert loopback_hub.count() == 0
    discard(fetched)
    assert sorted(hub_cache.rglob("*")) == before
    assert not into.exists()
    assert fetch("org/model", step, Hub(offline=True), into).folder == Path(snapshot)


def test_cache_that_is_not_whole_is_not_enough(
    loopback_hub: LoopbackHub, step: Checkpoint, hub: Hub, into: Path, hub_cache: Path
) -> None:
    hub.cached_file("org/model", "config.json", str(step.commit))
    fetched = fetch("org/model", step, hub, into)
    assert fetched.temporary
    assert content(fetched.folder) == NEEDED
    with pytest.raises(CheckpointError, match=r"step5 of org/model is not whole in the Hub cache.*--offline"):
        fetch("org/model", step, Hub(offline=True), into)


def test_local_folder_stays(tmp_path: Path, hub: Hub) -> None:
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    checkpoint = list_checkpoints(str(folder)).chosen[0]
    fetched = fetch(str(folder), checkpoint, hub, tmp_path / "into")
    assert fetched == Fetched(folder.resolve(), temporary=False, bytes_moved=0)
    discard(fetched)
    assert content(folder) == set(FILES)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-5 \(.*\) has no weights .* it holds: config.json"):
        fetch(str(folder), checkpoint, hub, tmp_path / "into")
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        fetch(str(folder), checkpoint, hub, tmp_path / "into")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"README.md": b""}, "step5 of org/other has no weights .* it holds: README.md"),
        (
            {"config.json": b"", "model-00001-of-00002.safetensors": b""},
            "model-00002-of-00002.safetensors is not there",
        ),
        ({"model.safetensors": b"x"}, "has weights, but no config.json"),
    ],
)
def test_checkpoints_without_what_is_needed(
    loopback_hub: LoopbackHub, hub: Hub, tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    loopback_hub.add_repo("org/other", revisions={"step5": files})
    checkpoint = list_checkpoints("org/other", "all", endpoint=loopback_hub.url).chosen[0]
    with pytest.raises(CheckpointError, match=message):
        fetch("org/other", checkpoint, hub, tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_files_are_asked_for_where_the_listing_has_none(
    loopback_hub: LoopbackHub, hub: Hub, tmp_path: Path, step: Checkpoint, into: Path
) -> None:
    bare = Checkpoint(name="step5", kind="branch", commit=step.commit)
    assert content(fetch("org/model", bare, hub, into).folder) == NEEDED
    gone = Checkpoint(name="step6", kind="branch", commit="0" * 40)
    with pytest.raises(CheckpointError, match="has no commit 0000"):
        fetch("org/model", gone, hub, tmp_path / "gone")


def test_code_of_the_repository_is_fetched_only_where_it_is_trusted(loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    files = FILES | {"modeling_own.py": b"pass", "scripts/other.py": b"pass"}
    loopback_hub.add_repo("org/own", revisions={"step5": files})
    own = list_checkpoints("org/own", "all", endpoint=loopback_hub.url).chosen[0]
    hub = Hub(loopback_hub.url)
    assert content(fetch("org/own", own, hub, tmp_path / "without").folder) == NEEDED
    assert content(fetch("org/own", own, hub, tmp_path / "with", code=True).folder) == NEEDED | {"modeling_own.py"}
    assert content(fetch("org/own", own, hub, tmp_path / "streamed", how="stream", code=True).folder) == {
        "config.json", "generation_config.json", "modeling_own.py"
    }  # fmt: skip


def test_fetch_under_faults(loopback_hub: LoopbackHub, step: Checkpoint, hub: Hub, into: Path) -> None:
    loopback_hub.fault("*/resolve/*", status=503, times=3, method="GET")
    loopback_hub.fault("*/model.safetensors", cut_at=10_000, method="GET")
    fetched = fetch("org/model", step, hub, into)
    for name in NEEDED:
        assert (fetched.folder / name).read_bytes() == FILES[name]


def test_failure_leaves_nothing(loopback_hub: LoopbackHub, step: Checkpoint, hub: Hub, into: Path) -> None:
    loopback_hub.fault("*/model.safetensors", status=404, error_code="EntryNotFound", times=9)
    with pytest.raises(CheckpointError, match=r"no such file: .*model.safetensors"):
        fetch("org/model", step, hub, into)
    assert not into.exists()
    loopback_hub.faults.clear()
    assert content(fetch("org/model", step, hub, into).folder) == NEEDED


def test_an_interrupted_download_is_gone_on_with(
    loopback_hub: LoopbackHub, step: Checkpoint, hub: Hub, into: Path
) -> None:
    loopback_hub.fault("*/model.safetensors", bytes_per_second=400_000)

    def interrupt(count: int) -> None:
        arrived.append(count)
        if sum(arrived) > 10_000:
            raise KeyboardInterrupt

    arrived: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        fetch("org/model", step, hub, into, interrupt)
    assert "model.safetensors.part" in content(into)
    again = fetch("org/model", step, hub, into)
    assert again.folder == into
    assert content(into) == NEEDED
    assert (into / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    whole = sum(len(FILES[name]) for name in NEEDED)
    assert whole <= again.bytes_moved + sum(arrived) <= whole + 4096, "nothing is moved twice but the last chunk"
    discard(again)
    assert not into.exists()


@pytest.mark.parametrize(("status", "told"), [(503, "answered 503"), (401, "hf auth login"), (403, "refuses access")])
def test_a_broken_connection_or_an_expired_token_leaves_what_has_arrived(
    loopback_hub: LoopbackHub, step: Checkpoint, hub: Hub, into: Path, status: int, told: str
) -> None:
    loopback_hub.fault("*/model.safetensors", cut_at=20_000)
    loopback_hub.fault("*/model.safetensors", status=status, times=99)
    with pytest.raises(CheckpointError, match=told):
        fetch("org/model", step, hub, into)
    loopback_hub.faults.clear()
    assert fetch("org/model", step, hub, into).bytes_moved <= len(FILES["model.safetensors"]) - 20_000


def test_wrong_content_is_fetched_again_once(loopback_hub: LoopbackHub, step: Checkpoint, hub: Hub, into: Path) -> None:
    loopback_hub.fault("*/model.safetensors", corrupt_at=77)
    loopback_hub.fault("*/config.json", corrupt_at=0)
    fetched = fetch("org/model", step, hub, into)
    for name in NEEDED:
        assert (fetched.folder / name).read_bytes() == FILES[name]
    discard(fetched)
    loopback_hub.fault("*/model.safetensors", corrupt_at=77, times=9)
    with pytest.raises(CheckpointError, match=r"model.safetensors of org/model arrived twice with another hash"):
        fetch("org/model", step, hub, into)
    assert not into.exists()


def test_a_subfolder_of_a_repository_of_its_own(loopback_hub: LoopbackHub, hub: Hub, tmp_path: Path) -> None:
    loopback_hub.add_repo("org/part", revisions={"main": {f"hf_ckpt/1B/{name}": data for name, data in FILES.items()}})
    commit = loopback_hub.commit("org/part", "main")
    checkpoint = Checkpoint(name="1B", kind="subfolder", commit=commit, repo="org/part", subfolder="hf_ckpt/1B")
    fetched = fetch("org/other", checkpoint, hub, tmp_path / "into")
    assert fetched.folder == tmp_path / "into" / "hf_ckpt" / "1B"
    assert content(fetched.folder) == NEEDED
    discard(fetched)
    assert not (tmp_path / "into").exists()


def test_room_is_waited_for_and_refused_before_the_first_byte(
    loopback_hub: LoopbackHub, step: Checkpoint, hub: Hub, into: Path
) -> None:
    size = sum(len(FILES[name]) for name in NEEDED)
    room = Room(size + 10)
    first = fetch("org/model", step, hub, into, room=room)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(fetch, "org/model", step, hub, into.with_name("next"), room=room)
        time.sleep(0.3)
        assert not second.done()
        discard(first)
        leave(second.result(10))
    loopback_hub.forget_requests()
    with pytest.raises(CheckpointError, match=rf"--disk-budget is {size + 10:,}, {size:,} are in use.*--fetch stream"):
        fetch("org/model", step, hub, into, room=room)
    assert loopback_hub.count() == 0
    assert not into.exists()


def test_no_space_is_told_before_the_first_byte(
    loopback_hub: LoopbackHub, step: Checkpoint, hub: Hub, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(CheckpointError, match=r"No space for step5: it needs 25,604 bytes, 1,000 are free .*--out"):
        fetch("org/model", step, hub, into)
    assert loopback_hub.count() == 0
    assert not into.exists()


def test_no_space_while_downloading(step: Checkpoint, hub: Hub, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("redundancy_trace.hub.partial.PartialFile.write", full)
    with pytest.raises(CheckpointError, match="No space for step5: it needs 25,604 bytes"):
        fetch("org/model", step, hub, into)
    assert not into.exists()


def test_unwritable_place(step: Checkpoint, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"step5 cannot be stored: .*file"):
        fetch("org/model", step, hub, tmp_path / "file" / "commit")


@pytest.mark.parametrize("length_off", [-1, 1])
def test_a_length_that_is_none(
    loopback_hub: LoopbackHub, step: Checkpoint, hub: Hub, into: Path, length_off: int
) -> None:
    loopback_hub.fault("*/model.safetensors", length_off=length_off, times=2)
    fetched = fetch("org/model", step, hub, into)
    assert (fetched.folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_what_a_killed_process_left_is_gone_on_with(
    loopback_hub: LoopbackHub, step: Checkpoint, hub: Hub, into: Path
) -> None:
    loopback_hub.fault("*/model.safetensors", bytes_per_second=20_000, times=9)
    code = (
        "import sys\nfrom pathlib import Path\nfrom redundancy_trace.checkpoints import Checkpoint\n"
        "from redundancy_trace.fetching import fetch\nfrom redundancy_trace.hub import Hub\n"
        f"step = Checkpoint(name='step5', kind='branch', commit={step.commit!r})\n"
        f"fetch('org/model', step, Hub({loopback_hub.url!r}), Path({str(into)!r}), lambda n: print(n, flush=True))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    moved = 0
    while moved < 9_000:
        moved += int(process.stdout.readline())
    mine = fetch("org/model", step, hub, into)
    assert mine.folder == into.with_name(f"{into.name}-2"), "a living process keeps its own"
    discard(mine)
    process.kill()
    process.communicate()
    loopback_hub.faults.clear()
    again = fetch("org/model", step, hub, into)
    assert again.folder == into
    assert content(into) == NEEDED
    assert again.bytes_moved <= len(FILES["model.safetensors"]) - 8_000
