"""Checkpoints scored in several processes and on several nodes, some of which die: the table is the undisturbed one."""

import os
import signal
import sys
import threading
import time

import pytest
from polars.testing import assert_frame_equal
from tiny_runs import PYDOC, STEPS, Sweeps, branches, leftovers, numbers, weights_asked

import redundancy_trace as rt
from redundancy_trace import cli
from redundancy_trace.cluster import Watch, devices
from redundancy_trace.cluster.workers import _Process
from redundancy_trace.errors import InputError
from redundancy_trace.locking import alone_in
from redundancy_trace.settings import TraceSettings
from redundancy_trace.store import read_scores
from redundancy_trace.sweep.tasks import share_of

pytestmark = pytest.mark.usefixtures("one_thread", "no_figures")
SHAPE = {"calibration": "pydoc", "samples": 4, "sequence_length": 32}


@pytest.fixture
def served(loopback_hub, tiny_run):
    loopback_hub.add_repo("me/model", revisions=branches(tiny_run))
    return ["--model", "me/model", "--revisions", "all", "--endpoint", loopback_hub.url, *PYDOC]


@pytest.fixture
def killing(monkeypatch):
    """Kills workers in the middle of checkpoints: name -> how often; returns the places' devices in turn."""
    real = _Process.score
    wanted: dict[str, int] = {}

    def score(process, job, watch):
        def kill(*step):
            watch.on_step(*step)
            if wanted.get(job.name, 0):
                wanted[job.name] -= 1
                os.kill(process._process.pid, signal.SIGKILL)

        return real(process, job, Watch(kill, watch.on_bytes, watch.stopped))

    monkeypatch.setattr(_Process, "score", score)
    return wanted


# Shards


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("size", [0, 1, 5, 13])
def test_shares_are_apart_and_together_the_whole(size, count):
    shares = [share_of(range(size), f"{i}/{count}") for i in range(1, count + 1)]
    assert sorted(one for share in shares for one in share) == list(range(size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(share == sorted(share) for share in shares)


def test_two_shards_on_one_run_at_once(loopback_hub, served, tiny_run, undisturbed, tmp_path):
    out = tmp_path / "run"
    sweeps = Sweeps(tiny_run)
    try:
        started = [
            sweeps.start(*served, "--out", str(out), "--shard", f"{i}/2", told=tmp_path / f"told-{i}") for i in (1, 2)
        ]
        assert [sweeps.wait(pid) for pid in started] == [0, 0]
        asked = len(weights_asked(loopback_hub))
        parts = sorted((out / "scores").iterdir())
        for part in parts:
            part.rename(tmp_path / part.name)
        with alone_in(out / "figures"):  # as another shard that is drawing
            waits = sweeps.start(*served, "--out", str(out), "--shard", "2/2", told=tmp_path / "told-late")
            while len(list((out / "scores").glob("*.parquet"))) < 2:
                time.sleep(0.02)
            assert sweeps.waited(waits, 0.5) is None
            for part in parts:
                (tmp_path / part.name).rename(part)
        assert sweeps.wait(waits) == 0
    finally:
        sweeps.close()
    assert_frame_equal(numbers(read_scores(out)), numbers(undisturbed))
    assert asked == len(STEPS), "each is fetched once, by one of them"
    assert not leftovers(out)
    told = [(tmp_path / f"told-{i}").read_text() for i in (1, 2)]
    assert "3 checkpoints in shard 1/2" in told[0]
    assert "2 checkpoints in shard 2/2" in told[1]
    assert any(f"stored so far: {len(STEPS)} of {len(STEPS)}" in one for one in told)
    told_late = (tmp_path / "told-late").read_text()
    assert f"stored so far: {len(STEPS)} of {len(STEPS)}" in told_late, "counted when its turn to draw has come"


def test_a_shard_without_a_checkpoint_gives_an_empty_table(tiny_run, tmp_path):
    scores = rt.trace(tiny_run, revisions="checkpoint-8", out=tmp_path / "run", shard="2/2", quiet=True, **SHAPE)
    assert scores.is_empty()
    scores = rt.trace(tiny_run, revisions="checkpoint-8", out=tmp_path / "run", shard="1/2", quiet=True, **SHAPE)
    assert scores["revision"].unique().to_list() == ["checkpoint-8"]


@pytest.mark.parametrize("shard", ["3/2", "0/2", "1/0", "1", "a/b", "-1/2", ""])
def test_a_shard_that_is_none_is_refused(shard, capsys):
    assert cli.run(["--model", "me/model", "--shard", shard]) == 2
    assert "write --shard 1/4" in capsys.readouterr().err


# Workers


def test_a_worker_that_is_killed_in_the_middle_and_one_checkpoint_that_kills_each(
    tiny_run, undisturbed, tmp_path, killing, capsys
):
    killing |= {"checkpoint-1": 1, "checkpoint-4": 2}
    given = ["--model", str(tiny_run), "--out", str(tmp_path / "run"), *PYDOC]
    assert cli.run([*given, "--devices", "cpu,cpu"]) == 1
    told = capsys.readouterr().err
    assert "The worker on cpu was ended by SIGKILL (out of memory?); checkpoint-1 is tried once more." in told
    assert (
        "checkpoint-4: not scored: The worker on cpu was ended by SIGKILL (out of memory?), the second to die" in told
    )
    stored = read_scores(tmp_path / "run")
    assert_frame_equal(numbers(stored), numbers(undisturbed.filter(undisturbed["step"] != 4)))
    assert cli.run([*given, "--quiet"]) == 0, "one process goes on where several were"
    stored = read_scores(tmp_path / "run")
    assert_frame_equal(numbers(stored), numbers(undisturbed))
    assert set(stored["identity"]) == set(undisturbed["identity"])


def test_workers_share_one_download_a_checkpoint(loopback_hub, served, undisturbed, tmp_path):
    """From Python, with two calibrations; what fits no checkpoint is told as such."""
    given = {"revisions": "all", "endpoint": loopback_hub.url, "devices": "cpu,cpu", "quiet": True}
    out = tmp_path / "run"
    scores = rt.trace("me/model", out=out, **given, **(SHAPE | {"samples": (4, 2)}))
    first = scores.filter(scores["calibration"] == "pydoc 4x32")
    assert_frame_equal(numbers(first), numbers(undisturbed))
    assert scores["calibration"].n_unique() == 2
    assert len(weights_asked(loopback_hub)) == len(STEPS)
    assert not leftovers(out)


def test_devices_that_are_not_there_are_refused(capsys, tiny_run, tmp_path, monkeypatch):
    def told(*given):
        assert cli.run(["--model", str(tiny_run), "--out", str(tmp_path / "run"), *given]) == 2
        return capsys.readouterr().err

    assert "--devices cuda:99: this machine has" in told("--devices", "cuda:99,cuda:98")
    assert "--devices 'abc' is no device" in told("--devices", "abc,cpu")
    assert "write their names, such as cuda:0,cuda:1" in told("--devices", "0,1")
    assert "leave out --device" in told("--devices", "cpu,cpu", "--device", "cpu")
    assert not (tmp_path / "run").exists()
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="this machine has none"):
        devices.named_devices("auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.named_devices("auto") == ("cuda:0", "cuda:1")
    with pytest.raises(InputError, match="are of one kind"):
        devices.named_devices("cpu,cuda:1")


# Ray


def test_clusters_that_are_none_are_refused(capsys, tiny_run, tmp_path, monkeypatch):
    given = ["--model", str(tiny_run), "--out", str(tmp_path / "run"), "--cluster"]
    for cluster, told in (
        ("slurm", "known: ray, ray:ADDRESS"),
        ("ray:", "known: ray, ray:ADDRESS"),
        ("ray:127.0.0.1:1", "no Ray cluster is reached there"),
        ("ray:nowhere", "it is no HOST:PORT"),
    ):
        assert cli.run([*given, cluster]) == 2
        assert told in capsys.readouterr().err
    with pytest.raises(InputError, match="leave out --devices"):
        TraceSettings(model="me/model", cluster="ray", devices="cpu,cpu")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.run([*given, "ray"]) == 2
    assert "pip install 'redundancy-trace[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def two_nodes(monkeypatch):
    """A Ray cluster of two nodes with a core each, on this machine; the second may be removed."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **memory})
    cluster.second = cluster.add_node(num_cpus=1, **memory)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_node_that_dies_in_the_middle_takes_no_checkpoint_with_it(
    two_nodes, loopback_hub, served, undisturbed, tmp_path
):
    """Weights are read from the server by the nodes, slowly, so that both are in the middle when one is killed."""
    loopback_hub.bytes_per_second = 60_000
    cut, asked = [], []

    def kill_in_the_middle():
        def at_work():
            return {body.path for body in loopback_hub.bodies if body.ended is None and "safetensors" in body.path}

        deadline = time.monotonic() + 60
        while len(at_work()) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        cut.extend(at_work())
        asked.append(len(loopback_hub.requests))
        two_nodes.remove_node(two_nodes.second, allow_graceful=False)
        loopback_hub.bytes_per_second = None

    killer = threading.Thread(target=kill_in_the_middle)
    killer.start()
    out = tmp_path / "run"
    scores = rt.trace(
        "me/model", revisions="all", endpoint=loopback_hub.url, out=out, fetch="stream",
        cluster=f"ray:{two_nodes.address}", quiet=True, **SHAPE,
    )  # fmt: skip
    killer.join()
    assert len(cut) == 2
    assert_frame_equal(numbers(scores), numbers(undisturbed))
    begun = [
        one.path for one in loopback_hub.requests[asked[0] :] if one.headers.get("Range", "").startswith("bytes=0-")
    ]
    assert set(begun) & set(cut), "one of the two was begun anew"
    assert not leftovers(out)
