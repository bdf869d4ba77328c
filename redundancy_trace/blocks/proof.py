"""The proof: where attention and MLP of a layer join the residual stream.

Names of submodules are only candidates. What counts is that x + a + m gives the layer's own output on real inputs,
also while noise is added to the attention and to the MLP; what cannot be shown is refused.
"""

from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from redundancy_trace.blocks.finding import ATTENTION_NAMES
from redundancy_trace.blocks.states import (
    TOLERANCE,
    Decomposition,
    Update,
    first_tensor,
    in_shape_of,
    not_finite,
    relative_error,
)
from redundancy_trace.errors import CheckpointError

MLP_NAMES = ("mlp", "ffn", "feed_forward", "block_sparse_moe", "fc2")
PROBE_TOKENS = 16
_NOISE_SEED = 20240622
# Share of the largest number by which a tensor must change to count as disturbed: far above what a GPU's order of
# summation does, far below what noise of the scale of x does.
_MOVED = 1e-4
_REFUSED = (
    "Its scores could not be trusted, so the model is refused. If it is a decoder-only transformer, please open an "
    "issue with its config.json."
)


def prove(
    layer: nn.Module, index: int, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], config: Any
) -> Decomposition:
    """Find and prove where attention and MLP of a layer join the residual stream.

    The layer runs three times in float32, as a copy if it has another dtype: as it is, with noise of the scale of x on
    the attention's output, and with noise on the MLP's output. The pair of updates must reproduce the output in all
    three, so that an update that is zero (a pruned or freshly initialised model) is no tie. The block is parallel if
    the MLP does not feel the noise on the attention.

    Args:
        layer: The decoder layer, weights loaded, any float dtype; it is left as it is.
        index: Its number, for messages.
        x: A real input of the layer, shape (1, T, D), any float dtype; `PROBE_TOKENS` tokens are enough.
        args: Further positional arguments that the model gives to the layer.
        kwargs: Keyword arguments that the model gives to the layer.
        config: The model's configuration; its `residual_multiplier` is tried as a factor.

    Returns:
        The decomposition, with the largest error seen.

    Raises:
        CheckpointError: If the layer has no attention or MLP by any known name, no pair reproduces the output, or the
            output is not finite.
    """
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in layer.parameters()):
        layer = _float32_copy(layer)
    x, args, kwargs = _in_float32(x), _in_float32(args), _in_float32(kwargs)
    generator = torch.Generator().manual_seed(_NOISE_SEED)
    # A zero input (padding rows of a fresh model) still needs noise that can be seen.
    scale = float(x.std()) or 1.0
    noise = scale * torch.randn(x.shape, generator=generator).to(x)
    run = partial(_record, layer, x, args, kwargs)
    clean = run(None, noise)
    if not bool(torch.isfinite(clean.y).all()):
        raise CheckpointError(not_finite(f"the output of layer {index}", clean.y.dtype))
    attn_name, mlp_name = _sublayer_names(layer, index, clean)
    passes = (clean, run(attn_name, noise), run(mlp_name, noise))
    order = list(clean.calls)
    attn_at, mlp_at = order.index(attn_name), order.index(mlp_name)
    attn_children = order[attn_at : mlp_at if mlp_at > attn_at else None]
    mlp_children = order[mlp_at : attn_at if attn_at > mlp_at else None]
    multiplier = getattr(layer, "residual_multiplier", getattr(config, "residual_multiplier", None))
    scales = (1.0,) if multiplier in (None, 1.0) else (float(multiplier), 1.0)

    best: tuple[float, Update, Update, float] | None = None
    for attn in _candidates(clean, attn_children):
        for mlp in _candidates(clean, mlp_children):
            for factor in scales:
                error = max(_pair_error(one, attn, mlp, factor) for one in passes)
                if best is None or error < best[0]:
                    best = error, attn, mlp, factor
    if best is None or not best[0] <= TOLERANCE[torch.float32]:
        closest = "no output has the shape of the residual stream" if best is None else f"closest: {best[0]:.1e} off"
        raise CheckpointError(
            f"Layer {index} ({type(layer).__name__}): no pair of updates of its children {', '.join(order)} adds up to "
            f"its output ({closest}; {TOLERANCE[torch.float32]:.0e} is allowed). {_REFUSED}"
        )
    error, attn, mlp, factor = best
    if _moved(clean.calls[attn_name].inputs, passes[2].calls[attn_name].inputs):
        raise CheckpointError(f"Layer {index}: its MLP runs before its attention. {_REFUSED}")
    # An MLP that is dead behind its first matrix feels nothing; what is handed x + a still tells where it branches off.
    felt = (
        _moved(clean.calls[mlp_name].inputs, passes[1].calls[mlp_name].inputs)
        or _moved((_update(clean, mlp),), (_update(passes[1], mlp),))
        or _is_handed(passes[1], passes[1].x + factor * _update(passes[1], attn))
    )
    return Decomposition(attn, mlp, factor, not felt, clean.input_overwritten, error)


@dataclass(frozen=True)
class _Call:
    """One call of a child: its residual-shaped outputs to choose from, and whether its input was seen to change."""

    updates: dict[int | str | None, Tensor]
    output: Tensor
    version: int
    inputs: tuple[Tensor, ...]

    def overwritten(self) -> bool:
        """Whether the tensor that the child returned was changed in place afterwards."""
        return self.output._version != self.version


@dataclass(frozen=True)
class _Pass:
    """One forward of a layer with every direct child recorded, in the order in which they ran."""

    x: Tensor
    y: Tensor
    calls: dict[str, _Call]
    input_overwritten: bool


def _sublayer_names(layer: nn.Module, index: int, clean: _Pass) -> tuple[str, str]:
    """The children that are searched first for attention and MLP: by a known name, and run exactly once."""
    children = [name for name, _ in layer.named_children()]
    attn = [name for name in children if name in ATTENTION_NAMES and name in clean.calls]
    mlp = [name for name in children if name in MLP_NAMES and name in clean.calls]
    for what, names, known in (("attention", attn, ATTENTION_NAMES), ("MLP", mlp, MLP_NAMES)):
        if not names:
            raise CheckpointError(
                f"Layer {index} ({type(layer).__name__}) has no {what} that runs once in a forward: its children are "
                f"{', '.join(children)}; known names are {', '.join(known)}. {_REFUSED}"
            )
    return attn[0], mlp[-1]


def _float32_copy(layer: nn.Module) -> nn.Module:
    # `deepcopy(layer).float()` would hold the weights a third time, in their own dtype.
    memo: dict[int, Any] = {
        id(one): nn.Parameter(one.float(), requires_grad=False) for one in layer.parameters() if one.is_floating_point()
    }
    memo |= {id(one): one.float() for one in layer.buffers() if one.is_floating_point()}
    return deepcopy(layer, memo)


def _in_float32(value: Any) -> Any:
    """`value` with every floating tensor in its tuples, lists and dicts in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_in_float32(item) for item in value)
    if isinstance(value, dict):
        return {key: _in_float32(item) for key, item in value.items()}
    return value


def _with_first(output: Any, tensor: Tensor) -> Any:
    return (tensor, *output[1:]) if isinstance(output, (tuple, list)) else tensor


def _record(
    layer: nn.Module,
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    noisy: str | None,
    noise: Tensor,
) -> _Pass:
    """Run the layer once, recording every direct child; noise is added to the output of the child `noisy`."""
    calls: dict[str, _Call] = {}
    repeated: set[str] = set()

    def disturb(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        tensor = first_tensor(output)
        if tensor is None or tensor.numel() != noise.numel():
            return output
        return _with_first(output, tensor + noise.reshape(tensor.shape))

    def record(name: str, _module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is None:
            return
        if name in calls:
            repeated.add(name)
        updates: dict[int | str | None, Tensor] = {}
        given: list[tuple[int | str, Any]] = [*enumerate(inputs), *keywords.items()]
        if (out := in_shape_of(tensor, x)) is not None:
            updates[None] = out.clone()
            updates |= {key: out - same for key, value in given if (same := in_shape_of(value, x)) is not None}
        floats = tuple(v.clone() for _, v in given if isinstance(v, Tensor) and v.is_floating_point())
        calls[name] = _Call(updates, tensor, tensor._version, floats)

    handles = []
    for name, child in layer.named_children():
        if name == noisy:
            handles.append(child.register_forward_hook(disturb))
        handles.append(child.register_forward_hook(partial(record, name), with_kwargs=True))
    given = x.clone()
    version = given._version
    try:
        with torch.no_grad():
            y = first_tensor(layer(given, *args, **kwargs))
    finally:
        for handle in handles:
            handle.remove()
    if y is None or y.shape != x.shape:
        raise CheckpointError(f"{type(layer).__name__} does not return a state of the shape it was given. {_REFUSED}")
    once = {name: call for name, call in calls.items() if name not in repeated}
    return _Pass(x, y, once, given._version != version)


def _candidates(clean: _Pass, children: list[str]) -> list[Update]:
    return [
        Update(name, minus, clean.calls[name].overwritten()) for name in children for minus in clean.calls[name].updates
    ]


def _pair_error(one: _Pass, attn: Update, mlp: Update, scale: float) -> float:
    if attn.child not in one.calls or mlp.child not in one.calls:
        return float("inf")
    return relative_error(one.x, scale * _update(one, attn), scale * _update(one, mlp), one.y)


def _update(one: _Pass, update: Update) -> Tensor:
    return one.calls[update.child].updates[update.minus]


def _is_handed(one: _Pass, state: Tensor) -> bool:
    """Whether any child is handed this state."""
    given = (in_shape_of(value, state) for call in one.calls.values() for value in call.inputs)
    return any(value is not None and not _moved((state,), (value,)) for value in given)


def _moved(before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> bool:
    return any(
        bool((a - b).abs().max() > _MOVED * b.abs().max().clamp_min(1e-12))
        for b, a in zip(before, after, strict=True)
        if b.shape == a.shape
    )
