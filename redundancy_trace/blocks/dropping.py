"""Which parts of a layer go when attention or MLP is dropped, found by trying, not by name; and the drop itself.

What is dropped is the update that the proof found: the norm behind a sublayer goes with it, a residual that is added
inside stays. Whatever then no longer has an influence on the layer's output (the norm in front, OPT's first matrix, the
attention itself) is dead weight and goes too. It is all tried on a copy of the layer with random weights, so that a
layer whose own weights are zero tells no less, and so that no weights have to be there.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from redundancy_trace.blocks.finding import find_layers, layer_input, layer_kind
from redundancy_trace.blocks.proof import prove
from redundancy_trace.blocks.skipping import skip_
from redundancy_trace.blocks.states import Decomposition, Update, first_tensor, in_shape_of
from redundancy_trace.errors import CheckpointError, first_line

_TRIED_TOKENS = 16
_SEED = 20240622


@dataclass(frozen=True)
class Part:
    """A child of a layer that is skipped, in the terms of `skipping.Skipped`.

    Attributes:
        child: Its name.
        state: The argument that has the form of the output.
        returns: The argument that it returns; None = zeros.
        more: How many values it returns behind the first; None = a bare tensor.
    """

    child: str
    state: int | str
    returns: int | str | None
    more: int | None


@dataclass(frozen=True)
class TrialLayer:
    """A layer with random weights in float32, what the model hands to it, and its proven form."""

    layer: nn.Module
    index: int
    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    form: Decomposition

    def run(self) -> Tensor:
        """The layer's output."""
        with torch.no_grad():
            y = first_tensor(self.layer(self.x.clone(), *self.args, **self.kwargs))
        assert y is not None  # the proof saw it
        return y

    def update_of(self, component: str) -> Update:
        """Where the update of `attn` or `mlp` is read."""
        return self.form.attn if component == "attn" else self.form.mlp


def trial_layers(model: Any) -> Iterator[TrialLayer]:
    """One layer of each kind with random weights, in order; the model's own weights are neither needed nor changed.

    Args:
        model: A causal language model. Its layers may be on the meta device; what stands outside of them is needed, for
            which `surround_with_random_weights_` helps.

    Raises:
        CheckpointError: The model has no layers, or the proof fails.
    """
    _, layers = find_layers(model)
    embedding = model.get_input_embeddings().weight
    ids = torch.arange(_TRIED_TOKENS, device=embedding.device)[None] % embedding.shape[0]
    given = layer_arguments(model, layers, ids)
    seen: set[Hashable] = set()
    for index, layer in enumerate(layers):
        kind = layer_kind(layers, index, model.config)
        if kind not in seen:
            seen.add(kind)
            hidden, args, kwargs = given[index]
            alive = _with_random_weights(layer)
            x = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(_SEED))
            args, kwargs = _on_cpu(args), _on_cpu(kwargs)
            with torch.no_grad():
                form = prove(alive, index, x, args, kwargs, model.config)
            yield TrialLayer(alive, index, x, args, kwargs, form)


def parts_of(trial: TrialLayer, components: frozenset[str]) -> tuple[Part, ...]:
    """The children that are skipped when components of a layer are dropped, and what stands in for each.

    Args:
        trial: The layer.
        components: `attn`, `mlp`, or both.

    Raises:
        CheckpointError: Skipping them is not the same as the update being zero.
    """
    layer = trial.layer
    calls = _calls(trial)
    updates = {update.child: update for update in map(trial.update_of, sorted(components))}
    with ExitStack() as hooks:
        for update in updates.values():
            hooks.enter_context(nothing_of(layer, update))
        without = trial.run()
        dead = {name for name in calls if name not in updates and torch.equal(_with_noise_on(trial, name), without)}
    parts = [
        Part(name, calls[name].state, updates[name].minus if name in updates else calls[name].state, calls[name].more)
        for name in calls
        if name in updates or name in dead
    ]
    trimmed = deepcopy(layer)
    skip_([trimmed], {0: [astuple(part) for part in parts]})
    with torch.no_grad():
        found = first_tensor(trimmed(trial.x.clone(), *trial.args, **trial.kwargs))
    both = components == {"attn", "mlp"}
    if found is None or not torch.equal(found, without) or (both and not torch.equal(found, trial.x)):
        raise CheckpointError(
            f"Layer {trial.index} ({type(layer).__name__}) without its {' and '.join(sorted(components))} does not "
            "compute what it should; the model is left as it is. Please open an issue with its config.json."
        )
    return tuple(parts)


def parts_to_skip(model: Any, dropped: Mapping[int, frozenset[str]]) -> dict[int, list[tuple[Any, ...]]]:
    """What `skipping.skip_` takes, for layers of a model: number of a layer to its parts that are skipped.

    Args:
        model: As for `trial_layers`.
        dropped: Number of a layer to the components it loses, `attn`, `mlp` or both.

    Raises:
        CheckpointError: As `trial_layers` and `parts_of`.
    """
    _, layers = find_layers(model)
    kinds = {index: layer_kind(layers, index, model.config) for index in dropped}
    found: dict[tuple[Hashable, frozenset[str]], tuple[Part, ...]] = {}
    wanted = {(kind, dropped[index]) for index, kind in kinds.items()}
    for trial in trial_layers(model):
        kind = layer_kind(layers, trial.index, model.config)
        found |= {key: parts_of(trial, key[1]) for key in wanted if key[0] == kind}
    return {index: [astuple(part) for part in found[kind, dropped[index]]] for index, kind in kinds.items()}


def drop_layers_(model: Any, dropped: Mapping[int, frozenset[str]]) -> Callable[[], None]:
    """Drop attention, MLP or both of layers of a model in memory, in place.

    Nothing of what is dropped is computed or kept; a cache of keys and values holds two numbers a token for it.

    Args:
        model: A causal language model of transformers; it may have lost other parts before.
        dropped: Number of a layer to the components it loses.

    Returns:
        A function that puts everything back; as long as it is kept, so are the weights.

    Raises:
        CheckpointError: The model has no layers, or what is dropped cannot be proven; it is left as it is.
    """
    _, layers = find_layers(model)
    replaced = skip_(layers, parts_to_skip(model, dropped))

    def undo() -> None:
        for layer, name, original in replaced:
            setattr(layer, name, original)

    return undo


def surround_with_random_weights_(model: Any) -> None:
    """Give a model on the meta device weights outside of its layers and its head, in place, for `trial_layers`.

    The embedding gets as many rows as are tried.
    """
    name, _ = find_layers(model)
    embedding = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(_SEED)
    embedding.weight = _random((_TRIED_TOKENS, embedding.weight.shape[1]), generator)
    embedding.padding_idx = None  # torch refuses one beyond the rows
    for outside, module in model.base_model.named_modules(prefix=_prefix_of(model)):
        if not outside.startswith(f"{name}."):
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    module._parameters[key] = _random(parameter.shape, generator)


def _prefix_of(model: Any) -> str:
    return str(next(name for name, module in model.named_modules() if module is model.base_model))


def _random(shape: Sequence[int], generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(torch.randn(tuple(shape), generator=generator), requires_grad=False)


def layer_arguments(
    model: Any, layers: nn.ModuleList, ids: Tensor
) -> list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]]:
    """What a model hands to each of its layers: hidden state, positional and keyword arguments; no layer runs.

    Raises:
        CheckpointError: The model cannot be run that way.
    """
    failures: list[Exception] = []
    for as_tuple in (False, True):  # what the model expects of a layer
        given: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []
        try:
            with _not_running(layers, given, as_tuple=as_tuple), torch.no_grad():
                output = model.base_model(input_ids=ids, use_cache=False)
            if (
                len(given) == len(layers)
                and output[0].ndim == 3
                and {s.shape for s, _, _ in given} == {given[0][0].shape}
            ):
                return given
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model raises that is handed the wrong form
            failures.append(error)
    reason = first_line(failures[0]) if failures else "it hands more than one state from layer to layer"
    raise CheckpointError(
        f"{type(model).__name__} cannot be run without its layers ({reason}), so its parts cannot be told apart. "
        "Please open an issue with its config.json."
    )


@contextmanager
def _not_running(layers: nn.ModuleList, given: list[Any], *, as_tuple: bool) -> Iterator[None]:
    """While open, layers note what they are given and return their hidden state."""

    def note(*args: Any, **kwargs: Any) -> Any:
        hidden, rest, keywords = layer_input(args, kwargs)
        given.append((hidden, rest, keywords))
        return (hidden,) if as_tuple else hidden

    own = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = note
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _with_random_weights(layer: nn.Module) -> nn.Module:
    """A copy on the CPU, in float32, whose parts all matter, whatever weights the layer has, or none."""
    parameters = dict(layer.named_parameters())
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in parameters.values()
    }
    copy = deepcopy(layer, memo)
    generator = torch.Generator().manual_seed(_SEED)
    for module in copy.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                drawn *= float(parameter.shape[-1]) ** -0.5
            else:
                drawn = 0.1 * drawn + (0.0 if name.endswith("bias") else 1.0)
            module._parameters[name] = nn.Parameter(drawn, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:  # on the meta device: one that the files hold
                module._buffers[name] = (
                    torch.randn(buffer.shape, generator=generator) if buffer.is_meta else _on_cpu(buffer)
                )
    return copy.eval()


def _on_cpu(value: Any) -> Any:
    """`value` with all its tensors on the CPU, where a sum has one order, and those of floats in float32."""
    if isinstance(value, Tensor):
        return value.cpu().float() if value.is_floating_point() else value.cpu()
    if isinstance(value, (tuple, list)):
        return type(value)(_on_cpu(item) for item in value)
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return value


@dataclass(frozen=True)
class _Form:
    """How a child is called: the argument that has the form of its output, and what it returns behind the first."""

    state: int | str
    more: int | None


def _calls(trial: TrialLayer) -> dict[str, _Form]:
    """Every direct child that ran and was given and gave a tensor, in order."""
    calls: dict[str, _Form] = {}

    def note(name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given: dict[int | str, Any] = dict([*enumerate(args), *kwargs.items()])
        floats = [key for key, value in given.items() if isinstance(value, Tensor) and value.is_floating_point()]
        alike = [key for key in floats if in_shape_of(given[key], trial.x) is not None]
        if floats and first_tensor(output) is not None:
            more = len(output) - 1 if isinstance(output, (tuple, list)) else None
            calls[name] = _Form((alike or floats)[0], more)

    with ExitStack() as hooks:
        for name, child in trial.layer.named_children():
            hooks.callback(child.register_forward_hook(partial(note, name), with_kwargs=True).remove)
        trial.run()
    return calls


@contextmanager
def nothing_of(layer: nn.Module, update: Update) -> Iterator[None]:
    """While open, an update of a layer is zero: its child returns zeros, or the residual that it would add to."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        tensor = first_tensor(output)
        assert tensor is not None  # the proof saw it
        if update.minus is None:
            nothing = torch.zeros_like(tensor)
        else:
            nothing = args[update.minus] if isinstance(update.minus, int) else kwargs[update.minus]
        return (nothing, *output[1:]) if isinstance(output, (tuple, list)) else nothing

    with getattr(layer, update.child).register_forward_hook(hook, with_kwargs=True):
        yield


def _with_noise_on(trial: TrialLayer, name: str) -> Tensor:
    """The layer's output while noise is added to that of a child."""
    generator = torch.Generator().manual_seed(_SEED + 1)

    def disturb(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        tensor = first_tensor(output)
        if tensor is None or not tensor.is_floating_point():
            return output
        noisy = tensor + torch.randn(tensor.shape, generator=generator).to(tensor)
        return (noisy, *output[1:]) if isinstance(output, (tuple, list)) else noisy

    with trial.layer.get_submodule(name).register_forward_hook(disturb):
        return trial.run()
