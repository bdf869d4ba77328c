"""Dropping in place: every family computes x + what is left, with a cache and without, and takes back what it lost."""

import gc
import weakref

import pytest
import torch
from accelerate import init_empty_weights
from families import FAMILIES, build, token_ids
from saved_models import built
from skipping_by_hand import logits_without
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3NextConfig, StaticCache

import redundancy_trace as rt
from redundancy_trace.blocks import find_layers
from redundancy_trace.blocks.dropping import parts_of, parts_to_skip, surround_with_random_weights_, trial_layers
from redundancy_trace.blocks.skipping import Skipped
from redundancy_trace.engine.whole import score_module
from redundancy_trace.pruning import DroppedComponent, DropPlan
from redundancy_trace.pruning.iterating import drop_one_by_one
from redundancy_trace.pruning.selecting import parse_spec

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*generation flags.*")]
every_family = pytest.mark.parametrize("family", FAMILIES)
DROPS = {
    "attn": (("attn", 0), ("attn", -1)),
    "mlp": (("mlp", 0), ("mlp", -1)),
    "block": (("block", 0), ("block", -1)),
    "joint": (("attn", 0), ("mlp", 1), ("attn", -1)),
}


def plan_of(model, components):
    n_layers = len(find_layers(model)[1])
    found = tuple(DroppedComponent(name, layer % n_layers) for name, layer in components)
    return DropPlan("tiny", None, None, None, None, ",".join(map(str, found)), "named", n_layers, found)


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@every_family
def test_every_family_computes_what_is_left(family):
    model = built(family)
    ids = torch.from_numpy(token_ids(2))
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        for components in DROPS.values():
            plan = plan_of(model, components)
            expected = logits_without(model, ids, plan.by_layer())
            with rt.dropped(model, plan):
                found = model(ids, use_cache=False).logits
                first = model(ids[:, :9], use_cache=True)
                second = model(ids[:, 9:], cache=first.cache, use_cache=True)
            assert relative(expected, before) > 1e-2  # the drop is felt
            assert relative(found, expected) < 1e-6
            assert relative(torch.cat([first.logits, second.logits], dim=1), expected) < 1e-5
        assert torch.equal(model(ids, use_cache=False).logits, before)


@every_family
def test_every_family_generates_alike_with_and_without_a_cache(family):
    model = built(family)
    ids = torch.from_numpy(token_ids(1, 4)).clamp_min(1)
    how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), rt.dropped(model, plan_of(model, DROPS["joint"])):
        for beams in (1, 3):  # beams change places in the cache
            cached, uncached = (
                model.generate(ids, use_cache=use_cache, num_beams=beams, **how) for use_cache in (True, False)
            )
            assert torch.equal(cached, uncached)


@pytest.mark.parametrize("family", ["llama", "olmo3", "gemma3", "qwen2", "bloom"])
def test_all_attentions_may_go(family):
    model = built(family)
    ids = torch.from_numpy(token_ids(1))
    plan = plan_of(model, [("attn", layer) for layer in range(3)])
    with torch.no_grad(), rt.dropped(model, plan):
        whole = model(ids, use_cache=False).logits
        first = model(ids[:, :9], use_cache=True)
        rest = model(ids[:, 9:], cache=first.cache, use_cache=True)
        assert relative(rest.logits, whole[:, 9:]) < 1e-5
        static = StaticCache(config=model.config, max_cache_len=32)
        first = model(ids[:, :9], cache=static, use_cache=True)
        rest = model(ids[:, 9:], cache=static, use_cache=True)
        assert relative(rest.logits, whole[:, 9:]) < 1e-5


def test_cache_holds_two_numbers_a_token_for_a_dropped_attention():
    model = built("llama")
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), rt.dropped(model, plan_of(model, [("attn", 0), ("block", 2)])):
        model(torch.from_numpy(token_ids(2)), cache=cache, use_cache=True)
    held = [layer.keys.numel() + layer.values.numel() for layer in cache.layers]
    kv = 2 * 2 * 16  # keys and values, two heads of 16
    assert held == [2 * 24 * 2, 2 * 24 * kv, 2 * 24 * 2]


def test_hybrids_with_linear_attention():
    config = Qwen3NextConfig(
        vocab_size=131, hidden_size=48, intermediate_size=72, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=24, layer_types=["linear_attention", "full_attention"] * 2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.from_numpy(token_ids(2))
    with torch.no_grad():
        for components in ([("attn", 0), ("mlp", 3)], [("attn", 1), ("block", 2)]):
            plan = plan_of(model, components)
            expected = logits_without(model, ids, plan.by_layer())
            with rt.dropped(model, plan):
                first = model(ids[:, :9], use_cache=True)
                rest = model(ids[:, 9:], cache=first.cache, use_cache=True)
            assert relative(torch.cat([first.logits, rest.logits], dim=1), expected) < 1e-5


def test_nothing_that_was_dropped_is_kept_or_computed():
    model = build("opt")
    layers = find_layers(model)[1]
    first, second = layers[0], layers[1]
    gone = [first.self_attn, first.self_attn_layer_norm, second.final_layer_norm, second.fc1, second.fc2]
    size = sum(p.numel() for module in gone for p in module.parameters())
    before = sum(p.numel() for p in model.parameters())
    lost = [weakref.ref(module) for module in gone]
    del gone
    assert rt.drop_(model, plan_of(model, [("attn", 0), ("mlp", 1)])) is model
    gc.collect()
    assert [module() for module in lost] == [None] * 5
    assert sum(p.numel() for p in model.parameters()) == before - size
    assert isinstance(layers[1].final_layer_norm, Skipped)
    assert "layer 0, returns zeros" in repr(layers[0].self_attn)


def test_norm_without_weights_goes_too_and_a_shared_one_stays():
    olmo = rt.drop_(build("olmo"), plan_of(built("olmo"), [("attn", 0)]))
    assert isinstance(find_layers(olmo)[1][0].input_layernorm, Skipped)
    phi = rt.drop_(build("phi"), plan_of(built("phi"), [("attn", 0), ("block", 1)]))
    layers = find_layers(phi)[1]
    assert isinstance(layers[0].input_layernorm, nn.LayerNorm)  # the MLP needs it
    assert isinstance(layers[1].input_layernorm, Skipped)


def test_weights_that_are_zero_hide_no_part():
    """A model that was zeroed before, or is fresh from a start at zero: the norm in front still belongs to its MLP."""
    model = build("llama")
    with torch.no_grad():
        for layer in find_layers(model)[1]:
            layer.mlp.down_proj.weight.zero_()
            layer.mlp.down_proj.bias.zero_()
    parts = parts_to_skip(model, {0: frozenset({"attn"})})
    assert [name for name, *_ in parts[0]] == ["input_layernorm", "self_attn"]


def test_layers_may_be_dropped_one_after_the_other_and_taken_back_in_turn():
    model = build("gemma2")
    ids = torch.from_numpy(token_ids(1))
    with torch.no_grad():
        before = model(ids).logits
        with rt.dropped(model, plan_of(model, [("attn", 1)])):
            one = model(ids).logits
            with rt.dropped(model, plan_of(model, [("mlp", 1), ("block", 0)])):
                both = model(ids).logits
            assert torch.equal(model(ids).logits, one)
        assert torch.equal(model(ids).logits, before)
        expected = logits_without(model, ids, {0: {"attn", "mlp"}, 1: {"attn", "mlp"}})
    assert relative(both, expected) < 1e-6


@pytest.mark.parametrize("spec", ["attn=2", "block=2", "joint=3", "attn<5"])
def test_iterative_dropping_scores_what_is_left(spec):
    """Against scores of the model without what went before, which the paper's own code gets wrong."""
    model = build("olmo2")
    ids = token_ids(2)
    asked = parse_spec(spec)
    found = drop_one_by_one(asked, model, ids)
    assert len(found) == (asked.count or 2)
    assert len({(one.component, one.layer) for one in found}) == len(found)
    kinds = ("attn", "mlp") if asked.wanted == "joint" else (asked.wanted,)
    gone = []
    for one in found:
        with rt.dropped(model, plan_of(model, gone)) if gone else torch.no_grad():
            values = score_module(model, ids, batch_size=2).values
        left = {
            (v.component, v.layer): 1 - v.value
            for v in values
            if v.metric == "cosine_similarity" and v.component in kinds and (v.component, v.layer) not in gone
        }
        assert min(left, key=left.__getitem__) == (one.component, one.layer)
        assert one.importance == pytest.approx(min(left.values()), abs=1e-9)
        gone.append((one.component, one.layer))
    plan = rt.plan_drop(
        rt.score_model(model, ids, batch_size=2), drop=spec, order="iterative", model=model, token_ids=ids
    )
    assert (plan.order, plan.components) == ("iterative", found)


def test_plan_of_another_model_is_refused():
    other = DropPlan("other", None, None, None, None, "attn:0", "named", 4, (DroppedComponent("attn", 0),))
    with pytest.raises(rt.InputError, match="of other with 4 layers; this model has 3"):
        rt.drop_(built("llama"), other)


@every_family
def test_parts_are_known_without_weights(family):
    expected = list(trial_layers(built(family)))
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    surround_with_random_weights_(model)
    found = list(trial_layers(model))
    assert all(parameter.is_meta for parameter in find_layers(model)[1].parameters())
    for components in ({"attn"}, {"mlp"}, {"attn", "mlp"}):
        for one, other in zip(found, expected, strict=True):
            assert parts_of(one, frozenset(components)) == parts_of(other, frozenset(components))
