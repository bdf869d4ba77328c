"""The whole way, as a user goes it: a really trained run on a loopback Hub or on disk, swept by the command line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from tiny_runs import weights_asked, without_figures

import redundancy_trace as rt
from redundancy_trace import cli
from redundancy_trace.demo import Recipe, train_demo
from redundancy_trace.store import SCORE_SCHEMA

RECIPE = Recipe(
    layers=3, width=32, heads=2, vocabulary=320, positions=128, sequence_length=32, batch_size=4, steps=8,
    saved=(0, 1, 2, 4, 8), warmup=2,
)  # fmt: skip
SMALL = ["--calibration", "pydoc", "--samples", "4", "--sequence-length", "32"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Checkpoints of a small training, `checkpoint-N`."""
    return train_demo(tmp_path_factory.mktemp("trained") / "my-run", recipe=RECIPE)


@pytest.fixture(scope="module")
def undisturbed(run_folder, tmp_path_factory):
    """The table of a local sweep that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    with without_figures():
        assert cli.run(["--model", str(run_folder), "--out", str(out), "--quiet", *SMALL]) == 0
    return rt.read_scores(out)


def as_branches(run_folder):
    revisions = {f"step{step}": run_folder / f"checkpoint-{step}" for step in RECIPE.saved}
    return {"main": run_folder / f"checkpoint-{RECIPE.saved[-1]}", **revisions}


def numbers(scores):
    """What must not depend on how the checkpoints were reached."""
    order = ["step", "layer", "component", "metric"]
    return scores.select(*order, "value", "stderr", "n_sequences", "n_tokens").sort(order, nulls_last=False)


def leftovers(out):
    return [p for p in out.rglob("*") if p.name.endswith(".part") or p.name == ".fetched"]


def test_a_sweep_over_branches_gives_the_table_of_the_local_files(
    loopback_hub, run_folder, undisturbed, tmp_path, capsys
):
    loopback_hub.add_repo("me/model", revisions=as_branches(run_folder))
    out = tmp_path / "run"
    arguments = ["--model", "me/model", "--revisions", "all", "--endpoint", loopback_hub.url, "--out", str(out), *SMALL]
    assert cli.run(arguments) == 0
    told = capsys.readouterr()
    assert "step8" in told.out
    assert "importance.png" in told.out
    assert "[5/5]" in told.err
    scores = rt.read_scores(out)
    assert dict(scores.schema) == SCORE_SCHEMA
    assert scores["revision"].unique(maintain_order=True).to_list() == [f"step{s}" for s in RECIPE.saved]
    assert_frame_equal(numbers(scores), numbers(undisturbed))
    assert not leftovers(out), "weights are gone once scored"
    assert len(list((out / "scores").glob("*.parquet"))) == len(RECIPE.saved)
    assert {p.name for p in (out / "figures").iterdir()} >= {"importance.png", "importance.pdf", "importance.csv"}
    listing = json.loads((out / "listing.json").read_text())
    assert {c["name"] for c in listing["checkpoints"]} == set(as_branches(run_folder))
    commits = scores.select("revision", "commit").unique()
    assert all(len(commit) == 40 for commit in commits["commit"])

    loopback_hub.forget_requests()
    assert cli.run(arguments) == 0
    assert "5 of 5 checkpoints are in" in capsys.readouterr().err
    assert loopback_hub.count("GET", "*/resolve/*") == 0, "nothing is fetched twice"


@pytest.mark.usefixtures("no_figures")
def test_tags_are_checkpoints_too(loopback_hub, run_folder, undisturbed, tmp_path):
    tags = {f"global_step{step}": run_folder / f"checkpoint-{step}" for step in RECIPE.saved}
    loopback_hub.add_repo("me/tagged", revisions={"main": {"README.md": b"empty"}}, tags=tags)
    out = tmp_path / "run"
    scores = rt.trace(
        model="me/tagged", revisions="all", endpoint=loopback_hub.url, out=out, calibration="pydoc",
        tokenizer=str(run_folder / "checkpoint-8"), samples=4, sequence_length=32, quiet=True,
    )  # fmt: skip
    assert set(scores["kind"]) == {"tag"}
    assert_frame_equal(numbers(scores), numbers(undisturbed))


@pytest.mark.usefixtures("no_figures")
def test_the_tokenizer_may_be_the_finished_models(loopback_hub, run_folder, undisturbed, tmp_path):
    bare = {}
    for step in RECIPE.saved:
        names = ("config.json", "model.safetensors")
        bare[f"step-{step}"] = {name: run_folder / f"checkpoint-{step}" / name for name in names}
    loopback_hub.add_repo("me/Small-1B-intermediate-checkpoints", revisions={"main": {"README.md": b""}, **bare})
    loopback_hub.add_repo("me/Small-1B", revisions={"main": run_folder / "checkpoint-8"})
    out = tmp_path / "run"
    arguments = ["--model", "me/Small-1B-intermediate-checkpoints", "--revisions", "all", "--out", str(out), *SMALL]
    assert cli.run([*arguments, "--endpoint", loopback_hub.url, "--quiet"]) == 0
    assert_frame_equal(numbers(rt.read_scores(out)), numbers(undisturbed))


@pytest.mark.usefixtures("no_figures")
def test_faults_of_the_server_change_nothing(loopback_hub, run_folder, undisturbed, tmp_path):
    loopback_hub.add_repo("me/model", revisions=as_branches(run_folder))
    loopback_hub.fault("*/refs", status=503, times=2)
    loopback_hub.fault("*/tree/*", status=429, times=2, retry_after=0)
    loopback_hub.fault("*/resolve/*/model.safetensors", method="GET", status=503, times=2)
    loopback_hub.fault("*/resolve/*/model.safetensors", method="GET", cut_at=5000, times=2)
    out = tmp_path / "run"
    arguments = ["--model", "me/model", "--revisions", "all", "--endpoint", loopback_hub.url, "--out", str(out), *SMALL]
    assert cli.run([*arguments, "--quiet"]) == 0
    assert_frame_equal(numbers(rt.read_scores(out)), numbers(undisturbed))
    assert not leftovers(out)


@pytest.mark.usefixtures("no_figures")
def test_while_one_is_scored_the_next_two_are_fetched_and_never_three(loopback_hub, run_folder, tmp_path, monkeypatch):
    from redundancy_trace import engine

    loopback_hub.add_repo("me/model", revisions=as_branches(run_folder))
    real = engine.score_checkpoint
    fetched_at_start = []

    def watched(*args, **kwargs):
        deadline = time.monotonic() + 5
        wanted = min(len(fetched_at_start) + 3, len(RECIPE.saved))
        while len(weights_asked(loopback_hub)) < wanted and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.1)
        fetched_at_start.append(len(weights_asked(loopback_hub)))
        return real(*args, **kwargs)

    monkeypatch.setattr(engine, "score_checkpoint", watched)
    arguments = ["--model", "me/model", "--revisions", "all", "--endpoint", loopback_hub.url, "--quiet"]
    assert cli.run([*arguments, "--out", str(tmp_path / "run"), *SMALL]) == 0
    assert fetched_at_start == [3, 4, 5, 5, 5]


@pytest.mark.usefixtures("no_figures")
def test_keep_keeps_and_the_users_own_cache_is_used_and_left_alone(loopback_hub, hub_cache, run_folder, tmp_path):
    from huggingface_hub import snapshot_download

    loopback_hub.add_repo("me/model", revisions=as_branches(run_folder))
    own = Path(snapshot_download("me/model", revision="step4", endpoint=loopback_hub.url, cache_dir=hub_cache))
    loopback_hub.forget_requests()
    arguments = ["--model", "me/model", "--revisions", "step4,step8", "--endpoint", loopback_hub.url, "--quiet"]
    out = tmp_path / "run"
    assert cli.run([*arguments, "--out", str(out), "--keep", *SMALL]) == 0
    assert len(weights_asked(loopback_hub)) == 1, "step4 came from the cache"
    assert (own / "model.safetensors").is_file()
    kept = list((out / ".fetched").rglob("model.safetensors"))
    assert len(kept) == 1
    other = ["--calibration", "pydoc", "--samples", "2", "--sequence-length", "16"]
    assert cli.run([*arguments, "--out", str(out), *other]) == 0, "and --keep is not given again"
    assert len(weights_asked(loopback_hub)) == 1
    assert list((out / ".fetched").rglob("model.safetensors")) == kept


@pytest.mark.usefixtures("no_figures")
def test_offline_after_online(loopback_hub, run_folder, tmp_path, capsys):
    """What an online run left in the user's cache, the tokenizer here, serves a later one without a network."""
    loopback_hub.add_repo("me/model", revisions=as_branches(run_folder))
    arguments = [
        "--model",
        str(run_folder),
        "--tokenizer",
        "me/model",
        "--quiet",
        *SMALL,
        "--endpoint",
        loopback_hub.url,
    ]
    assert cli.run([*arguments, "--out", str(tmp_path / "online")]) == 0
    loopback_hub.forget_requests()
    assert cli.run([*arguments, "--out", str(tmp_path / "offline"), "--offline"]) == 0
    assert not loopback_hub.requests
    assert_frame_equal(rt.read_scores(tmp_path / "online"), rt.read_scores(tmp_path / "offline"))
    capsys.readouterr()
    assert cli.run(["--model", "me/other", "--offline", "--out", str(tmp_path / "other")]) == 2
    assert "not in the Hub cache" in capsys.readouterr().err


def command(*arguments):
    return [sys.executable, "-c", "from redundancy_trace.cli import main; main()", *arguments]


@pytest.mark.usefixtures("no_figures")
def test_interrupted_sweep_stops_cleanly(run_folder, undisturbed, tmp_path):
    out = tmp_path / "run"
    arguments = ["--model", str(run_folder), "--out", str(out), *SMALL]
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("[1/"):
            process.send_signal(signal.SIGINT)
            break
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    assert 1 <= len(list((out / "scores").iterdir())) < len(RECIPE.saved)
    assert not leftovers(out)
    assert cli.run(arguments) == 0
    assert_frame_equal(numbers(rt.read_scores(out)), numbers(undisturbed))


@pytest.mark.usefixtures("no_figures")
def test_one_bad_checkpoint_does_not_end_the_sweep_and_is_tried_again(run_folder, undisturbed, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(run_folder, broken)
    weights = broken / "checkpoint-2" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "run"
    arguments = ["--model", str(broken), "--out", str(out), *SMALL]
    assert cli.run(arguments) == 1
    told = capsys.readouterr()
    assert "checkpoint-2" in told.err
    assert "truncated" in told.err
    assert "Traceback" not in told.err
    (failure,) = (out / "failures").glob("*.json")
    assert "truncated" in json.loads(failure.read_text())["reason"]
    assert rt.read_scores(out)["step"].unique().sort().to_list() == [0, 1, 4, 8]
    weights.write_bytes(whole)
    assert cli.run(arguments) == 0
    assert_frame_equal(numbers(rt.read_scores(out)), numbers(undisturbed))
    failures = [json.loads(path.read_text()) for path in (out / "failures").glob("*.json")]
    assert not failures


@pytest.mark.usefixtures("no_figures")
def test_an_unforeseen_fault_of_one_checkpoint_is_its_failure(run_folder, tmp_path, capsys, monkeypatch):
    from redundancy_trace import engine

    real = engine.score_checkpoint

    def faulty(folder, *args, **kwargs):
        if folder.name == "checkpoint-1":
            raise RuntimeError("something that nobody thought of")
        return real(folder, *args, **kwargs)

    monkeypatch.setattr(engine, "score_checkpoint", faulty)
    out = tmp_path / "run"
    assert cli.run(["--model", str(run_folder), "--revisions", "0..2", "--out", str(out), *SMALL]) == 1
    told = capsys.readouterr().err
    assert "checkpoint-1: not scored: RuntimeError: something that nobody thought of" in told
    assert rt.read_scores(out)["step"].unique().sort().to_list() == [0, 2]


@pytest.mark.usefixtures("no_figures")
def test_a_run_trained_anew_in_place_shows_the_new_weights(run_folder, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run_folder, again)
    settings = {"model": again, "out": tmp_path / "run", "samples": 4, "sequence_length": 32, "quiet": True}
    before = rt.trace(**settings)
    for step, other in ((1, 2), (2, 1)):  # each has the other's weights now: new ones, and no two alike
        folder = again / f"checkpoint-{step}"
        shutil.copy(run_folder / f"checkpoint-{other}" / "model.safetensors", folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "note": "trained anew"}))
    after = rt.trace(**settings)
    assert len(after) == len(before), "one set of rows a checkpoint"
    old, new = ({s: f.filter(pl.col("step") == s)["value"].to_list() for s in (1, 2, 8)} for f in (before, after))
    assert (new[1], new[2], new[8]) == (old[2], old[1], old[8])
    assert len(list((tmp_path / "run" / "scores").iterdir())) == len(RECIPE.saved) + 2


@pytest.mark.usefixtures("no_figures")
def test_another_calibration_adds_rows_and_another_model_or_dtype_is_refused(run_folder, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["--model", str(run_folder), "--revisions", "log:2", "--out", str(out), "--quiet"]
    assert cli.run([*arguments, *SMALL]) == 0
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 50)
    assert cli.run([*arguments, *SMALL[2:], "--calibration", str(text)]) == 0
    capsys.readouterr()
    assert cli.run([*arguments, *SMALL[2:], "--calibration", str(text)]) == 0
    assert f"on {text} 4x32" in capsys.readouterr().out, "the table is of the calibration that was asked for"
    calibrations = rt.read_scores(out)["calibration"].unique(maintain_order=True).to_list()
    assert calibrations[0] == "pydoc 4x32"
    assert len(calibrations) == 2
    capsys.readouterr()
    assert cli.run([*arguments, *SMALL, "--dtype", "bfloat16"]) == 2
    assert "dtype 'float32', not 'bfloat16'" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(run_folder, other)
    assert cli.run(["--model", str(other), "--out", str(out), "--quiet", *SMALL]) == 2
    assert "model" in capsys.readouterr().err


@pytest.mark.usefixtures("no_figures")
def test_both_engines_and_score_model_agree_with_the_sweep(run_folder, undisturbed, tmp_path):
    import numpy as np

    out = tmp_path / "run"
    scores = rt.trace(
        model=run_folder, out=out, engine="whole", calibration="pydoc", samples=4, sequence_length=32, quiet=True
    )
    difference = (numbers(scores)["value"] - numbers(undisturbed)["value"]).abs().max()
    assert difference < 1e-6
    ids = np.load(out / "token_ids.npy")
    one = rt.score_model(run_folder / "checkpoint-8", ids)
    swept = undisturbed.filter(pl.col("step") == 8)
    keys = ["layer", "component", "metric", "value", "stderr"]
    assert_frame_equal(one.select(keys).sort(keys[:3]), swept.select(keys).sort(keys[:3]))


def run_fails(arguments, capsys, tmp_path):
    """Give the command; returns exit code and message, having made sure that nothing was left half-written."""
    before = sorted(tmp_path.rglob("*"))
    code = cli.run(arguments)
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert told.strip()
    made = [path for path in sorted(tmp_path.rglob("*")) if path not in before and path.suffix == ".parquet"]
    assert not made
    return code, told


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--samples", "0"], ["--samples is 0", "at least 1"]),
        (["--device", "cuda:7"], ["--device cuda:7", "--device cpu"]),
        (["--dtype", "float16"], ["float16", "bfloat16"]),
        (["--engine", "quick"], ["quick", "stream, whole"]),
        (["--revisions", "checkpoint-3"], ["checkpoint-3", "checkpoint-2"]),
        (["--revisions", "log:x"], ["log:x"]),
        (["--calibration", "nowhere.txt"], ["nowhere.txt", "pydoc"]),
        (["--samples", "100000"], ["tokens", "--samples"]),
        (["--sequence-length", "129"], ["129", "128"]),
        (["--demo"], ["--demo", "--model"]),
    ],
)
def test_bad_settings_are_told_in_one_message(flags, words, run_folder, tmp_path, capsys):
    given = dict(zip(SMALL[::2], SMALL[1::2], strict=True))
    if flags[0] in given:
        given.pop(flags[0])
    rest = [word for pair in given.items() for word in pair]
    arguments = ["--model", str(run_folder), "--out", str(tmp_path / "run"), *rest, *flags]
    code, told = run_fails(arguments, capsys, tmp_path)
    assert code == 2
    for word in words:
        assert word in told


def test_bad_models_are_told_in_one_message(loopback_hub, run_folder, tmp_path, capsys):
    loopback_hub.add_repo("me/model", revisions=as_branches(run_folder))
    out = ["--out", str(tmp_path / "run"), *SMALL]
    there = ["--endpoint", loopback_hub.url]
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, words in (
        (["--model", "me/modle", *there], ["me/modle"]),
        (["--model", "me/model", "--revisions", "step3", *there], ["step3", "step2"]),
        (["--model", "me/model", "--endpoint", "http://127.0.0.1:9"], ["127.0.0.1:9"]),
        (["--model", str(empty)], ["holds no checkpoint"]),
        (["--model", str(tmp_path / "nowhere")], ["nowhere"]),
    ):
        code, told = run_fails([*arguments, *out], capsys, tmp_path)
        assert code == 2, told
        for word in words:
            assert word in told


def test_out_that_cannot_be_used(run_folder, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("in the way")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    for out, word in ((file, "cannot be written to"), (file / "run", "cannot be written to"), (foreign, "thesis.tex")):
        code, told = run_fails(["--model", str(run_folder), "--out", str(out), *SMALL], capsys, tmp_path)
        assert code == 2
        assert word in told
    assert file.read_text() == "in the way"
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]


def test_no_space_left(run_folder, tmp_path, capsys, monkeypatch):
    def full(self, *_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pl.DataFrame, "write_parquet", full)
    code, told = run_fails(["--model", str(run_folder), "--out", str(tmp_path / "run"), *SMALL], capsys, tmp_path)
    assert code == 2
    assert "No space left" in told
    assert "bytes free" in told


def test_plot_redraws_without_torch(run_folder, tmp_path):
    out = tmp_path / "run"
    assert cli.run(["--model", str(run_folder), "--out", str(out), "--quiet", *SMALL]) == 0
    drawn = (out / "figures" / "importance.png").read_bytes()
    shutil.rmtree(out / "figures")
    code = (
        "import sys; from redundancy_trace.cli import run; code = run(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "plot", str(out), "--format", "png"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (out / "figures" / "importance.png").read_bytes() == drawn


def test_light_commands_import_nothing_heavy(tmp_path):
    heavy = "{'torch', 'transformers', 'matplotlib', 'huggingface_hub', 'polars'}"
    for body in ("import redundancy_trace", "from redundancy_trace.cli import run; run(['--help'])"):
        code = f"import sys; {body}; found = {heavy} & set(sys.modules); assert not found, found"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_finished_run_of_154_is_recognised_at_once(run_folder, tmp_path, monkeypatch):
    """154 local checkpoints in a run; the second call scores none, and does without torch."""
    from redundancy_trace import engine

    real, results = engine.score_checkpoint, []

    def score_once(*args, **kwargs):
        # One real result stands for all: what is looked at is the second call.
        results.extend([] if results else [real(*args, **kwargs)])
        return results[0]

    monkeypatch.setattr(engine, "score_checkpoint", score_once)
    many = tmp_path / "many"
    for step in range(154):
        folder = many / f"checkpoint-{step}"
        shutil.copytree(run_folder / "checkpoint-8", folder)
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[:-2] + step.to_bytes(2, "big"))  # each its own
    out = tmp_path / "run"
    arguments = ["--model", str(many), "--revisions", "all", "--out", str(out), "--quiet", "--json"]
    small = ["--calibration", "pydoc", "--samples", "1", "--sequence-length", "8"]
    assert cli.run([*arguments, *small]) == 0
    code = (
        "import sys; from redundancy_trace.cli import run; code = run(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, *small], capture_output=True, text=True, check=False, env=os.environ
    )
    print(f"a finished run of 154 checkpoints: {time.monotonic() - started:.1f} s")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["scored"], result["kept"]) == (0, 154)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo(tmp_path):
    """The embedded default: trained unless the cache has it, swept, drawn; the second call finds all of it done."""
    for line in ("[12/12]", "12 of 12 checkpoints are in"):
        done = subprocess.run(command("--demo"), capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert line in done.stderr
        assert "checkpoint-192" in done.stdout
        assert (tmp_path / "runs" / "demo" / "figures" / "importance.png").is_file()
