"""Models with Llama's arithmetic: RMSNorm in front, rotary positions, full attention, a gated MLP with SiLU."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from redundancy_trace.errors import InputError
from redundancy_trace.pruning.plans import DropPlan
from redundancy_trace.pruning.sources import Source

FAMILIES = ("llama", "mistral", "qwen2")
ATTENTION = ("input_layernorm", "self_attn")
MLP = ("post_attention_layernorm", "mlp")


@dataclass(frozen=True)
class LlamaShape:
    """The numbers of a Llama-shaped model.

    Attributes:
        width: Of the residual stream.
        heads: Query heads.
        kv_heads: Heads of keys and values.
        head_dim: Width of a head.
        mlp_width: Inside the MLP.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int


@dataclass(frozen=True)
class KeptLayer:
    """A layer of which something stays.

    Attributes:
        number: Its number in the export.
        layer: Its number in the source.
        lost: What it loses, `attn`, `mlp` or nothing.
    """

    number: int
    layer: int
    lost: frozenset[str]


def llama_shape(source: Source, form: str) -> LlamaShape:
    """The shape of a Llama-shaped model.

    Args:
        source: The checkpoint.
        form: The format that needs it, for messages.

    Raises:
        InputError: It is of another shape; says in what.
    """
    config = source.config
    reason = _other_than_llama(config)
    if reason is not None:
        raise InputError(
            f"--format {form} takes models with Llama's arithmetic ({', '.join(FAMILIES)}); of {source.class_name}, "
            f"{reason}. Use --format hf (faster, for transformers) or zeroed (runs anywhere)."
        )
    heads = config.num_attention_heads
    return LlamaShape(
        width=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        mlp_width=config.intermediate_size,
    )


def kept_layers(plan: DropPlan) -> tuple[KeptLayer, ...]:
    """The layers of which something stays; blocks that go leave no gap."""
    lost = plan.by_layer()
    stay = [layer for layer in range(plan.n_layers) if layer not in plan.blocks]
    return tuple(KeptLayer(number, layer, lost.get(layer, frozenset())) for number, layer in enumerate(stay))


def rope_factors(source: Source) -> tuple[float, Tensor | None]:
    """Base of the rotary frequencies, and by what each is divided beside it, shape (head_dim / 2,); None: by nothing.

    Raises:
        InputError: The rotary positions also scale the attention, or change with the length.
    """
    rotary = source.empty.model.get_submodule("model.rotary_emb")
    theta = float(source.config.rope_parameters["rope_theta"])
    if float(getattr(rotary, "attention_scaling", 1.0)) != 1.0 or rotary.rope_type in ("dynamic", "longrope", "yarn"):
        raise InputError(
            f"The rotary positions of this model are of the type {rotary.rope_type}, which this format does not hold. "
            "Use --format hf."
        )
    inverse = rotary.inv_freq.double()
    plain = theta ** -(torch.arange(len(inverse), dtype=torch.float64) / len(inverse))
    factors = plain / inverse
    return theta, None if torch.allclose(factors, torch.ones_like(factors), atol=1e-5) else factors.float()


def _other_than_llama(config: Any) -> str | None:
    if config.model_type not in FAMILIES:
        return f"the type is {config.model_type}"
    if config.hidden_act not in ("silu", "swish"):
        return f"hidden_act is {config.hidden_act}"
    types = getattr(config, "layer_types", None) or ()
    windowed = config.model_type == "mistral" and config.sliding_window is not None
    if windowed or any(kind != "full_attention" for kind in types):
        return "some attention looks at a sliding window"
    if (config.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
        return "only a part of each head is rotated"
    return None
