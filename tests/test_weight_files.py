"""Weight files that somebody else has made: nothing in them runs, leads elsewhere or takes memory; all is told."""

import collections
import json
import os
import pickle
import random
import shutil
import struct
import tracemalloc
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from saved_models import folder, refusal, score, scored, state_of

from redundancy_trace.errors import CheckpointError
from redundancy_trace.weights import open_weights

pytestmark = pytest.mark.usefixtures("one_thread")
SAFETENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def refused(path):
    with pytest.raises(CheckpointError) as told:
        open_weights(path)
    return str(told.value)


def with_config(path):
    path.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder("llama") / "config.json", path)
    return path


def header(content, data=b"", length=None):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def sharded(path, suffix="safetensors", states=None, weight_map=None):
    """Two shards and an index of one's own words."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    states = states or [{"a": torch.ones(2)}, {"b": torch.ones(3)}]
    names = [f"{stem}-{number:05d}-of-00002.{suffix}" for number in (1, 2)]
    for name, state in zip(names, states, strict=True):
        if suffix == "safetensors":
            save_file(state, path / name)
        else:
            torch.save(state, path / name)
    places = {tensor: name for name, state in zip(names, states, strict=True) for tensor in state}
    index = path / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": places | (weight_map or {})}))
    return index


class Reduced:
    """Pickled as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False, None])
@pytest.mark.parametrize(
    ("function", "told"),
    [(os.system, f"{os.name}.system"), (eval, "eval"), (exec, "exec"), (shutil.rmtree, "shutil.rmtree")],
)
def test_a_pickle_that_runs_something_is_refused_naming_file_and_function(function, told, zipped, tmp_path):
    sprung = tmp_path / "sprung"
    call = {os.system: f"touch {sprung}", shutil.rmtree: str(sprung)}.get(function, f"open({str(sprung)!r}, 'w')")
    if function is shutil.rmtree:
        sprung.mkdir()
    path = with_config(tmp_path / "model")
    state = {"a": torch.ones(2), "b": Reduced(function, call)}
    if zipped is None:
        (path / "pytorch_model.bin").write_bytes(pickle.dumps({"b": state["b"]}, protocol=2))
    else:
        torch.save(state, path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    message = refusal(path)
    assert message.startswith(f"{path / 'pytorch_model.bin'} (")
    assert f"asks for {told} when it is opened" in message
    assert "weights_only" not in message  # torch's own message tells how to run it all the same
    assert sprung.exists() == (function is shutil.rmtree)


def test_a_shard_is_opened_no_less_carefully(tmp_path):
    sharded(tmp_path, "bin")
    shard, sprung = tmp_path / "pytorch_model-00002-of-00002.bin", tmp_path / "sprung"
    torch.save({"b": Reduced(os.system, f"touch {sprung}")}, shard)
    assert refused(tmp_path).startswith(f"{shard} ({shard.stat().st_size:,} bytes) asks for {os.name}.system ")
    assert not sprung.exists()


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "../model.safetensors", "/etc/passwd.safetensors", "sub/model.safetensors",
     "sub\\m.safetensors", "..\\m.safetensors", "C:m.safetensors", "..", "", ".", "m.safetensors\n",
     "m\x00.safetensors", "\ud800.safetensors", "m.bin", "x" * 5000 + ".safetensors", 3, None, ["a.safetensors"]],
)  # fmt: skip
def test_an_index_that_leads_elsewhere_is_refused_by_name(name, tmp_path):
    """Also where what it leads to is there."""
    path = with_config(tmp_path / "deep" / "model")
    save_file(SAFETENSORS, tmp_path / "deep" / "model.safetensors")
    (path / "sub").mkdir()
    save_file(SAFETENSORS, path / "sub" / "model.safetensors")
    index = sharded(path, weight_map={"c": name})
    message = refusal(path)
    assert message.startswith(f"{index} names weight shards that are no .safetensors files beside it: ")
    assert repr(name) in message
    assert message.isprintable()


def test_index_and_shards_must_agree(tmp_path):
    index = sharded(tmp_path, weight_map={"c": "model-00001-of-00002.safetensors"})
    assert refused(tmp_path) == (
        f"{index} says that model-00001-of-00002.safetensors holds tensor c, which it does not; the index and the "
        "shards are not of one checkpoint."
    )
    sharded(tmp_path, weight_map={"b": "model-00001-of-00002.safetensors", "a": "model-00002-of-00002.safetensors"})
    assert "holds tensor a and 1 more, which it does not" in refused(tmp_path)
    sharded(tmp_path, states=[{"a": torch.ones(2), "c": torch.ones(1)}, {"a": torch.ones(2), "b": torch.ones(3)}])
    assert refused(tmp_path) == (
        f"{tmp_path}: tensor a is both in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors."
    )
    sharded(tmp_path, weight_map={"c": "model-00003-of-00002.safetensors"})
    assert refused(tmp_path) == f"{tmp_path} lacks 1 of its 3 weight shards: model-00003-of-00002.safetensors."
    index.write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors", "a": "model-00002-of-00002.safetensors"}}'
    )
    assert "it has 'a' twice" in refused(tmp_path)
    index.write_text("[" * 100_000)
    assert "nested too deeply" in refused(tmp_path)
    index.write_bytes(b'{"weight_map": {"\xff": "x"}}')
    assert "is no index of weight shards" in refused(tmp_path)
    with index.open("wb") as sparse:
        sparse.truncate(10**12)
    assert "(1,000,000,000,000 bytes) is no index of weight shards" in refused(tmp_path)
    sharded(tmp_path)
    assert set(open_weights(tmp_path).info) == {"a", "b"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (header({"a": ONE}, b"0000", 2**63), "header too large"),
        (header({"a": ONE}, b"0000", 2**64 - 1), "header too large"),
        (header({"a": ONE}, b"0000", 99_999_999), "invalid header length"),
        (header({"a": ONE}, b"0000", 0), "invalid JSON"),
        (header({"a": ONE, "b": ONE}, b"0000"), "invalid offset"),
        (header({"a": ONE, "b": ONE | {"data_offsets": [2, 6]}}, b"000000"), "invalid offset"),
        (header({"a": ONE, "b": ONE | {"data_offsets": [8, 12]}}, b"0" * 12), "invalid offset"),
        (header({"a": ONE | {"data_offsets": [4, 0]}}, b"0000"), "invalid offset"),
        (header({"a": ONE | {"data_offsets": [-4, 0]}}, b"0000"), "invalid value"),
        (header({"a": ONE | {"data_offsets": [0, 2**62]}}, b"0000"), "invalid"),
        (header({"a": ONE | {"shape": [2**40, 2**40]}}, b"0000"), "overflow"),
        (header({"a": ONE | {"shape": [2]}}, b"0000"), "invalid shape"),
        (header({"a": ONE}, b"00001111"), "not fully covered"),
        (header({"a": ONE}, b"00"), "not fully covered"),
        (header({"a": ONE | {"dtype": "Q4"}}, b"0000"), "unknown variant"),
        (header(b"[" * 500_000), "invalid JSON"),
        (header(b'{"__metadata__":' + b'{"a":' * 100_000), "invalid JSON"),
        (header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},' * 2, b"0000"), "invalid JSON"),
        (header(("{" + ",".join([f'"a":{json.dumps(ONE)}'] * 2) + "}").encode(), b"0000"), "it has 'a' twice"),
        (header(b'{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}', b"0000"), "duplicate field"),
        (header(b'{"\xff":1}'), "invalid UTF-8"),
    ],
)
def test_broken_safetensors_headers_are_told_and_take_no_memory(content, told, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    tracemalloc.start()
    message = refused(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message.startswith(
        f"{file} ({len(content):,} bytes) is truncated, still being written, or no safetensors file: "
    )
    assert told in message
    assert message.endswith("Try again when it is whole.")
    assert peak < 20 * len(content) + 1_000_000


def test_a_file_that_is_still_being_saved_may_be_that(tmp_path):
    """A local training run: `Fetch it again` would be no advice."""
    for form, save in (("model.safetensors", save_file), ("pytorch_model.bin", torch.save)):
        path = tmp_path / form
        path.mkdir()
        save(SAFETENSORS, path / form)
        whole = (path / form).read_bytes()
        for length in (0, 1, 8, 40, len(whole) // 2, len(whole) - 1):
            (path / form).write_bytes(whole[:length])
            message = refused(path)
            assert message.startswith(f"{path / form} ({length:,} bytes) is truncated, still being written, or ")
            assert "etch it again" not in message


def test_attributes_and_parameters_in_a_torch_file_are_no_obstacle(tmp_path):
    """OLMo-1B's file holds tensors with attributes, which torch stores as `_rebuild_from_type_v2`."""
    state = state_of(folder("llama"))
    path = with_config(tmp_path)
    for number, tensor in enumerate(state.values()):
        tensor.note = number
    torch.save(state, path / "pytorch_model.bin")
    with zipfile.ZipFile(path / "pytorch_model.bin") as archive:
        assert b"_rebuild_from_type_v2" in archive.read("pytorch_model/data.pkl")
    stored = open_weights(path)
    name = next(iter(stored.info))
    assert type(stored.read([name])[name]) is torch.Tensor
    assert score(path) == scored("llama", "stream")
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in state.items()}, path / "pytorch_model.bin")
    assert not open_weights(path).read([name])[name].requires_grad
    assert score(path) == scored("llama", "stream")
    torch.save(collections.OrderedDict(state), path / "pytorch_model.bin")
    assert score(path) == scored("llama", "stream")


@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        (torch.empty(10**12, device="meta"), "is stored as meta"),
        (torch.eye(3).to_sparse(), "is stored as torch.sparse_coo"),
        (torch.ones(2, dtype=torch.complex64), "is stored as torch.complex64"),
        (torch.ones(2).to(torch.float8_e4m3fn), "is stored as torch.float8_e4m3fn"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_tensors_of_an_odd_kind_are_told(tensor, told, tmp_path):
    torch.save({"a": torch.ones(3), "b": tensor}, tmp_path / "pytorch_model.bin")
    assert f"tensor b {told}" in refused(tmp_path)


def test_names_that_are_no_text_are_told(tmp_path):
    torch.save({1: torch.ones(3)}, tmp_path / "pytorch_model.bin")
    assert "holds more than tensors (1)" in refused(tmp_path)


def test_a_tensor_that_is_larger_than_its_file_takes_no_memory(tmp_path):
    """A row repeated a million million times is 4 bytes of file."""
    name = "model.layers.1.mlp.up_proj.weight"
    path = with_config(tmp_path)
    torch.save(state_of(folder("llama")) | {name: torch.ones(1).expand(10**6, 10**6)}, path / "pytorch_model.bin")
    assert f"{name} (1000000, 1000000) for (72, 48)" in refusal(path)


def test_compressed_torch_files_are_refused(tmp_path):
    """Mapped into memory as they are, they would be wrong numbers."""
    torch.save({"a": torch.arange(1000.0), "b": torch.randn(5000)}, tmp_path / "plain.bin")
    with (
        zipfile.ZipFile(tmp_path / "plain.bin") as plain,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as compressed,
    ):
        for name in plain.namelist():
            compressed.writestr(name, plain.read(name))
    assert "is compressed, which torch's own files are not" in refused(tmp_path)


@pytest.mark.parametrize("form", ["safetensors", "bin", "old bin"])
def test_damaged_files_are_read_or_refused_and_nothing_else(form, tmp_path):
    """Some hundred files with a few wrong bytes: never another error than ours."""
    file = tmp_path / ("model.safetensors" if form == "safetensors" else "pytorch_model.bin")
    if form == "safetensors":
        save_file(SAFETENSORS, file)
    else:
        torch.save(SAFETENSORS, file, _use_new_zipfile_serialization=form == "bin")
    whole, found = file.read_bytes(), collections.Counter()
    randomly = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(randomly.choice((1, 2, 5))):
            damaged[randomly.randrange(len(damaged))] = randomly.randrange(256)
        file.write_bytes(damaged)
        try:
            weights = open_weights(tmp_path)
            weights.read(weights.info)
            found["read"] += 1
        except CheckpointError:
            found["refused"] += 1
    assert min(found["read"], found["refused"]) > 5
