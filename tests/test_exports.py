"""Exports: loaded back, each computes what a hand-made skip does, and decodes what the drop in place decodes."""

import json
import os
import shutil
from importlib import import_module

import numpy as np
import pytest
import torch
from families import FAMILIES, token_ids
from safetensors import safe_open
from saved_models import built, byte_level_tokenizer, folder, save
from skipping_by_hand import logits_without
from tiny_runs import branches, without_figures
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, LlamaConfig

import redundancy_trace as rt
from redundancy_trace import cli
from redundancy_trace.blocks import find_layers
from redundancy_trace.pruning import DroppedComponent, DropPlan, parse_spec, proving
from redundancy_trace.pruning.iterating import drop_one_by_one
from redundancy_trace.pruning.reload import greedy
from redundancy_trace.pruning.sources import open_source

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*generation flags.*")]
DROPS = {
    "attn": (("attn", 0), ("attn", -1)),
    "mlp": (("mlp", 0), ("mlp", -1)),
    "block": (("block", 0), ("block", -1)),
    "joint": (("attn", 0), ("mlp", 1), ("attn", -1)),
}
NEW_TOKENS = 32
LAST = "checkpoint-8"
ON_TEXT = {"calibration": "pydoc", "samples": 4, "sequence_length": 32}


def plan_of(model, components):
    n_layers = len(find_layers(model)[1])
    found = tuple(DroppedComponent(name, layer % n_layers) for name, layer in components)
    return DropPlan("tiny", None, None, None, None, ",".join(map(str, found)), "named", n_layers, found)


def loaded(path):
    """A folder as a user of plain transformers loads it; nothing may be missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(
        path, trust_remote_code=True, local_files_only=True, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.fixture(autouse=True)
def no_remains_of_remote_code(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_every_format(family, tmp_path):
    model, source = built(family), open_source(folder(family))
    ids, prompt = torch.from_numpy(token_ids(2)), torch.from_numpy(token_ids(1, 8))
    for name, components in DROPS.items():
        plan = plan_of(model, components)
        expected = logits_without(model, ids, plan.by_layer())
        with torch.no_grad(), rt.dropped(model, plan):
            decoded = greedy(model, prompt, NEW_TOKENS)
        for form in ("zeroed", "hf", "native")[: 3 if name == "block" else 2]:
            written = import_module(f"redundancy_trace.pruning.formats.{form}")
            target = tmp_path / f"{name}-{form}"
            target.mkdir()
            written.check(source, plan)
            written.write(source, plan, target, 2**30, None)
            again = loaded(target)
            if form == "hf":  # never the whole model with random numbers where nothing is stored
                with pytest.raises(ValueError, match="trust_remote_code"):
                    AutoModelForCausalLM.from_pretrained(target, trust_remote_code=False, local_files_only=True)
            with torch.no_grad():
                found = again(ids, use_cache=False).logits
                assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5, (name, form)
                assert torch.equal(greedy(again, prompt, NEW_TOKENS), decoded), (name, form)
            sizes = [sum(p.numel() for p in one.parameters()) for one in (again, model)]
            assert (sizes[0] == sizes[1]) if form == "zeroed" else (sizes[0] < sizes[1])
            shutil.rmtree(target)


def pruned(tmp_path, *arguments, source=None, out=None):
    where = ["--model", str(source or folder("llama")), "--out", str(out or tmp_path / "out")]
    return cli.run(["prune", *where, "--quiet", "--device", "cpu", *arguments]), tmp_path / "out"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A Llama in bfloat16 of few positions, with all that a published checkpoint has beside its weights."""
    path = tmp_path_factory.mktemp("whole") / "llama"
    byte_level_tokenizer().save_pretrained(path)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=288, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, bos_token_id=0, eos_token_id=0, max_position_embeddings=64,
        )
    )  # fmt: skip
    save(model.to(torch.bfloat16), path)
    GenerationConfig(top_p=0.9, do_sample=True, bos_token_id=0, eos_token_id=0).save_pretrained(path)
    return path


def tensors_of(path):
    """Name to shape and dtype of all safetensors, and the largest file's size in tensors and bytes."""
    held, largest = {}, (0, 0)
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not iterable itself
        largest = max(largest, (sum(t.nbytes for t in found.values()), len(found)))
        held |= found
    return held, largest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "drop"),
    [
        ("native", "block:1"),
        ("zeroed", "attn:0,mlp:2"),
        ("hf", "attn:0,mlp:2,block:1"),
        ("nemotron-nas", "attn:0,mlp:2"),
        ("gguf", "attn:0,mlp:2"),
    ],
)
def test_trace_prune_proves_in_a_fresh_process(form, drop, whole, tmp_path, capsys, monkeypatch):
    if form in ("nemotron-nas", "gguf"):  # as on a machine that has no room for a copy in float32
        monkeypatch.setattr(proving, "_SHARE_OF_MEMORY", 0.0)
    text = tmp_path / "text.txt"
    text.write_text("the mat sat on the cat " * 40)
    on_text = ("--calibration", str(text), "--samples", "2", "--sequence-length", "16")
    monkeypatch.chdir(tmp_path)  # a folder may be named from where one stands
    asked = ("--format", form, "--drop", drop, "--json", "--shard-size", "40kB", *on_text)
    code, out = pruned(tmp_path, *asked, source=whole, out="out")
    told = json.loads(capsys.readouterr().out)
    assert code == 0
    assert told["proof"]["holds"]
    assert told["proof"]["equal_tokens"] == NEW_TOKENS
    assert told["proof"]["error"] < 1e-5
    plan = rt.read_plan(out / "drop_plan.json")
    assert [str(one) for one in plan.components] == drop.split(",")
    # Numbers and cache of the export, not of the drop: what stays as zeros is counted.
    (whole_size, size), (before, after) = told["sizes"]["parameters"], told["sizes"]["cache_bytes"]
    mlp, norm, projection, number = (
        3 * 64 * 96,
        64,
        64 * 64,
        torch.finfo(getattr(torch, told["sizes"]["dtype"])).bits // 8,
    )
    assert before == 3 * 2 * 2 * 16 * number
    left = {
        "native": (2 * projection + 2 * 64 * 32 + mlp + 2 * norm, 2 / 3 * before),
        "zeroed": (0, before),
        "hf": (2 * (2 * projection + 2 * 64 * 32) + 2 * mlp + 4 * norm, before / 3 + 2 * 2 * number),
        "nemotron-nas": (mlp + norm, before),
        "gguf": (projection + 2 * 64 * 32 + mlp - 3 * 32 * 64, 2 / 3 * before),
    }
    assert (whole_size - size, after) == (left[form][0], pytest.approx(left[form][1]))
    # Beside the weights: what the checkpoint had, unchanged, and a card that says what was done and what it cost.
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    card = (out / "README.md").read_text()
    effect = told["effect"]
    assert effect["before"] != effect["after"]
    assert effect["n_tokens"] == 2 * 15
    for stated in (
        drop.split(",")[0],
        told["commit"],
        f"{size:,} after the drop" if form != "zeroed" else "all as before",
        f"{effect['before']:.4f} before",
        f"{effect['after']:.4f} after",
    ):
        assert stated in card
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "modules", "text.txt"}
    if form == "gguf":
        import gguf

        kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out / "model.gguf").tensors}
        assert kinds["blk.0.ffn_up.weight"] == "BF16"
        assert {path.suffix for path in out.iterdir()} == {".gguf", ".json", ".md"}
        return
    # The weights: sharded, in the dtype that they had, and said so.
    held, (size, count) = tensors_of(out)
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert size <= 40_000 or count == 1
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(held)
    if form == "zeroed":
        assert not held["model.layers.0.self_attn.o_proj.weight"].any()
        assert not held["model.layers.2.mlp.down_proj.weight"].any()
        assert held["model.layers.1.mlp.down_proj.weight"].any()


def computes_nothing(monkeypatch):
    for name in ("weights.load_whole_model", "engine.score_checkpoint"):
        monkeypatch.setattr(f"redundancy_trace.{name}", None)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--format", "native", "--drop", "attn:1"], "leaves out whole blocks"),
        (["--format", "native", "--drop", "attn=1"], "--drop block=2"),
        (["--format", "native", "--drop", "mlp<0.1"], "leaves out whole blocks"),
        (["--drop", "attn:1"], "one of native, zeroed, hf, nemotron-nas, gguf"),
        (["--format", "hff", "--drop", "attn:1"], "Did you mean hf"),
        (["--format", "hf"], "Either --drop or --plan"),
        (["--format", "hf", "--drop", "attn:7"], "layer"),
        (["--format", "hf", "--drop", "block:0,block:1,block:2"], "block"),
        (["--format", "hf", "--drop", "attention=1"], "attn"),
        (["--format", "hf", "--drop", "attn=110%"], "there are only 3"),
        (["--format", "hf", "--drop", "attn:1", "--dtype", "float16"], "known: auto, float32, bfloat16"),
        (["--format", "hf", "--drop", "attn:1", "--device", "gpu"], "'gpu' is no device"),
        (["--format", "gguf", "--drop", "attn:0,block:1,attn:2"], "no model without any attention"),
        (["--format", "gguf", "--drop", "attn:0"], "needs a tokenizer"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(arguments, told, tmp_path, capsys, monkeypatch):
    computes_nothing(monkeypatch)
    code, _ = pruned(tmp_path, *arguments)
    said = capsys.readouterr().err
    assert code == 2
    assert told in said
    assert "Traceback" not in said
    assert not any(tmp_path.iterdir())


def test_families_that_a_format_cannot_express_are_refused(tmp_path, capsys, monkeypatch):
    computes_nothing(monkeypatch)
    for form in ("nemotron-nas", "gguf"):
        for drop in ("attn:1", "attn=1"):
            code, out = pruned(tmp_path, "--format", form, "--drop", drop, source=folder("olmo2"))
            assert code == 2
            assert "Use --format hf" in capsys.readouterr().err
            assert not out.exists()


@pytest.fixture(scope="module")
def scored_run(tiny_run, tmp_path_factory):
    """A run that holds the scores of the last checkpoint of a trained model."""
    out = tmp_path_factory.mktemp("scored") / "run"
    with without_figures():
        rt.trace(tiny_run, revisions=LAST, out=out, quiet=True, **ON_TEXT)
    return out


@pytest.fixture
def planned(monkeypatch):
    """What `rt.prune` would carry out: planned as ever, and not written."""
    monkeypatch.setattr("redundancy_trace.pruning.exporting._exported", lambda _checkpoint, _source, plan, *_: plan)
    return lambda *where, **asked: rt.prune(*where, out="none", format="zeroed", device="cpu", **asked)


@pytest.mark.parametrize(
    ("drop", "order"),
    [
        ("attn=2", "importance"),
        ("joint=50%", "importance"),
        ("block=1", "consecutive"),
        ("mlp=2", "deepest"),
        ("attn=2", "random:3"),
    ],
)
def test_plans_from_a_run_and_from_scores_made_now_are_one(drop, order, tiny_run, scored_run, planned):
    expected = rt.plan_drop(scored_run, LAST, drop=drop, order=order)
    found = planned(tiny_run, LAST, drop=drop, order=order, scores=scored_run)
    assert found == expected
    assert found.identity is not None
    now = planned(tiny_run / LAST, drop=drop, order=order, **ON_TEXT)
    assert [str(one) for one in now.components] == [str(one) for one in expected.components]
    assert now.commit == expected.commit
    if order in ("importance", "consecutive"):
        values = [one.importance for one in expected.components]
        assert [one.importance for one in now.components] == pytest.approx(values, abs=1e-9)
        assert now.identity == expected.identity


def test_iterative_plans_score_on_the_runs_own_text(tiny_run, scored_run, planned):
    ids = np.load(scored_run / "token_ids.npy")
    expected = drop_one_by_one(parse_spec("joint=2"), rt.load_model(tiny_run, LAST), ids)
    found = planned(tiny_run, LAST, drop="joint=2", order="iterative", scores=scored_run)
    assert (found.order, found.components) == ("iterative", expected)


@pytest.mark.slow
def test_an_export_with_code_is_pruned_again_where_its_code_may_run(tmp_path, capsys):
    once, twice = tmp_path / "out", tmp_path / "twice"
    assert pruned(tmp_path, "--format", "hf", "--drop", "attn:0")[0] == 0
    assert '"FOLDER", trust_remote_code=True' in (once / "README.md").read_text()
    again = ("--format", "zeroed", "--drop", "mlp:2")
    assert pruned(tmp_path, *again, source=once, out=twice)[0] == 1
    assert "--trust-remote-code" in capsys.readouterr().err
    assert pruned(tmp_path, *again, "--trust-remote-code", source=once, out=twice)[0] == 0
    assert '"FOLDER", trust_remote_code=True' in (twice / "README.md").read_text()
    ids = torch.from_numpy(token_ids(1))
    expected = logits_without(built("llama"), ids, {0: {"attn"}, 2: {"mlp"}})
    with torch.no_grad():
        assert torch.allclose(loaded(twice)(ids).logits, expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.slow
def test_any_revision_of_a_repository_is_pruned_by_one_command(loopback_hub, tiny_run, tmp_path, monkeypatch):
    """Its tokenizer is on `main` alone; what was fetched is let go."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loopback_hub.add_repo("me/model", revisions=branches(tiny_run))
    on_text = ("--calibration", "pydoc", "--samples", "4", "--sequence-length", "32")
    asked = ("--revision", "step2", "--endpoint", loopback_hub.url, "--format", "hf", "--drop", "attn=1", *on_text)
    code, out = pruned(tmp_path, *asked, source="me/model")
    assert code == 0
    plan, commit = rt.read_plan(out / "drop_plan.json"), loopback_hub.commit("me/model", "step2")
    assert (plan.model, plan.revision, plan.commit) == ("me/model", "step2", commit)
    card = (out / "README.md").read_text()
    assert "base_model: me/model" in card
    assert commit in card
    ids = torch.from_numpy(token_ids(1, vocab=320))
    model = rt.load_model(tiny_run, "checkpoint-2", device="cpu")
    assert torch.equal(loaded(out)(ids).logits, rt.drop_(model, plan)(ids).logits)
    assert (out / "tokenizer.json").is_file()
    assert not list((tmp_path / "cache" / "redundancy-trace").iterdir())


def test_a_run_without_scores_of_the_checkpoint_says_what_makes_them(tiny_run, scored_run, planned):
    with pytest.raises(rt.InputError, match=r"no scores of checkpoint-4 at commit .*--revisions checkpoint-4 --out"):
        planned(tiny_run, "checkpoint-4", drop="attn=1", scores=scored_run)
    with pytest.raises(rt.InputError, match=r"The run is of tiny-run.*, not of llama .*: trace --model llama"):
        planned(folder("llama"), drop="attn=1", scores=scored_run)


def test_a_folder_that_is_there_is_left_alone(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    code, out = pruned(tmp_path, "--format", "hf", "--drop", "attn:1")
    assert code == 2
    assert "is there already" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_an_export_that_fails_its_proof_is_deleted_and_so_is_what_killed_ones_left(
    whole, tmp_path, capsys, monkeypatch
):
    from redundancy_trace.pruning.formats import gguf

    left, in_use, other = (tmp_path / f".{name}.part" for name in ("out.0a", "out.1b", "mine.2c"))
    for stray in (left, in_use, other):
        (stray / "export").mkdir(parents=True)
        (stray / "export" / "model.safetensors").touch()
        for path in (stray / "export" / "model.safetensors", stray / "export", stray):
            os.utime(path, (0, 0))
    (in_use / "export" / "model.safetensors").write_text("it grows")
    monkeypatch.setattr(gguf, "_reordered", lambda *_: lambda tensor: tensor)
    code, out = pruned(tmp_path, "--format", "gguf", "--drop", "attn:1", source=whole)
    assert code == 1
    assert "does not compute what the drop in place does" in capsys.readouterr().err
    assert not out.exists()
    assert {path for path in tmp_path.iterdir() if path.name != "modules"} == {in_use, other}


def test_models_of_few_positions_are_probed_within_them():
    config = GPT2Config(vocab_size=50, n_positions=20, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    found = proving.reference_of(AutoModelForCausalLM.from_config(config).eval(), proving.probe(50, 20), torch.float32)
    assert (found.logits.shape, found.tokens.shape) == ((2, 20, 50), (19,))


@pytest.mark.parametrize(
    ("model", "revision", "told"),
    [
        ("org/name", "step8", "--model org/name --revision step8 --plan"),
        ("run", "checkpoint-8", "--model PATH/TO/run --revision checkpoint-8 --plan"),
        ("llama", "llama", "--model PATH/TO/llama --plan"),
    ],
)
def test_eval_of_a_gguf_says_what_measures_the_same_drop(model, revision, told, tmp_path, capsys):
    plan = DropPlan(model, revision, None, None, None, "attn:1", "named", 3, (DroppedComponent("attn", 1),))
    plan.write(tmp_path / "drop_plan.json")
    (tmp_path / "model.gguf").touch()
    assert cli.run(["eval", str(tmp_path)]) == 2
    assert told in capsys.readouterr().err
