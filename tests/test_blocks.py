"""The proof: where attention and MLP join the stream is found on layers of any shape, or the layer is refused."""

import numpy as np
import pytest
import torch
from families import FAMILIES, build, token_ids
from reference_scores import reference_scores
from saved_models import built, reference
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BloomConfig, MambaConfig, OPTConfig, T5Config
from transformers import T5ForConditionalGeneration as T5

from redundancy_trace.blocks import (
    TOLERANCE,
    LayerStates,
    Update,
    find_layers,
    layer_input,
    layer_kind,
    prove,
    tap,
)
from redundancy_trace.engine.whole import score_module
from redundancy_trace.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH = 16
# Sliding and full attention, or dense and then experts.
HYBRIDS = {"olmo3", "gemma2", "gemma3", "exaone4", "qwen2", "qwen3_moe", "glm4_moe"}
every_family = pytest.mark.parametrize("family", FAMILIES)


class Layer(nn.Module):
    """A pre-norm layer whose parts the tests rename and rearrange."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first_norm = nn.LayerNorm(WIDTH)
        self.self_attn = nn.Linear(WIDTH, WIDTH)
        self.second_norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.self_attn(self.first_norm(x))
        return x + self.mlp(self.second_norm(x))


class Parallel(Layer):
    def forward(self, x):
        return x + self.self_attn(self.first_norm(x)) + self.mlp(self.second_norm(x))


class NormBehindTheSum(Layer):
    def forward(self, x):
        x = self.first_norm(x + self.self_attn(x))
        return self.second_norm(x + self.mlp(x))


class ScaledSum(Layer):
    def forward(self, x):
        return 0.7 * super().forward(x)


class Gated(Layer):
    def forward(self, x):
        x = x + 0.5 * self.self_attn(self.first_norm(x))
        return x + self.mlp(self.second_norm(x))


class NormBehindTheSublayers(Layer):
    def forward(self, x):
        x = x + self.first_norm(self.self_attn(x))
        return x + self.second_norm(self.mlp(x))


class InPlace(Layer):
    """Overwrites its input and the output of its attention, as Falcon overwrites that of its MLP."""

    def forward(self, x):
        a = self.self_attn(self.first_norm(x))
        m = self.mlp(self.second_norm(x))
        a += m
        x += a
        return x


class MlpFirst(Layer):
    def forward(self, x):
        x = x + self.mlp(self.second_norm(x))
        return x + self.self_attn(self.first_norm(x))


class Multiplied(Layer):
    residual_multiplier = 0.22

    def forward(self, x):
        x = x + self.residual_multiplier * self.self_attn(self.first_norm(x))
        return x + self.residual_multiplier * self.mlp(self.second_norm(x))


class Decoys(Layer):
    """What is called attention and MLP is none; the real ones stand behind them under other known names."""

    def __init__(self):
        super().__init__()
        self.attn = self.self_attn
        self.attention = nn.Linear(WIDTH, WIDTH)
        self.ffn = nn.Linear(WIDTH, WIDTH)
        del self.self_attn

    def forward(self, x):
        self.attention(x)
        x = x + self.attn(self.first_norm(x))
        gate = self.mlp(x)
        return x + self.ffn(self.second_norm(x) + gate)


class LooseMlp(Layer):
    """As OPT: the MLP is two loose matrices, the last of which is found."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 32)
        self.fc2 = nn.Linear(32, WIDTH)
        del self.mlp

    def forward(self, x):
        x = x + self.self_attn(self.first_norm(x))
        return x + self.fc2(self.fc1(self.second_norm(x)).relu())


class TwiceAttended(Layer):
    def forward(self, x):
        return super().forward(x + self.self_attn(x))


class ReturnsTuple(Layer):
    def forward(self, hidden_states):
        return (super().forward(hidden_states), None)


def states(n_tokens=12, seed=1):
    return torch.randn(1, n_tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def proof(layer, index=3, config=None):
    with torch.no_grad():
        return prove(layer, index, states(), (), {}, config)


def tapped(layer, decomposition, x):
    seen = []
    with torch.no_grad(), tap(layer, decomposition, seen.append):
        y = layer(x.clone())
    (one,) = seen
    return one, y


@pytest.mark.parametrize("kind", [Layer, Parallel, NormBehindTheSublayers, InPlace, Multiplied, Decoys, LooseMlp])
def test_pair_is_found_and_tapped(kind):
    layer = kind()
    found = proof(layer)
    assert found.error < TOLERANCE[torch.float32]
    assert found.parallel == (kind in (Parallel, InPlace))
    assert found.scale == (0.22 if kind is Multiplied else 1.0)
    assert found.copy_input == (kind is InPlace)
    x = states(seed=2)
    one, y = tapped(layer, found, x)
    assert torch.equal(one.resid_pre, x)
    assert torch.equal(one.resid_post, y)
    assert one.identity_error() < 1e-6
    mid = x if found.parallel else x + one.attn_update
    torch.testing.assert_close(one.resid_mid, mid)
    with torch.no_grad():
        if kind is NormBehindTheSublayers:
            attn = layer.first_norm(layer.self_attn(x))
        else:
            attn = found.scale * (layer.attn if kind is Decoys else layer.self_attn)(layer.first_norm(x))
    torch.testing.assert_close(one.attn_update, attn)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())


def test_update_is_read_behind_the_norm_that_stands_behind_the_sublayer():
    found = proof(NormBehindTheSublayers())
    assert (found.attn, found.mlp) == (Update("first_norm"), Update("second_norm"))
    found = proof(InPlace())
    assert found.attn == Update("self_attn", copy=True)


@pytest.mark.parametrize("kind", [NormBehindTheSum, ScaledSum, Gated])
def test_what_does_not_add_up_is_refused(kind):
    with pytest.raises(CheckpointError, match=rf"Layer 3 \({kind.__name__}\).*adds up.*closest: .* off.*open an issue"):
        proof(kind())


def test_mlp_in_front_of_the_attention_is_refused():
    with pytest.raises(CheckpointError, match="Layer 3: its MLP runs before its attention"):
        proof(MlpFirst())


def test_a_child_that_runs_twice_is_no_candidate():
    with pytest.raises(CheckpointError, match="no attention that runs once in a forward"):
        proof(TwiceAttended())


def test_unknown_names_are_listed():
    layer = Layer()
    layer.mystery = layer.mlp
    del layer.mlp
    layer.forward = lambda x: x + layer.mystery(layer.self_attn(x))
    with pytest.raises(
        CheckpointError, match=r"Layer 3 .* no MLP .* first_norm, self_attn, .*mystery; known names are"
    ):
        proof(layer)


@pytest.mark.parametrize("dead", [("self_attn",), ("mlp",), ("self_attn", "mlp")])
@pytest.mark.parametrize("kind", [Layer, Parallel, NormBehindTheSublayers])
def test_updates_that_are_zero_are_no_tie(kind, dead):
    layer = kind()
    norms = {"self_attn": layer.first_norm, "mlp": layer.second_norm}
    for name in dead:
        for parameter in (*layer.get_submodule(name).parameters(), norms[name].bias):
            nn.init.zeros_(parameter)
    alive = proof(kind())
    found = proof(layer)
    assert (found.attn, found.mlp, found.parallel) == (alive.attn, alive.mlp, alive.parallel)


def test_loose_mlp_that_is_dead_behind_its_first_matrix_stays_sequential():
    layer = LooseMlp()
    nn.init.zeros_(layer.fc1.weight)
    nn.init.constant_(layer.fc1.bias, -1.0)
    assert not proof(layer).parallel


def test_zero_input_still_gets_a_proof():
    with torch.no_grad():
        assert not prove(Layer(), 0, torch.zeros(1, 4, WIDTH), (), {}, None).parallel


def test_other_dtypes_are_proven_on_a_copy_in_float32():
    layer = Layer().bfloat16()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with torch.no_grad():
        found = prove(layer, 0, states().bfloat16(), (), {}, None)
    assert found.error < TOLERANCE[torch.float32]
    for name, tensor in layer.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name])


def test_output_that_is_not_finite_is_no_failed_proof():
    layer = Layer()
    with torch.no_grad():
        layer.mlp.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="The output of layer 3 is not finite in float32"):
        proof(layer)


def test_hidden_state_may_come_by_keyword():
    layer = ReturnsTuple()
    found, seen = proof(layer), []
    with torch.no_grad(), tap(layer, found, seen.append):
        layer(hidden_states=states())
    assert torch.equal(seen[0].resid_pre, states())
    x, rest, keywords = layer_input((), {"hidden_states": 1, "mask": 2})
    assert (x, rest, keywords) == (1, (), {"mask": 2})
    assert layer_input((1, 3), {"mask": 2}) == (1, (3,), {"mask": 2})


def test_identity_error_is_relative_to_each_token():
    x = torch.tensor([[[1000.0, 0.0], [1.0, 0.0]]])
    update = torch.zeros_like(x)
    wrong = x.clone()
    wrong[0, 1, 1] = 0.01
    assert LayerStates(x, wrong, update, update, parallel=True).identity_error() == pytest.approx(0.01)
    assert LayerStates(x * 0, x * 0, update, update, parallel=True).identity_error() == 0


@every_family
def test_one_proof_a_kind_says_parallel_as_the_equations_do(family):
    model = built(family)
    name, layers = find_layers(model)
    assert model.get_submodule(name) is layers
    given = {}
    handles = [
        layer.register_forward_pre_hook(lambda m, a, k, i=i: given.update({i: layer_input(a, k)}), with_kwargs=True)
        for i, layer in enumerate(layers)
    ]
    with torch.no_grad():
        model(torch.from_numpy(token_ids(1)), use_cache=False)
        for handle in handles:
            handle.remove()
        found = [prove(layer, i, *given[i], model.config) for i, layer in enumerate(layers)]
    assert tuple(one.parallel for one in found) == reference(family).parallel
    assert max(one.error for one in found) < 1e-6
    kinds = [layer_kind(layers, i, model.config) for i in range(len(layers))]
    # Layers of one kind have one form, and hybrids have two kinds.
    assert len({(kind, one.attn, one.mlp, one.parallel) for kind, one in zip(kinds, found, strict=True)}) == len(
        set(kinds)
    )
    assert len(set(kinds)) == (2 if family in HYBRIDS else 1)


@pytest.mark.parametrize("family", ["olmo2", "gemma3", "bloom", "opt"])
@pytest.mark.parametrize("dead", [("attn",), ("mlp",), ("attn", "mlp")])
def test_dead_projections_keep_the_form_that_the_living_have(family, dead):
    model = build(family)
    names = {
        "attn": ("o_proj", "out_proj", "self_attention.dense"),
        "mlp": ("down_proj", "dense_4h_to_h", "fc2"),
    }
    kill = tuple(name for part in dead for name in names[part])
    for name, tensor in model.state_dict().items():
        if name.removesuffix(".weight").removesuffix(".bias").endswith(kill):
            tensor.zero_()
    expected = reference_scores(model, token_ids())
    found = score_module(model, token_ids(), batch_size=6)
    for value in found.values:
        if value.layer is not None:
            assert value.n_tokens == expected.n_tokens[value.component, value.metric][value.layer]
            if value.n_tokens:
                exact = expected.value[value.component, value.metric][value.layer]
                assert value.value == pytest.approx(exact, abs=1e-5)
            else:
                assert (value.value, value.stderr, value.metric) == (None, None, "update_cosine")
            if value.component in dead and value.metric in ("angular_distance", "relative_norm"):
                assert value.value == 0
            if value.component in dead and value.metric == "cosine_similarity":
                assert value.value == 1


def refusal(config):
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(CheckpointError) as refused:
        score_module(model, token_ids(2, 8), batch_size=2)
    return str(refused.value)


def test_architectures_that_do_not_add_up_are_refused():
    common = {"vocab_size": 131, "hidden_size": 32, "num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 0}
    opt = OPTConfig(
        **common, num_hidden_layers=2, ffn_dim=64, word_embed_proj_dim=32, do_layer_norm_before=False, pad_token_id=1
    )
    message = refusal(opt)
    assert message.startswith("Layer 0 (OPTDecoderLayer): no pair of updates of its children")
    assert "open an issue" in message
    bloom = BloomConfig(
        vocab_size=131, hidden_size=32, n_layer=2, n_head=4, apply_residual_connection_post_layernorm=True
    )
    assert refusal(bloom).startswith("Layer 0 (BloomBlock): no pair of updates of its children")


def test_architectures_without_attention_and_mlp_are_refused():
    bert = BertConfig(vocab_size=131, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, is_decoder=True)
    message = refusal(bert)
    assert message.startswith("Layer 0 (BertLayer) has no MLP")
    assert "attention, intermediate, output" in message
    mamba = MambaConfig(vocab_size=131, hidden_size=32, num_hidden_layers=2, state_size=4)
    message = refusal(mamba)
    assert message.startswith("MambaForCausalLM has no decoder blocks")
    assert "decoder-only" in message
    with pytest.raises(CheckpointError, match="encoder-decoder"):
        find_layers(T5(T5Config(vocab_size=131, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)))


def test_falcon_adds_in_place_and_its_mlp_is_read_before():
    found = score_module(built("falcon"), token_ids(), batch_size=6)
    norms = [v.value for v in found.values if (v.component, v.metric) == ("mlp", "relative_norm")]
    np.testing.assert_allclose(norms, reference("falcon").value["mlp", "relative_norm"], atol=1e-5)
    layers = find_layers(built("falcon"))[1]
    with torch.no_grad():
        found = prove(layers[0], 0, *_given_to_layer_0("falcon"), built("falcon").config)
    assert found.mlp.copy


def _given_to_layer_0(family):
    given = []
    layer = find_layers(built(family))[1][0]
    with layer.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(layer_input(args, kwargs)), with_kwargs=True
    ):
        built(family)(torch.from_numpy(token_ids(1)), use_cache=False)
    return given[0]
