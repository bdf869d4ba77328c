"""Find a model's decoder layers, prove where attention and MLP join the residual stream, and tap them there.

Names of submodules are only candidates. What counts is that x + a + m gives the layer's own output on real inputs,
also while noise is added to the attention and to the MLP; what cannot be shown is refused.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from redundancy_trace.errors import CheckpointError

ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention", "linear_attn")
MLP_NAMES = ("mlp", "ffn", "feed_forward", "block_sparse_moe", "fc2")
PROBE_TOKENS = 64
# Largest |x + a + m − y| of a token, as a share of the largest number that token has in x, a, m or y.
# States of float64 are compared in float32, too.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float64: 1e-5}
_NOISE_SEED = 20240622
# Share of the largest number by which a tensor must change to count as disturbed: far above what a GPU's order of
# summation does, far below what noise of the scale of x does.
_MOVED = 1e-4


@dataclass(frozen=True)
class Update:
    """Where one sublayer's update is read.

    Attributes:
        child: Name of the layer's direct child whose output it is, `post_attention_layernorm` or `mlp`, say.
        minus: None, or the position (int) or keyword (str) of the residual that the child is handed and adds itself.
        copy: Whether the layer overwrites the child's output, so that it must be copied when it appears.
    """

    child: str
    minus: int | str | None = None
    copy: bool = False


@dataclass(frozen=True)
class Decomposition:
    """The proven form of one kind of layer: output = input + scale · attn + scale · mlp.

    Attributes:
        attn: Where the attention's update is read.
        mlp: Where the MLP's update is read.
        scale: Factor on both updates (Granite's residual multiplier, else 1).
        parallel: Whether the MLP branches off at the layer's input rather than behind the attention.
        copy_input: Whether the layer overwrites its input.
        error: Largest relative |x + a + m − y| that the proof saw.
    """

    attn: Update
    mlp: Update
    scale: float
    parallel: bool
    copy_input: bool
    error: float


@dataclass(frozen=True)
class LayerStates:
    """What one layer did to one batch; tensors of shape (B, T, D) in the compute dtype unless said otherwise.

    Attributes:
        resid_pre: Input of the layer, X of attention and block.
        resid_mid: X of the MLP: the input again in a parallel block, else input + attention as the model rounds it.
        resid_post: Output of the layer, Y of the block.
        attn_update: What attention adds, float32, times the residual multiplier.
        mlp_update: What the MLP adds, float32, times the residual multiplier.
    """

    resid_pre: Tensor
    resid_mid: Tensor
    resid_post: Tensor
    attn_update: Tensor
    mlp_update: Tensor

    def components(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """For attn, mlp and block: name, X, Y and update, the last two in float32 but for the block's own output."""
        yield "attn", self.resid_pre, self.resid_pre.float() + self.attn_update, self.attn_update
        yield "mlp", self.resid_mid, self.resid_mid.float() + self.mlp_update, self.mlp_update
        yield "block", self.resid_pre, self.resid_post, self.resid_post.float() - self.resid_pre.float()

    def identity_error(self) -> float:
        """Largest |x + a + m − y| of a token, as a share of the largest number that the token has in x, a, m or y."""
        x, y = self.resid_pre.float(), self.resid_post.float()
        return _relative_error(x, self.attn_update, self.mlp_update, y)


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
        layer = deepcopy(layer).float()
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


_REFUSED = (
    "Its scores could not be trusted, so the model is refused. If it is a decoder-only transformer, please open an "
    "issue with its config.json."
)


def not_finite(what: str, dtype: torch.dtype) -> str:
    """The message for a state that is infinite or no number."""
    name = str(dtype).removeprefix("torch.")
    hint = " Try --dtype float32." if dtype != torch.float32 else " The weights themselves may be broken."
    return f"{what[0].upper()}{what[1:]} is not finite in {name}; it is no redundancy and gets no score.{hint}"


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


def _in_float32(value: Any) -> Any:
    """`value` with every floating tensor in its tuples, lists and dicts in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_in_float32(item) for item in value)
    if isinstance(value, dict):
        return {key: _in_float32(item) for key, item in value.items()}
    return value


def _first_tensor(value: Any) -> Tensor | None:
    """The tensor itself, or the first member of a tuple (attentions return weights beside it)."""
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return value if isinstance(value, Tensor) else None


def _with_first(output: Any, tensor: Tensor) -> Any:
    return (tensor, *output[1:]) if isinstance(output, (tuple, list)) else tensor


def _like(value: Any, x: Tensor) -> Tensor | None:
    """`value` in the shape of the residual stream `x`, or None (OPT flattens batch and tokens for its MLP)."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.numel() == x.numel():
        return value.reshape(x.shape) if value.shape[-1] == x.shape[-1] else None
    return None


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
        tensor = _first_tensor(output)
        if tensor is None or tensor.numel() != noise.numel():
            return output
        return _with_first(output, tensor + noise.reshape(tensor.shape))

    def record(name: str, _module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        tensor = _first_tensor(output)
        if tensor is None:
            return
        if name in calls:
            repeated.add(name)
        updates: dict[int | str | None, Tensor] = {}
        given: list[tuple[int | str, Any]] = [*enumerate(inputs), *keywords.items()]
        if (out := _like(tensor, x)) is not None:
            updates[None] = out.clone()
            updates |= {key: out - same for key, value in given if (same := _like(value, x)) is not None}
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
            y = _first_tensor(layer(given, *args, **kwargs))
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
    return _relative_error(one.x, scale * _update(one, attn), scale * _update(one, mlp), one.y)


def _update(one: _Pass, update: Update) -> Tensor:
    return one.calls[update.child].updates[update.minus]


def _is_handed(one: _Pass, state: Tensor) -> bool:
    """Whether any child is handed this state."""
    given = (_like(value, state) for call in one.calls.values() for value in call.inputs)
    return any(value is not None and not _moved((state,), (value,)) for value in given)


def _relative_error(x: Tensor, a: Tensor, m: Tensor, y: Tensor) -> float:
    largest = torch.stack([t.abs().amax(dim=-1) for t in (x, a, m, y)]).amax(dim=0)
    error = (x + a + m - y).abs().amax(dim=-1)
    # A token of zeros throughout reproduces itself.
    return float(torch.where(largest == 0, error, error / largest.clamp_min(1e-30)).max())


def _moved(before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> bool:
    return any(
        bool((a - b).abs().max() > _MOVED * b.abs().max().clamp_min(1e-12))
        for b, a in zip(before, after, strict=True)
        if b.shape == a.shape
    )


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
        out = _like(_first_tensor(output), seen["x"])
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
        x, y = seen["x"], _first_tensor(output)
        assert y is not None
        # The multiplier is applied in the compute dtype and the sum rounded to it, as the model itself does.
        attn, mlp = (
            (seen[key] if decomposition.scale == 1.0 else seen[key] * decomposition.scale).float()
            for key in ("attn", "mlp")
        )
        mid = x if decomposition.parallel else (x.float() + attn).to(x.dtype)
        seen.clear()
        on_states(LayerStates(x, mid, y, attn, mlp))

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
