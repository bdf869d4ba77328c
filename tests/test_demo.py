"""The demo's training, short: what it writes, that it repeats, and what an interrupted one leaves."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from redundancy_trace import demo
from redundancy_trace.calibration import TokenizerSource, load_calibration
from redundancy_trace.demo import Recipe, demo_checkpoints, train_demo
from redundancy_trace.errors import TraceError

SHORT = Recipe(
    layers=2, width=32, vocabulary=320, sequence_length=32, batch_size=4, steps=6, saved=(0, 1, 2, 6), warmup=2
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_demo(tmp_path_factory.mktemp("demo"), recipe=SHORT)


def weights(folder: Path) -> dict[str, bytes]:
    return {file.parent.name: file.read_bytes() for file in sorted(folder.glob("*/model.safetensors"))}


def test_checkpoints_are_those_of_a_trainer(trained: Path) -> None:
    assert {folder.name for folder in trained.iterdir()} == {f"checkpoint-{step}" for step in SHORT.saved}
    for step in SHORT.saved:
        folder = trained / f"checkpoint-{step}"
        assert {file.name for file in folder.iterdir()} == {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "trainer_state.json",
            "training_args.bin",
        }
        assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == step
    assert len(set(weights(trained).values())) == len(SHORT.saved), "every checkpoint differs, the first two too"


def test_they_load_as_any_model(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained / "checkpoint-6")
    ids = tokenizer("The assert statement\n", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "The assert statement\n"
    assert int(ids.max()) < SHORT.vocabulary
    model = AutoModelForCausalLM.from_pretrained(trained / "checkpoint-6")
    assert model.config.model_type == "gpt_neox"
    assert model.config.use_parallel_residual
    assert model.config.rope_parameters["partial_rotary_factor"] == 0.25
    assert len(model.gpt_neox.layers) == SHORT.layers
    assert torch.isfinite(model(ids).logits).all()


def test_the_same_recipe_gives_the_same_weights(trained: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    assert weights(train_demo(tmp_path, recipe=SHORT)) == weights(trained)
    other = train_demo(tmp_path / "other", recipe=dataclasses.replace(SHORT, seed=1))
    assert weights(other)["checkpoint-0"] != weights(trained)["checkpoint-0"]


def test_the_loss_falls(tmp_path: Path) -> None:
    recipe = dataclasses.replace(SHORT, steps=64, saved=(64,))
    told = []
    train_demo(tmp_path, recipe=recipe, on_step=lambda step, steps: told.append((step, steps)))
    assert told == [(step, 64) for step in range(1, 65)]
    losses = [
        entry["loss"]
        for entry in json.loads((tmp_path / "checkpoint-64" / "trainer_state.json").read_text())["log_history"]
        if "loss" in entry
    ]
    assert losses[0] > 5.5
    assert losses[-1] < losses[0] - 0.7


def test_training_is_quiet_and_leaves_the_callers_state(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bars = logging.is_progress_bar_enabled()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    train_demo(tmp_path, recipe=SHORT)
    assert torch.equal(torch.get_rng_state(), state)
    assert logging.is_progress_bar_enabled() == bars
    assert capfd.readouterr() == ("", "")


def test_the_cache_is_used(tmp_path: Path) -> None:
    steps: list[int] = []
    first = demo_checkpoints(tmp_path, lambda step, _: steps.append(step), SHORT)
    assert first.parent == tmp_path
    assert first.name.startswith("demo-")
    assert len(steps) == SHORT.steps
    assert demo_checkpoints(tmp_path, lambda step, _: steps.append(step), SHORT) == first
    assert len(steps) == SHORT.steps
    assert {left.name for left in tmp_path.iterdir()} == {first.name}
    other = demo_checkpoints(tmp_path, recipe=dataclasses.replace(SHORT, seed=1))
    assert other != first
    before = weights(first)
    (first / "checkpoint-1" / "model.safetensors").unlink()
    assert demo_checkpoints(tmp_path, recipe=SHORT) == first
    assert weights(first) == before


def test_the_cache_is_where_the_platform_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo_checkpoints(recipe=SHORT).parent == tmp_path / "xdg" / "redundancy-trace"


def test_an_interrupted_training_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(step: int, _: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo_checkpoints(tmp_path, interrupt, SHORT)
    assert not list(tmp_path.iterdir())


def test_a_killed_training_is_not_trusted(tmp_path: Path, trained: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from redundancy_trace.demo import Recipe, demo_checkpoints;"
        f"demo_checkpoints(Path(sys.argv[1]), lambda s, _: s == 3 and os.kill(os.getpid(), signal.SIGKILL), {SHORT!r})"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, check=False)
    assert killed.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".demo-")
    yesterday = time.time() - 90_000
    os.utime(left, (yesterday, yesterday))
    folder = demo_checkpoints(tmp_path, recipe=SHORT)
    assert weights(folder) == weights(trained), "the same in another process"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceError, match=r"cannot be kept in .*Set XDG_CACHE_HOME"):
        demo_checkpoints(tmp_path / "file", recipe=SHORT)


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(TraceError, match=r"cannot be kept in .*: No space left on device"):
        demo_checkpoints(tmp_path, full, SHORT)
    assert not list(tmp_path.iterdir())


def test_the_default_calibration_is_held_out(tmp_path: Path) -> None:
    recipe = Recipe()
    tokenizer = demo._tokenizer(recipe)
    tokenizer.save_pretrained(tmp_path)
    ids = load_calibration("pydoc", samples=65, sequence_length=512, candidates=[TokenizerSource(tmp_path)]).token_ids
    sequences = demo._sequences(tokenizer, recipe)
    assert sequences[0]["input_ids"] == ids[64, :128].tolist(), "training begins behind the 64th sequence"
    assert len(sequences) > 900


def test_the_default_recipe_is_worth_a_look() -> None:
    recipe = Recipe()
    assert recipe.layers >= 8
    assert recipe.saved[0] == 0
    assert recipe.saved[-1] == recipe.steps
    assert len(recipe.saved) == 12
