"""OLMo's original layout: the native model that it is read as computes what Ai2's own code computed.

`data/original_olmo/make.py` made the checkpoints and the recorded numbers with that code.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import CPU, ENGINES, apart, folder, refusal, score, state_of
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OlmoConfig, OlmoForCausalLM

import redundancy_trace as rt
from redundancy_trace import cli
from redundancy_trace.errors import CheckpointError
from redundancy_trace.weights import build_empty_model, load_whole_model, open_weights
from redundancy_trace.weights.files import WeightFiles
from redundancy_trace.weights.original_olmo import is_original_olmo, native_config, native_weights

pytestmark = pytest.mark.usefixtures("one_thread")
MADE = Path(__file__).parent / "data" / "original_olmo"
MODELS = ("olmo_7b", "olmo_1b", "datadecide")
every_model = pytest.mark.parametrize("name", MODELS)
both_engines = pytest.mark.parametrize("engine", ENGINES)


def recorded(name):
    with np.load(MADE / name / "recorded.npz") as numbers:
        return dict(numbers)


def fields_of(name):
    return json.loads((MADE / name / "config.json").read_text())


def stored_in(name):
    """The tensors of one of the checkpoints, read without our code."""
    if (MADE / name / "model.safetensors").is_file():
        return load_file(MADE / name / "model.safetensors")
    return torch.load(MADE / name / "pytorch_model.bin", weights_only=True)


def rewritten(name, path, change=lambda state: state, form="safetensors", **config):
    """A copy with the tensors changed, and fields of config.json; a field of `...` is left out."""
    path.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.clone() for key, tensor in change(stored_in(name)).items()}
    if form == "safetensors":
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(state, path / "pytorch_model.bin")
    fields = {key: value for key, value in (fields_of(name) | config).items() if value is not ...}
    (path / "config.json").write_text(json.dumps(fields))
    return path


def native_by_hand(name):
    """The same weights in the native model, mapped here once more, as plainly as can be."""
    stored, fields = stored_in(name), fields_of(name)
    width, heads = fields["d_model"], fields["n_heads"]
    shared = width // heads * (fields["n_kv_heads"] or heads)
    inner = stored["model.transformer.blocks.0.ff_out.weight"].shape[1]
    config = {
        "vocab_size": fields["embedding_size"] or fields["vocab_size"],
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "num_key_value_heads": shared // (width // heads),
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["rope_theta"]},
        "tie_word_embeddings": fields["weight_tying"],
        "pad_token_id": None,
    }
    if name == "datadecide":
        model = LlamaForCausalLM(LlamaConfig(**config, rms_norm_eps=1e-6))
    else:
        model = OlmoForCausalLM(OlmoConfig(**config, clip_qkv=fields["clip_qkv"]))
    state = {"model.embed_tokens.weight": stored["model.transformer.wte.weight"]}
    for layer in range(3):
        block = {part: stored.get(f"model.transformer.blocks.{layer}.{part}.weight") for part in PARTS}
        q, k, v = block["att_proj"].split([width, shared, shared])
        up, gate = block["ff_proj"].chunk(2)
        own = {
            "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": block["attn_out"],
            "mlp.up_proj": up, "mlp.gate_proj": gate, "mlp.down_proj": block["ff_out"],
            "input_layernorm": block["attn_norm"], "post_attention_layernorm": block["ff_norm"],
        }  # fmt: skip
        state |= {f"model.layers.{layer}.{part}.weight": t for part, t in own.items() if t is not None}
    if name == "datadecide":
        state["model.norm.weight"] = stored["model.transformer.ln_f.weight"]
    head = "embed_tokens" if fields["weight_tying"] else None
    state["lm_head.weight"] = state["model.embed_tokens.weight"] if head else stored["model.transformer.ff_out.weight"]
    model.load_state_dict(state, strict=True)
    return model.eval()


PARTS = ("att_proj", "attn_out", "ff_proj", "ff_out", "attn_norm", "ff_norm")


def whole(path):
    return load_whole_model(path, device=CPU, dtype=torch.float32)


def streamed(path):
    """The model of the streaming engine, with every tensor loaded."""
    empty = build_empty_model(path, device=CPU, dtype=torch.float32)
    assert all(parameter.is_meta for parameter in empty.model.parameters())
    empty.load_(empty.targets)
    empty.load_head_()
    return empty.model


@every_model
@pytest.mark.parametrize("load", [whole, streamed])
def test_computes_what_ai2s_own_code_computed(name, load):
    model, expected = load(MADE / name), recorded(name)
    with torch.no_grad():
        output = model(torch.tensor(expected["token_ids"]), output_hidden_states=True)
    hidden = torch.stack(output.hidden_states).numpy()
    assert hidden.shape == expected["hidden"].shape == (4, 3, 24, 32)
    # Processors add in orders of their own: up to 3.3e-6 was seen, of states up to 5.
    assert np.abs(hidden - expected["hidden"]).max() < 1e-5
    assert np.abs(output.logits.numpy() - expected["logits"]).max() < 1e-5
    assert np.abs(expected["logits"]).max() > 5  # no fresh model, of which everything is near 0


@every_model
def test_the_clip_and_the_order_of_the_halves_matter_to_these_numbers(name, tmp_path):
    """That a slip in the mapping would be seen."""
    expected = recorded(name)

    def off(path):
        with torch.no_grad():
            return np.abs(whole(path)(torch.tensor(expected["token_ids"])).logits.numpy() - expected["logits"]).max()

    def halves_changed(state):
        return {key: tensor.roll(len(tensor) // 2, 0) if "ff_proj" in key else tensor for key, tensor in state.items()}

    assert off(rewritten(name, tmp_path / "halves", halves_changed)) > 0.1
    assert off(rewritten(name, tmp_path / "theta", rope_theta=77)) > 0.1
    if name == "olmo_7b":
        assert off(rewritten(name, tmp_path / "clip", clip_qkv=None)) > 0.1


@every_model
@both_engines
def test_scores_are_those_of_the_native_model(name, engine, tmp_path):
    native_by_hand(name).save_pretrained(tmp_path)
    ids = recorded(name)["token_ids"]
    assert apart(score(MADE / name, engine, ids), score(tmp_path, engine, ids)) < 1e-6


@both_engines
def test_both_engines_agree_with_each_other_in_bfloat16_too(engine):
    ids = recorded("olmo_7b")["token_ids"]
    stream = score(MADE / "olmo_7b", "stream", ids, dtype=torch.bfloat16)
    assert apart(stream, score(MADE / "olmo_7b", engine, ids, dtype=torch.bfloat16)) == 0


@every_model
@both_engines
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_form_prefix_and_model_type_do_not_matter(name, engine, form, tmp_path):
    ids = recorded(name)["token_ids"]
    expected = score(MADE / name, engine, ids)

    def unprefixed(state):
        return {key.removeprefix("model."): tensor for key, tensor in state.items()}

    for number, (change, model_type) in enumerate(((unprefixed, "olmo"), (lambda state: state, ...))):
        path = rewritten(name, tmp_path / str(number), change, form, model_type=model_type)
        assert apart(score(path, engine, ids), expected) == 0


@both_engines
def test_shards(engine, tmp_path):
    state, ids = stored_in("olmo_7b"), recorded("olmo_7b")["token_ids"]
    places = {key: f"pytorch_model-{1 + i % 2:05d}-of-00002.bin" for i, key in enumerate(state)}
    for file in set(places.values()):
        torch.save({key: tensor.clone() for key, tensor in state.items() if places[key] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    shutil.copy(MADE / "olmo_7b" / "config.json", tmp_path)
    assert apart(score(tmp_path, engine, ids), score(MADE / "olmo_7b", engine, ids)) == 0


@both_engines
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_half_precision_files(engine, form, tmp_path):
    ids = recorded("datadecide")["token_ids"]

    def rounded(state):
        return {key: tensor.bfloat16() for key, tensor in state.items()}

    path = rewritten("datadecide", tmp_path / "half", rounded, form)
    same = rewritten("datadecide", tmp_path / "float", lambda s: {k: t.float() for k, t in rounded(s).items()})
    assert apart(score(path, engine, ids), score(same, engine, ids)) == 0


def test_fields_that_old_files_lack_are_what_ai2s_code_takes_them_for(tmp_path):
    newer = (
        "n_kv_heads",
        "rope_theta",
        "layer_norm_eps",
        "norm_after",
        "embedding_layer_norm",
        "clip_qkv",
        "emb_init_std",
    )
    old = rewritten("datadecide", tmp_path / "old", **dict.fromkeys(newer, ...), layer_norm_type="rms")
    told = rewritten("datadecide", tmp_path / "told", rope_theta=10000, layer_norm_eps=1e-5)
    ids = recorded("datadecide")["token_ids"]
    assert apart(score(old, ids=ids), score(told, ids=ids)) == 0


def test_the_mlp_ratio_of_zero_beside_a_hidden_size_is_not_asked(tmp_path):
    path = rewritten("olmo_7b", tmp_path, mlp_ratio=0)
    assert whole(path).config.intermediate_size == 44


def test_older_field_of_shared_heads():
    fields = fields_of("olmo_1b")
    older = fields | {"n_kv_heads": None, "multi_query_attention": True}
    assert native_config(older, Path("config.json")).num_key_value_heads == 1
    assert native_config(older | {"multi_query_attention": False}, Path("config.json")).num_key_value_heads == 4
    assert native_config(fields | {"multi_query_attention": None}, Path("config.json")).num_key_value_heads == 2
    with pytest.raises(CheckpointError, match="n_kv_heads = 2 and multi_query_attention = True contradict"):
        native_config(fields | {"multi_query_attention": True}, Path("config.json"))


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        *((name, field, value) for name in ("olmo_7b", "datadecide") for field, value in (
            ("alibi", True), ("rope", False), ("attention_layer_norm", True), ("embedding_layer_norm", True),
            ("include_bias", True), ("scale_logits", True), ("norm_after", True), ("block_type", "llama"),
            ("block_type", "parallel"), ("block_group_size", 3), ("activation_type", "gelu"),
            ("layer_norm_type", "low_precision_rms"),
        )),
        ("olmo_7b", "layer_norm_with_affine", True),
        ("olmo_7b", "layer_norm_eps", 1e-6),
        ("datadecide", "layer_norm_with_affine", False),
        ("datadecide", "bias_for_layer_norm", True),
        ("datadecide", "clip_qkv", 8.0),
    ],
)  # fmt: skip
def test_what_no_native_model_computes_is_refused_by_name(name, field, value, tmp_path):
    message = refusal(rewritten(name, tmp_path, **{field: value}))
    assert message.startswith(f"{tmp_path / 'config.json'} describes an original OLMo that cannot be read as ")
    assert f"{field} = {value!r}, not " in message


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_layers", "3"), ("n_heads", 0), ("d_model", None), ("mlp_hidden_size", -8), ("n_heads", 5), ("n_layers", True),
     ("weight_tying", "no"), ("rope_theta", None), ("max_sequence_length", 1.5), ("vocab_size", ...)],
)  # fmt: skip
def test_fields_that_are_no_numbers_are_refused(field, value, tmp_path):
    changes = {field: value} | ({"embedding_size": None} if field == "vocab_size" else {})
    assert str(tmp_path) in refusal(rewritten("olmo_7b", tmp_path, **changes))


def test_missing_unexpected_and_misshapen_tensors_go_by_their_stored_names(tmp_path):
    fused, mlp = "model.transformer.blocks.1.att_proj.weight", "model.transformer.blocks.2.ff_proj.weight"

    def without(name):
        return lambda state: {key: tensor for key, tensor in state.items() if key != name}

    message = refusal(rewritten("olmo_7b", tmp_path / "a", without(fused)))
    assert f"1 tensor is missing: {fused}." in message
    assert str(tmp_path / "a") in message
    message = refusal(rewritten("olmo_7b", tmp_path / "b", lambda s: s | {"model.transformer.wpe.weight": s[fused]}))
    assert "1 tensor is unexpected: model.transformer.wpe.weight." in message
    message = refusal(rewritten("olmo_7b", tmp_path / "c", lambda s: s | {mlp: s[mlp][:-2]}))
    assert f"1 tensor is misshapen: {mlp} (86, 32) for (88, 32)." in message
    message = refusal(rewritten("olmo_7b", tmp_path / "d", without("model.transformer.ff_out.weight")))
    assert "1 tensor is missing: model.transformer.ff_out.weight." in message
    message = refusal(rewritten("olmo_1b", tmp_path / "e", n_layers=4))
    assert "4 tensors are missing: model.transformer.blocks.3.att_proj.weight, " in message
    message = refusal(rewritten("olmo_7b", tmp_path / "f", embedding_size=101))
    assert "model.transformer.wte.weight (128, 32) for (101, 32)" in message
    # Norms with weights under a configuration without them.
    message = refusal(rewritten("datadecide", tmp_path / "g", layer_norm_type="default", layer_norm_with_affine=False,
                                layer_norm_eps=1e-5))  # fmt: skip
    assert "7 tensors are unexpected: model.transformer.blocks.0.attn_norm.weight" in message


def test_a_tied_model_with_a_head_in_its_file_is_refused(tmp_path):
    """Ai2's code has no place for it there and takes the embedding."""

    def with_head(state):
        return state | {"model.transformer.ff_out.weight": state["model.transformer.wte.weight"]}

    message = refusal(rewritten("olmo_1b", tmp_path, with_head))
    assert "1 tensor is unexpected: model.transformer.ff_out.weight." in message


def test_a_layer_is_read_alone_and_of_fused_tensors_only_the_rows():
    asked = []

    class Watched:
        def __init__(self, name, tensor):
            self.name, self.tensor = name, tensor

        def __getitem__(self, index):
            asked.append((self.name, index))
            return self.tensor[index]

    weights, state = open_weights(MADE / "datadecide"), state_of(MADE / "datadecide")
    watched = WeightFiles(weights.folder, weights.info, {name: Watched(name, t) for name, t in state.items()})
    native = native_weights(watched, native_config(fields_of("datadecide"), MADE))
    assert asked == []
    read = native.read(["model.layers.1.self_attn.k_proj.weight"])["model.layers.1.self_attn.k_proj.weight"]
    fused = "model.transformer.blocks.1.att_proj.weight"
    assert asked == [(fused, slice(32, 64))]
    assert torch.equal(read, state[fused][32:64])
    assert native.info["model.layers.1.self_attn.k_proj.weight"].shape == (32, 32)

    empty = build_empty_model(MADE / "datadecide", device=CPU, dtype=torch.float32)
    empty.load_(empty.stored_names("model.layers.1"))
    layers = empty.model.model.layers
    assert not any(parameter.is_meta for parameter in layers[1].parameters())
    assert all(parameter.is_meta for parameter in layers[0].parameters())
    assert empty.model.model.embed_tokens.weight.is_meta


def test_fused_tensors_of_a_torch_file_are_views():
    weights = open_weights(MADE / "olmo_7b")
    native = native_weights(weights, native_config(fields_of("olmo_7b"), MADE))
    name, layer = "model.transformer.blocks.0.ff_proj.weight", "model.layers.0.mlp"
    stored = weights.read([name])[name]
    up, gate = native.read([f"{layer}.up_proj.weight", f"{layer}.gate_proj.weight"]).values()
    assert up.data_ptr() == stored.data_ptr()
    assert gate.data_ptr() == stored[44:].data_ptr()


def test_other_layouts_are_not_taken_for_it():
    fields, names = fields_of("olmo_7b"), list(stored_in("olmo_7b"))
    assert is_original_olmo(fields, names)
    assert is_original_olmo(fields, [name.removeprefix("model.") for name in names])
    mpt = folder("mpt")
    assert "d_model" in json.loads((mpt / "config.json").read_text())
    for family in ("mpt", "olmo", "gpt2"):
        config = json.loads((folder(family) / "config.json").read_text())
        assert not is_original_olmo(config, state_of(folder(family)))
        assert not is_original_olmo(fields, state_of(folder(family)))
        assert not is_original_olmo(config | {"d_model": ...} if family == "olmo" else {}, state_of(folder(family)))
    assert not is_original_olmo([], names)


def test_native_weights_under_a_configuration_of_the_original_are_refused(tmp_path):
    """`olmo` of transformers ignores `d_model` and would make a model of 7 billion numbers."""
    save_file(state_of(folder("olmo")), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(fields_of("olmo_7b") | {"model_type": "olmo"}))
    assert "are not those of its config.json" in refusal(tmp_path)


@both_engines
def test_its_own_model_code_is_not_run(engine, tmp_path):
    """`--trust-remote-code` changes nothing: what can be read natively is."""
    path = rewritten("olmo_7b", tmp_path, auto_map={
        "AutoConfig": "its_own.OLMoConfig", "AutoModelForCausalLM": "its_own.OLMoForCausalLM",
    })  # fmt: skip
    ran = tmp_path / "ran"
    (path / "its_own.py").write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\n")
    ids = recorded("olmo_7b")["token_ids"]
    assert apart(score(path, engine, ids, trust_remote_code=True), score(MADE / "olmo_7b", engine, ids)) == 0
    assert not ran.exists()


@every_model
def test_it_is_streamed_from_a_server(loopback_hub, name):
    """A fused tensor is asked for once for all that lies in it."""
    from test_remote import served

    from redundancy_trace.weights import open_remote_weights

    ids, moved = recorded(name)["token_ids"], []
    remote = open_remote_weights(MADE / name, served(loopback_hub, MADE / name, moved.append))
    assert apart(score(MADE / name, ids=ids, weights=remote), score(MADE / name, ids=ids)) == 0
    assert sum(moved) < 1.1 * sum(tensor.numel() * 4 for tensor in stored_in(name).values())


def test_a_sweep_over_it(loopback_hub, tmp_path, no_figures):
    """As allenai/OLMo-7B publishes it: a branch a step, and a config.json that says `olmo`."""
    steps = {"step0-tokens0B": 0.5, "step1000-tokens4B": 1.0}
    for name, factor in steps.items():
        rewritten(
            "olmo_7b",
            tmp_path / name,
            lambda state, factor=factor: {key: tensor * factor for key, tensor in state.items()},
            model_type="olmo",
        )
    loopback_hub.add_repo("allenai/OLMo-7B", revisions={name: tmp_path / name for name in steps})
    np.save(tmp_path / "ids.npy", recorded("olmo_7b")["token_ids"])
    arguments = ["--model", "allenai/OLMo-7B", "--revisions", "all", "--endpoint", loopback_hub.url]
    arguments += ["--calibration", f"tokens:{tmp_path / 'ids.npy'}", "--samples", "2"]
    frames = []
    for how in ("file", "stream"):
        assert cli.run([*arguments, "--fetch", how, "--out", str(tmp_path / how)]) == 0
        frames.append(rt.read_scores(tmp_path / how))
    assert frames[0].equals(frames[1])
    assert frames[0]["tokens"].unique(maintain_order=True).to_list() == [0, 4 * 10**9]
    alone = rt.score_model(tmp_path / "step1000-tokens4B", recorded("olmo_7b")["token_ids"][:2])
    assert sorted(frames[0].filter(step=1000)["value"]) == sorted(alone["value"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"n_heads": 5}, "d_model = 32 is no multiple of n_heads = 5"),
        ({"n_kv_heads": 3}, "n_heads = 4 is no multiple of n_kv_heads = 3"),
        ({"mlp_hidden_size": 97}, "mlp_hidden_size = 97 is odd"),
        ({"clip_qkv": -1}, "clip_qkv = -1 is no positive number"),
        ({"clip_qkv": "much"}, "clip_qkv = 'much' is no positive number"),
    ],
)
def test_sizes_that_do_not_fit_each_other(change, told):
    with pytest.raises(CheckpointError, match=told):
        native_config(fields_of("olmo_7b") | {"multi_query_attention": None} | change, MADE / "config.json")


@every_model
def test_it_is_pruned_and_the_export_is_a_native_model(name, tmp_path, capsys):
    """The last block has gone: Ai2's own code told what goes into it, and that is what the final norm gets."""
    arguments = ["--drop", "block:2", "--format", "native", "--out", str(tmp_path / "out"), "--quiet"]
    assert cli.run(["prune", "--model", str(MADE / name), *arguments]) == 0, capsys.readouterr().err
    pruned, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert type(pruned) is (LlamaForCausalLM if name == "datadecide" else OlmoForCausalLM)
    numbers, by_hand = recorded(name), native_by_hand(name)
    with torch.no_grad():
        found = pruned.eval()(torch.from_numpy(numbers["token_ids"]), use_cache=False).logits
        expected = by_hand.lm_head(by_hand.model.norm(torch.from_numpy(numbers["hidden"][2])))
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
