"""Layers that run without some of their parts. Stands alone: an exported model carries this file with it.

A part that is skipped is replaced by a `Skipped`, which computes nothing and has no weights. A cache of keys and values
asks the first layer of each kind how many tokens it has seen, so an attention that is skipped still notes them there,
with one number a token in place of its keys and one in place of its values.
"""

from typing import Any

import torch
from torch import nn


class Skipped(nn.Module):
    """Takes the place of a part of a layer: returns zeros, or what it is given, unchanged.

    Args:
        original: The part. What a model reads off it (`layer_idx`, `is_sliding` and the like) stays; it is let go.
        index: Number of the layer, counted as a cache counts.
        state: The argument, by position or keyword, that has the form of the output.
        returns: The argument that is returned; None = zeros in the form of `state`.
        more: How many values the part returns behind the first; None = it returns a bare tensor.
    """

    def __init__(
        self, original: nn.Module, index: int, state: int | str, returns: int | str | None, more: int | None
    ) -> None:
        super().__init__()
        plain = (bool, int, float, str, type(None))
        for name, value in vars(original).items():
            if isinstance(value, plain) and not name.startswith("_") and name != "training":
                setattr(self, name, value)
        self.skipped = (index, state, returns, more)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The result of a part that adds nothing, in the form that its layer expects."""
        index, state, returns, more = self.skipped
        given: dict[Any, Any] = dict([*enumerate(args), *kwargs.items()])
        for value in given.values():
            if hasattr(value, "get_seq_length"):
                note_tokens(value, index, given[state])
        result = torch.zeros_like(given[state]) if returns is None else given[returns]
        return result if more is None else (result, *(None for _ in range(more)))

    def extra_repr(self) -> str:
        """What is shown where the model is printed."""
        index, _, returns, _ = self.skipped
        return f"layer {index}, returns {'zeros' if returns is None else 'what it is given'}"


def note_tokens(cache: Any, index: int, state: torch.Tensor) -> None:
    """Let a cache know that a layer has seen the tokens of `state`, shape (B, T, D)."""
    layers = getattr(cache, "layers", ())
    if index < len(layers) and not hasattr(layers[index], "get_seq_length"):
        return  # of linear attention: it counts no tokens, and nothing asks it
    one = state.new_zeros(state.shape[0], 1, state.shape[1], 1)
    cache.update(one, one, index)


def skip_(layers: Any, parts: dict[Any, Any]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Replace parts of layers, in place.

    Args:
        layers: The decoder layers of a model.
        parts: Number of a layer to its parts that are skipped, each `[child, state, returns, more]` as `Skipped` takes
            them.

    Returns:
        What was replaced: layer, name of the child, the child.
    """
    replaced = []
    for index, children in parts.items():
        layer = layers[int(index)]
        for name, state, returns, more in children:
            original = getattr(layer, name)
            replaced.append((layer, name, original))
            setattr(layer, name, Skipped(original, int(index), state, returns, more))
    return replaced
