"""The plain way to the same scores, as arXiv 2406.15786 describes it and its authors' code goes about it.

A full pass for attention, one for the MLP, one for the block. Each goes layer by layer, one sequence at a time, on
inputs that are kept on the CPU; copies of a layer's states of all sequences are stored there too, put together in
float32, and compared at the end of the layer where the model is: S = 1 − cos(X, X + f(norm(X))) of a sublayer (eq. 3 to
6), S = 1 − cos(X, Y) of a block (eq. 1 and 2). The standard errors, the other metrics, the loss and the distances
between all layers, which the engine gives beside them, are not computed here.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

Component = Literal["attn", "mlp", "block"]
# Llama's names: the norm that a sublayer reads the residual stream through, and the sublayer.
_SUBLAYERS = {"attn": ("input_layernorm", "self_attn"), "mlp": ("post_attention_layernorm", "mlp")}


def naive_similarities(model: Any, token_ids: np.ndarray) -> dict[str, list[float]]:
    """Mean cosine similarity of every layer, by component, in three passes.

    Args:
        model: A Llama with its head, in the dtype to compute in, on the device to compute on.
        token_ids: Shape (N, T), integers.

    Returns:
        `attn`, `mlp` and `block`: L numbers each.
    """
    ids = torch.as_tensor(token_ids)
    with torch.inference_mode():
        return {component: naive_pass(model, ids, component) for component in ("attn", "mlp", "block")}


def naive_pass(model: Any, ids_NT: Tensor, component: Component) -> list[float]:
    """Mean cosine similarity of one component of every layer, shape (L,), from one pass."""
    decoder, device = model.model, model.device
    states = [decoder.embed_tokens(ids_T[None].to(device)).cpu() for ids_T in ids_NT]
    positions = decoder.rotary_emb(states[0].to(device), torch.arange(ids_NT.shape[1], device=device)[None])
    similarities = []
    for layer in decoder.layers:
        before: list[Tensor] = []
        behind: list[Tensor] = []
        hooks = _keep_states(layer, component, before, behind)
        # No mask: attention is then causal by itself, and no slower than in the model's own forward.
        states = [layer(state.to(device), position_embeddings=positions, attention_mask=None).cpu() for state in states]
        for hook in hooks:
            hook.remove()
        x_NTD, y_NTD = torch.cat(before).to(device).float(), torch.cat(behind).to(device).float()
        if component != "block":
            y_NTD = x_NTD + y_NTD
        similarities.append(float(nn.functional.cosine_similarity(x_NTD, y_NTD, dim=-1).mean()))
    return similarities


def _keep_states(layer: nn.Module, component: Component, before: list[Tensor], behind: list[Tensor]) -> list[Any]:
    """Hooks that store what the component is given and what it puts out, of every sequence."""

    def keep_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        before.append(_copy(inputs[0]))

    def keep_output(_module: nn.Module, _inputs: Any, output: Any) -> None:
        behind.append(_copy(output[0] if isinstance(output, tuple) else output))

    if component == "block":
        return [layer.register_forward_pre_hook(keep_input), layer.register_forward_hook(keep_output)]
    norm, sublayer = _SUBLAYERS[component]
    return [
        layer.get_submodule(norm).register_forward_pre_hook(keep_input),
        layer.get_submodule(sublayer).register_forward_hook(keep_output),
    ]


def _copy(state: Tensor) -> Tensor:
    return state.to("cpu", copy=True)
