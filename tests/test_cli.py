"""The command line as a new user meets it: what is printed where, and what is said when something is wrong."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import PYDOC, SHAPE, STEPS, branches, token_file

from redundancy_trace import cli, store
from redundancy_trace.cli.sweeping import print_result
from redundancy_trace.metrics import COMPONENTS, ModelScores, Value

KEYS = [
    "name", "kind", "commit", "stage", "ingredient", "seed", "step", "tokens", "bytes", "format", "duplicate_of",
    "partial_duplicate_of", "chosen",
]  # fmt: skip


def stored_run(folder, steps=(1, 10, 100)):
    """A run folder with made-up scores."""
    record = store.CalibrationRecord("pydoc 4x8", "a" * 64, "token_ids.npy")
    store.write_run(store.Run(folder, "me/model", "float32", False, None, (record,)), {})
    for step in steps:
        values = [
            Value(layer, component, "cosine_similarity", 1 - 0.1 / (layer + 1) - step / 1000, 0.01, 4, 32)
            for layer in range(3)
            for component in COMPONENTS
        ]
        labels = store.Labels(
            model="me/model", revision=f"step{step}", commit=f"{step:03x}".ljust(40, "0"), step=step,
            calibration=record.label, identity="e" * 64,
        )  # fmt: skip
        store.write_part(folder, labels, ModelScores((*values, Value(None, "model", "loss", 3.0, 0.1, 4, 28)), ()))
    return folder


def python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


# trace list


def other_weights(run):
    """A checkpoint like the last one, but for one bit of the weights."""
    files = dict(branches(run)["step8"])
    weights = files["model.safetensors"].read_bytes()
    return files | {"model.safetensors": weights[:-1] + bytes([weights[-1] ^ 1])}


def test_list_of_a_repository_moves_no_weights(loopback_hub, tiny_run, capsys):
    loopback_hub.add_repo(
        "me/model", revisions=branches(tiny_run), tags={"stage2-step9-tokens1B": other_weights(tiny_run)}
    )
    arguments = ["list", "--model", "me/model", "--endpoint", loopback_hub.url]
    assert cli.run([*arguments, "--revisions", "step1,step8", "--json", "--tokens-per-step", "10"]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    rows = json.loads(told.out)
    assert [list(row) for row in rows] == [KEYS] * 7
    assert [row["name"] for row in rows] == [*(f"step{s}" for s in STEPS), "stage2-step9-tokens1B", "main"]
    by_name = {row["name"]: row for row in rows}
    size = (tiny_run / "checkpoint-8" / "model.safetensors").stat().st_size
    assert by_name["step8"] == {
        "name": "step8", "kind": "branch", "commit": loopback_hub.commit("me/model", "step8"), "stage": 1,
        "ingredient": None, "seed": None, "step": 8, "tokens": 80, "bytes": size, "format": "safetensors",
        "duplicate_of": None, "partial_duplicate_of": None, "chosen": True,
    }  # fmt: skip
    assert (by_name["step0"]["bytes"], by_name["step0"]["chosen"]) == (None, False)
    tag = by_name["stage2-step9-tokens1B"]
    assert (tag["kind"], tag["stage"], tag["step"], tag["tokens"]) == ("tag", 2, 9, 10**9)
    assert by_name["main"]["step"] is None

    assert cli.run([*arguments, "--revisions", "all"]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    lines = told.out.splitlines()
    assert lines[0].split() == [
        "name",
        "commit",
        "stage",
        "step",
        "tokens",
        "bytes",
        "format",
        "kind",
        "duplicate",
        "of",
    ]
    starred = [line.split()[1] for line in lines if line.startswith("*")]
    assert starred == [*(f"step{s}" for s in STEPS), "stage2-step9-tokens1B"]
    assert lines[-1] == f"7 refs, 6 chosen (*), {6 * size:,} bytes of weights"
    assert not loopback_hub.count("GET", "*/resolve/*")
    assert not loopback_hub.count("HEAD")


def test_list_of_a_folder(tiny_run, capsys):
    assert cli.run(["list", "--model", str(tiny_run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["kind"], row["step"], row["commit"]) for row in rows] == [
        (f"checkpoint-{step}", "local", step, None) for step in STEPS
    ]
    assert all(row["bytes"] and row["format"] == "safetensors" and row["chosen"] for row in rows)


# trace plot


def test_plot_works_where_torch_cannot_be_imported(tmp_path):
    code = (
        "import sys; from importlib.machinery import ModuleSpec\n"
        "class Blocked:\n"
        "    def find_spec(self, name, *_):\n"
        "        blocked = name.split('.')[0] in ('torch', 'transformers', 'huggingface_hub')\n"
        "        return ModuleSpec(name, self) if blocked else None\n"
        "    def create_module(self, spec): raise ImportError(spec.name)\n"
        "    def exec_module(self, module): pass\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from redundancy_trace.cli import main; main()"
    )
    run = stored_run(tmp_path / "run")
    done = python(code, "plot", str(run), "--figure", "loss", "--figure", "importance", "--format", "svg, png")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    figures = run / "figures"
    assert done.stdout.splitlines() == [
        str(figures / f"{name}.{suffix}") for name in ("loss", "importance") for suffix in ("svg", "png", "csv")
    ]
    assert (figures / "loss.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--figure", "losses"], ["no figure 'losses'", "importance, similarity-depth, loss", "Did you mean loss?"]),
        (["--format", "gif"], ["no format 'gif'", "png, pdf, svg"]),
    ],
)
def test_plot_refuses_what_it_cannot_draw(tmp_path, capsys, arguments, words):
    run = stored_run(tmp_path / "run")
    before = sorted(run.rglob("*"))
    assert cli.run(["plot", str(run), *arguments]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    for word in words:
        assert word in told.err
    assert [path for path in sorted(run.rglob("*")) if path.is_file()] == [path for path in before if path.is_file()]


def test_plot_of_what_is_no_run(tmp_path, tiny_run, capsys):
    for folder in (tiny_run, tmp_path / "nowhere"):
        assert cli.run(["plot", str(folder)]) == 2
        assert re.search(r"is no run: it has no settings\.json\. A run is what `trace", capsys.readouterr().err)
    assert not (tmp_path / "nowhere").exists()


# What is printed


@pytest.mark.parametrize(
    "body",
    [
        "import redundancy_trace; dir(redundancy_trace)", "cli(['--help'])", "cli(['list', '--help'])", "cli(['-h'])",
        "cli(['--version'])",
    ],
)  # fmt: skip
def test_nothing_heavy_is_imported_to_give_help(body):
    heavy = "{'torch', 'transformers', 'matplotlib', 'huggingface_hub', 'polars', 'numpy', 'rich.progress'}"
    start = "" if body.startswith("import") else "from redundancy_trace.cli import run as cli; "
    done = python(f"import sys; {start}{body}; found = {heavy} & set(sys.modules); assert not found, found")
    assert done.returncode == 0, done.stderr


def test_threads_wait_without_keeping_the_machine_busy_unless_told(monkeypatch):
    body = (
        "import os; from redundancy_trace.cli import main\n"
        "try: main(['--version'])\n"
        "except SystemExit: print(os.environ['OMP_WAIT_POLICY'])"
    )
    for given, policy in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        assert python(body).stdout.splitlines()[-1] == policy


def test_version_names_what_a_number_depends_on(capsys):
    import torch
    import transformers

    assert cli.run(["--version"]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    words = ("redundancy_trace 0.1.0", f"torch {torch.__version__}", f"transformers {transformers.__version__}")
    assert told.out.strip().startswith(", ".join(words))


def test_results_go_to_stdout_and_everything_else_to_stderr(tiny_run, tmp_path, no_figures, capfd):
    arguments = ["--model", str(tiny_run), "--revisions", "log:2", "--out", str(tmp_path / "run"), *PYDOC]
    assert cli.run(arguments) == 0
    told = capfd.readouterr()
    assert told.err.startswith("2 checkpoints, no bytes to move.\n")
    assert re.search(r"\n\[1/2\] checkpoint-0 scored in .* s\n\[2/2\] checkpoint-8 scored in .* s\n$", told.err)
    head, columns, *rows = told.out.splitlines()
    assert head.endswith("over all layers (0 = redundant), loss in nats per token, on pydoc 4x32:")
    assert columns.split() == ["checkpoint", "step", "attn", "mlp", "block", "loss"]
    assert [row.split()[:2] for row in rows] == [["checkpoint-0", "0"], ["checkpoint-8", "8"]]
    assert cli.run([*arguments, "--quiet"]) == 0
    assert capfd.readouterr() == (told.out, "")
    assert cli.run([*arguments, "--quiet", "--json", "--tokens-per-step", "64"]) == 0
    told = capfd.readouterr()
    assert told.err == ""
    result = json.loads(told.out)
    assert list(result) == [
        "run",
        "calibration",
        "calibrations",
        "scored",
        "kept",
        "failures",
        "figures",
        "checkpoints",
    ]
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    described = re.search(r"`trace --json` prints one object: (.*?)\n\n", readme, flags=re.DOTALL)
    assert described is not None
    assert re.findall(r"`(\w+)`", described.group(1)) == [*result, *result["checkpoints"][0]]
    assert (result["run"], result["scored"], result["kept"]) == (str(tmp_path / "run"), 0, 2)
    assert (result["failures"], result["figures"]) == ({}, [])
    assert [(row["revision"], row["tokens"]) for row in result["checkpoints"]] == [
        ("checkpoint-0", 0), ("checkpoint-8", 512)
    ]  # fmt: skip
    assert 0 < result["checkpoints"][1]["attn"] < result["checkpoints"][1]["block"] < 1


def test_of_many_checkpoints_some_are_shown(tmp_path, capsys):
    from redundancy_trace.sweep import SweepResult

    stored_run(tmp_path, range(50))
    print_result(SweepResult(tmp_path, 50, 0, {}, (), ("pydoc 4x8",), None, None))
    _, _, *rows, last = capsys.readouterr().out.splitlines()
    assert len(rows) == 24
    assert (rows[0].split()[0], rows[-1].split()[0]) == ("step0", "step49")
    assert last == "(24 of 50 checkpoints are shown)"


# What is wrong, what exists, what to type next


def refused(arguments, capsys, out, code=2):
    """The message of a command that must fail without a traceback and without leaving a run."""
    assert cli.run([*arguments, "--out", str(out)]) == code
    told = capsys.readouterr()
    assert told.out == ""
    assert "Traceback" not in told.err
    assert not out.exists() or code == 1
    return told.err


def test_a_mistyped_command(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for arguments, words in (
        ([], ["No model is named", "trace --demo", "trace --help"]),
        (["--modle", "x"], ["No such option: --modle", "--model"]),
        (["lsit", "--model", "x"], ["No such command 'lsit'", "Did you mean 'list'?"]),
        (["me/model"], ["No such command 'me/model'", "trace --model REPO"]),
        (["list"], ["Missing option '--model'"]),
        (["--model", "x", "--samples", "many"], ["'--samples'", "integer"]),
        (["--model", "x", "--demo"], ["leave out --model or --demo"]),
        (["plot"], ["Missing argument 'RUN'"]),
    ):
        assert cli.run(arguments) == 2
        told = capsys.readouterr()
        assert told.out == ""
        for word in words:
            assert word in told.err
    assert not list(tmp_path.iterdir())


def test_no_network_is_told_soon(tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    started = time.monotonic()
    told = refused(["--model", "me/model", "--endpoint", url], capsys, tmp_path / "run")
    assert time.monotonic() - started < 10
    for word in (f"Cannot reach {url}", "--endpoint", "HF_ENDPOINT", "--offline", "no folder me/model here either"):
        assert word in told


def test_what_the_hub_does_not_have(loopback_hub, tiny_run, tmp_path, capsys):
    loopback_hub.add_repo("me/model", revisions=branches(tiny_run))
    loopback_hub.add_repo("me/final", revisions={"main": branches(tiny_run)["main"]})
    there = ["--endpoint", loopback_hub.url, *SHAPE]
    for arguments, words in (
        (["--model", "me/modle"], ["me/modle was not found", "hf auth login", "no folder me/modle here"]),
        (["--model", "me/model", "--revisions", "step3"], ["no checkpoint 'step3'; nearest: ", "step2", "log:20"]),
        (["--model", "me/final"], ["me/final", "There is: main", "--revisions main"]),
        (["--model", "me/model"], ["c4, the default", "allenai/c4", "--calibration pydoc"]),
        (["--model", "nope"], ["nope was not found", "There is no folder nope here either"]),
        (["--model", "me/model", "--calibration", "hf:me/text"], ["me/text was not found"]),
        (["--model", "me/model", "--calibration", "pydoc", "--tokenizer", "me/none"], ["--tokenizer me/none"]),
    ):
        told = refused([*arguments, *there], capsys, tmp_path / "run")
        for word in words:
            assert word in told


def test_calibrations_that_cannot_be_used(tiny_run, tmp_path, capsys):
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x81")
    (tmp_path / "few.txt").write_text("few words")
    np.save(tmp_path / "floats.npy", np.zeros((4, 32)))
    (tmp_path / "none.npy").write_text("no array")
    for calibration, words in (
        ("binary.txt", ["is not UTF-8 text", "convert it"]),
        ("nowhere.txt", ["there is no file", "pydoc, c4, FILE.txt"]),
        ("few.txt", ["needs 128", "--samples 1 --sequence-length"]),
        ("floats.npy", ["is an array, not text", "--calibration tokens:"]),
        ("tokens:floats.npy", ["float64", "integer array of shape (sequences, length)"]),
        ("tokens:none.npy", ["is no .npy array", "numpy.save"]),
    ):
        place = str(tmp_path / calibration.removeprefix("tokens:"))
        given = f"tokens:{place}" if calibration.startswith("tokens:") else place
        told = refused(["--model", str(tiny_run), "--calibration", given, *SHAPE, "--quiet"], capsys, tmp_path / "run")
        for word in words:
            assert word in told


def test_a_device_that_is_not_there(tiny_run, tmp_path, capsys):
    for device, words in (("cuda:7", ["--device cuda:7: this machine has"]), ("gpu", ["'gpu' is no device; try auto"])):
        told = refused(["--model", str(tiny_run), "--device", device, *PYDOC], capsys, tmp_path / "run")
        for word in words:
            assert word in told


@pytest.mark.parametrize("kind", ["bert", "resnet", "nonsense", "no config"])
def test_a_model_that_is_no_decoder(tmp_path, tiny_run, capsys, recwarn, kind):
    from safetensors.torch import save_file
    from transformers import BertConfig, BertForMaskedLM, ResNetConfig

    folder = tmp_path / kind
    folder.mkdir()
    if kind == "bert":
        config = BertConfig(
            vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
        model = BertForMaskedLM(config)
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if "decoder" not in name}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)
    else:
        shutil.copy(tiny_run / "checkpoint-8" / "model.safetensors", folder)
    if kind == "resnet":
        ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8).save_pretrained(folder)
    if kind == "nonsense":
        (folder / "config.json").write_text('{"model_type": "nonsense"}')
    recwarn.clear()
    ids = token_file(tmp_path / "ids.npy")
    arguments = ["--model", str(folder), "--calibration", ids, *SHAPE, "--quiet"]
    code = 2 if kind == "no config" else 1
    told = refused(arguments, capsys, tmp_path / "run", code=code)
    word = {
        "bert": "so the model is refused",
        "resnet": "makes no causal language model",
        "nonsense": "does not recognize this architecture",
        "no config": "Expected is a checkpoint (config.json beside its weights)",
    }[kind]
    assert word in told
    assert not list((tmp_path / "run").rglob("*.parquet"))


def test_an_internal_fault_is_told_as_one(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("redundancy_trace.sweep.run_sweep", lambda *_: 1 / 0)
    assert cli.run(["--model", str(tiny_run), "--out", str(tmp_path / "run")]) == 1
    told = capsys.readouterr().err
    assert "ZeroDivisionError" in told
    assert "this is a fault of the program" in told
