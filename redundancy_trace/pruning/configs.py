"""The configuration of a model that has lost whole layers: every list that has an entry a layer is cut."""

import re
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from torch import nn

from redundancy_trace.errors import InputError

# Lists of numbers of layers.
_NUMBERS = (
    "mlp_only_layers", "hybrid_layer_ids", "attn_layer_indices", "full_attn_idxs", "global_attn_idxs", "moe_layers",
    "moe_layer_indices", "dense_layers",
)  # fmt: skip
# So many layers from the first on are of another kind.
_LEADING = ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "n_dense_layers")
# What has as many entries by chance.
_NO_LAYERS = re.compile(r".*(_token_id|_ids|_labels?)|architectures|languages")
# Attributes of a module that count layers, or say nothing of what it computes.
_COUNTERS = re.compile(r"layer_(idx|id|index|number)|index|training|_.*")
_INSTEAD = "Use --format hf, which keeps the numbers of the layers, or --format zeroed."


def shortened(config: Any, kept: Sequence[int]) -> Any:
    """The configuration of a model of which some layers are kept, renumbered from 0.

    Args:
        config: The whole model's configuration; it is left as it is.
        kept: The layers that stay, ascending.

    Raises:
        InputError: The architecture computes with the numbers of its layers.
    """
    n_layers = config.num_hidden_layers
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise InputError(
            "This model scales the attention of each layer by the layer's number (scale_attn_by_inverse_layer_idx), so "
            f"that renumbered layers would compute something else. {_INSTEAD}"
        )
    short = deepcopy(config)
    for name, value in config.to_dict().items():
        if name in _NUMBERS and isinstance(value, list):
            setattr(short, name, [kept.index(layer) for layer in value if layer in kept])
        elif name in _LEADING and isinstance(value, int):
            setattr(short, name, sum(layer < value for layer in kept))
        elif isinstance(value, list) and len(value) == n_layers and not _NO_LAYERS.fullmatch(name):
            setattr(short, name, [value[layer] for layer in kept])
    if getattr(config, "attention_types", None) and hasattr(config, "attention_layers"):  # GPT-Neo: runs of patterns
        short.attention_types = [[[kind], 1] for kind in short.attention_layers]
    short.num_hidden_layers = len(kept)
    return short


def check_same_layers(layers: nn.ModuleList, short: nn.ModuleList, kept: Sequence[int]) -> None:
    """Refuse a shortened model whose layers are not those that were kept.

    Raises:
        InputError: A layer has other modules, shapes or settings; it names the first.
    """
    if len(short) != len(kept):
        raise InputError(f"A model of {len(kept)} layers cannot be described in its config.json. {_INSTEAD}")
    for number, layer in enumerate(kept):
        before, after = _description(layers[layer]), _description(short[number])
        if before != after:
            odd = next(name for name in (*before, *after) if before.get(name) != after.get(name))
            raise InputError(
                f"Layer {layer} would be of another kind as layer {number} of {len(kept)}, in {odd or 'itself'}; its "
                f"config.json gives layers their kind by their number. {_INSTEAD}"
            )


def _description(layer: nn.Module) -> dict[str, Any]:
    """Class, plain attributes and shapes of every module of a layer."""
    plain = (bool, int, float, str, type(None))
    return {
        name: (
            type(module).__qualname__,
            {k: v for k, v in vars(module).items() if isinstance(v, plain) and not _COUNTERS.fullmatch(k)},
            {k: tuple(p.shape) for k, p in module.named_parameters(recurse=False)},
        )
        for name, module in layer.named_modules()
    }
