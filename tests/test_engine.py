"""Both engines against the hand-written reference and the paper's own code; streaming; what is refused and when."""

import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, LENGTH, POSITIONS, VOCAB, build, token_ids
from reference_scores import COMPONENTS, METRICS, reference_scores
from saved_models import (
    CPU,
    ENGINES,
    apart,
    built,
    by_metric,
    difference,
    folder,
    loss_of,
    reference,
    rewrite,
    save,
    score,
    scored,
)
from tiny_runs import PYDOC, STEPS
from torch import nn
from transformers import AutoModelForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import redundancy_trace as rt
from redundancy_trace import cli
from redundancy_trace.blocks import find_layers
from redundancy_trace.engine import (
    Kept,
    choose_batch_size,
    choose_device,
    choose_dtype,
    hidden,
    score_module,
    scoring,
)
from redundancy_trace.engine import sums as engine_sums
from redundancy_trace.engine.sums import DistanceSums, LossSums, distance_sequences, mean_and_error
from redundancy_trace.errors import CheckpointError, InputError
from redundancy_trace.weights import EmptyModel, ModelBuilder, build_empty_model, loading

pytestmark = pytest.mark.usefixtures("one_thread")
every_family = pytest.mark.parametrize("family", FAMILIES)
both_engines = pytest.mark.parametrize("engine", ENGINES)
GOLDEN = Path(__file__).parent / "golden" / "llama"


@pytest.fixture(scope="module")
def table():
    """Rows of a table that is printed at the end (`pytest -s`)."""
    rows = []
    yield rows
    print("\n" + "\n".join(rows))


# Against the reference


@every_family
def test_both_engines_meet_the_reference(family, table):
    expected = reference(family)
    worst = {engine: difference(scored(family, engine), expected) for engine in ENGINES}
    worst["module"] = difference(score_module(built(family), token_ids(), batch_size=4), expected)
    for engine, numbers in worst.items():
        table.append(f"{family:20} {engine:7}" + "".join(f" {name} {number:.1e}" for name, number in numbers.items()))
    assert max(number for numbers in worst.values() for number in numbers.values()) < 1e-5


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streaming_equals_whole(family, dtype):
    stream, whole = (scored(family, engine, dtype) for engine in ENGINES)
    assert apart(stream, whole) < 1e-6
    if dtype == torch.bfloat16:
        worst = difference(stream, reference(family))
        assert worst["cosine_similarity"] < 5e-3


@every_family
def test_batch_size_changes_nothing(family):
    one, all_at_once = (score(folder(family), batch_size=size) for size in (1, 6))
    assert apart(one, all_at_once) < 1e-6
    assert apart(one, scored(family, "stream")) < 1e-6


# Against the paper's own code


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "golden.json").read_text())


@pytest.fixture(scope="module")
def golden_ids():
    return np.load(GOLDEN / "token_ids.npy")


def golden_differences(golden, source, found):
    """Largest difference of each component's similarities to those of a golden source."""
    return {
        (source, component): np.abs(
            found[component, "cosine_similarity"] - np.array(golden[source][f"{component}_similarity"])
        ).max()
        for component in COMPONENTS
    }


@both_engines
def test_golden_numbers(engine, golden, golden_ids, table):
    scores = score(GOLDEN, engine, golden_ids)
    found = by_metric(scores)
    worst = {}
    for source in ("fp32_eager", "reference_fp64"):
        worst |= golden_differences(golden, source, found)
        matrix = golden[source]["block_consecutive_matrix"]
        cells = {(d.layer, d.to_layer): d.value for d in scores.distances if d.metric == "cosine_similarity"}
        exact = {(i, i + g): v for i, row in enumerate(matrix) for g, v in enumerate(row, start=1) if v is not None}
        assert cells.keys() == exact.keys()
        worst[source, "consecutive"] = max(abs(cells[key] - exact[key]) for key in cells)
    worst["loss"] = abs(loss_of(scores) - golden["loss_after_drop"]["full"])
    table.append(f"golden {engine} " + ", ".join(f"{key} {number:.1e}" for key, number in worst.items()))
    assert max(worst.values()) < 1e-5


def test_golden_numbers_in_bfloat16(golden, golden_ids, table):
    stream, whole = (score(GOLDEN, engine, golden_ids, dtype=torch.bfloat16) for engine in ENGINES)
    assert apart(stream, whole) < 1e-6
    found = by_metric(stream)
    worst = {}
    for source in ("bf16_eager", "fp32_eager"):
        worst |= golden_differences(golden, source, found)
    table.append("golden bfloat16 " + ", ".join(f"{key} {number:.1e}" for key, number in worst.items()))
    assert max(worst.values()) < 5e-4


# Zeros


def zero_(model, *endings):
    changed = 0
    for name, tensor in model.state_dict().items():
        # Fused experts are a parameter of that name, no module with a weight.
        if name.endswith(endings) or f"{name}.weight".endswith(endings):
            tensor.zero_()
            changed += 1
    assert changed
    return model


@both_engines
def test_dead_attention_of_layer_0(engine, tmp_path):
    model = zero_(build("gpt_neox"), "layers.0.attention.dense.weight", "layers.0.attention.dense.bias")
    scores = score(save(model, tmp_path), engine)
    attn = {v.metric: v for v in scores.values if (v.layer, v.component) == (0, "attn")}
    assert attn["cosine_similarity"].value == 1.0
    assert attn["angular_distance"].value == attn["relative_norm"].value == 0.0
    direction = attn["update_cosine"]
    assert (direction.value, direction.stderr, direction.n_sequences, direction.n_tokens) == (None, None, 0, 0)
    assert max(difference(scores, reference_scores(model, token_ids())).values()) < 1e-5


ATTENTION_OUT = ("o_proj", "out_proj", "attention.dense", "self_attn.dense", "attn.c_proj")
MLP_OUT = ("down_proj", "dense_4h_to_h", "mlp.c_proj", "fc2", "fc_out")


@every_family
def test_a_model_without_any_update_has_no_importance(family):
    names = (*ATTENTION_OUT, *MLP_OUT)
    model = zero_(build(family), *(f"{name}.{kind}" for name in names for kind in ("weight", "bias")))
    scores = score_module(model, token_ids(2), batch_size=2)
    for value in scores.values:
        if value.metric == "cosine_similarity":
            assert value.value == 1.0
        elif value.metric in ("angular_distance", "relative_norm"):
            assert value.value == 0.0
    assert {d.value for d in scores.distances} == {0.0, 1.0}


@both_engines
@pytest.mark.parametrize("component", ["attn", "mlp"])
@pytest.mark.parametrize("family", ["gpt_neox", "olmo2", "granite", "qwen3_moe"])
def test_one_dead_sublayer_leaves_the_other_as_it_is(family, component, engine, tmp_path):
    names = ATTENTION_OUT if component == "attn" else MLP_OUT
    model = zero_(build(family), *(f"{name}.{kind}" for name in names for kind in ("weight", "bias")))
    scores = score(save(model, tmp_path), engine)
    assert max(difference(scores, reference_scores(model, token_ids())).values()) < 1e-5
    assert not by_metric(scores, "n_tokens")[component, "update_cosine"].any()


@both_engines
def test_zero_rows_of_a_fresh_embedding_are_left_out_and_counted(engine, tmp_path):
    """The padding row of a model at step 0 is exactly zero; biases may make its stream live later."""
    model, ids = build("gpt_neox"), token_ids()
    for layer in range(3):  # the tokens stay zero through every layer
        for name in ("attention.dense.bias", "mlp.dense_4h_to_h.bias"):
            model.state_dict()[f"gpt_neox.layers.{layer}.{name}"].zero_()
    zeros = np.unique(ids[2:4, :9])
    model.state_dict()["gpt_neox.embed_in.weight"][zeros] = 0
    ids[4] = zeros[0]  # a sequence without one token that counts in layer 0
    expected = reference_scores(model, ids)
    scores = score(save(model, tmp_path), engine, ids)
    n_zero = int(np.isin(ids, zeros).sum())
    assert expected.n_tokens["block", "cosine_similarity"][0] == ids.size - n_zero
    assert max(difference(scores, expected).values()) < 1e-5
    n_sequences = by_metric(scores, "n_sequences")
    assert n_sequences["attn", "cosine_similarity"][0] == 5
    assert all(np.isfinite(v.value) and np.isfinite(v.stderr) for v in scores.values)
    assert all(np.isfinite(d.value) for d in scores.distances)
    cells = {(d.layer, d.to_layer): d.n_tokens for d in scores.distances}
    assert cells[0, 1] == ids.size - n_zero


# Sums


@pytest.mark.parametrize("engine", [*ENGINES, "module"])
def test_one_sequence_has_no_standard_error(engine):
    ids = token_ids(1)
    if engine == "module":
        scores = score_module(built("olmo2"), ids, batch_size=1)
    else:
        scores = score(folder("olmo2"), engine, ids)
    assert {(v.stderr, v.n_sequences) for v in scores.values} == {(None, 1)}
    assert {v.n_tokens for v in scores.values} == {LENGTH, LENGTH - 1}


def test_sums_are_those_of_numpy():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(7, 11))
    counted = rng.random((7, 11)) < 0.7
    counted[3] = False
    value, stderr, n_sequences, n_tokens = mean_and_error((tokens * counted).sum(1), counted.sum(1))
    rows = [row[keep] for row, keep in zip(tokens, counted, strict=True) if keep.any()]
    assert value == pytest.approx(np.concatenate(rows).mean(), rel=1e-14)
    assert stderr == pytest.approx(np.std([row.mean() for row in rows], ddof=1) / 6**0.5, rel=1e-14)
    assert (n_sequences, n_tokens) == (6, counted.sum())
    assert mean_and_error(np.zeros(3), np.zeros(3)) == (None, None, 0, 0)


def test_loss_is_next_token_cross_entropy():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(1))
    sums = LossSums(4)
    sums.add(logits[:1], ids[:1])
    sums.add(logits[1:], ids[1:])
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert sums.value().value == pytest.approx(expected.item(), rel=1e-6)
    assert (sums.value().n_tokens, sums.value().n_sequences) == (8, 2)
    sums.add((logits * torch.nan).bfloat16(), ids)
    with pytest.raises(CheckpointError, match="The loss is not finite in bfloat16"):
        sums.value()


def test_loss_of_sequences_together_and_in_pieces_is_that_of_each():
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(1))
    apart, together = LossSums(3), LossSums(3)
    apart.add(logits, ids)
    together.add_sequences([(logits[:, :3], ids[:, 1:4]), (logits[:, 3:4], ids[:, 4:])])
    one, other = together.value(), apart.value()
    assert (one.value, one.stderr) == pytest.approx((other.value, other.stderr), rel=1e-6)
    assert (one.n_tokens, one.n_sequences) == (other.n_tokens, other.n_sequences) == (12, 3)


def test_distances_are_of_the_first_sequences_that_fit(monkeypatch):
    assert distance_sequences(256, 2048, width=4096, n_layers=32) == 1
    assert distance_sequences(64, 512, width=768, n_layers=12) == 13
    assert distance_sequences(64, 512, width=64, n_layers=4) == 64
    states = torch.randn(3, 6, 4, 8, generator=torch.Generator().manual_seed(0))
    sums = DistanceSums(5)
    for state in states:
        for batch in state.split(4):
            sums.add(batch)
        sums.close()
    cells = {(d.layer, d.to_layer): d for d in sums.distances() if d.metric == "cosine_similarity"}
    assert set(cells) == {(0, 1), (0, 2), (1, 2)}
    for (i, j), cell in cells.items():
        expected = torch.cosine_similarity(states[i, :5], states[j, :5], dim=-1).double().mean()
        assert cell.value == pytest.approx(float(expected), abs=1e-6)
        assert cell.n_tokens == 20
    # Both engines take the same sequences, and batches do not matter.
    monkeypatch.setattr("redundancy_trace.engine.sums.DISTANCE_BYTES", 3 * 4 * LENGTH * 48 * 4)
    for engine in ENGINES:
        for batch_size in (2, 4):
            scores = score(folder("olmo2"), engine, batch_size=batch_size)
            expected = reference("olmo2").distances("angular_distance", n_sequences=3)
            for cell in scores.distances:
                assert cell.n_tokens == 3 * LENGTH
                if cell.metric == "angular_distance":
                    assert cell.value == pytest.approx(expected[cell.layer, cell.to_layer], abs=1e-5)


# Streaming


def n_real(model):
    return [sum(not p.is_meta for p in layer.parameters()) for layer in find_layers(model)[1]]


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "mixtral", "glm4_moe", "llama_tied"])
def test_one_layer_at_a_time_is_in_memory(family, monkeypatch):
    models, peak, calls, rows = [], [], [], set()
    load, build = EmptyModel.load_, ModelBuilder.build

    def counted_load(self, names, *read):
        load(self, names, *read)
        peak.append(sum(count > 0 for count in n_real(self.model)))

    def kept_build(*args, **settings):
        empty = build(*args, **settings)
        models.append(empty.model)
        for index, layer in enumerate(find_layers(empty.model)[1]):
            layer.register_forward_hook(lambda _, args, out, index=index: calls.append((index, len(args[0]))))
        head = empty.model.get_output_embeddings()
        head.register_forward_hook(lambda _, args, out: calls.append(("head", len(args[0]))))
        embedding = empty.model.get_input_embeddings()
        embedding.register_forward_hook(lambda module, *_: rows.add(len(module.weight)))
        return empty

    monkeypatch.setattr(EmptyModel, "load_", counted_load)
    monkeypatch.setattr(ModelBuilder, "build", kept_build)
    progress = []
    scores = score(folder(family), on_progress=lambda done, of: progress.append((done, of)))
    assert apart(scores, scored(family, "whole")) < 1e-6
    (model,) = models
    n_layers = len(find_layers(model)[1])
    assert max(peak) == 1
    assert n_real(model) == [0] * n_layers
    assert progress == [(i + 1, n_layers) for i in range(n_layers)]
    assert rows == {len(np.unique(token_ids()))}
    assert all(parameter.is_meta for parameter in model.parameters())
    for index in range(n_layers):
        # Each batch once, the last one smaller; a proof is three more, on one sequence.
        sizes = [size for layer, size in calls if layer == index]
        assert sizes[-2:] == [4, 2]
        assert sizes[:-2] in ([], [1, 1, 1])
    assert [size for layer, size in calls if layer == 0] == [1, 1, 1, 4, 2]
    assert [size for layer, size in calls if layer == "head"] == [4, 2]


@every_family
def test_the_model_is_built_once_for_all_checkpoints_of_a_run(family, tmp_path, monkeypatch):
    """Another checkpoint's weights in the same empty model; another configuration gets a model of its own."""
    counted, matched = [], loading._matched

    def counting(stored, **settings):
        counted.append(stored.weights.folder)
        return matched(stored, **settings)

    monkeypatch.setattr(loading, "_matched", counting)
    torch.manual_seed(1)
    other = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32).eval()
    second, kept = save(other, tmp_path / "other"), Kept()
    in_turn = [score(path, kept=kept) for path in (folder(family), second, folder(family))]
    assert len(counted) == 1
    for found, path in zip(in_turn, (folder(family), second), strict=False):
        assert apart(found, score(path)) == 0
    assert apart(in_turn[2], in_turn[0]) == 0
    counted.clear()
    score(folder("llama" if family != "llama" else "gpt2"), kept=kept)
    score(folder(family), dtype=torch.bfloat16, kept=kept)
    assert len(counted) == 2


def test_the_memory_of_states_is_taken_once_for_all_checkpoints_of_a_run():
    """And again where another dtype, or more of it, is needed; what the last checkpoint left there changes nothing."""
    kept, path, taken = Kept(), folder("llama"), []
    float32, bfloat16 = torch.float32, torch.bfloat16
    for ids, dtype in [
        (token_ids(), float32),
        (token_ids(3), float32),
        (token_ids(), float32),
        (token_ids(), bfloat16),
    ]:
        assert apart(score(path, ids=ids, dtype=dtype, kept=kept), score(path, ids=ids, dtype=dtype)) == 0
        taken.append([kept.room(name, 1, dtype).data_ptr() for name in ("states", "distances")])
    assert taken[0] == taken[1] == taken[2]
    assert kept.room("states", 1, bfloat16).dtype == bfloat16


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs /proc")
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_no_file_stays_open_with_the_model_that_is_kept(family, tmp_path):
    """Disk that a deleted checkpoint took is free only when nothing maps it any more."""
    kept, path = Kept(), save(built(family), tmp_path / "model")
    score(path, kept=kept)
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_sweep_builds_its_model_once(tiny_run, tmp_path, no_figures, monkeypatch):
    built, matched = [], loading._matched
    monkeypatch.setattr(loading, "_matched", lambda *args, **settings: (built.append(1), matched(*args, **settings))[1])
    assert cli.run(["--model", str(tiny_run), "--out", str(tmp_path / "run"), "--quiet", *PYDOC]) == 0
    assert rt.read_scores(tmp_path / "run")["revision"].n_unique() == len(STEPS) > 2
    assert len(built) == 1


@pytest.mark.parametrize("family", ["llama", "gemma3", "gptj", "bloom", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_in_a_file_change_nothing(family, dtype, tmp_path, monkeypatch):
    in_memory = scored(family, "stream", dtype)
    monkeypatch.setattr(hidden, "STATES_BYTES", 1000)
    monkeypatch.setattr(hidden.tempfile, "tempdir", str(tmp_path))
    files = []
    room = hidden._take_room
    monkeypatch.setattr(hidden, "_take_room", lambda file, count: (files.append(count), room(file, count)))
    assert apart(score(folder(family), dtype=dtype), in_memory) == 0
    assert files == [6 * LENGTH * 48 * dtype.itemsize]
    assert not list(tmp_path.iterdir())


def test_no_room_for_the_states_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(hidden, "STATES_BYTES", 1000)

    def full(descriptor, start, count):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hidden.os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match=r"states of 6 sequences take 0\.0 GB.*No space left.*set TMPDIR"):
        score(folder("llama"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere", "bloom"])
def test_the_loss_of_a_long_sequence_is_computed_in_pieces(family, monkeypatch):
    whole = loss_of(scored(family, "stream"))
    pieces = []
    original = LossSums.add_sequences

    def watched(self, tiles):
        tiles = list(tiles)
        pieces.append([logits.shape[1] for logits, _ in tiles])
        original(self, tiles)

    monkeypatch.setattr(LossSums, "add_sequences", watched)
    monkeypatch.setattr(engine_sums, "LOGITS", 7 * VOCAB)
    found = score(folder(family))
    assert pieces == [[7, 7, 7, 2]] * 6
    assert loss_of(found) == pytest.approx(whole, abs=1e-6)


@every_family
def test_head_runs_once_for_the_sequences_that_there_is_room_for(family, monkeypatch):
    """Whatever form the model's layers return: it is found out on the probe, not by failing again and again."""
    calls = []
    build = ModelBuilder.build

    def kept_build(*args, **settings):
        empty = build(*args, **settings)
        empty.model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
        return empty

    monkeypatch.setattr(ModelBuilder, "build", kept_build)
    together = score(folder(family), ids=token_ids(3))
    assert len(calls) == 1
    monkeypatch.setattr(engine_sums, "LOGITS", LENGTH * VOCAB)
    apart = score(folder(family), ids=token_ids(3))
    assert len(calls) == 1 + 3
    assert loss_of(apart) == pytest.approx(loss_of(together), abs=1e-6)


@both_engines
def test_models_of_one_layer(engine, tmp_path):
    """Nothing is handed from layer to layer that would show in which form."""
    for family in ("gptj", "llama", "falcon_sequential", "bloom"):
        config = FAMILIES[family]()
        config.num_hidden_layers = 1
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        path = save(model, tmp_path / family)
        assert max(difference(score(path, engine), reference_scores(model, token_ids())).values()) < 1e-5
        assert max(difference(score(path, engine, token_ids(1)), reference_scores(model, token_ids(1))).values()) < 1e-5


FAKE_MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM


class FakeConfig(LlamaConfig):
    model_type = "fake-llama"


class FakeForCausalLM(LlamaForCausalLM):
    config_class = FakeConfig
"""


def test_code_of_the_folder_runs_only_when_asked(tmp_path):
    auto = {"AutoConfig": "modeling_fake.FakeConfig", "AutoModelForCausalLM": "modeling_fake.FakeForCausalLM"}
    path = rewrite(folder("llama"), tmp_path / "fake_model", model_type="fake-llama", auto_map=auto, architectures=None)
    (path / "modeling_fake.py").write_text(FAKE_MODEL)
    for engine in ENGINES:
        with pytest.raises(CheckpointError, match=r"code of its own.*--trust-remote-code"):
            score(path, engine)
        assert apart(score(path, engine, trust_remote_code=True), scored("llama", engine)) < 1e-6


@pytest.mark.parametrize("n_sequences", [1, 2, 6])
def test_layers_that_are_handed_more_than_the_state_are_refused(n_sequences, monkeypatch):
    """A layer that sees the embeddings, say: what a dry run recorded of one batch would be wrong for the next."""

    def forward(self, input_ids=None, **_):
        x = shared = self.embed_tokens(input_ids)
        positions = torch.arange(x.shape[1])[None]
        embeddings = self.rotary_emb(x, position_ids=positions)
        for layer in self.layers:
            x = layer(x, position_embeddings=embeddings, attention_mask=None, shared=shared)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x))

    monkeypatch.setattr(LlamaModel, "forward", forward)
    ids = token_ids(n_sequences)
    with pytest.raises(CheckpointError, match=r"handed more than the state.*try --engine whole"):
        score(folder("llama"), "stream", ids)
    score(folder("llama"), "whole", ids)


def test_models_that_skip_layers_are_refused(monkeypatch):
    original = LlamaModel.forward

    def forward(self, *args, **kwargs):
        layers, self.layers = self.layers, self.layers[:2]
        try:
            return original(self, *args, **kwargs)
        finally:
            self.layers = layers

    monkeypatch.setattr(LlamaModel, "forward", forward)
    for engine in ENGINES:
        with pytest.raises(CheckpointError, match=r"2 .*its 3 layers|2 layers in a forward, but has 3"):
            score(folder("llama"), engine)


def test_identity_is_checked_while_scoring(monkeypatch):
    """A proof on the probe is not the last word: here the layers do something else on longer sequences."""
    original = LlamaDecoderLayer.forward

    def forward(self, hidden_states, *args, **kwargs):
        out = original(self, hidden_states, *args, **kwargs)
        return out * 1.001 if hidden_states.shape[0] > 1 else out

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    for engine in ENGINES:
        with pytest.raises(CheckpointError, match=r"Layer 0: input \+ attention \+ MLP misses.*though the proof held"):
            score(folder("llama"), engine)


# Limits and choices


@pytest.mark.parametrize("engine", [*ENGINES, "module"])
def test_ids_and_lengths_beyond_the_model_are_the_users(engine):
    def run(ids):
        if engine == "module":
            return score_module(built("gpt2"), ids, batch_size=4)
        return score(folder("gpt2"), engine, ids)

    ids = token_ids()
    ids[3, 5] = VOCAB
    with pytest.raises(InputError, match=f"token id {VOCAB}, the model's embedding has {VOCAB} rows"):
        run(ids)
    ids[3, 5] = -1
    with pytest.raises(InputError, match="token id -1; ids count from 0"):
        run(ids)
    with pytest.raises(InputError, match=f"65 is longer than the model's {POSITIONS} positions"):
        run(token_ids(1, POSITIONS + 1))
    run(token_ids(1, POSITIONS))


def test_positions_are_found_under_every_name():
    for family in ("mpt", "opt", "gptj", "gpt_neox"):
        with pytest.raises(InputError, match=f"longer than the model's {POSITIONS} positions"):
            score(folder(family), ids=token_ids(1, POSITIONS + 1))
    score(folder("bloom"), ids=token_ids(1, POSITIONS + 40))  # no positions, no limit


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
        MemoryError(),
    ],
)
def test_batch_size_is_halved_when_memory_runs_out(error, monkeypatch):
    expected = {engine: scored("llama", engine) for engine in ENGINES}
    sizes = []
    for name in ("score_folder", "score_module"):
        original = getattr(scoring, name)

        def limited(*args, batch_size, original=original, **settings):
            sizes.append(batch_size)
            if batch_size > limit:
                raise error
            return original(*args, batch_size=batch_size, **settings)

        monkeypatch.setattr(scoring, name, limited)
    limit = 2
    for engine in ENGINES:
        sizes.clear()
        assert apart(score(folder("llama"), engine, batch_size=5), expected[engine]) < 1e-6
        assert sizes == [5, 3, 2]
    limit = 0
    with pytest.raises(CheckpointError, match="24 tokens does not fit the memory of cpu; try"):
        score(folder("llama"), batch_size=5)


def test_choices():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert choose_batch_size(None, 512, 64, cuda) == 8
    assert choose_batch_size(None, 512, 64, cpu) == 2
    assert choose_batch_size(None, 8192, 64, cuda) == 1
    assert choose_batch_size(None, 16, 3, cpu) == 3
    assert choose_batch_size(7, 512, 64, cpu) == 7
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    assert choose_dtype("auto", CPU) == torch.float32
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16
    for name in ("gpu", "meta", "cuda:99"):
        with pytest.raises(InputError, match="try"):
            choose_device(name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("family", ["gpt_neox", "gemma3", "glm4_moe", "gptj", "bloom", "falcon", "llama_tied"])
def test_cuda_equals_cpu(family):
    cuda = torch.device("cuda")
    for engine in ENGINES:
        found = score(folder(family), engine, device=cuda)
        assert max(difference(found, reference(family)).values()) < 1e-5
    assert apart(score(folder(family), device=cuda), score(folder(family), "whole", device=cuda)) < 1e-6
    half = score(folder(family), device=cuda, dtype=torch.bfloat16)
    assert difference(half, reference(family))["cosine_similarity"] < 5e-3


# score_model


def to_arrays(frame):
    """Rows of `score_model` as `by_metric` gives them."""
    rows = frame.filter(frame["layer"].is_not_null()).sort("layer")
    return {
        (c, m): rows.filter((rows["component"] == c) & (rows["metric"] == m))["value"].to_numpy()
        for c in COMPONENTS
        for m in METRICS
    }


def test_score_model_takes_folders_and_modules_and_any_kind_of_ids():
    ids = token_ids()
    kinds = (ids, ids.astype(np.int32), torch.from_numpy(ids), ids.tolist())
    frames = [rt.score_model(folder("olmo2"), kind, device="cpu") for kind in kinds]
    frames += [
        rt.score_model(str(folder("olmo2")), ids, device="cpu", engine="whole", batch_size=2),
        rt.score_model(built("olmo2"), ids),
    ]
    for frame in frames:
        for key, values in to_arrays(frame).items():
            np.testing.assert_allclose(values, reference("olmo2").value[key], atol=1e-5)
        assert frame.filter(frame["metric"] == "loss")["value"].item() == pytest.approx(
            reference("olmo2").loss, abs=1e-5
        )
        assert frame.columns == rt.score_model(built("olmo2"), ids[:1, :4]).columns


@pytest.mark.parametrize("ids", [[1, 2, 3], [[1.0, 2.0]], [[1]], np.zeros((0, 5), dtype=int), [["a", "b"]]])
def test_score_model_tells_what_ids_it_needs(ids):
    with pytest.raises(InputError, match="integers of shape"):
        rt.score_model(built("llama"), ids)


def test_score_model_tells_what_is_no_model(tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        rt.score_model(tmp_path / "nothing", token_ids())
    with pytest.raises(InputError, match="--engine"):
        rt.score_model(folder("llama"), token_ids(), engine="fast")
    with pytest.raises(InputError, match="--dtype"):
        rt.score_model(folder("llama"), token_ids(), dtype="float16")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        rt.score_model(tmp_path, token_ids())


def snapshot(model):
    return {name: (tensor.dtype, tensor.clone()) for name, tensor in model.state_dict().items()} | {
        f"buffer {name}": (buffer.dtype, buffer.clone()) for name, buffer in model.named_buffers()
    }


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("glm4_moe", torch.float32),
        ("glm4_moe", torch.bfloat16),
        ("gpt_neox", torch.bfloat16),
        ("gpt_neox", torch.float64),
    ],
)
def test_a_module_is_left_as_it_was(family, dtype):
    model = build(family).to(dtype)
    if family == "glm4_moe":  # as transformers keeps it when it loads
        model.model.layers[1].mlp.gate.e_score_correction_bias.data = torch.randn(8, dtype=torch.float32)
        model.model.layers[2].post_attention_layernorm.float()
        model.model.layers[2].post_attention_layernorm.register_forward_hook(lambda _, args, out: out.to(dtype))
    if dtype == torch.float64:  # more digits than float32 holds
        for parameter in model.parameters():
            parameter.data += 1e-12
    model.train()
    find_layers(model)[1][0].eval()  # frozen, say
    training = {name: module.training for name, module in model.named_modules()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    before = snapshot(model)
    identities = {name: id(parameter) for name, parameter in model.named_parameters()}
    frame = rt.score_model(model, token_ids())
    assert np.isfinite(frame["value"].to_numpy()).all()
    for name, (kind, tensor) in snapshot(model).items():
        assert kind == before[name][0]
        assert torch.equal(tensor, before[name][1])
    assert {name: module.training for name, module in model.named_modules()} == training
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooks
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == identities
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_module_can_be_trained_after_it_was_scored():
    model = build("llama")
    rt.score_model(model, token_ids(2))
    ids = torch.from_numpy(token_ids(2))
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_module_in_float64_is_scored_in_it():
    scores = score_module(build("llama").double(), token_ids(), batch_size=4)
    assert max(difference(scores, reference("llama")).values()) < 1e-6


def test_a_module_in_float16_is_refused():
    with pytest.raises(InputError, match=r"float16.*model\.float"):
        rt.score_model(build("llama").half(), token_ids())


def test_hooks_are_gone_after_a_failure():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = torch.nan
    with pytest.raises(CheckpointError, match="layer 1 is not finite"):
        rt.score_model(model, token_ids())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_progress_of_the_whole_engine_counts_batches():
    seen = []
    score(folder("llama"), "whole", on_progress=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 2), (2, 2)]


def test_rows_of_an_embedding_that_the_calibration_does_not_use_are_not_read():
    empty = build_empty_model(folder("gpt_neox"), device=CPU, dtype=torch.float32)
    rows = torch.tensor([3, 100])
    assert empty.load_embedding_rows_(rows)
    weight = empty.model.get_input_embeddings().weight
    assert torch.equal(weight, built("gpt_neox").gpt_neox.embed_in.weight[rows])
