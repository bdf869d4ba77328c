"""Tap a proven layer: while a model runs, hand over what each of its layers does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from redundancy_trace.blocks.finding import layer_input
from redundancy_trace.blocks.states import Decomposition, LayerStates, Update, first_tensor, in_shape_of


@contextmanager
def tap(layer: nn.Module, decomposition: Decomposition, on_states: Callable[[LayerStates], None]) -> Iterator[None]:
    """While open, every forward of `layer` hands what it did to `on_states`.

    Args:
        layer: A decoder layer of the kind that was proven.
        decomposition: From `prove`.
        on_states: Called once a forward, with the states of that batch.
    """
    seen: dict[str, Tensor] = {}

    def enter(_module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x, _, _ = layer_input(inputs, keywords)
        seen["x"] = x.clone() if decomposition.copy_input else x

    def read(
        key: str,
        update: Update,
        _module: nn.Module,
        inputs: tuple[Any, ...],
        keywords: dict[str, Any],
        output: Any,
    ) -> None:
        out = in_shape_of(first_tensor(output), seen["x"])
        assert out is not None  # the proof saw this shape
        out = out.clone() if update.copy else out
        if update.minus is None:
            seen[key] = out
            return
        handed = inputs[update.minus] if isinstance(update.minus, int) else keywords[update.minus]
        residual = handed.reshape(out.shape)
        # The subtraction is done in float32: in the compute dtype it would round a second time.
        seen[key] = out.float() - residual.float()

    def leave(_module: nn.Module, _inputs: Any, _keywords: Any, output: Any) -> None:
        x, y = seen["x"], first_tensor(output)
        assert y is not None
        # The multiplier is applied in the compute dtype, as the model itself does.
        attn, mlp = (
            seen[key] if decomposition.scale == 1.0 else seen[key] * decomposition.scale for key in ("attn", "mlp")
        )
        seen.clear()
        on_states(LayerStates(x, y, attn, mlp, decomposition.parallel))

    children = dict(layer.named_children())
    handles = [
        layer.register_forward_pre_hook(enter, with_kwargs=True),
        children[decomposition.attn.child].register_forward_hook(
            partial(read, "attn", decomposition.attn), with_kwargs=True
        ),
        children[decomposition.mlp.child].register_forward_hook(
            partial(read, "mlp", decomposition.mlp), with_kwargs=True
        ),
        layer.register_forward_hook(leave, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
