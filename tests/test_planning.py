"""What a sweep tells before it starts, what it refuses, and how it keeps to its share of the disk."""

import itertools
import json

import pytest
from polars.testing import assert_frame_equal
from tiny_runs import PYDOC, STEPS, branches, leftovers, numbers, token_file, weights_asked

import redundancy_trace as rt
from redundancy_trace import cli
from redundancy_trace.checkpoints.ordering import endpoints_first
from redundancy_trace.errors import InputError
from redundancy_trace.settings import TraceSettings, parse_bytes
from redundancy_trace.sweep import pipeline, planning


@pytest.fixture
def served(loopback_hub, tiny_run):
    loopback_hub.add_repo("me/model", revisions=branches(tiny_run))
    return loopback_hub


@pytest.fixture
def size(tiny_run):
    """Bytes of one checkpoint's weights."""
    return (tiny_run / "checkpoint-0" / "model.safetensors").stat().st_size


def sweep(hub, out, *more):
    return cli.run(["--model", "me/model", "--endpoint", hub.url, "--out", str(out), *PYDOC, *more])


def test_a_dry_run_tells_and_does_nothing(served, size, tmp_path, capsys):
    assert sweep(served, tmp_path / "run", "--dry-run", "--revisions", "all") == 0
    moved, most = planning.amount(5 * size), planning.amount(3 * size)
    told = capsys.readouterr().out
    assert told.startswith(f"5 checkpoints, {moved} to move, at most {most} on disk at a time, about ")
    assert "/s as measured now." in told
    assert not (tmp_path / "run").exists()
    assert not weights_asked(served)
    assert sweep(served, tmp_path / "run", "--dry-run", "--json", "--revisions", "step0,step8", "--keep") == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {
        "run": str(tmp_path / "run"), "checkpoints": 2, "stored": 0, "bytes_to_move": 2 * size,
        "bytes_on_disk": 2 * size, "bytes_per_second": told["bytes_per_second"], "seconds": told["seconds"],
        "chosen": ["step0", "step8"],
    }  # fmt: skip
    listed = rt.trace("me/model", endpoint=served.url, revisions="all", dry_run=True, out=tmp_path / "run", quiet=True)
    assert listed.filter(chosen=True)["name"].to_list() == [f"step{step}" for step in STEPS]


def test_what_is_stored_or_cached_is_not_counted(served, size, tmp_path, no_figures, capsys, hub_cache):
    from huggingface_hub import snapshot_download

    out = tmp_path / "run"
    assert sweep(served, out, "--revisions", "step0,step1") == 0
    assert sweep(served, out, "--revisions", "all", "--dry-run") == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith(f"5 checkpoints (2 scored already), {planning.amount(3 * size)} to move")
    snapshot_download("me/model", revision="step2", endpoint=served.url)
    assert sweep(served, out, "--revisions", "all", "--dry-run", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["stored"], told["bytes_to_move"]) == (2, 2 * size)
    other = token_file(tmp_path / "other.npy")
    assert sweep(served, out, "--calibration", other, "--revisions", "step0", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["stored"] == 0, "another calibration is another number"


def test_the_rate_is_measured_where_it_matters(served, tmp_path, monkeypatch, capsys):
    served.fault("*/model.safetensors", bytes_per_second=200_000)
    assert sweep(served, tmp_path / "run", "--dry-run", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert 50_000 < told["bytes_per_second"] < 300_000
    assert told["seconds"] == pytest.approx(told["bytes_to_move"] / told["bytes_per_second"])
    assert sweep(served, tmp_path / "run", "--dry-run") == 0
    assert "B/s as measured now" in capsys.readouterr().out
    served.fault("*/model.safetensors", status=403, times=9)
    assert sweep(served, tmp_path / "run", "--dry-run") == 0, "that it cannot be had is told when its turn comes"


def test_very_many_bytes_must_be_meant(served, tmp_path, no_figures, monkeypatch, capsys):
    monkeypatch.setattr(planning, "BYTES_WITHOUT_YES", 1000)
    for selection in ("all", "0..8", "step*", "every:2", "log:2,all"):
        assert sweep(served, tmp_path / "run", "--revisions", selection) == 2
        told = capsys.readouterr().err
        assert f"--revisions {selection} is " in told
        assert "to move, at most" in told
        assert "--yes" in told
        assert not (tmp_path / "run").exists()
    assert not weights_asked(served)
    assert sweep(served, tmp_path / "run", "--revisions", "all", "--dry-run") == 0
    assert sweep(served, tmp_path / "run", "--revisions", "log:2") == 0, "a count has been meant"
    assert sweep(served, tmp_path / "run", "--revisions", "step0,step1") == 0, "so have names"
    assert sweep(served, tmp_path / "run", "--revisions", "all", "--yes") == 0


def test_the_share_of_the_disk_is_kept(served, size, tmp_path, no_figures, capsys, monkeypatch):
    most = 0
    begin = pipeline.fetch

    def watched(*given, **more):
        nonlocal most
        found = begin(*given, **more)
        most = max(most, sum(path.stat().st_size for path in (tmp_path / "one").rglob("model.safetensors")))
        return found

    monkeypatch.setattr(pipeline, "fetch", watched)
    assert sweep(served, tmp_path / "none", "--disk-budget", "1kB", "--fetch", "file") == 2
    told = capsys.readouterr().err
    assert f"--disk-budget 1kB is less than step0 takes ({size:,} bytes)" in told
    assert "--fetch stream" in told
    assert not (tmp_path / "none").exists()
    assert not weights_asked(served)
    assert sweep(served, tmp_path / "one", "--disk-budget", f"{size * 3 // 2}", "--fetch", "file") == 0
    assert most == size, "two never lay there together"
    assert sweep(served, tmp_path / "streamed", "--disk-budget", "1kB") == 0, "what does not fit is streamed"
    one, streamed = (numbers(rt.read_scores(tmp_path / name)) for name in ("one", "streamed"))
    assert_frame_equal(one, streamed, check_exact=True)


def test_a_streamed_sweep_stores_no_weights(served, size, tmp_path, no_figures):
    assert sweep(served, tmp_path / "files", "--fetch", "file") == 0
    served.forget_requests()
    served.fault("*/model.safetensors", cut_at=3000, times=4)
    served.fault("*/model.safetensors", status=503, times=2)
    assert sweep(served, tmp_path / "run", "--fetch", "stream") == 0
    assert all("Range" in request.headers for request in served.matching("GET", "*/model.safetensors"))
    assert not leftovers(tmp_path / "run")
    assert_frame_equal(
        numbers(rt.read_scores(tmp_path / "files")), numbers(rt.read_scores(tmp_path / "run")), check_exact=True
    )


def test_a_streamed_checkpoint_that_is_broken_fails_alone(served, tiny_run, tmp_path, no_figures, capsys):
    broken = branches(tiny_run)["step2"] | {"model.safetensors": b"no weights at all" * 10}
    served.set_revision("me/model", "step2", broken)
    assert sweep(served, tmp_path / "run", "--fetch", "stream") == 1
    assert "step2: not scored: model.safetensors is no safetensors file" in capsys.readouterr().err
    assert rt.read_scores(tmp_path / "run")["step"].n_unique() == 4
    assert not leftovers(tmp_path / "run")


def test_the_ends_come_first(served, tmp_path, no_figures, capsys):
    assert sweep(served, tmp_path / "run") == 0
    told = [line.split()[1] for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    assert told == ["step0", "step8", "step2", "step1", "step4"]


@pytest.mark.parametrize("count", range(1, 40))
def test_every_beginning_is_spread_over_the_whole(count):
    order = endpoints_first(count)
    assert sorted(order) == list(range(count))
    for length in range(2, count):
        chosen = sorted(order[:length])
        gaps = [b - a for a, b in itertools.pairwise(chosen)]
        assert max(gaps) <= 4 * min(gaps) + 2


def test_settings_that_contradict_each_other():
    for given, told in (
        ({"fetch": "stream", "engine": "whole"}, "--engine whole needs the files"),
        ({"fetch": "stream", "keep": True}, "nothing to --keep"),
        ({"fetch": "disk"}, "--fetch is 'disk'; known: auto, file, stream"),
        ({"disk_budget": "much"}, "'much' is no number of bytes; write it like 100GB"),
        ({"disk_budget": "0"}, "'0' is no number of bytes"),
    ):
        with pytest.raises(InputError, match=told):
            TraceSettings(model="me/model", **given)


def test_bytes_as_people_write_them():
    assert [parse_bytes(text) for text in ("5", "5b", "2 kB", "1.5MB", "3GiB", "0.5T")] == [
        5, 5, 2000, 1_500_000, 3 * 2**30, 500_000_000_000
    ]  # fmt: skip


def test_sizes_and_times_for_people():
    assert [planning.amount(n) for n in (0, 1500, 15_400_000_000_000)] == ["0 bytes", "1.5 kB", "15.4 TB"]
    plan = planning.SweepPlan(558, 0, 15_400_000_000_000, 55_200_000_000, 125_000_000.0)
    moved = "558 checkpoints, 15.4 TB to move, at most 55.2 GB on disk at a time"
    assert plan.told() == f"{moved}, about 34 hours at 125 MB/s as measured now."
