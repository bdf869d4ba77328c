"""One tiny random model for each architecture, quick to run and rough enough to catch a slip.

`build` gives every parameter a random value, the norms' weights and the biases too: transformers starts them
at 1 and 0, where a forgotten bias or the wrong norm would change nothing.
"""

from collections.abc import Callable

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Exaone4Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    Glm4MoeConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    OlmoeConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

VOCAB = 131
WIDTH = 48
HEADS = 4
POSITIONS = 64
LENGTH = 24  # the tests' sequence length: longer than every sliding window here
WINDOW = 7

_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
# What most configurations call by the same names.
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    **_TOKENS,
}
_GATED = {**_COMMON, "intermediate_size": 72, "num_key_value_heads": 2}
_MIX = ["sliding_attention", "full_attention", "sliding_attention"]


def _rope(theta: float = 1000.0, **more: float) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": theta, **more}


def _gpt_neox(**changes: object) -> GPTNeoXConfig:
    neox = {"hidden_size": 64, "intermediate_size": 96, "rope_parameters": _rope(partial_rotary_factor=0.25)}
    return GPTNeoXConfig(**{**_COMMON, **neox, **changes})


def _falcon(**changes: object) -> FalconConfig:
    return FalconConfig(**{**_COMMON, "ffn_hidden_size": 80, **changes})


def _stablelm(**changes: object) -> StableLmConfig:
    rope = _rope(partial_rotary_factor=0.5)
    return StableLmConfig(**{**_GATED, "use_qkv_bias": True, "rope_parameters": rope, **changes})


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt_neox": _gpt_neox,
    "gpt_neox_sequential": lambda: _gpt_neox(use_parallel_residual=False, attention_bias=False),
    "olmo": lambda: OlmoConfig(**_GATED, clip_qkv=0.8, rope_parameters=_rope()),
    "olmo2": lambda: Olmo2Config(**_GATED, rope_parameters=_rope()),
    "olmo3": lambda: Olmo3Config(
        **_GATED,
        layer_types=_MIX,
        sliding_window=WINDOW,
        rope_parameters={"sliding_attention": _rope(100.0), "full_attention": _rope(1000.0)},
    ),
    "llama": lambda: LlamaConfig(**_GATED, head_dim=16, attention_bias=True, mlp_bias=True, rope_parameters=_rope()),
    "llama_tied": lambda: LlamaConfig(**_GATED, tie_word_embeddings=True, rope_parameters=_rope()),
    "mistral": lambda: MistralConfig(**_GATED, sliding_window=WINDOW, rope_parameters=_rope()),
    "qwen2": lambda: Qwen2Config(
        **_GATED,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=2,
        rope_parameters=_rope(),
    ),
    "qwen3": lambda: Qwen3Config(**_GATED, head_dim=16, rope_parameters=_rope()),
    "gemma2": lambda: Gemma2Config(
        **_GATED,
        head_dim=16,
        query_pre_attn_scalar=9,
        layer_types=_MIX,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=4.0,
        rope_parameters=_rope(),
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_GATED,
        head_dim=16,
        query_pre_attn_scalar=9,
        layer_types=_MIX,
        sliding_window=WINDOW,
        rope_parameters={"sliding_attention": _rope(100.0), "full_attention": _rope(5000.0)},
    ),
    "smollm3": lambda: SmolLM3Config(**_GATED, no_rope_layers=[1, 0, 1], rope_parameters=_rope()),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_positions=POSITIONS, n_embd=WIDTH, n_layer=3, n_head=HEADS, **_TOKENS
    ),
    # Six heads: the slopes of ALiBi have a second half where the count is no power of two.
    "bloom": lambda: BloomConfig(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=3, n_head=6, **_TOKENS),
    "phi": lambda: PhiConfig(**_COMMON, intermediate_size=96, rope_parameters=_rope(partial_rotary_factor=0.5)),
    "falcon": lambda: _falcon(rope_parameters=_rope()),
    "falcon_new": lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2, bias=True, rope_parameters=_rope()),
    "falcon_sequential": lambda: _falcon(
        parallel_attn=False, multi_query=False, alibi=True, bias=True, num_attention_heads=6
    ),
    "mpt": lambda: MptConfig(
        vocab_size=VOCAB,
        d_model=WIDTH,
        n_heads=6,
        n_layers=3,
        max_seq_len=POSITIONS,
        attn_config={"attn_type": "multihead_attention", "clip_qkv": 1.5, "alibi": True},
        **_TOKENS,
    ),
    "opt": lambda: OPTConfig(**_COMMON, ffn_dim=96, word_embed_proj_dim=WIDTH, dropout=0.0),
    "olmoe": lambda: OlmoeConfig(
        **{**_GATED, "intermediate_size": 24},
        num_experts=6,
        num_experts_per_tok=2,
        clip_qkv=2.0,
        rope_parameters=_rope(),
    ),
    "mixtral": lambda: MixtralConfig(
        **{**_GATED, "intermediate_size": 40},
        num_local_experts=5,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        rope_parameters=_rope(),
    ),
    "granite": lambda: GraniteConfig(
        **_GATED,
        embedding_multiplier=3.0,
        residual_multiplier=0.6,
        attention_multiplier=0.4,
        logits_scaling=1.7,
        rope_parameters=_rope(),
    ),
    "cohere": lambda: CohereConfig(**_GATED, use_qk_norm=True, logit_scale=0.4, rope_parameters=_rope()),
    "starcoder2": lambda: Starcoder2Config(**_GATED, sliding_window=WINDOW, rope_parameters=_rope()),
    "qwen3_moe": lambda: Qwen3MoeConfig(  # layer 0 dense, layers 1 and 2 of experts
        **_GATED,
        head_dim=16,
        moe_intermediate_size=24,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[0],
        rope_parameters=_rope(),
    ),
    "glm4_moe": lambda: Glm4MoeConfig(  # layer 0 dense, then routed experts and a shared one
        **_GATED,
        head_dim=12,
        attention_bias=True,
        use_qk_norm=True,
        moe_intermediate_size=24,
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=3,
        n_shared_experts=1,
        first_k_dense_replace=1,
        routed_scaling_factor=1.5,
        num_mtp_layers=0,
        rope_parameters=_rope(partial_rotary_factor=0.5),
    ),
    "glm4": lambda: Glm4Config(**_GATED, head_dim=12, rope_parameters=_rope(partial_rotary_factor=0.5)),
    "exaone4": lambda: Exaone4Config(**_GATED, layer_types=_MIX, sliding_window=WINDOW, rope_parameters=_rope()),
    "gptj": lambda: GPTJConfig(
        vocab_size=VOCAB,
        n_positions=POSITIONS,
        n_embd=WIDTH,
        n_layer=3,
        n_head=HEADS,
        rotary_dim=8,
        **_TOKENS,
    ),
    "stablelm": _stablelm,
    "stablelm_parallel": lambda: _stablelm(use_parallel_residual=True, qk_layernorm=True),
}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """The tiny model of a family, in float32 and eval mode; equal seeds give equal parameters."""
    model = AutoModelForCausalLM.from_config(FAMILIES[name](), dtype=torch.float32)
    randomise_(model, seed)
    model.eval()
    assert 3 <= model.config.num_hidden_layers <= 4
    assert model.config.vocab_size == VOCAB
    assert model.config.hidden_size in (WIDTH, 64)
    assert 30_000 < sum(parameter.numel() for parameter in model.parameters()) < 200_000
    return model


def token_ids(n_sequences: int = 6, length: int = LENGTH, vocab: int = VOCAB, seed: int = 0) -> np.ndarray:
    """Random token ids, int64 of shape (sequences, length)."""
    return np.random.default_rng(seed).integers(0, vocab, size=(n_sequences, length), dtype=np.int64)


def randomise_(model: PreTrainedModel, seed: int) -> None:
    """Give everything a file of weights would hold a random value, so that attention and MLP both matter."""
    random = torch.Generator().manual_seed(seed)
    norm_centre = 0.0 if model.config.model_type.startswith("gemma") else 1.0  # Gemma stores weight - 1
    seen: set[int] = set()
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            if not tensor.is_floating_point() or tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            centre, spread = _spread(name, tensor, model.config, norm_centre)
            tensor.copy_(centre + spread * torch.randn(tensor.shape, generator=random))


def _spread(name: str, tensor: torch.Tensor, config: PreTrainedConfig, norm_centre: float) -> tuple[float, float]:
    """Mean and standard deviation of one tensor's random values."""
    is_norm = "norm" in name or ".ln_" in name
    if name.endswith("bias"):
        return 0.0, 0.2
    if is_norm:
        return norm_centre, 0.3
    if any(part in name for part in ("embed", "wte", "wpe")):
        return 0.0, 0.6 / _embedding_scale(config)
    if "lm_head" in name and config.tie_word_embeddings:  # the embeddings too: a stream of some size, modest logits
        return 0.0, 0.35 if _embedding_scale(config) == 1 else 0.15
    if ".gate.weight" in name:  # a router: far apart, so that no choice of experts hangs on a rounding
        return 0.0, 0.5
    fan_in = tensor.shape[-2] if config.model_type == "gpt2" and "lm_head" not in name else tensor.shape[-1]
    return 0.0, 1.2 / float(fan_in) ** 0.5


def _embedding_scale(config: PreTrainedConfig) -> float:
    if config.model_type.startswith("gemma"):
        return float(config.hidden_size) ** 0.5
    return float(getattr(config, "embedding_multiplier", 1.0))
