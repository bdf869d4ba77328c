"""Weights that are read from a server piece by piece: the same tensors and scores, no more bytes than need be."""

import io
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from families import token_ids
from hypothesis import given
from hypothesis import strategies as st
from saved_models import CPU, apart, built, folder, save, score
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaConfig, LlamaForCausalLM

from redundancy_trace.errors import CheckpointError
from redundancy_trace.hub import Hub
from redundancy_trace.weights import open_remote_weights, open_weights
from redundancy_trace.weights.remote import RemoteWeights, merge_spans

pytestmark = pytest.mark.usefixtures("one_thread")


def served(hub, path, on_bytes=None):
    """The weights of a folder, from the Hub that serves it."""
    hub.add_repo("org/model", revisions={"main": path})
    commit = hub.commit("org/model", "main")
    client = Hub(hub.url)
    files = [f for f in client.files("org/model", commit) if f.path.endswith((".safetensors", ".bin"))]
    return client.remote_folder("org/model", commit, files, on_bytes)


def as_bin(source, path, parts=1, change=lambda state: state):
    """A folder's weights as torch files."""
    path.mkdir()
    shutil.copy(source / "config.json", path)
    weights = open_weights(source)
    state = {name: tensor.clone() for name, tensor in weights.read(weights.info).items()}
    names = list(state)
    weight_map = {}
    for number in range(parts):
        name = "pytorch_model.bin" if parts == 1 else f"pytorch_model-{number + 1:05}-of-{parts:05}.bin"
        weight_map |= dict.fromkeys(names[number::parts], name)
        torch.save(change({key: state[key] for key in names[number::parts]}), path / name)
    if parts > 1:
        (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


FORMS = {
    "safetensors": lambda family, path: folder(family),
    "shards": lambda family, path: save(built(family), path, max_shard_size="60kB"),
    "bin": lambda family, path: as_bin(folder(family), path),
    "bin shards": lambda family, path: as_bin(folder(family), path, parts=3),
    "half": lambda family, path: as_bin(
        folder(family), path, change=lambda state: {k: v.to(torch.float16) for k, v in state.items()}
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["gpt_neox", "llama_tied", "mixtral"])
def test_the_tensors_and_scores_are_those_of_the_files(loopback_hub, tmp_path, family, form):
    path = FORMS[form](family, tmp_path / "model")
    local = open_weights(path)
    remote = open_remote_weights(path, served(loopback_hub, path))
    assert dict(remote.info) == dict(local.info)
    for name, tensor in remote.read(local.info).items():
        assert torch.equal(tensor, local.read([name])[name])
    for name, info in local.info.items():
        if len(info.shape) == 2:
            rows = torch.tensor([0, 3, info.shape[0] - 1])
            assert torch.equal(remote.rows(name, rows), local.rows(name, rows))
    assert apart(score(path, weights=remote), score(path)) == 0


def test_views_and_shared_storages(loopback_hub, tmp_path):
    base = torch.randn(6, 5)
    state = {"a": base, "b": base[2:4].t(), "c": base.flatten()[3:7], "d": torch.zeros(0, 3), "e": torch.tensor(4)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    remote = open_remote_weights(tmp_path, served(loopback_hub, tmp_path))
    for name, tensor in remote.read(state).items():
        assert torch.equal(tensor, state[name])
    assert torch.equal(remote.rows("b", torch.tensor([4, 0])), state["b"][[4, 0]])


@pytest.mark.parametrize(("tied", "form"), [(False, "safetensors"), (True, "safetensors"), (False, "bin")])
def test_no_more_bytes_than_need_be(loopback_hub, tmp_path, tied, form):
    config = LlamaConfig(
        vocab_size=8192, hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    path = save(model, tmp_path / "saved")
    if form == "bin":
        path = as_bin(path, tmp_path / "bin")
    ids = np.random.default_rng(0).integers(0, 8192, size=(4, 32))
    moved = []
    remote = open_remote_weights(path, served(loopback_hub, path, moved.append))
    loopback_hub.forget_requests()
    assert apart(score(path, ids=ids, weights=remote), score(path, ids=ids)) == 0
    layers = sum(p.numel() for p in model.model.layers.parameters())
    rows = 8192 if tied else len(np.unique(ids))
    head = 0 if tied else model.lm_head.weight.numel()
    needed = 4 * (layers + rows * 128 + model.model.norm.weight.numel() + head)
    print(f"{form} tied={tied}: {sum(moved):,} bytes of {needed:,} needed: {sum(moved) / needed:.4f}")
    assert sum(moved) <= 1.02 * needed
    # Every layer lies in one piece; a word of the vocabulary costs a request at most.
    assert loopback_hub.count("GET", "*/resolve/*") <= 2 * len(np.unique(ids)) + 6 * 3 + 12


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_two_layers_at_most_are_held(loopback_hub, tmp_path, monkeypatch, form):
    """The one at work and the next: whatever the depth."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    path = save(model, tmp_path / "saved")
    if form == "bin":
        path = as_bin(path, tmp_path / "bin")
    remote = open_remote_weights(path, served(loopback_hub, path))
    read, held, most = RemoteWeights.read, [], [0]

    def watched(self, names):
        found = read(self, names)
        held.extend((StorageWeakRef(t.untyped_storage()), t.nbytes) for n, t in found.items() if ".layers." in n)
        most[0] = max(most[0], sum(size for storage, size in held if not storage.expired()))
        return found

    monkeypatch.setattr(RemoteWeights, "read", watched)
    ids = np.random.default_rng(0).integers(0, 300, size=(4, 32))
    score(path, ids=ids, weights=remote)
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    assert len(held) == 9 * 8
    assert layer < most[0] <= 2 * layer


def test_a_broken_connection_is_taken_up(loopback_hub, tmp_path):
    path = folder("gpt_neox")
    remote = open_remote_weights(path, served(loopback_hub, path))
    loopback_hub.fault("*/model.safetensors", cut_at=1000, times=5)
    loopback_hub.fault("*/model.safetensors", status=503, times=3)
    assert apart(score(path, weights=remote), score(path)) == 0


def test_a_server_that_ignores_ranges_is_told(loopback_hub, tmp_path):
    path = folder("gpt_neox")
    remote = open_remote_weights(path, served(loopback_hub, path))
    loopback_hub.fault("*/model.safetensors", whole=True, times=99)
    with pytest.raises(CheckpointError, match=r"does not serve ranges of model.safetensors.*--fetch file"):
        score(path, weights=remote)


def header(text, length=None):
    raw = text if isinstance(text, bytes) else json.dumps(text).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw


class Malicious:
    def __reduce__(self):
        return (print, ("it ran",))


def pickled(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("model.safetensors", header({}, 2**63), "its header would have 9,223"),
        ("model.safetensors", header({}, 0), "its header would have 0"),
        ("model.safetensors", header(b"not json at all"), "cannot be read"),
        ("model.safetensors", header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}), "outside"),
        (
            "model.safetensors",
            header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}) + bytes(8),
            "another size",
        ),
        (
            "model.safetensors",
            header({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}) + bytes(8),
            "outside",
        ),
        (
            "model.safetensors",
            header({"a": {"dtype": "I4", "shape": [2], "data_offsets": [0, 8]}}) + bytes(8),
            "stored as I4",
        ),
        ("model.safetensors", header({"a": [1]}), "cannot be read"),
        ("pytorch_model.bin", b"PK no zip at all" * 100, "cannot be streamed"),
        ("pytorch_model.bin", pickle.dumps({"a": 1}), "cannot be streamed"),
        ("pytorch_model.bin", pickled({"a": Malicious()}), "cannot be streamed"),
        ("pytorch_model.bin", pickled({"a": 1}), "more than tensors"),
        ("pytorch_model.bin", pickled([torch.ones(1)]), "more than tensors"),
    ],
)
def test_files_that_are_none(loopback_hub, tmp_path, capsys, name, data, told):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=told) as caught:
        open_remote_weights(tmp_path, served(loopback_hub, tmp_path))
    assert name in str(caught.value)
    assert "it ran" not in capsys.readouterr().out


@given(
    st.lists(st.tuples(st.integers(0, 500), st.integers(1, 50)).map(lambda pair: (pair[0], sum(pair))), max_size=20),
    st.integers(0, 200),
)
def test_merged_spans_hold_all_and_waste_little(spans, waste):
    merged = merge_spans(spans, waste)
    wanted = {byte for start, stop in spans for byte in range(start, stop)}
    read = {byte for start, stop in merged for byte in range(start, stop)}
    assert wanted <= read
    assert len(read - wanted) <= waste
    assert all(any(first <= start and stop <= last for first, last in merged) for start, stop in spans)
    assert merged == sorted(merged)


def test_one_calibration_for_both(loopback_hub, tmp_path):
    """The ids of the batches do not depend on where the weights are."""
    path = folder("olmo2")
    remote = open_remote_weights(path, served(loopback_hub, path))
    assert apart(score(path, ids=token_ids(3), weights=remote), score(path, ids=token_ids(3), device=CPU)) == 0
