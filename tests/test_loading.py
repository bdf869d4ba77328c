"""One checkpoint by name: from the Hub or a folder, complete, with its tokenizer, and nothing left behind."""

import pytest
import torch
from saved_models import rewrite
from tiny_runs import branches, weights_asked
from transformers import AutoModelForCausalLM

import redundancy_trace as rt
from redundancy_trace.loading import open_checkpoint


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def expected(run, step):
    return AutoModelForCausalLM.from_pretrained(run / f"checkpoint-{step}").state_dict()


def test_revision_of_a_repository(loopback_hub, tiny_run, cache_home):
    loopback_hub.add_repo("me/model", revisions=branches(tiny_run))
    where = {"endpoint": loopback_hub.url}
    model = rt.load_model("me/model", "step4", device="cpu", **where)
    for name, tensor in expected(tiny_run, 4).items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert list((cache_home / "redundancy-trace").iterdir()) == []  # what was fetched is gone
    assert len(weights_asked(loopback_hub)) == 1
    text = "a def that is"
    tokenizer = rt.load_tokenizer("me/model", "step4", **where)  # its branch has none, main has
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with open_checkpoint("me/model", "step4", **where) as checkpoint:
        assert (checkpoint.model, checkpoint.revision) == ("me/model", "step4")
        assert checkpoint.commit == loopback_hub.commit("me/model", "step4")
        assert checkpoint.tokenizer()(text)["input_ids"] == tokenizer(text)["input_ids"]
        folder = checkpoint.folder
        assert folder.is_dir()
    assert not folder.exists()


def test_revision_may_be_left_out_only_where_there_is_one(loopback_hub, tiny_run):
    loopback_hub.add_repo("me/model", revisions=branches(tiny_run))
    loopback_hub.add_repo("me/final", revisions={"main": branches(tiny_run)["main"]})
    with pytest.raises(rt.InputError, match=r"5 checkpoints are in me/model: step0, .* Name one with --revision"):
        rt.load_model("me/model", endpoint=loopback_hub.url)
    with pytest.raises(rt.InputError, match="--revision all means 5 of me/model"):
        rt.load_model("me/model", "all", endpoint=loopback_hub.url)
    state = rt.load_model("me/final", device="cpu", endpoint=loopback_hub.url).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected(tiny_run, 8).items())


def test_local_folders(tiny_run):
    several = rt.load_model(tiny_run, "checkpoint-2", device="cpu", dtype="bfloat16")
    alone = rt.load_model(tiny_run / "checkpoint-2", device="cpu")
    for name, tensor in alone.state_dict().items():
        assert several.state_dict()[name].dtype == torch.bfloat16
        assert torch.equal(several.state_dict()[name], tensor.bfloat16())
    with pytest.raises(rt.InputError, match="5 checkpoints are in"):
        rt.load_model(tiny_run)
    with pytest.raises(rt.InputError, match="dtype is 'float16'; known"):
        rt.load_model(tiny_run / "checkpoint-2", dtype="float16")
    assert rt.load_tokenizer(tiny_run).eos_token == "<|endoftext|>"
    with open_checkpoint(tiny_run, "checkpoint-2") as one, open_checkpoint(tiny_run / "checkpoint-2") as other:
        assert one.commit == other.commit
        assert (one.model, other.model) == ("tiny-run", "checkpoint-2")
        assert one.folder == tiny_run / "checkpoint-2"
    assert one.folder.is_dir()  # the user's own


def test_weights_that_are_not_all_there_are_refused(tiny_run, tmp_path):
    def without_one(state):
        state.pop(next(name for name in state if "mlp" in name))
        return state

    broken = rewrite(tiny_run / "checkpoint-2", tmp_path / "broken", without_one)
    with pytest.raises(rt.CheckpointError, match=r"1 tensor is missing: .*mlp"):
        rt.load_model(broken, device="cpu")
