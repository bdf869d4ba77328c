"""What `trace eval` measures: each number against a plain way to get it."""

import math

import numpy as np
import pytest
import torch
from families import FAMILIES, POSITIONS, VOCAB, build, token_ids
from hypothesis import given
from hypothesis import strategies as st
from saved_models import built
from transformers import AutoModelForCausalLM, Qwen3NextConfig

import redundancy_trace as rt
from redundancy_trace.blocks import find_layers
from redundancy_trace.calibration import TokenStream
from redundancy_trace.calibration.streams import joined, tokens_and_bytes
from redundancy_trace.calibration.texts import Piece
from redundancy_trace.errors import CheckpointError, InputError
from redundancy_trace.evaluation import Load, cut_windows, loss_rows, speed_rows, tokens_needed
from redundancy_trace.evaluation.loss import _ratio_and_error, text_loss
from redundancy_trace.evaluation.memory import cache_bytes, computed_cache_bytes, layers_without_attention, peak_memory
from redundancy_trace.pruning import DroppedComponent, DropPlan

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = "Emma Woodhouse, handsome, clever, and rich — naïve? 日本語! " * 3
CPU = torch.device("cpu")


def plan_of(model, *components):
    n_layers = len(find_layers(model)[1])
    found = tuple(DroppedComponent(name, layer % n_layers) for name, layer in components)
    return DropPlan("tiny", None, None, None, None, ",".join(map(str, found)), "named", n_layers, found)


def numbers(rows, plan=None):
    return {row.metric: row for row in rows if row.plan == (plan and plan.drop)}


def random_stream(n=61, prefix=(), high=VOCAB):
    draw = np.random.default_rng(3)
    return TokenStream("text", draw.integers(1, high, n), draw.integers(0, 4, n), prefix)


@given(
    n=st.integers(2, 60),
    length=st.integers(2, 12),
    stride=st.integers(1, 12),
    prefix=st.sampled_from([(), (7,), (7, 8)]),
    skip=st.integers(0, 5),
)
def test_every_token_of_the_text_counts_once_with_the_text_in_front_of_it(n, length, stride, prefix, skip):
    stream = TokenStream("text", np.arange(100, 100 + n), np.arange(n), prefix)
    fresh = length - len(prefix)
    if fresh < 1 or stride > fresh or n - skip < fresh:
        with pytest.raises(InputError):
            cut_windows(stream, samples=0, sequence_length=length, stride=stride, skip=skip)
        return
    windows = cut_windows(stream, samples=0, sequence_length=length, stride=stride, skip=skip)
    counted = np.concatenate([row[first:] for row, first in zip(windows.ids, windows.first, strict=True)])
    seen, expected = set(), []
    for row in windows.ids[:, len(prefix) :].tolist():
        expected += [token for token in row if token not in seen and (prefix or token != row[0])]
        seen.update(row)
    assert counted.tolist() == expected
    assert seen == set(range(100 + skip, 100 + n))
    assert windows.n_bytes.sum() == sum(token - 100 for token in expected)
    for row in windows.ids:
        assert tuple(row[: len(prefix)]) == prefix
        assert (np.diff(row[len(prefix) :]) == 1).all()
    needed = tokens_needed(samples=1, sequence_length=length, stride=stride, skip=skip)
    first = TokenStream("text", stream.ids[:needed], None, prefix)
    one = cut_windows(first, samples=1, sequence_length=length, stride=stride, skip=skip)
    assert one.ids.tolist() == windows.ids[:1].tolist()


@pytest.mark.parametrize("prefix", [(), (5,)], ids=["no-bos", "bos"])
@pytest.mark.parametrize("stride", [None, 5])
def test_loss_is_that_of_a_plain_loop(prefix, stride):
    """One token at a time, each with the text of its window in front of it."""
    model, length = built("llama"), 16
    stream = random_stream(prefix=prefix)
    windows = cut_windows(stream, samples=0, sequence_length=length, stride=stride)
    fresh = length - len(prefix)
    total, count, n_bytes, known = 0.0, 0, 0, 0
    last = stream.ids.size - fresh
    for start in sorted({*range(0, last, stride or fresh), last}):
        for place in range(max(known, start + (not prefix)), start + fresh):
            context = torch.tensor([[*prefix, *stream.ids[start:place]]])
            with torch.no_grad():
                logits = model(input_ids=context, use_cache=False).logits[0, -1].double()
            total -= float(torch.log_softmax(logits, 0)[stream.ids[place]])
            count, n_bytes = count + 1, n_bytes + int(stream.n_bytes[place])
        known = start + fresh
    found = numbers(loss_rows(model, windows, batch_size=3))
    assert found["loss"].n_tokens == count
    assert found["loss"].n_bytes == n_bytes
    assert found["loss"].value == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"].value == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found["bits_per_byte"].value == pytest.approx(total / math.log(2) / n_bytes, rel=1e-5)
    recorded = found["loss"]
    assert (recorded.sequence_length, recorded.stride, recorded.bos) == (length, stride or fresh, bool(prefix))
    assert (recorded.token_sha256, recorded.dataset) == (windows.sha256, f"text {len(windows.ids)}x{length}")
    assert (recorded.device, recorded.dtype, recorded.n_samples) == ("cpu", "float32", len(windows.ids))


def test_standard_error_is_that_of_a_ratio_over_windows():
    model = built("llama")
    windows = cut_windows(random_stream(96), samples=0, sequence_length=16)
    found = text_loss(model, windows)
    assert set(found.counts) == {15}
    per_window = found.sums / found.counts
    assert found.loss().stderr == pytest.approx(per_window.std(ddof=1) / len(per_window) ** 0.5)
    # Of windows of unequal size: against 20,000 draws of the windows with replacement.
    sums, sizes = np.array([9.0, 4.0, 6.5, 12.0, 3.0, 8.0] * 8), np.array([4, 2, 3, 5, 2, 3] * 8)
    draws = np.random.default_rng(0).integers(0, sums.size, (20_000, sums.size))
    spread = (sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)).std()
    value, error = _ratio_and_error(sums, sizes)
    assert value == sums.sum() / sizes.sum()
    assert error == pytest.approx(spread, rel=0.03)


def test_bytes_of_tokens_add_up_to_the_text(tiny_run):
    tokenizer = rt.load_tokenizer(tiny_run)
    ids, n_bytes = tokens_and_bytes(tokenizer, TEXT)
    assert ids == tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert sum(n_bytes) == len(TEXT.encode())
    assert min(n_bytes) >= 0
    pieces = [Piece(TEXT, ends_document=True), Piece("Und so weiter.", ends_document=True)]
    both, counted = joined(pieces, tokenizer, None)
    assert both[len(ids)] == tokenizer.eos_token_id
    assert counted[len(ids)] == 0  # an EOS stands for no text
    assert counted.sum() == len(TEXT.encode()) + len("Und so weiter.")
    assert joined(pieces, tokenizer, 5)[0].tolist() == ids[:5]


def test_a_loss_that_is_not_finite_is_an_error():
    model = build("llama")
    model.lm_head.weight.data[3] = torch.inf
    with pytest.raises(CheckpointError, match="not finite"):
        text_loss(model, cut_windows(random_stream(), samples=2, sequence_length=8))


def cache_after(model, ids, step):
    """The cache of a prompt and one token behind it."""
    with torch.no_grad():
        first = model(ids[:, :step], use_cache=True)
        return model(ids[:, step:], cache=first.cache, use_cache=True).cache


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_bytes_are_those_of_the_formula(family):
    model = built(family)
    ids = torch.from_numpy(token_ids(2))

    def held_and_computed():
        given = {"batch_size": 2, "tokens": ids.shape[1], "element_bytes": 4}
        computed = computed_cache_bytes(model.config, **given, dropped=layers_without_attention(model))
        return cache_bytes(cache_after(model, ids, ids.shape[1] - 1)), computed

    held, computed = held_and_computed()
    assert held == computed > 0
    with rt.dropped(model, plan_of(model, ("attn", 0), ("mlp", 1), ("block", -1))):
        assert layers_without_attention(model) == (0, len(find_layers(model)[1]) - 1)
        left, computed = held_and_computed()
    assert left == computed
    assert left < 0.7 * held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_of_a_hybrid(dtype):
    config = Qwen3NextConfig(
        vocab_size=131, hidden_size=48, intermediate_size=72, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=24, layer_types=["linear_attention", "full_attention"] * 2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    ids = torch.from_numpy(token_ids(2))
    for lost in ((), (("attn", 0), ("attn", 1))):
        context = rt.dropped(model, plan_of(model, *lost)) if lost else torch.no_grad()
        with context:
            computed = computed_cache_bytes(
                config, batch_size=2, tokens=24, element_bytes=dtype.itemsize, dropped=layers_without_attention(model)
            )
            assert cache_bytes(cache_after(model, ids, 23)) == computed


def test_the_formula_is_silent_where_the_shape_is_not_told():
    config = Qwen3NextConfig(num_hidden_layers=2, layer_types=["full_attention"] * 2)
    config.layer_types = ["full_attention", "compressed_attention"]
    assert computed_cache_bytes(config, batch_size=1, tokens=4, element_bytes=4) is None


def test_speed_and_memory_before_and_after_in_one_run():
    model, load = built("llama"), Load(batch_size=2, prompt_tokens=12, new_tokens=3, rounds=2)
    plan = plan_of(model, ("attn", 0), ("attn", 2))
    rows = speed_rows(model, load, [None, plan])
    before, after = numbers(rows), numbers(rows, plan)
    always = {
        "prefill_tokens_per_second", "decode_tokens_per_second", "prefill_flops", "decode_flops", "decode_bytes",
        "weight_bytes", "kv_cache_bytes", "kv_cache_bytes_computed", "peak_memory_bytes",
    }  # fmt: skip
    ratios = {"prefill_speedup", "decode_speedup", "prefill_speedup_bound", "decode_speedup_bound"}
    assert set(before) == always
    assert set(after) == always | ratios
    assert all(row.value > 0 for row in rows)
    for row in rows:
        assert (row.batch_size, row.prompt_tokens, row.new_tokens, row.dtype) == (2, 12, 3, "float32")
    assert before["decode_tokens_per_second"].n_samples == 2
    weights = {name: p.numel() * 4 for name, p in model.named_parameters()}
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    gone = sum(size for name, size in weights.items() if any(f"layers.{i}.self_attn" in name for i in (0, 2)))
    gone += sum(weights[f"model.layers.{i}.input_layernorm.weight"] for i in (0, 2))
    assert before["weight_bytes"].value == sum(weights.values()) + buffers
    assert before["weight_bytes"].value - after["weight_bytes"].value == gone
    for found in (before, after):
        assert found["kv_cache_bytes"].value == found["kv_cache_bytes_computed"].value
        assert found["peak_memory_bytes"].value >= found["weight_bytes"].value
        read = found["weight_bytes"].value - weights["model.embed_tokens.weight"]
        assert found["decode_bytes"].value == read + found["kv_cache_bytes"].value


def test_operations_are_those_counted_by_hand():
    model, load = built("llama"), Load(batch_size=2, prompt_tokens=12, new_tokens=3, rounds=1)
    plan = plan_of(model, ("attn", 1))
    rows = speed_rows(model, load, [None, plan])
    before, after = numbers(rows), numbers(rows, plan)
    layer = model.model.layers[0]
    matrices = [p.numel() for name, p in layer.named_parameters() if name.endswith("proj.weight")]
    attention = [p.numel() for p in (getattr(layer.self_attn, f"{name}_proj").weight for name in "qkvo")]
    head = model.lm_head.weight.numel()
    heads, width = model.config.num_attention_heads, model.config.head_dim

    def scores(queries, keys):
        return 2 * 2 * heads * queries * keys * width  # two products, two operations a multiply-add

    prefill = 2 * (3 * (12 * 2 * sum(matrices) + scores(12, 12)) + 2 * head)
    decode = 2 * (3 * (2 * sum(matrices) + scores(1, 15)) + 2 * head)
    assert before["prefill_flops"].value == prefill
    assert before["decode_flops"].value == decode
    assert decode - after["decode_flops"].value == 2 * (2 * sum(attention) + scores(1, 15))
    assert after["prefill_speedup_bound"].value == pytest.approx(prefill / after["prefill_flops"].value)
    bytes_ratio = before["decode_bytes"].value / after["decode_bytes"].value
    assert after["decode_speedup_bound"].value == pytest.approx(max(decode / after["decode_flops"].value, bytes_ratio))


def test_more_than_the_positions_cannot_be_generated():
    with pytest.raises(InputError, match=f"{POSITIONS} positions"):
        speed_rows(built("llama"), Load(prompt_tokens=POSITIONS, new_tokens=1))


def test_peak_memory_is_that_of_a_tensor_that_was_held():
    with peak_memory(CPU) as peak:
        torch.ones(64 * 2**20 // 4).sum()
    assert peak.rise is None or 60 * 2**20 < peak.rise < 80 * 2**20


def test_a_model_in_memory_is_as_before_afterwards():
    model = build("gpt_neox")
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plan = plan_of(model, ("attn", 0), ("block", 2))
    ids = token_ids(4)
    rows = rt.evaluate(model, plan=plan, token_ids=ids, measure="loss", quiet=True)
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert list(model.state_dict()) == list(state)
    model.eval()
    losses = rows.filter(rows["metric"] == "loss")
    expected = []
    for lost in (None, plan):
        with rt.dropped(model, lost) if lost else torch.no_grad(), torch.no_grad():
            expected.append(float(model(torch.from_numpy(ids), labels=torch.from_numpy(ids)).loss))
    assert losses["value"].to_list() == pytest.approx(expected, rel=1e-5)
    assert losses["n_dropped"].to_list() == [0, 2]
    with pytest.raises(InputError, match="token_ids"):
        rt.evaluate(model, measure="loss", quiet=True)
    with pytest.raises(InputError, match="9 layers; this model has 3"):
        rt.evaluate(built("gpt_neox"), plan=DropPlan(*_of_nine_layers()), token_ids=ids, quiet=True)


def _of_nine_layers():
    return "tiny", None, None, None, None, "attn:8", "named", 9, (DroppedComponent("attn", 8),)
