"""Weight files of every form give the same scores; what is not exactly the model's weights is refused by name."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from families import VOCAB, build, token_ids
from reference_scores import reference_scores
from safetensors.torch import load_file, save_file
from saved_models import (
    CPU,
    ENGINES,
    apart,
    built,
    difference,
    folder,
    reference,
    refusal,
    rewrite,
    save,
    score,
    scored,
    state_of,
)

from redundancy_trace.errors import CheckpointError
from redundancy_trace.weights import build_empty_model, load_whole_model, open_weights, read_config, release_

pytestmark = pytest.mark.usefixtures("one_thread")
both_engines = pytest.mark.parametrize("engine", ENGINES)


def as_bin(source, path, state=None, **settings):
    """A folder with the same tensors in a torch zip."""
    path.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "config.json", path)
    torch.save(state_of(source) if state is None else state, path / "pytorch_model.bin", **settings)
    return path


def as_shards(source, path, suffix):
    """A folder with the same tensors in two shards and an index."""
    path.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "config.json", path)
    state = state_of(source)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    places = {name: f"{stem}-{1 + i % 2:05d}-of-00002.{suffix}" for i, name in enumerate(state)}
    for file in set(places.values()):
        part = {name: tensor for name, tensor in state.items() if places[name] == file}
        if suffix == "safetensors":
            save_file(part, path / file, metadata={"format": "pt"})
        else:
            torch.save(part, path / file)
    index = {"metadata": {}, "weight_map": places}
    (path / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return path


@both_engines
@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("form", ["safetensors shards", "bin", "bin shards"])
def test_every_form_of_file_gives_the_same_scores(family, form, engine, tmp_path):
    if form == "bin":
        path = as_bin(folder(family), tmp_path)
    else:
        path = as_shards(folder(family), tmp_path, "bin" if "bin" in form else "safetensors")
    assert apart(score(path, engine), scored(family, engine)) == 0


def test_what_transformers_shards_itself_is_read(tmp_path):
    path = save(built("gpt_neox"), tmp_path, max_shard_size="100KB")
    assert len(list(path.glob("model-*.safetensors"))) > 2
    assert apart(score(path), scored("gpt_neox", "stream")) == 0


def test_torch_files_from_before_the_zip_are_read(tmp_path):
    path = as_bin(folder("gpt2"), tmp_path, _use_new_zipfile_serialization=False)
    assert apart(score(path), scored("gpt2", "stream")) == 0


@both_engines
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_half_precision_files_are_computed_in_float32(dtype, form, engine, tmp_path):
    def half(state):
        return {name: tensor.to(dtype) for name, tensor in state.items()}

    path = rewrite(folder("gpt_neox"), tmp_path / "a", half)
    if form == "bin":
        path = as_bin(path, tmp_path / "b")
    rounded = build("gpt_neox")
    rounded.load_state_dict({name: tensor.to(dtype).float() for name, tensor in rounded.state_dict().items()})
    worst = difference(score(path, engine), reference_scores(rounded, token_ids()))
    assert max(worst.values()) < 1e-5


@both_engines
def test_tied_heads_may_be_in_the_file_or_not(engine, tmp_path):
    tied = folder("llama_tied")
    assert "lm_head.weight" not in state_of(tied)
    copied = rewrite(tied, tmp_path / "copy", lambda s: s | {"lm_head.weight": s["model.embed_tokens.weight"].clone()})
    assert apart(score(copied, engine), scored("llama_tied", engine)) == 0

    def head_only(state):
        matrix = state.pop("model.embed_tokens.weight")
        return state | {"lm_head.weight": matrix}

    assert apart(score(rewrite(tied, tmp_path / "head", head_only), engine), scored("llama_tied", engine)) == 0


def test_a_head_of_its_own_wins_over_the_tie(tmp_path):
    """As in transformers: the file knows better than the configuration."""
    path = rewrite(
        folder("llama_tied"), tmp_path, lambda s: s | {"lm_head.weight": s["model.embed_tokens.weight"].flip(0)}
    )
    stream, whole = (score(path, engine) for engine in ENGINES)
    assert apart(stream, whole) < 1e-6
    assert stream.values[-1].value != scored("llama_tied", "stream").values[-1].value


@both_engines
def test_padded_vocabulary(engine, tmp_path):
    """More rows than the tokenizer has tokens, as Pythia and OLMo have."""
    path = tmp_path / "padded"
    model = build("gpt_neox")
    model.resize_token_embeddings(192, mean_resizing=False)
    save(model, path)
    worst = difference(score(path, engine), reference_scores(model, token_ids()))
    assert max(worst.values()) < 1e-5


@both_engines
def test_buffers_that_old_files_carry_are_no_error(engine, tmp_path):
    def with_buffers(state):
        for layer in range(3):
            attention = f"gpt_neox.layers.{layer}.attention"
            state[f"{attention}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
            state[f"{attention}.masked_bias"] = torch.tensor(-1e9)
            state[f"{attention}.rotary_emb.inv_freq"] = torch.ones(4)
        return state

    path = rewrite(folder("gpt_neox"), tmp_path / "a", with_buffers)
    assert apart(score(path, engine), scored("gpt_neox", engine)) == 0
    assert apart(score(as_bin(path, tmp_path / "b"), engine), scored("gpt_neox", engine)) == 0


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"

    def without(state):
        del state[name]
        return state

    message = refusal(rewrite(folder("qwen3"), tmp_path / "a", without))
    assert f"1 tensor is missing: {name}." in message
    assert str(tmp_path / "a") in message
    message = refusal(rewrite(folder("qwen3"), tmp_path / "b", lambda s: s | {"model.extra": torch.ones(3)}))
    assert "1 tensor is unexpected: model.extra." in message
    message = refusal(rewrite(folder("qwen3"), tmp_path / "c", lambda s: s | {name: s[name][:5].clone()}))
    assert f"1 tensor is misshapen: {name} (5, 48) for (72, 48)." in message
    message = refusal(rewrite(folder("olmo"), tmp_path / "d", num_hidden_layers=5))
    assert "14 tensors are missing: model.layers.3.mlp.down_proj.weight, " in message
    assert "and 11 more" in message
    message = refusal(rewrite(folder("olmo"), tmp_path / "e", num_hidden_layers=2))
    assert "7 tensors are unexpected: model.layers.2.mlp.down_proj.weight, " in message


def test_missing_expert_is_named(tmp_path):
    name = next(name for name in state_of(folder("mixtral")) if "layers.1" in name and "experts.3" in name)

    def without(state):
        del state[name]
        return state

    assert "model.layers.1.mlp.experts" in refusal(rewrite(folder("mixtral"), tmp_path, without))


def test_missing_head_or_embedding_is_no_tie(tmp_path):
    def without(name):
        return lambda state: {key: tensor for key, tensor in state.items() if key != name}

    for number, name in enumerate(("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight")):
        message = refusal(rewrite(folder("llama"), tmp_path / str(number), without(name)))
        assert f"1 tensor is missing: {name}." in message
    message = refusal(rewrite(folder("llama_tied"), tmp_path / "tied", without("model.embed_tokens.weight")))
    assert "model.embed_tokens.weight" in message


def test_weights_of_another_architecture_are_refused(tmp_path):
    """The original OLMo files carry hf_olmo's names under a config.json that says olmo."""

    def original(state):
        return {
            "model.transformer.wte.weight": state["model.embed_tokens.weight"],
            "model.transformer.blocks.0.att_proj.weight": torch.ones(4, 4),
        }

    message = refusal(rewrite(folder("olmo"), tmp_path / "a", original))
    assert "are not those of its config.json" in message
    assert "23 tensors are missing" in message
    assert "2 tensors are unexpected: model.transformer.blocks.0.att_proj.weight" in message
    message = refusal(rewrite(folder("olmo"), tmp_path / "b", model_type="hf_olmo"))
    assert "config.json cannot be used" in message
    assert "hf_olmo" in message
    message = refusal(rewrite(folder("llama"), tmp_path / "c", model_type="t5", architectures=None))
    assert "no causal language model" in message


def test_configurations_that_cannot_be_read(tmp_path):
    path = rewrite(folder("llama"), tmp_path)
    for text, told in (("{", "is no valid JSON"), ("[]", "cannot be used"), ('{"hidden_size": 8}', "cannot be used")):
        (path / "config.json").write_text(text)
        assert told in refusal(path)
    (path / "config.json").unlink()
    assert f"{path} has no config.json" in refusal(path)


@pytest.mark.parametrize("length", [0, 5, 100, -1000])
def test_truncated_files_are_told(length, tmp_path):
    for form in ("safetensors", "bin", "old bin"):
        path = tmp_path / form
        if form == "safetensors":
            file = rewrite(folder("llama"), path) / "model.safetensors"
        else:
            file = as_bin(folder("llama"), path, _use_new_zipfile_serialization=form == "bin") / "pytorch_model.bin"
        file.write_bytes(file.read_bytes()[:length])
        message = refusal(path)
        assert message.startswith(f"{file} (")
        assert "truncated" in message


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        b"<html><body>504 Gateway Time-out</body></html>",
        b"\x80\x02garbage",
        b"\x00" * 64,
        b"PK\x03\x04" + b"\x00" * 64,
    ],
)
def test_files_that_hold_something_else_are_told(content, tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = tmp_path / name
        path.mkdir()
        shutil.copy(folder("llama") / "config.json", path)
        (path / name).write_bytes(content)
        assert refusal(path).startswith(f"{path / name} (")


def test_missing_shards_and_indexes_are_told(tmp_path):
    path = as_shards(folder("llama"), tmp_path / "a", "safetensors")
    (path / "model-00002-of-00002.safetensors").unlink()
    assert refusal(path) == f"{path} lacks 1 of its 2 weight shards: model-00002-of-00002.safetensors."
    whole = open_weights(folder("llama"))
    torch.save(whole.read(whole.info), path / "pytorch_model.bin")
    assert set(open_weights(path).info) == set(whole.info), "the set that is whole is taken"
    (path / "pytorch_model.bin").unlink()
    for text in ("{", "{}", '{"weight_map": []}', '{"weight_map": 3}'):
        (path / "model.safetensors.index.json").write_text(text)
        assert "is no index of weight shards" in refusal(path)
    (path / "model.safetensors.index.json").unlink()
    assert "has no weights" in refusal(path)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_never_runs(zipped, tmp_path):
    sprung = tmp_path / "sprung"
    state = state_of(folder("llama")) | {"trap": Trap(sprung)}
    path = as_bin(folder("llama"), tmp_path / "model", state, _use_new_zipfile_serialization=zipped)
    message = refusal(path)
    assert "is not opened for that reason" in message
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(state))
    assert "is not opened for that reason" in refusal(path)
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()  # the trap works


def test_more_than_tensors_is_told(tmp_path):
    path = as_bin(folder("llama"), tmp_path, {"model": state_of(folder("llama")), "step": 3})
    assert "holds more than tensors (model, step)" in refusal(path)
    torch.save(torch.ones(3), path / "pytorch_model.bin")
    assert "no model's weights" in refusal(path)
    torch.save({}, path / "pytorch_model.bin")
    assert "holds no tensors" in refusal(path)


def test_quantised_weights_are_told(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    path = rewrite(folder("qwen3"), tmp_path, lambda s: s | {name: s[name].to(torch.float8_e4m3fn)})
    assert f"tensor {name} is stored as F8_E4M3" in refusal(path)


@both_engines
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize(
    ("family", "name", "layer"),
    [
        ("llama", "model.layers.0.mlp.up_proj.weight", 0),
        ("llama", "model.layers.1.self_attn.v_proj.weight", 1),
        ("glm4_moe", "model.layers.1.self_attn.o_proj.weight", 1),  # the first of its kind
        ("olmo3", "model.layers.0.mlp.down_proj.weight", 0),  # layer 1 is of another kind
        ("olmo3", "model.layers.2.self_attn.o_proj.weight", 2),
    ],
)
def test_weights_that_are_not_finite_name_layer_and_dtype(family, name, layer, value, engine, tmp_path):
    def broken(state):
        state[name][0] = value
        return state

    path = rewrite(folder(family), tmp_path, broken)
    with pytest.raises(CheckpointError, match=rf"layer {layer} is not finite in float32.*weights themselves"):
        score(path, engine)


@both_engines
def test_embedding_that_is_not_finite_is_told(engine, tmp_path):
    def broken(state):
        state["model.embed_tokens.weight"][:] = torch.nan
        return state

    with pytest.raises(CheckpointError, match="not finite in float32"):
        score(rewrite(folder("llama"), tmp_path, broken), engine)


@both_engines
def test_what_only_bfloat16_cannot_hold_says_so(engine, tmp_path):
    """3.4e38 is a float32 and rounds to infinity in bfloat16."""

    def large(state):
        state["model.layers.1.input_layernorm.weight"][0] = 3.4e38
        for part in "qkv":
            state[f"model.layers.1.self_attn.{part}_proj.weight"][:, 0] = 0
        # |normed| < 1 there, so that float32 holds the product.
        state["model.embed_tokens.weight"][:, 0] = 0
        for layer in range(3):
            for projection in ("self_attn.o_proj", "mlp.down_proj"):
                state[f"model.layers.{layer}.{projection}.weight"][0] = 0
                state[f"model.layers.{layer}.{projection}.bias"][0] = 0.01
        return state

    path = rewrite(folder("llama"), tmp_path, large)
    score(path, engine)
    with pytest.raises(CheckpointError, match=r"layer 1 is not finite in bfloat16.*--dtype float32"):
        score(path, engine, dtype=torch.bfloat16)


def test_folder_without_weights(tmp_path):
    shutil.copy(folder("llama") / "config.json", tmp_path)
    message = refusal(tmp_path)
    assert "has no weights" in message
    assert "model.safetensors" in message


def test_headers_alone_match_files_and_parameters():
    empty = build_empty_model(folder("mixtral"), device=CPU, dtype=torch.float32)
    assert all(parameter.is_meta for parameter in empty.model.parameters())
    stored = load_file(folder("mixtral") / "model.safetensors")
    assert set(empty.targets) == set(stored)
    assert {name: info.shape for name, info in empty.weights.info.items()} == {n: t.shape for n, t in stored.items()}
    names = empty.stored_names("model.layers.1")
    assert names
    assert all("layers.1." in name for name in names)
    layers = empty.model.model.layers
    empty.load_(names)
    assert not any(parameter.is_meta for parameter in layers[1].parameters())
    assert all(parameter.is_meta for parameter in layers[0].parameters())
    expected = load_whole_model(folder("mixtral"), device=CPU, dtype=torch.float32).model.layers[1].state_dict()
    for name, tensor in layers[1].state_dict().items():
        assert torch.equal(tensor, expected[name])
    release_(layers[1])
    assert all(parameter.is_meta for parameter in layers[1].parameters())


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_rows_of_a_matrix(form, tmp_path):
    path = folder("llama") if form == "safetensors" else as_bin(folder("llama"), tmp_path)
    name, rows = "model.embed_tokens.weight", torch.tensor([3, 0, VOCAB - 1])
    weights = open_weights(path)
    assert torch.equal(weights.rows(name, rows), state_of(folder("llama"))[name][rows])
    assert torch.equal(weights.read([name])[name], state_of(folder("llama"))[name])


def test_buffers_are_those_of_a_loaded_model_in_any_dtype():
    for family in ("gptj", "gemma3", "bloom"):
        for dtype in (torch.float32, torch.bfloat16):
            empty = build_empty_model(folder(family), device=CPU, dtype=dtype).model
            loaded = dict(load_whole_model(folder(family), device=CPU, dtype=dtype).named_buffers())
            for name, buffer in empty.named_buffers():
                assert buffer.dtype == loaded[name].dtype
                assert torch.equal(buffer, loaded[name])


def test_parameters_that_stay_in_float32_do_so():
    empty = build_empty_model(folder("glm4_moe"), device=CPU, dtype=torch.bfloat16)
    empty.load_(empty.stored_names("model.layers.1"))
    gate = empty.model.model.layers[1].mlp.gate
    loaded = load_whole_model(folder("glm4_moe"), device=CPU, dtype=torch.bfloat16).model.layers[1].mlp.gate
    assert gate.e_score_correction_bias.dtype == loaded.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(gate.e_score_correction_bias, loaded.e_score_correction_bias)


def test_config_is_read_without_noise(capfd):
    config = read_config(Path(__file__).parent / "golden" / "llama")
    assert config.num_hidden_layers == 8
    assert capfd.readouterr() == ("", "")


def test_reference_is_met_on_the_files_of_these_tests():
    assert max(difference(scored("llama", "stream"), reference("llama")).values()) < 1e-5
