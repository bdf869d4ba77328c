"""The order of the work: what is asked of the Hub, what is scored again and what is not, what a fault leaves."""

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from safetensors.torch import load_file, save
from tiny_runs import (
    PYDOC,
    SHAPE,
    STEPS,
    Sweeps,
    branches,
    c4,
    checkpoint_files,
    leftovers,
    numbers,
    token_file,
    weights_asked,
)

import redundancy_trace as rt
from redundancy_trace import cli, engine, sweep
from redundancy_trace.calibration import token_hash
from redundancy_trace.errors import CheckpointError, InputError
from redundancy_trace.store import read_distances, read_failures, read_run


@pytest.fixture
def scored(monkeypatch):
    """Names of the folders that the engine has been given."""
    real, names = engine.score_checkpoint, []

    def watched(folder, *args, **kwargs):
        names.append(folder.name)
        return real(folder, *args, **kwargs)

    monkeypatch.setattr(engine, "score_checkpoint", watched)
    return names


@pytest.fixture
def copied(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "tiny-run")


@pytest.fixture(scope="module")
def sweeps(tiny_run):
    processes = Sweeps(tiny_run)
    yield processes
    processes.close()


def sweep_hub(hub, out, *more):
    return cli.run(["--model", "me/model", "--revisions", "all", "--endpoint", hub.url, "--out", str(out), *more])


# Over HTTP


def test_a_hub_model_with_no_more_than_its_name(loopback_hub, tiny_run, tmp_path, no_figures):
    """c4 is the default, the tokenizer that of `main`, as the branches have none; everything is pinned."""
    hub = loopback_hub
    hub.add_repo("me/model", revisions=branches(tiny_run))
    hub.add_repo("allenai/c4", revisions={"main": c4()}, kind="dataset")
    out = tmp_path / "run"
    assert sweep_hub(hub, out, "--quiet", *SHAPE) == 0
    scores = rt.read_scores(out)
    assert set(scores["calibration"]) == {"c4 4x32"}
    assert set(scores["model"]) == {"me/model"}
    commits = dict(scores.select("revision", "commit").unique().rows())
    assert commits == {f"step{step}": hub.commit("me/model", f"step{step}") for step in STEPS}
    ids = np.load(out / "token_ids.npy")
    for step in STEPS:
        one = rt.score_model(tiny_run / f"checkpoint-{step}", ids)
        stored = scores.filter(step=step)
        columns = ["layer", "component", "metric", "value", "stderr", "n_sequences", "n_tokens"]
        assert_frame_equal(stored.select(columns), one.select(columns), check_row_order=False, check_exact=True)

    paths = [request.path for request in hub.matching("GET", "*/resolve/*")]
    assert all(re.search(r"/resolve/[0-9a-f]{40}/", path) for path in paths), "by commit, never by name"
    assert sorted(weights_asked(hub)) == sorted(
        f"/me/model/resolve/{commit}/model.safetensors" for commit in commits.values()
    )
    assert not [path for path in paths if path.endswith(".bin")], "no optimizer states, no arguments of the training"
    assert {path.name for path in out.iterdir()} == {
        "listing.json", "settings.json", "token_ids.npy", "token_ids.json", "scores", "distances"
    }  # fmt: skip
    names = {path.name for path in (out / "scores").iterdir()}
    assert names == {path.name for path in (out / "distances").iterdir()}
    assert names == {
        f"{commit[:12]}-{identity[:12]}.parquet"
        for commit, identity in scores.select("commit", "identity").unique().rows()
    }
    listing = json.loads((out / "listing.json").read_text())
    by_name = {row["name"]: row for row in listing["checkpoints"]}
    weights = next(file for file in by_name["step8"]["files"] if file["path"] == "model.safetensors")
    assert weights["sha256"] == hashlib.sha256((tiny_run / "checkpoint-8/model.safetensors").read_bytes()).hexdigest()
    kept = json.loads((out / "settings.json").read_text())
    assert kept["settings"]["revisions"] == "all"
    assert [record["sha256"] for record in kept["calibrations"]] == [token_hash(ids)]
    assert len(read_distances(out)) == len(STEPS) * 2 * 6

    # Without a network: the text and the tokenizer are in the user's cache, the model once he has put it there.
    from huggingface_hub import snapshot_download

    snapshot_download("me/model", revision="step4", endpoint=hub.url)
    hub.forget_requests()
    offline = ["--offline", "--calibration", "c4", "--quiet", "--out", str(tmp_path / "offline"), *SHAPE]
    assert cli.run(["--model", "me/model", "--revisions", "step4", "--endpoint", hub.url, *offline]) == 0
    assert not hub.requests
    assert_frame_equal(numbers(rt.read_scores(tmp_path / "offline")), numbers(scores.filter(step=4)))


@pytest.mark.parametrize(
    "fault",
    [{"status": 429, "retry_after": 1}, {"status": 503}, {"cut_at": 100}],
    ids=["429", "503", "cut"],
)
def test_a_fault_of_every_kind_of_request_changes_nothing(
    loopback_hub, tiny_run, undisturbed, tmp_path, no_figures, fault
):
    hub = loopback_hub
    hub.add_repo("me/model", revisions=branches(tiny_run))
    patterns = ("*/refs", "*/tree/*", "*/revision/*", "*/model.safetensors", "*/config.json", "*/tokenizer.json")
    for pattern in patterns:
        hub.fault(pattern, **fault)
    out = tmp_path / "run"
    assert sweep_hub(hub, out, "--quiet", *PYDOC) == 0
    assert {f.pattern: f.times for f in hub.faults} == dict.fromkeys(patterns, 0)
    assert_frame_equal(numbers(rt.read_scores(out)), numbers(undisturbed))
    assert not leftovers(out)


def test_a_branch_that_moved_is_scored_again_and_read_at_its_present_commit(
    loopback_hub, tiny_run, tmp_path, no_figures, scored
):
    hub = loopback_hub
    hub.add_repo("me/model", revisions=branches(tiny_run))
    before = hub.commit("me/model", "step2")
    assert sweep_hub(hub, tmp_path / "run", "--quiet", *PYDOC) == 0
    weights = load_file(tiny_run / "checkpoint-4" / "model.safetensors")
    new = save({name: tensor * 1.5 for name, tensor in weights.items()}, {"format": "pt"})
    hub.set_revision("me/model", "step2", {**checkpoint_files(tiny_run, 4), "model.safetensors": new})
    assert sweep_hub(hub, tmp_path / "run", "--quiet", *PYDOC) == 0
    assert len(scored) == len(STEPS) + 1
    scores = rt.read_scores(tmp_path / "run")
    assert scores.filter(step=2)["commit"].unique().to_list() == [hub.commit("me/model", "step2")]
    (part,) = (tmp_path / "run" / "scores").glob(f"{before[:12]}-*.parquet")
    assert set(scores.filter(step=2)["value"]) != set(pl.read_parquet(part)["value"])


# What is scored, and what is not again


def test_nothing_is_scored_twice(tiny_run, tmp_path, no_figures, scored):
    arguments = ["--model", str(tiny_run), "--out", str(tmp_path / "run"), "--quiet", *PYDOC]
    assert cli.run([*arguments, "--revisions", "0..2"]) == 0
    assert scored == ["checkpoint-0", "checkpoint-2", "checkpoint-1"], "endpoints first"
    assert cli.run([*arguments, "--revisions", "checkpoint-8,checkpoint-1"]) == 0
    assert cli.run([*arguments, "--revisions", "all", "--device", "cpu", "--dtype", "float32"]) == 0
    assert cli.run([*arguments, "--revisions", "all", "--engine", "whole", "--batch-size", "2", "--keep"]) == 0
    assert scored[3:] == ["checkpoint-8", "checkpoint-4"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "scores").iterdir()}
    assert len(before) == len(STEPS)
    assert cli.run([*arguments, "--samples", "2"]) == 0, "other token ids are another identity"
    assert len(scored) == 2 * len(STEPS)
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    calibrations = rt.read_scores(tmp_path / "run")["calibration"].unique(maintain_order=True).to_list()
    assert calibrations == ["pydoc 4x32", "pydoc 2x32"]


def test_the_python_call_returns_the_rows_of_its_own_calibration(tiny_run, tmp_path, no_figures):
    def call(**settings):
        return rt.trace(tiny_run, out=tmp_path / "run", calibration="pydoc", sequence_length=32, quiet=True, **settings)

    first = call(samples=4, revisions="0..2")
    second = call(samples=2, revisions="0..1")
    assert (set(first["calibration"]), set(second["calibration"])) == ({"pydoc 4x32"}, {"pydoc 2x32"})
    assert second["step"].unique().sort().to_list() == [0, 1]
    assert_frame_equal(call(samples=4, revisions="checkpoint-0"), first)
    assert len(rt.read_scores(tmp_path / "run")) == len(first) + len(second)


def test_several_calibrations_and_numbers_of_samples_take_the_weights_once(
    loopback_hub, tiny_run, tmp_path, no_figures, scored, capsys
):
    hub, out = loopback_hub, tmp_path / "run"
    hub.add_repo("me/model", revisions=branches(tiny_run))
    ids = token_file(tmp_path / "ids.npy")
    asked = ["--calibration", "pydoc", "--calibration", ids, "--samples", "4", "--samples", "2"]
    asked += ["--sequence-length", "32", "--quiet", "--revisions", "step0,step8", "--json"]
    arguments = ["--model", "me/model", "--endpoint", hub.url, "--out", str(out), *asked]
    assert cli.run(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    labels = ["pydoc 4x32", "pydoc 2x32", f"{ids} 4x32", f"{ids} 2x32"]
    assert (told["calibration"], told["calibrations"], told["scored"]) == (labels[0], labels, 2)
    assert len(weights_asked(hub)) == 2, "each checkpoint is fetched once"
    assert len(scored) == 2 * 4
    scores = rt.read_scores(out)
    assert scores["calibration"].unique(maintain_order=True).to_list() == labels
    for label, sequences in zip(labels, (4, 2, 4, 2), strict=True):
        assert scores.filter(calibration=label)["n_sequences"].unique().to_list() == [sequences]
    for number, calibration in enumerate(("pydoc", ids)):
        alone = rt.trace(
            tiny_run, revisions="checkpoint-0,checkpoint-8", calibration=calibration, samples=2, sequence_length=32,
            out=tmp_path / f"alone{number}", quiet=True,
        )  # fmt: skip
        together = scores.filter(calibration=labels[2 * number + 1])
        assert_frame_equal(numbers(together), numbers(alone), check_exact=True)
    both = rt.trace(
        "me/model", revisions="step0,step8", calibration=[ids, "pydoc"], samples=2, sequence_length=32, out=out,
        endpoint=hub.url, quiet=True,
    )  # fmt: skip
    assert both["calibration"].unique(maintain_order=True).to_list() == [labels[3], labels[1]]
    assert len(scored) == 2 * 4 + 2 * 2, "what is stored is not scored again"
    # A third number of samples: only what is new is scored, and what is left is what the plan counts.
    more = [*arguments, "--samples", "3"]
    assert cli.run([*more, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["stored"] == 0
    assert cli.run(more) == 0
    assert len(scored) == 12 + 2 * 2
    capsys.readouterr()
    assert cli.run([*more, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["stored"] == 2


def test_of_several_calibrations_each_is_looked_at_before_any_is_scored(tiny_run, tmp_path, scored, capsys):
    arguments = ["--model", str(tiny_run), "--out", str(tmp_path / "run"), "--quiet", *PYDOC]
    assert cli.run([*arguments, "--calibration", str(tmp_path / "none.txt")]) == 2
    assert "there is no file" in capsys.readouterr().err
    assert not scored


def test_what_one_calibration_lacks_the_others_have(tiny_run, tmp_path, no_figures, monkeypatch, capsys):
    real = engine.score_checkpoint

    def failing(folder, ids, **settings):
        if len(ids) == 2 and folder.name == "checkpoint-4":
            raise CheckpointError("a state is not finite")
        return real(folder, ids, **settings)

    monkeypatch.setattr(engine, "score_checkpoint", failing)
    arguments = ["--model", str(tiny_run), "--out", str(tmp_path / "run"), "--revisions", "2..8", *PYDOC]
    arguments += ["--samples", "2", "--samples", "3"]
    assert cli.run(arguments) == 1
    assert "1 of 3 checkpoints could not be scored" in capsys.readouterr().err
    stored = rt.read_scores(tmp_path / "run").select("step", "calibration").unique().rows()
    assert (4, "pydoc 4x32") in stored
    assert not {(4, "pydoc 2x32"), (4, "pydoc 3x32")} & set(stored)
    assert {one["calibration"] for one in read_failures(tmp_path / "run")} == {"pydoc 2x32", "pydoc 3x32"}
    monkeypatch.setattr(engine, "score_checkpoint", real)
    assert cli.run(arguments) == 0
    assert not read_failures(tmp_path / "run")


def test_the_demo_is_called_demo(tiny_run, tmp_path, no_figures, monkeypatch):
    trained = []
    monkeypatch.setattr("redundancy_trace.demo.demo_checkpoints", lambda on_step: trained.append(1) or tiny_run)
    monkeypatch.chdir(tmp_path)
    scores = rt.trace(demo=True, samples=4, sequence_length=32, quiet=True)
    assert set(scores["model"]) == {"demo"}
    kept = json.loads((tmp_path / "runs" / "demo" / "settings.json").read_text())
    assert (kept["model"], kept["settings"]["demo"], kept["settings"]["model"]) == ("demo", True, None)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    with pytest.raises(InputError, match="is not empty"):
        rt.trace(demo=True, out="taken", quiet=True)
    assert len(trained) == 1, "what cannot be used is told before the training"


def test_tokens_per_step_may_be_given_and_changed_later(tiny_run, tmp_path, no_figures, scored):
    arguments = ["--model", str(tiny_run), "--out", str(tmp_path / "run"), "--quiet", *PYDOC]

    def tokens():
        return dict(rt.read_scores(tmp_path / "run").select("step", "tokens").unique().rows())

    assert cli.run([*arguments, "--revisions", "0..2"]) == 0
    assert tokens() == {0: None, 1: None, 2: None}
    assert cli.run([*arguments, "--revisions", "0..4", "--tokens-per-step", "64"]) == 0
    assert tokens() == {0: 0, 1: 64, 2: 128, 4: 256}
    assert cli.run([*arguments, "--tokens-per-step", "128"]) == 0
    assert cli.run(arguments) == 0
    assert tokens() == {0: 0, 1: 128, 2: 256, 4: 512, 8: 1024}
    assert len(scored) == len(STEPS)


def test_figures_are_drawn_when_what_they_show_has_changed(tiny_run, tmp_path, monkeypatch):
    out, drawn = tmp_path / "run", []

    def draw(scores, folder, *_, **__):
        drawn.append(scores["step"].n_unique())
        if fault:
            raise fault.pop()
        folder.mkdir(exist_ok=True)
        (folder / "loss.png").write_text("a picture")
        return [folder / "loss.png"]

    monkeypatch.setattr("redundancy_trace.figures.draw_figures", draw)
    arguments = ["--model", str(tiny_run), "--out", str(out), "--quiet", *PYDOC]
    fault = [KeyboardInterrupt()]
    assert cli.run([*arguments, "--revisions", "0..2"]) == 130
    assert cli.run([*arguments, "--revisions", "0..2"]) == 0
    assert cli.run([*arguments, "--revisions", "0..2"]) == 0
    assert drawn == [3, 3], "drawn to the end once"
    (out / "figures" / "loss.png").unlink()
    assert cli.run([*arguments, "--revisions", "0..2"]) == 0
    assert cli.run([*arguments, "--revisions", "all"]) == 0
    assert cli.run([*arguments, "--revisions", "all", "--tokens-per-step", "3"]) == 0
    assert cli.run(arguments) == 0
    assert drawn == [3, 3, 3, 5, 5]


# Checkpoints that fail


def test_broken_ones_among_good_ones(copied, undisturbed, tmp_path, no_figures, scored, capsys):
    from safetensors.torch import load_file, save_file

    out = tmp_path / "run"
    whole = {step: (copied / f"checkpoint-{step}" / "model.safetensors").read_bytes() for step in (0, 4)}
    (copied / "checkpoint-0" / "model.safetensors").write_bytes(whole[0][:5000])
    config = (copied / "checkpoint-1" / "config.json").read_text()
    (copied / "checkpoint-1" / "config.json").unlink()
    tensors = load_file(copied / "checkpoint-4" / "model.safetensors")
    missing = "gpt_neox.layers.1.attention.dense.weight"
    del tensors[missing]
    save_file(tensors, copied / "checkpoint-4" / "model.safetensors", metadata={"format": "pt"})
    (copied / "checkpoint-8" / "config.json").write_text(config.replace("{", "", 1))

    arguments = ["--model", str(copied), "--out", str(out), "--tokenizer", str(copied / "checkpoint-2"), *PYDOC]
    assert cli.run(arguments) == 1
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    summary = "4 of 5 checkpoints could not be scored, for the reasons above: "
    assert re.search(rf"{summary}(checkpoint-\d, ){{3}}checkpoint-\d\. They are tried again next time\.$", told.err)
    reasons = {failure["revision"]: failure["reason"] for failure in read_failures(out)}
    assert set(reasons) == {"checkpoint-0", "checkpoint-1", "checkpoint-4", "checkpoint-8"}
    assert "truncated" in reasons["checkpoint-0"]
    assert "no config.json" in reasons["checkpoint-1"]
    assert missing in reasons["checkpoint-4"]
    assert "no valid JSON" in reasons["checkpoint-8"]
    for name, reason in reasons.items():
        assert told.err.count(f"{name}: not scored: {reason}") == told.err.count(reason) == 1
    assert "checkpoint-2" in told.out
    assert rt.read_scores(out)["step"].unique().to_list() == [2]

    for step, content in whole.items():
        (copied / f"checkpoint-{step}" / "model.safetensors").write_bytes(content)
    for step in (1, 8):
        (copied / f"checkpoint-{step}" / "config.json").write_text(config)
    scored.clear()
    assert cli.run(arguments) == 0
    assert sorted(scored) == ["checkpoint-0", "checkpoint-1", "checkpoint-4", "checkpoint-8"]
    assert not list((out / "failures").iterdir())
    assert_frame_equal(rt.read_scores(out), undisturbed)


def test_files_that_cannot_be_read_are_a_failure_like_others(tiny_run, tmp_path, no_figures, monkeypatch, capsys):
    out, real = tmp_path / "run", hashlib.file_digest

    def refused(stream, digest):
        if "checkpoint-2" in stream.name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(stream, digest)

    arguments = ["--model", str(tiny_run), "--out", str(out), *PYDOC]
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", refused)
        assert cli.run(arguments) == 1
        told = capsys.readouterr().err
    assert re.search(r"\[1/5\] checkpoint-2: not scored: .*checkpoint-2/\S+ cannot be read: Permission denied\.", told)
    assert "[5/5]" in told
    (failure,) = read_failures(out)
    assert (failure["revision"], failure["step"], failure["commit"]) == ("checkpoint-2", 2, None)
    assert "Permission denied" in failure["reason"]
    assert cli.run(arguments) == 0
    assert not read_failures(out)
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", refused)
        os.utime(tiny_run / "checkpoint-2" / "config.json")
        assert cli.run(arguments) == 1
    assert len(read_failures(out)) == 1
    assert cli.run(arguments) == 0
    assert not read_failures(out), "its scores were there before"


def test_all_broken(copied, tmp_path, no_figures, capsys):
    for folder in copied.iterdir():
        (folder / "model.safetensors").write_bytes(f"no weights in {folder.name}".encode())
    arguments = ["--model", str(copied), "--out", str(tmp_path / "run"), "--quiet", *PYDOC]
    assert cli.run(arguments) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "5 of 5 checkpoints could not be scored" in told.err
    with pytest.raises(CheckpointError, match="5 of 5"):
        rt.trace(model=copied, out=tmp_path / "run", calibration="pydoc", samples=4, sequence_length=32, quiet=True)
    with pytest.raises(InputError, match="holds no scores yet"):
        rt.read_scores(tmp_path / "run")


def test_a_broken_one_on_the_hub_leaves_no_weights(loopback_hub, tiny_run, undisturbed, tmp_path, no_figures):
    served = branches(tiny_run)
    served["step1"]["model.safetensors"] = b"no weights"
    del served["step2"]["config.json"]
    loopback_hub.add_repo("me/model", revisions=served)
    loopback_hub.fault(f"*/{loopback_hub.commit('me/model', 'step4')}/model.safetensors", status=404, times=9)
    out = tmp_path / "run"
    assert sweep_hub(loopback_hub, out, "--quiet", *PYDOC) == 1
    assert {failure["revision"] for failure in read_failures(out)} == {"step1", "step2", "step4"}
    assert_frame_equal(numbers(rt.read_scores(out)), numbers(undisturbed.filter(pl.col("step").is_in([0, 8]))))
    assert not leftovers(out)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (RuntimeError("something odd\nand more"), ["RuntimeError: something odd (in faulty, ", "test_sweep.py:"]),
        (torch.OutOfMemoryError("CUDA out of memory."), ["OutOfMemoryError: CUDA out of", "--sequence-length"]),
        (MemoryError(), ["MemoryError (in", "--device cpu"]),
        (InputError("The calibration holds the token id 9"), ["holds the token id 9"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_fault_of_one_checkpoint_is_its_own(tiny_run, tmp_path, no_figures, monkeypatch, capsys, fault, words):
    real = engine.score_checkpoint

    def faulty(folder, *args, **kwargs):
        if folder.name == "checkpoint-1":
            raise fault
        return real(folder, *args, **kwargs)

    monkeypatch.setattr(engine, "score_checkpoint", faulty)
    arguments = ["--model", str(tiny_run), "--revisions", "0..2", "--out", str(tmp_path / "run"), *PYDOC]
    assert cli.run(arguments) == 1
    told = capsys.readouterr().err
    assert "Traceback" not in told
    (failure,) = read_failures(tmp_path / "run")
    assert failure["revision"] == "checkpoint-1"
    for word in words:
        assert word in failure["reason"]
    assert rt.read_scores(tmp_path / "run")["step"].unique().sort().to_list() == [0, 2]
    monkeypatch.undo()
    monkeypatch.setattr(sweep.running, "_draw", lambda *_: ())
    assert cli.run(arguments) == 0
    assert not read_failures(tmp_path / "run")


def test_many_failures_are_told_in_a_few_lines(tmp_path):
    failures = {f"step{n}": "truncated" for n in range(154)}
    result = sweep.SweepResult(tmp_path, 1, 2, failures, (), "pydoc 4x8", None, None)
    lines = sweep.failure_summary(result).splitlines()
    assert lines[0].startswith("154 of 157 checkpoints")
    assert len(lines) == 22
    assert lines[-1] == f"  and 134 more; all of them are in {tmp_path / 'failures'}"
    (line,) = sweep.failure_summary(result, told=True).splitlines()
    assert "truncated" not in line
    assert line.count("step") == 20
    assert f"step19, and 134 more; all of them are in {tmp_path / 'failures'}. They are tried again" in line


@pytest.mark.parametrize("beyond", [False, True], ids=["too long", "ids beyond the rows"])
def test_input_that_fits_no_checkpoint_leaves_nothing(loopback_hub, tiny_run, tmp_path, no_figures, capsys, beyond):
    loopback_hub.add_repo("me/model", revisions=branches(tiny_run))
    out = tmp_path / "runs" / "model"
    wrong = ["--calibration", token_file(tmp_path / "ids.npy", 9999)] if beyond else ["--calibration", "pydoc"]
    length = [] if beyond else ["--sequence-length", "65"]
    assert sweep_hub(loopback_hub, out, "--quiet", *SHAPE, *wrong, *length) == 2
    told = capsys.readouterr()
    assert told.out == ""
    for word in ("embedding has 320 rows", "--tokenizer") if beyond else ("64 positions", "Try --sequence-length 64"):
        assert word in told.err
    assert not out.exists()
    assert sweep_hub(loopback_hub, out, "--quiet", *PYDOC) == 0, "the same folder serves the right input"
    before = sorted(out.rglob("*"))
    assert sweep_hub(loopback_hub, out, "--quiet", "--revisions", "step8", *SHAPE, *wrong, *length) in (1, 2)
    assert set(before) <= set(out.rglob("*")), "what was stored stays"
    assert rt.read_scores(out)["calibration"].unique().to_list() == ["pydoc 4x32"]


# Processes that end early, and several at once


def test_killed_at_any_moment_and_run_again_gives_the_same_table(loopback_hub, tiny_run, tmp_path, no_figures, sweeps):
    hub = loopback_hub
    hub.add_repo("me/model", revisions=branches(tiny_run))
    ids = token_file(tmp_path / "ids.npy")
    assert sweep_hub(hub, tmp_path / "whole", "--quiet", "--calibration", ids, *SHAPE) == 0
    out, generator, killed = tmp_path / "run", random.Random(3), 0
    arguments = ["--model", "me/model", "--revisions", "all", "--endpoint", hub.url, "--out", str(out)]
    arguments += ["--calibration", ids, *SHAPE]
    stored = []
    for _ in range(40):
        pid = sweeps.start(*arguments, told=tmp_path / "told")
        time.sleep(generator.uniform(0.05, 0.6))
        os.kill(pid, signal.SIGKILL)
        killed += sweeps.wait(pid) == -signal.SIGKILL
        stored.append(len(list((out / "scores").glob("*.parquet"))))
        if stored[-1] == len(STEPS):
            break
    print(f"killed {killed} times, with so many stored: {stored}")
    assert killed >= 3
    assert stored == sorted(stored)
    assert sweeps.wait(sweeps.start(*arguments, told=tmp_path / "told")) == 0, (tmp_path / "told").read_text()
    assert_frame_equal(rt.read_scores(out), rt.read_scores(tmp_path / "whole"), check_exact=True)
    assert_frame_equal(read_distances(out), read_distances(tmp_path / "whole"), check_exact=True)
    assert not (out / ".fetched").exists()


@pytest.mark.parametrize("waiting", ["download", "back-off"])
def test_interrupted_it_ends_at_once_and_goes_on(loopback_hub, tiny_run, tmp_path, no_figures, sweeps, waiting):
    """Ctrl-C while bytes trickle in, or while a busy server is waited for."""
    hub, out = loopback_hub, tmp_path / "run"
    hub.add_repo("me/model", revisions=branches(tiny_run))
    ids = token_file(tmp_path / "ids.npy")
    arguments = ["--model", "me/model", "--endpoint", hub.url, "--out", str(out), "--calibration", ids, *SHAPE]
    if waiting == "download":
        hub.fault("*/model.safetensors", bytes_per_second=8_000, times=9)
    else:
        hub.fault("*/model.safetensors", status=503, retry_after=60, times=9)
    pid = sweeps.start(*arguments, "--fetch", "file", told=tmp_path / "told")
    deadline = time.monotonic() + 30
    while not weights_asked(hub) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.5)
    started = time.monotonic()
    os.kill(pid, signal.SIGINT)
    assert sweeps.wait(pid) == 130, (tmp_path / "told").read_text()
    assert time.monotonic() - started < 10
    assert "Give the same command again to go on" in (tmp_path / "told").read_text()
    kept = list(out.rglob("model.safetensors.part"))
    assert len(kept) == (waiting == "download"), "what has arrived stays"
    hub.faults.clear()
    assert sweeps.wait(sweeps.start(*arguments, told=tmp_path / "told")) == 0, (tmp_path / "told").read_text()
    assert len(rt.read_scores(out)["revision"].unique()) == len(STEPS)
    assert not leftovers(out)


def test_what_killed_sweeps_left_goes_once_nothing_needs_it(loopback_hub, tiny_run, tmp_path, no_figures):
    hub, out = loopback_hub, tmp_path / "run"
    hub.add_repo("me/model", revisions=branches(tiny_run))
    assert sweep_hub(hub, out, "--quiet", *PYDOC, "--revisions", "step0,step1", "--keep") == 0
    kept = {hub.commit("me/model", f"step{step}") for step in (0, 1)}
    assert {path.name for path in (out / ".fetched").iterdir()} == kept
    stored, waiting, gone = hub.commit("me/model", "step2"), hub.commit("me/model", "step8"), "0" * 40
    assert sweep_hub(hub, out, "--quiet", *PYDOC, "--revisions", "step2") == 0
    for name in (stored, waiting, gone, f"{waiting}-2"):
        (out / ".fetched" / name).mkdir()
        (out / ".fetched" / name / "model.safetensors.part").write_bytes(b"half")
    assert sweep_hub(hub, out, "--quiet", *PYDOC, "--revisions", "step2") == 0, "scored before it was killed"
    assert {path.name for path in (out / ".fetched").iterdir()} == {*kept, waiting}


@pytest.mark.parametrize("at", ["engine.score_checkpoint", "store.write_part"])
def test_interrupted_while_it_is_scored_a_checkpoint_is_not_fetched_again(
    loopback_hub, tiny_run, undisturbed, tmp_path, no_figures, monkeypatch, at
):
    hub, out = loopback_hub, tmp_path / "run"
    hub.add_repo("me/model", revisions=branches(tiny_run))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"redundancy_trace.{at}", interrupted)
        assert sweep_hub(hub, out, "--quiet", *PYDOC) == cli.INTERRUPTED
    assert weights_asked(hub)
    assert sweep_hub(hub, out, "--quiet", *PYDOC) == 0
    assert len(weights_asked(hub, f"*/{hub.commit('me/model', 'step0')}/*.safetensors")) == 1
    assert_frame_equal(numbers(rt.read_scores(out)), numbers(undisturbed))
    assert not leftovers(out)


def test_two_processes_on_one_run(loopback_hub, tiny_run, tmp_path, no_figures, sweeps):
    """They start together on a new folder; a third has another calibration, which stays on record."""
    hub = loopback_hub
    hub.add_repo("me/model", revisions=branches(tiny_run))
    ids, other = token_file(tmp_path / "ids.npy"), token_file(tmp_path / "other.npy", seed=1)
    assert sweep_hub(hub, tmp_path / "whole", "--quiet", "--calibration", ids, *SHAPE) == 0
    arguments = ["--model", "me/model", "--revisions", "all", "--endpoint", hub.url, "--out", str(tmp_path / "run")]
    pids = [
        sweeps.start(*arguments, "--calibration", tokens, *SHAPE, told=tmp_path / f"told{number}")
        for number, tokens in enumerate((ids, ids, other))
    ]
    for number, pid in enumerate(pids):
        assert sweeps.wait(pid) == 0, (tmp_path / f"told{number}").read_text()
    scores = rt.read_scores(tmp_path / "run")
    label = f"{ids} 4x32"
    whole = rt.read_scores(tmp_path / "whole")
    assert_frame_equal(scores.filter(calibration=label), whole, check_exact=True)
    assert len(scores) == 2 * len(whole)
    assert {record.label for record in read_run(tmp_path / "run").calibrations} == {label, f"{other} 4x32"}
    assert not leftovers(tmp_path / "run")


def test_a_full_disk(loopback_hub, tiny_run, tmp_path, no_figures, capsys):
    """A file system that is too small for the weights: every checkpoint says so, nothing is half-written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        loopback_hub.add_repo("me/model", revisions=branches(tiny_run))
        code = sweep_hub(loopback_hub, disk / "run", "--quiet", "--revisions", "step8", *PYDOC, "--fetch", "file")
        told = capsys.readouterr().err
        assert code == 1
        assert re.search(r"step8: No space for step8: it needs [\d,]+ bytes, [\d,]+ are free at .*--out", told)
        assert not leftovers(disk / "run")
        assert not list(Path(disk).rglob("*.parquet"))
        assert sweep_hub(loopback_hub, disk / "run", "--quiet", "--revisions", "step8", *PYDOC) == 0, "it is streamed"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_interrupt_that_python_drops_is_met_before_the_next_checkpoint(
    loopback_hub, tiny_run, tmp_path, no_figures, monkeypatch
):
    """Python swallows what is raised in the callback of a weak reference."""
    from redundancy_trace import engine

    hub, out = loopback_hub, tmp_path / "run"
    hub.add_repo("me/model", revisions=branches(tiny_run))
    real, before = engine.score_checkpoint, signal.default_int_handler
    # A shell starts what it runs in the background with the interrupt ignored.
    started_with = signal.signal(signal.SIGINT, before)

    def dropped(*given, **more):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return real(*given, **more)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "score_checkpoint", dropped)
            assert sweep_hub(hub, out, "--quiet", *PYDOC) == cli.INTERRUPTED
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, started_with)
    assert len(list((out / "scores").iterdir())) == 1, "what was finished is stored"
    assert sweep_hub(hub, out, "--quiet", *PYDOC) == 0
