"""Which of a model's modules are its decoder layers, and what they are handed."""

from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn

from redundancy_trace.errors import CheckpointError

ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention", "linear_attn")


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The model's decoder layers and their dotted name, such as `model.layers`.

    Raises:
        CheckpointError: If the model has none: no list of layers each with an attention of its own.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(
            f"{type(model).__name__} is an encoder-decoder model; redundancy is traced in decoder-only models."
        )
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(any(hasattr(layer, known) for known in ATTENTION_NAMES) for layer in module)
    ]
    if not found:
        raise CheckpointError(
            f"{type(model).__name__} has no decoder blocks: no list of layers that each have an attention called "
            f"{', '.join(ATTENTION_NAMES)}. Only decoder-only transformers can be traced."
        )
    return max(found, key=lambda item: len(item[1]))


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """What a model hands to a layer, split: hidden state, further positional arguments, keyword arguments."""
    if args:
        return args[0], args[1:], kwargs
    others = dict(kwargs)
    return others.pop("hidden_states"), (), others


def layer_kind(layers: nn.ModuleList, index: int, config: Any) -> Hashable:
    """What two layers must share for one proof to serve both: class, children, attention type."""
    layer = layers[index]
    types = getattr(config, "layer_types", None)
    children = tuple((name, type(child)) for name, child in layer.named_children())
    return type(layer), children, types[index] if types and len(types) > index else None
