"""A hand-made skip, by name of architecture: the sublayer runs, and what it adds is taken away again.

It shares nothing with the package: where each family adds the update is written down here.
"""

from contextlib import ExitStack

import torch
from torch import nn

# Module whose output is the update; where the residual is added inside, the argument that holds it.
NORMS_BEHIND = {
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "exaone4": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3_text": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "glm4": ("post_self_attn_layernorm", "post_mlp_layernorm"),
}
NAMES = {
    "gpt_neox": ("attention", "mlp"),
    "gpt2": ("attn", "mlp"),
    "gptj": ("attn", "mlp"),
    "bloom": ("self_attention", "mlp"),
    "falcon": ("self_attention", "mlp"),
    "mpt": ("attn", "ffn"),
    "opt": ("self_attn", "fc2"),
    **NORMS_BEHIND,
}
RESIDUAL_INSIDE = {("bloom", "attn"), ("bloom", "mlp"), ("mpt", "mlp")}
LAYERS = {
    **dict.fromkeys(("gpt2", "gptj", "bloom", "falcon"), "transformer.h"),
    "mpt": "transformer.blocks",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
}


def update_module(model: nn.Module, layer: int, component: str) -> nn.Module:
    """The module whose output is what attention or MLP of a layer adds."""
    kind = model.config.model_type
    block = model.get_submodule(f"{LAYERS.get(kind, 'model.layers')}.{layer}")
    if kind == "qwen3_next" and component == "attn":
        return block.linear_attn if hasattr(block, "linear_attn") else block.self_attn
    return getattr(block, NAMES.get(kind, ("self_attn", "mlp"))[component == "mlp"])


def logits_without(model: nn.Module, ids: torch.Tensor, lost: dict[int, set[str]]) -> torch.Tensor:
    """Logits, shape (B, T, V), of a forward without a cache in which the updates of `lost` are zero."""
    kind = model.config.model_type
    with ExitStack() as hooks, torch.no_grad():
        for layer, components in lost.items():
            for component in components:

                def erase(_module, args, output, inside=(kind, component) in RESIDUAL_INSIDE):
                    first = output[0] if isinstance(output, tuple) else output
                    nothing = args[1] if inside else torch.zeros_like(first)
                    return (nothing, *output[1:]) if isinstance(output, tuple) else nothing

                hooks.enter_context(update_module(model, layer, component).register_forward_hook(erase))
        return model(input_ids=ids, use_cache=False).logits
