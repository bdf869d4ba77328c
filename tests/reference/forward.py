"""The forward pass of every tested architecture, written by hand: what each block adds to the residual stream.

A family is four functions: what enters the first block, what a block adds, the final norm, and what becomes of
the logits. A block returns its two updates and says whether its MLP reads the stream before the attention.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from reference.parts import (
    ACTIVATIONS,
    Weights,
    alibi_slopes,
    attend,
    conv1d,
    gated_mlp,
    gelu,
    gelu_bloom,
    grouped_sigmoid_router,
    heads,
    layer_norm,
    linear,
    mixture,
    named_layer_norm,
    plain_mlp,
    rms_norm,
    rope,
    softmax_router,
)
from torch import Tensor

Config = Any  # the fields of transformers' configurations; nothing of its code is called
Step = Callable[[Tensor], Tensor]


class Updates(NamedTuple):
    """What one block adds: y = x + attn + mlp."""

    attn: Tensor
    mlp: Tensor
    parallel: bool


@dataclass(frozen=True)
class Family:
    """How one architecture computes, and what its tensors are called."""

    block: Callable[[Config, Weights, int, Tensor], Updates]
    base: str = "model."
    layers: str = "layers"
    embedding: str = "embed_tokens"
    embed: Callable[[Config, Weights, Tensor], Tensor] = lambda c, w, rows: rows
    norm: Callable[[Config, Weights, Tensor], Tensor] = lambda c, w, x: rms_norm(x, w["norm.weight"], c.rms_norm_eps)
    finish: Callable[[Config, Tensor], Tensor] = lambda c, logits: logits


class Pass(NamedTuple):
    """One forward pass in float64: `hidden` holds L + 1 states, `updates` L pairs."""

    hidden: tuple[Tensor, ...]
    updates: tuple[Updates, ...]
    logits: Tensor


def forward(config: Config, tensors: Mapping[str, Tensor], token_ids: Tensor) -> Pass:
    """Run a model by hand.

    Args:
        config: The model's configuration.
        tensors: Its state dict, in any float dtype.
        token_ids: Shape (sequences, length).
    """
    family = FAMILIES[config.model_type]
    w = Weights(tensors, family.base)
    embedding = w[f"{family.embedding}.weight"]
    x = family.embed(config, w, embedding[token_ids])
    hidden, updates = [x], []
    for layer in range(config.num_hidden_layers):
        step = family.block(config, w.under(f"{family.layers}.{layer}"), layer, x)
        x = x + step.attn + step.mlp
        hidden.append(x)
        updates.append(step)
    whole = Weights(tensors)
    head = embedding if config.tie_word_embeddings else whole["lm_head.weight"]
    logits = family.norm(config, w, x) @ head.T
    bias = whole.get("lm_head.bias")
    logits = family.finish(config, logits if bias is None else logits + bias)
    return Pass(tuple(hidden), tuple(updates), logits)


# ---- the two shapes of a block


def sequential(x: Tensor, attn: Step, mlp: Step) -> Updates:
    a = attn(x)
    return Updates(a, mlp(x + a), parallel=False)


def parallel(x: Tensor, attn: Step, mlp: Step) -> Updates:
    return Updates(attn(x), mlp(x), parallel=True)


# ---- attention with separate q, k, v


def _unchanged(name: str, x: Tensor) -> Tensor:
    return x


def separate_attention(
    x: Tensor,
    w: Weights,
    c: Config,
    *,
    rotate: Step | None,
    flat: Callable[[str, Tensor], Tensor] = _unchanged,
    by_head: Callable[[str, Tensor], Tensor] = _unchanged,
    out: str = "o_proj",
    **rules: Any,
) -> Tensor:
    """Project to q, k, v; change them (`flat`: all heads in a row; `by_head`: (B, T, H, K)); turn; attend."""
    n_heads = c.num_attention_heads
    n_kv = getattr(c, "num_key_value_heads", None) or n_heads
    q, k, v = (flat(name, linear(x, w, f"{name}_proj")) for name in "qkv")
    q, k, v = by_head("q", heads(q, n_heads)), by_head("k", heads(k, n_kv)), by_head("v", heads(v, n_kv))
    if rotate is not None:
        q, k = rotate(q), rotate(k)
    return linear(attend(q, k, v, **rules), w, out)


def rotation(c: Config, layer: int, *, interleaved: bool = False) -> Step:
    """Rotary positions as the configuration has them for this layer."""
    parameters = c.rope_parameters
    if "rope_theta" not in parameters:
        parameters = parameters[c.layer_types[layer]]
    assert parameters["rope_type"] == "default"

    def rotate(x_BTHK: Tensor) -> Tensor:
        width = int(x_BTHK.shape[-1] * parameters.get("partial_rotary_factor", 1.0))
        return rope(x_BTHK, parameters["rope_theta"], width, interleaved=interleaved)

    return rotate


def window(c: Config, layer: int) -> int | None:
    """Tokens that the attention of this layer sees, itself included; None = all."""
    types = getattr(c, "layer_types", None)
    if types is not None and types[layer] != "sliding_attention":
        return None
    return getattr(c, "sliding_window", None)


def clipped(limit: float | None) -> Callable[[str, Tensor], Tensor]:
    return _unchanged if limit is None else lambda name, x: x.clamp(-limit, limit)


def rms_on_qk(w: Weights, eps: float, *, shift: float = 0.0) -> Callable[[str, Tensor], Tensor]:
    """RMS norm of q and k over the last axis: over a head or over all of them, as it is applied."""
    return lambda name, x: x if name == "v" else rms_norm(x, shift + w[f"{name}_norm.weight"], eps)


# ---- Llama and those that differ from it in a detail


def llama_mlp(c: Config, w: Weights, layer: int, x: Tensor) -> Tensor:
    return gated_mlp(x, w.under("mlp"), ACTIVATIONS[c.hidden_act])


def llama_block(
    c: Config, w: Weights, layer: int, x: Tensor, *, mlp: Callable[..., Tensor] = llama_mlp, **changes: Any
) -> Updates:
    """Norm, attention; norm, MLP. The residual multiplier of Granite belongs to the updates."""
    eps, factor = c.rms_norm_eps, getattr(c, "residual_multiplier", 1.0)
    rules = {"rotate": rotation(c, layer), "window": window(c, layer), **changes}
    return sequential(
        x,
        lambda x: (
            factor * separate_attention(rms_norm(x, w["input_layernorm.weight"], eps), w.under("self_attn"), c, **rules)
        ),
        lambda x: factor * mlp(c, w, layer, rms_norm(x, w["post_attention_layernorm.weight"], eps)),
    )


def smollm3_block(c: Config, w: Weights, layer: int, x: Tensor) -> Updates:
    keeps_rope = c.no_rope_layers[layer] == 1  # in spite of its name, 1 marks a layer with rotary positions
    return llama_block(c, w, layer, x, rotate=rotation(c, layer) if keeps_rope else None)


def qwen3_block(c: Config, w: Weights, layer: int, x: Tensor, *, mlp: Callable[..., Tensor] = llama_mlp) -> Updates:
    return llama_block(c, w, layer, x, mlp=mlp, by_head=rms_on_qk(w.under("self_attn"), c.rms_norm_eps))


def olmo_block(c: Config, w: Weights, layer: int, x: Tensor) -> Updates:
    """Norms without weights, and queries, keys and values cut at ±clip_qkv."""
    rules = {"rotate": rotation(c, layer), "flat": clipped(c.clip_qkv)}
    return sequential(
        x,
        lambda x: separate_attention(layer_norm(x, 1e-5), w.under("self_attn"), c, **rules),
        lambda x: llama_mlp(c, w, layer, layer_norm(x, 1e-5)),
    )


def granite_block(c: Config, w: Weights, layer: int, x: Tensor) -> Updates:
    return llama_block(c, w, layer, x, scale=c.attention_multiplier)


# ---- mixtures of experts


def mixtral_mlp(c: Config, w: Weights, layer: int, x: Tensor) -> Tensor:
    share = softmax_router(x, w["mlp.gate.weight"], c.num_experts_per_tok, renormalise=True)
    return mixture(x, w.under("mlp.experts"), share, ACTIVATIONS[c.hidden_act])


def qwen3_moe_mlp(c: Config, w: Weights, layer: int, x: Tensor) -> Tensor:
    if layer in c.mlp_only_layers or (layer + 1) % c.decoder_sparse_step:
        return llama_mlp(c, w, layer, x)
    return olmoe_mlp(c, w, layer, x)


def olmoe_mlp(c: Config, w: Weights, layer: int, x: Tensor) -> Tensor:
    share = softmax_router(x, w["mlp.gate.weight"], c.num_experts_per_tok, renormalise=c.norm_topk_prob)
    return mixture(x, w.under("mlp.experts"), share, ACTIVATIONS[c.hidden_act])


def olmoe_block(c: Config, w: Weights, layer: int, x: Tensor) -> Updates:
    """q and k are normed over all heads together, then cut at ±clip_qkv."""
    norm, clip = rms_on_qk(w.under("self_attn"), c.rms_norm_eps), clipped(c.clip_qkv)
    return llama_block(c, w, layer, x, mlp=olmoe_mlp, flat=lambda name, x: clip(name, norm(name, x)))


def glm4_moe_mlp(c: Config, w: Weights, layer: int, x: Tensor) -> Tensor:
    if layer < c.first_k_dense_replace:
        return llama_mlp(c, w, layer, x)
    assert c.norm_topk_prob
    share = grouped_sigmoid_router(
        x,
        w["mlp.gate.weight"],
        w["mlp.gate.e_score_correction_bias"],
        k=c.num_experts_per_tok,
        n_groups=c.n_group,
        k_groups=c.topk_group,
        factor=c.routed_scaling_factor,
    )
    act = ACTIVATIONS[c.hidden_act]
    return mixture(x, w.under("mlp.experts"), share, act) + gated_mlp(x, w.under("mlp.shared_experts"), act)


# ---- a norm behind the sublayer: the update is taken behind it


def olmo2_block(
    c: Config, w: Weights, layer: int, x: Tensor, *, rotate: bool = True, norm_heads: bool = False
) -> Updates:
    """OLMo-2 and OLMo-3 norm q and k over all heads together, EXAONE-4 (`norm_heads`) each head by itself."""
    eps = c.rms_norm_eps
    rules = {
        "rotate": rotation(c, layer) if rotate else None,
        "window": window(c, layer),
        "by_head" if norm_heads else "flat": rms_on_qk(w.under("self_attn"), eps),
    }
    return sequential(
        x,
        lambda x: rms_norm(
            separate_attention(x, w.under("self_attn"), c, **rules), w["post_attention_layernorm.weight"], eps
        ),
        lambda x: rms_norm(llama_mlp(c, w, layer, x), w["post_feedforward_layernorm.weight"], eps),
    )


def exaone4_block(c: Config, w: Weights, layer: int, x: Tensor) -> Updates:
    """Layers with full attention go without positions if others slide."""
    rotate = c.sliding_window is None or c.layer_types[layer] == "sliding_attention"
    return olmo2_block(c, w, layer, x, rotate=rotate, norm_heads=True)


def _gemma_norm(c: Config, w: Weights, name: str, x: Tensor) -> Tensor:
    return rms_norm(x, 1 + w[f"{name}.weight"], c.rms_norm_eps)


def gemma_block(c: Config, w: Weights, layer: int, x: Tensor, **changes: Any) -> Updates:
    """Norms before and behind both sublayers, each with weight 1 + w."""
    act = ACTIVATIONS[c.hidden_activation]
    rules = {
        "rotate": rotation(c, layer),
        "window": window(c, layer),
        "scale": c.query_pre_attn_scalar**-0.5,
        **changes,
    }

    def attn(x: Tensor) -> Tensor:
        a = separate_attention(_gemma_norm(c, w, "input_layernorm", x), w.under("self_attn"), c, **rules)
        return _gemma_norm(c, w, "post_attention_layernorm", a)

    def mlp(x: Tensor) -> Tensor:
        m = gated_mlp(_gemma_norm(c, w, "pre_feedforward_layernorm", x), w.under("mlp"), act)
        return _gemma_norm(c, w, "post_feedforward_layernorm", m)

    return sequential(x, attn, mlp)


def gemma2_block(c: Config, w: Weights, layer: int, x: Tensor) -> Updates:
    return gemma_block(c, w, layer, x, softcap=c.attn_logit_softcapping)


def gemma3_block(c: Config, w: Weights, layer: int, x: Tensor) -> Updates:
    norm = rms_on_qk(w.under("self_attn"), c.rms_norm_eps, shift=1.0)
    return gemma_block(c, w, layer, x, by_head=norm)


def gemma_finish(c: Config, logits: Tensor) -> Tensor:
    cap = c.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


def glm4_block(c: Config, w: Weights, layer: int, x: Tensor) -> Updates:
    eps, act = c.rms_norm_eps, ACTIVATIONS[c.hidden_act]
    rotate = rotation(c, layer, interleaved=True)

    def attn(x: Tensor) -> Tensor:
        x = rms_norm(x, w["input_layernorm.weight"], eps)
        a = separate_attention(x, w.under("self_attn"), c, rotate=rotate)
        return rms_norm(a, w["post_self_attn_layernorm.weight"], eps)

    def mlp(x: Tensor) -> Tensor:
        x = rms_norm(x, w["post_attention_layernorm.weight"], eps)
        gate, up = linear(x, w, "mlp.gate_up_proj").chunk(2, dim=-1)
        return rms_norm(linear(act(gate) * up, w, "mlp.down_proj"), w["post_mlp_layernorm.weight"], eps)

    return sequential(x, attn, mlp)


# ---- layer norms and separate q, k, v


def starcoder2_block(c: Config, w: Weights, layer: int, x: Tensor) -> Updates:
    eps, act = c.norm_epsilon, ACTIVATIONS[c.hidden_act]
    rules = {"rotate": rotation(c, layer), "window": window(c, layer)}
    return sequential(
        x,
        lambda x: separate_attention(named_layer_norm(x, w, "input_layernorm", eps), w.under("self_attn"), c, **rules),
        lambda x: plain_mlp(
            named_layer_norm(x, w, "post_attention_layernorm", eps), w.under("mlp"), act, "c_fc", "c_proj"
        ),
    )


def opt_block(c: Config, w: Weights, layer: int, x: Tensor) -> Updates:
    assert c.do_layer_norm_before
    act = ACTIVATIONS[c.activation_function]
    return sequential(
        x,
        lambda x: separate_attention(
            named_layer_norm(x, w, "self_attn_layer_norm", 1e-5),
            w.under("self_attn"),
            c,
            rotate=None,
            out="out_proj",
        ),
        lambda x: plain_mlp(named_layer_norm(x, w, "final_layer_norm", 1e-5), w, act, "fc1", "fc2"),
    )


def stablelm_block(c: Config, w: Weights, layer: int, x: Tensor) -> Updates:
    """Parallel, with one norm, if the configuration says so; q and k may have a norm for each head."""
    eps, attn_w = c.layer_norm_eps, w.under("self_attn")

    def by_head(name: str, x_BTHK: Tensor) -> Tensor:
        if name == "v" or not c.qk_layernorm:
            return x_BTHK
        weight_HK = torch.stack([attn_w[f"{name}_layernorm.norms.{head}.weight"] for head in range(x_BTHK.shape[2])])
        return layer_norm(x_BTHK, eps, weight_HK)

    shape, mlp_norm = sequential, "post_attention_layernorm"
    if c.use_parallel_residual:
        shape, mlp_norm = parallel, "input_layernorm"
    return shape(
        x,
        lambda x: separate_attention(
            named_layer_norm(x, w, "input_layernorm", eps),
            attn_w,
            c,
            rotate=rotation(c, layer),
            by_head=by_head,
        ),
        lambda x: llama_mlp(c, w, layer, named_layer_norm(x, w, mlp_norm, eps)),
    )


def phi_block(c: Config, w: Weights, layer: int, x: Tensor) -> Updates:
    """Parallel: attention and MLP read the same normed state."""
    assert not c.qk_layernorm
    act = ACTIVATIONS[c.hidden_act]
    normed = named_layer_norm(x, w, "input_layernorm", c.layer_norm_eps)
    return parallel(
        normed,
        lambda x: separate_attention(x, w.under("self_attn"), c, rotate=rotation(c, layer), out="dense"),
        lambda x: plain_mlp(x, w.under("mlp"), act, "fc1", "fc2"),
    )


def cohere_block(c: Config, w: Weights, layer: int, x: Tensor) -> Updates:
    """Parallel; rotary pairs are neighbours; q and k are normed head by head, with a weight for each head."""
    eps = c.layer_norm_eps
    attn_w = w.under("self_attn")

    def by_head(name: str, x_BTHK: Tensor) -> Tensor:
        weight_HK = None if name == "v" else attn_w.get(f"{name}_norm.weight")
        return x_BTHK if weight_HK is None else layer_norm(x_BTHK, eps, weight_HK)

    normed = named_layer_norm(x, w, "input_layernorm", eps)
    rotate = rotation(c, layer, interleaved=True)
    return parallel(
        normed,
        lambda x: separate_attention(x, attn_w, c, rotate=rotate, by_head=by_head),
        lambda x: llama_mlp(c, w, layer, x),
    )


def gptj_block(c: Config, w: Weights, layer: int, x: Tensor) -> Updates:
    act = ACTIVATIONS[c.activation_function]
    normed = named_layer_norm(x, w, "ln_1", c.layer_norm_epsilon)
    return parallel(
        normed,
        lambda x: separate_attention(
            x,
            w.under("attn"),
            c,
            rotate=lambda q: rope(q, 10000.0, c.rotary_dim, interleaved=True),
            out="out_proj",
        ),
        lambda x: plain_mlp(x, w.under("mlp"), act, "fc_in", "fc_out"),
    )


# ---- q, k and v in one matrix


def split_by_head(fused: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each head's own q, k, v stand together."""
    q, k, v = fused.unflatten(-1, (n_heads, 3, -1)).unbind(-2)
    return q, k, v


def split_in_thirds(fused: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (heads(part, n_heads) for part in fused.chunk(3, dim=-1))
    return q, k, v


def split_by_group(fused: Tensor, n_groups: int, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each group: its queries, then one key, then one value."""
    grouped = fused.unflatten(-1, (n_groups, n_heads // n_groups + 2, -1))
    return grouped[..., :-2, :].flatten(-3, -2), grouped[..., -2, :], grouped[..., -1, :]


def gpt_neox_block(c: Config, w: Weights, layer: int, x: Tensor) -> Updates:
    """Two norms in both shapes; the MLP's reads the block's input if parallel."""
    eps, act, rotate = c.layer_norm_eps, ACTIVATIONS[c.hidden_act], rotation(c, layer)

    def attn(x: Tensor) -> Tensor:
        x = named_layer_norm(x, w, "input_layernorm", eps)
        q, k, v = split_by_head(linear(x, w, "attention.query_key_value"), c.num_attention_heads)
        return linear(attend(rotate(q), rotate(k), v), w, "attention.dense")

    def mlp(x: Tensor) -> Tensor:
        x = named_layer_norm(x, w, "post_attention_layernorm", eps)
        return plain_mlp(x, w.under("mlp"), act, "dense_h_to_4h", "dense_4h_to_h")

    return (parallel if c.use_parallel_residual else sequential)(x, attn, mlp)


def gpt2_block(c: Config, w: Weights, layer: int, x: Tensor) -> Updates:
    assert c.scale_attn_weights
    assert not c.scale_attn_by_inverse_layer_idx
    eps, act = c.layer_norm_epsilon, ACTIVATIONS[c.activation_function]

    def attn(x: Tensor) -> Tensor:
        x = named_layer_norm(x, w, "ln_1", eps)
        q, k, v = split_in_thirds(conv1d(x, w, "attn.c_attn"), c.n_head)
        return conv1d(attend(q, k, v), w, "attn.c_proj")

    def mlp(x: Tensor) -> Tensor:
        x = named_layer_norm(x, w, "ln_2", eps)
        return conv1d(act(conv1d(x, w, "mlp.c_fc")), w, "mlp.c_proj")

    return sequential(x, attn, mlp)


def bloom_block(c: Config, w: Weights, layer: int, x: Tensor) -> Updates:
    """The modules add the residual themselves; an update is what they add to it."""
    assert not c.apply_residual_connection_post_layernorm
    eps = c.layer_norm_epsilon

    def attn(x: Tensor) -> Tensor:
        x = named_layer_norm(x, w, "input_layernorm", eps)
        q, k, v = split_by_head(linear(x, w, "self_attention.query_key_value"), c.n_head)
        return linear(attend(q, k, v, alibi=alibi_slopes(c.n_head)), w, "self_attention.dense")

    def mlp(x: Tensor) -> Tensor:
        x = named_layer_norm(x, w, "post_attention_layernorm", eps)
        return plain_mlp(x, w.under("mlp"), gelu_bloom, "dense_h_to_4h", "dense_4h_to_h")

    return sequential(x, attn, mlp)


def falcon_block(c: Config, w: Weights, layer: int, x: Tensor) -> Updates:
    """Parallel with one norm (7B) or two (40B), or sequential; a key head for all, for a group or for each."""
    eps, act, n_heads = c.layer_norm_epsilon, ACTIVATIONS[c.activation], c.num_attention_heads
    is_parallel = c.new_decoder_architecture or c.parallel_attn
    two_norms = w.get("ln_attn.weight") is not None
    attn_norm = "ln_attn" if two_norms else "input_layernorm"
    mlp_norm = "ln_mlp" if two_norms else ("input_layernorm" if is_parallel else "post_attention_layernorm")

    def attn(x: Tensor) -> Tensor:
        fused = linear(named_layer_norm(x, w, attn_norm, eps), w, "self_attention.query_key_value")
        if c.new_decoder_architecture:
            q, k, v = split_by_group(fused, c.num_kv_heads, n_heads)
        elif c.multi_query:
            q, k, v = split_by_group(fused, 1, n_heads)
        else:
            q, k, v = split_by_head(fused, n_heads)
        if c.alibi:
            mixed = attend(q, k, v, alibi=alibi_slopes(n_heads) / q.shape[-1] ** 0.5)  # scaled like the scores
        else:
            rotate = rotation(c, layer)
            mixed = attend(rotate(q), rotate(k), v)
        return linear(mixed, w, "self_attention.dense")

    def mlp(x: Tensor) -> Tensor:
        x = named_layer_norm(x, w, mlp_norm, eps)
        return plain_mlp(x, w.under("mlp"), act, "dense_h_to_4h", "dense_4h_to_h")

    return (parallel if is_parallel else sequential)(x, attn, mlp)


def mpt_block(c: Config, w: Weights, layer: int, x: Tensor) -> Updates:
    """The MLP's module adds the residual itself; the update is what it adds."""
    rules = c.attn_config
    assert rules.alibi_bias_max == 8
    eps, clip = c.layer_norm_epsilon, clipped(rules.clip_qkv)

    def attn(x: Tensor) -> Tensor:
        fused = clip("qkv", linear(named_layer_norm(x, w, "norm_1", eps), w, "attn.Wqkv"))
        q, k, v = split_in_thirds(fused, c.n_heads)
        return linear(attend(q, k, v, scale=rules.softmax_scale, alibi=alibi_slopes(c.n_heads)), w, "attn.out_proj")

    def mlp(x: Tensor) -> Tensor:
        return plain_mlp(named_layer_norm(x, w, "norm_2", eps), w.under("ffn"), gelu, "up_proj", "down_proj")

    return sequential(x, attn, mlp)


# ---- what enters the first block


def learned_positions(table: str, offset: int = 0) -> Callable[[Config, Weights, Tensor], Tensor]:
    return lambda c, w, rows: rows + w[f"{table}.weight"][offset : offset + rows.shape[1]]


def _last_layer_norm(name: str, eps: str) -> Callable[[Config, Weights, Tensor], Tensor]:
    return lambda c, w, x: named_layer_norm(x, w, name, getattr(c, eps))


_GEMMA = {
    "embed": lambda c, w, rows: c.hidden_size**0.5 * rows,
    "norm": lambda c, w, x: _gemma_norm(c, w, "norm", x),
    "finish": gemma_finish,
}
_GPT = {"base": "transformer.", "layers": "h", "norm": _last_layer_norm("ln_f", "layer_norm_epsilon")}

# By `model_type`; the defaults of `Family` are Llama's.
FAMILIES: dict[str, Family] = {
    "llama": Family(llama_block),
    "mistral": Family(llama_block),
    "qwen2": Family(llama_block),
    "qwen3": Family(qwen3_block),
    "smollm3": Family(smollm3_block),
    "granite": Family(
        granite_block,
        embed=lambda c, w, rows: c.embedding_multiplier * rows,
        finish=lambda c, logits: logits / c.logits_scaling,
    ),
    "olmo": Family(olmo_block, norm=lambda c, w, x: layer_norm(x, 1e-5)),
    "olmo2": Family(olmo2_block),
    "olmo3": Family(olmo2_block),
    "exaone4": Family(exaone4_block),
    "glm4": Family(glm4_block),
    "gemma2": Family(gemma2_block, **_GEMMA),
    "gemma3_text": Family(gemma3_block, **_GEMMA),
    "olmoe": Family(olmoe_block),
    "mixtral": Family(lambda c, w, layer, x: llama_block(c, w, layer, x, mlp=mixtral_mlp)),
    "qwen3_moe": Family(lambda c, w, layer, x: qwen3_block(c, w, layer, x, mlp=qwen3_moe_mlp)),
    "glm4_moe": Family(lambda c, w, layer, x: qwen3_block(c, w, layer, x, mlp=glm4_moe_mlp)),
    "starcoder2": Family(starcoder2_block, norm=_last_layer_norm("norm", "norm_epsilon")),
    "stablelm": Family(stablelm_block, norm=_last_layer_norm("norm", "layer_norm_eps")),
    "phi": Family(phi_block, norm=_last_layer_norm("final_layernorm", "layer_norm_eps")),
    "cohere": Family(
        cohere_block,
        norm=_last_layer_norm("norm", "layer_norm_eps"),
        finish=lambda c, logits: c.logit_scale * logits,
    ),
    "opt": Family(
        opt_block,
        base="model.decoder.",
        embed=learned_positions("embed_positions", offset=2),
        norm=lambda c, w, x: named_layer_norm(x, w, "final_layer_norm", 1e-5),
    ),
    "gpt_neox": Family(
        gpt_neox_block,
        base="gpt_neox.",
        embedding="embed_in",
        norm=_last_layer_norm("final_layer_norm", "layer_norm_eps"),
    ),
    "gptj": Family(gptj_block, embedding="wte", **_GPT),
    "gpt2": Family(gpt2_block, embedding="wte", embed=learned_positions("wpe"), **_GPT),
    "bloom": Family(
        bloom_block,
        embedding="word_embeddings",
        embed=lambda c, w, rows: named_layer_norm(rows, w, "word_embeddings_layernorm", c.layer_norm_epsilon),
        **_GPT,
    ),
    "falcon": Family(falcon_block, embedding="word_embeddings", **_GPT),
    "mpt": Family(
        mpt_block,
        base="transformer.",
        layers="blocks",
        embedding="wte",
        norm=_last_layer_norm("norm_f", "layer_norm_epsilon"),
    ),
}
