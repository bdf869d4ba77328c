"""`trace eval` of one checkpoint: what is printed and stored, what is not measured twice, what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from loopback_hub import LoopbackHub
from tiny_runs import PYDOC, branches, token_file, without_figures

import redundancy_trace as rt
from redundancy_trace import cli
from redundancy_trace.store import EVALUATION_SCHEMA, ONE_FILE

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*generation flags.*")]
TEXT = ("--text", "pydoc", "--samples", "4", "--sequence-length", "32")
LOAD = ("--prompt-tokens", "8", "--new-tokens", "2", "--rounds", "1")


@pytest.fixture
def checkpoint(tiny_run, tmp_path):
    """A folder of the last checkpoint that may be written to."""
    return shutil.copytree(tiny_run / "checkpoint-8", tmp_path / "model")


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A sweep's run folder of two checkpoints."""
    out = tmp_path_factory.mktemp("swept") / "run"
    with without_figures():
        given = ["--model", str(tiny_run), "--revisions", "checkpoint-4,checkpoint-8", "--out", str(out)]
        assert cli.run([*given, *PYDOC, "--quiet"]) == 0
    return out


@pytest.fixture
def plan(run, tmp_path):
    file = tmp_path / "plan.json"
    return rt.plan_drop(rt.read_scores(run), "checkpoint-8", attn=1).write(file)


def evaluated(*arguments):
    return cli.run(["eval", *map(str, arguments), "--quiet"])


def values(rows, metric):
    return rows.filter(pl.col("metric") == metric)["value"].to_list()


def test_a_folder_is_measured_before_and_after_a_plan(tiny_run, plan, tmp_path, capsys):
    out = tmp_path / "run"
    given = ["--model", tiny_run, "--revision", "checkpoint-8", "--plan", plan, "--out", out, *TEXT, *LOAD]
    assert evaluated(*given) == 0
    printed = capsys.readouterr().out
    assert "tiny-run at checkpoint-8, float32 on cpu" in printed
    assert "whole model" in printed
    assert "attn=1" in printed
    rows = rt.read_evaluations(out)
    assert list(rows.columns) == list(EVALUATION_SCHEMA)
    assert rows["revision"].unique().to_list() == ["checkpoint-8"]
    assert rows["step"].unique().to_list() == [8]
    model, ids = rt.load_model(tiny_run, "checkpoint-8"), _pydoc_ids(tiny_run)
    again = rt.evaluate(model, plan=rt.read_plan(plan), token_ids=ids, measure="loss", quiet=True)
    assert values(rows, "loss") == pytest.approx(values(again, "loss"), abs=1e-6)
    whole, dropped = rows.filter(pl.col("metric") == "loss").sort("n_dropped").rows(named=True)
    assert (whole["plan"], whole["n_dropped"], dropped["plan"], dropped["n_dropped"]) == (None, 0, "attn=1", 1)
    assert (dropped["component"], dropped["order"], dropped["plan_revision"]) == ("attn", "importance", "checkpoint-8")
    assert whole["token_sha256"] == dropped["token_sha256"] == again["token_sha256"][0]
    before, after = values(rows.sort("n_dropped"), "kv_cache_bytes")
    assert [before, after] == values(rows.sort("n_dropped"), "kv_cache_bytes_computed")
    assert before > after


def _pydoc_ids(tiny_run):
    from redundancy_trace.calibration import load_calibration

    return load_calibration("pydoc", samples=4, sequence_length=32, tokenizer=str(tiny_run / "checkpoint-8")).token_ids


def test_what_is_stored_is_not_measured_again_but_times_are(checkpoint, capsys):
    given = [checkpoint, *TEXT, *LOAD, "--json"]
    found = []
    for _ in range(2):
        assert evaluated(*given) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [(one["measured"], one["kept"]) for one in found] == [(2, 0), (1, 1)]
    assert found[0]["place"].endswith(ONE_FILE)
    first, second = (rt.read_evaluations(checkpoint), found[1]["rows"])
    assert len(first) == len(second) == len(found[0]["rows"])
    assert evaluated(checkpoint, *TEXT, "--stride", "8", "--measure", "loss") == 0
    assert len(values(rt.read_evaluations(checkpoint), "loss")) == 2


def test_a_repository_is_fetched_and_its_rows_go_to_the_run(tiny_run, loopback_hub: LoopbackHub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loopback_hub.add_repo("me/tiny", revisions=branches(tiny_run))
    where = ("--model", "me/tiny", "--endpoint", loopback_hub.url)
    assert evaluated(*where, "--revision", "step4", *TEXT, "--measure", "loss") == 0
    rows = rt.read_evaluations("runs/tiny")
    assert rows["model"].unique().to_list() == ["me/tiny"]
    assert (rows["revision"][0], rows["step"][0], len(rows["commit"][0])) == ("step4", 4, 40)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and "lock" not in path.name] == []
    # The sweep may come later, into the same folder.
    sweep = ["--model", "me/tiny", "--endpoint", loopback_hub.url, "--revisions", "step4", "--quiet", *PYDOC]
    monkeypatch.setattr("redundancy_trace.sweep.running._draw", lambda *_: ())
    assert cli.run(sweep) == 0
    assert len(rt.read_scores("runs/tiny")) > 0
    assert evaluated(*where, "--revision", "step5", *TEXT) == 2


def test_a_checkpoint_of_several_goes_beside_their_run_and_a_cache_is_left_alone(tiny_run, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = shutil.copytree(tiny_run, tmp_path / "cache" / "redundancy-trace" / "demo-0123456789ab")
    given = [*TEXT, "--measure", "loss"]
    assert evaluated("--model", tiny_run, "--revision", "checkpoint-8", *given) == 0
    assert evaluated(models / "checkpoint-4", *given) == 0, "no cache as long as nobody says so"
    assert (models / "checkpoint-4" / ONE_FILE).is_file()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = sorted(models.rglob("*"))
    assert evaluated("--model", models, "--revision", "checkpoint-8", *given) == 0
    assert evaluated(models / "checkpoint-8", *given) == 0
    assert sorted(models.rglob("*")) == before
    found = {place.name: rt.read_evaluations(place)["model"].unique().to_list() for place in Path("runs").iterdir()}
    assert found == {name: [name] for name in (tiny_run.name, "demo", "checkpoint-8")}


def test_a_run_of_another_model_is_left_alone(tiny_run, run, tmp_path, capsys):
    other = shutil.copytree(tiny_run, tmp_path / "other")
    settings = json.loads((run / "settings.json").read_text())
    taken = shutil.copytree(run, tmp_path / "taken")
    (taken / "settings.json").write_text(json.dumps(settings | {"model": "me/other-model"}))
    given = ["--measure", "loss", *TEXT, "--out", taken]
    assert evaluated("--model", other, "--revision", "checkpoint-2", *given) == 2
    assert "is a run of me/other-model, not of other" in capsys.readouterr().err
    assert not (taken / "evaluations").exists()
    assert evaluated(other / "checkpoint-8", *given) == 0, "by another name, but a checkpoint of the run"
    curve = ["--curve", "attn", "--scores", taken, "--out", tmp_path / "rows.parquet", *TEXT]
    assert evaluated("--model", other, "--revision", "checkpoint-2", *curve) == 2
    assert "The run is of tiny-run, not of other" in capsys.readouterr().err
    assert not (tmp_path / "rows.parquet").exists()


def test_token_ids_of_ones_own(checkpoint, tmp_path):
    assert evaluated(checkpoint, "--text", token_file(tmp_path / "ids.npy"), "--measure", "loss") == 0
    rows = rt.read_evaluations(checkpoint)
    assert set(rows["metric"]) == {"loss", "perplexity"}  # no text, so no bytes
    assert rows["n_tokens"].unique().to_list() == [4 * 31]
    ids = np.load(tmp_path / "ids.npy")
    scored = rt.score_model(checkpoint, ids).filter(pl.col("metric") == "loss")["value"].item()
    assert values(rows, "loss") == [pytest.approx(scored, abs=1e-6)]


def test_an_export_is_measured_like_any_folder(checkpoint, plan, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    shape = ("--samples", "4", "--sequence-length", "32", "--quiet")
    export = tmp_path / "export"
    assert cli.run(["prune", "--model", str(checkpoint), "--plan", str(plan), "--format", "hf", "--out", str(export),
                    *shape]) == 0  # fmt: skip
    assert evaluated(export, *TEXT) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert evaluated(checkpoint, "--plan", plan, *TEXT, *LOAD) == 0
    assert evaluated(export, "--trust-remote-code", *TEXT, *LOAD) == 0
    in_place = rt.read_evaluations(checkpoint).filter(pl.col("n_dropped") == 1)
    exported = rt.read_evaluations(export)
    for metric in (
        "loss",
        "bits_per_byte",
        "kv_cache_bytes",
        "kv_cache_bytes_computed",
        "weight_bytes",
        "decode_flops",
    ):
        assert values(exported, metric) == pytest.approx(values(in_place, metric), rel=1e-6), metric


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["Nothing to evaluate", "trace eval"]),
        (["DIR", "--model", "DIR"], ["both name a model"]),
        (["RUN_OF_MODELS"], ["5 checkpoints", "--revision"]),
        (["RUN_OF_MODELS", "--revision", "checkpoint-7"], ["no checkpoint 'checkpoint-7'", "nearest"]),
        (["DIR", "--plan", "nowhere.json"], ["no plan nowhere.json"]),
        (["DIR", "--plan", "OTHER"], ["plan is of someone/else"]),
        (["DIR", "--plan", "LAYERS"], ["9 layers", "has 3"]),
        (["DIR", "--measure", "beauty"], ["'beauty'", "loss, speed"]),
        (["DIR", "--text", "nowhere.txt"], ["--text nowhere.txt"]),
        (["DIR", "--text", "pydoc", "--stride", "99"], ["--stride"]),
        (["DIR", "--text", "pydoc", "--sequence-length", "65"], ["--sequence-length 65", "model's 64 positions"]),
        (["DIR", "--text", "IDS", "--measure", "loss"], ["token id 899", "320 rows", "--text tokens:"]),
        (["DIR", "--rounds", "0"], ["--rounds", "at least 1"]),
        (["DIR", "--device", "abacus"], ["abacus"]),
        (["DIR", "--text", "pydoc", "--sequence-length", "1"], ["at least 2"]),
        (
            ["DIR", "--text", "SHORT", "--samples", "1"],
            ["short.txt has", "too few for one window of 64", "longer text"],
        ),
        (["DIR", "--text", "soup"], ["--text soup", "A text is one of"]),
        (["DIR", "--curve", "attn", "--plan", "LAYERS"], ["leave out --plan"]),
        (["DIR", "--curve", "attn", "--tasks", "arc_easy"], ["leave out --tasks"]),
        (["DIR", "--curve", "attn", "--orders", "random"], ["--orders 'random'", "random:0"]),
        (["DIR", "--curve", "attn", "--scores", "LAYERS"], ["is no run"]),
        (["DIR", "--drops", "attn=1"], ["--drops is of use with --along only"]),
        (["DIR", "--orders", "deepest"], ["--orders is of use with --along or --curve only"]),
        (["DIR", "--shots", "2"], ["--shots is of use with --tasks only"]),
        (["DIR", "--new-tokens", "65", "--measure", "speed"], ["--new-tokens 65", "64 positions"]),
        (["VLLM"], ["export for vLLM", "--model someone/else --revision r --plan", "for-vllm/drop_plan.json"]),
        (["LLAMA"], ["export for llama.cpp"]),
        (["RUN"], ["is a run of tiny-run, not a model", "trace eval --along", "--model /", "/tiny-run --revision"]),
        (["DIR", "--out", "DIR/config.json"], ["config.json"]),
    ],
)
def test_what_cannot_be_used_is_refused(arguments, words, checkpoint, run, tiny_run, tmp_path, capsys):
    component = {"component": "attn", "layer": 0, "importance": None}
    plan = {
        "version": 1, "model": "someone/else", "revision": "r", "commit": "a" * 40, "identity": None,
        "calibration": None, "drop": "attn:0", "order": "named", "n_layers": 3, "components": [component],
    }  # fmt: skip
    (tmp_path / "other.json").write_text(json.dumps(plan))
    (tmp_path / "layers.json").write_text(json.dumps({**plan, "model": None, "n_layers": 9}))
    names = {"OTHER": "other.json", "LAYERS": "layers.json", "RUN_OF_MODELS": tiny_run, "DIR": checkpoint}
    np.save(tmp_path / "ids.npy", np.full((2, 8), 899))
    (tmp_path / "short.txt").write_text("Too short.")
    for name, file in (("for-vllm", "config.json"), ("for-llama", "model.gguf")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(json.dumps({"model_type": "nemotron-nas"}))
        (tmp_path / name / "drop_plan.json").write_text(json.dumps(plan))
    names |= {"SHORT": "short.txt", "RUN": run, "VLLM": "for-vllm", "LLAMA": "for-llama"}
    names = {name: tmp_path / file for name, file in names.items()} | {"IDS": f"tokens:{tmp_path / 'ids.npy'}"}
    given = [names[one] if one in names else one.replace("DIR", str(checkpoint)) for one in arguments]
    before = sorted(path.name for path in checkpoint.iterdir())
    assert evaluated(*given) == 2
    told = capsys.readouterr().err
    for word in words:
        assert word in told
    assert sorted(path.name for path in checkpoint.iterdir()) == before


def test_evaluations_that_are_not_there(tmp_path):
    with pytest.raises(rt.InputError, match="holds no evaluations yet"):
        rt.read_evaluations(tmp_path)
    (tmp_path / ONE_FILE).write_text("no parquet")
    with pytest.raises(rt.InputError, match="can be read"):
        rt.read_evaluations(tmp_path)
