"""The whole engine: the model as transformers loads it, hooked. The reference that streaming must equal."""

from collections.abc import Callable, Hashable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from redundancy_trace.blocks import (
    PROBE_TOKENS,
    Decomposition,
    LayerStates,
    find_layers,
    layer_kind,
    prove,
    tap,
)
from redundancy_trace.engine.checks import check_calibration, check_identity
from redundancy_trace.engine.sums import (
    DistanceSums,
    LayerSums,
    LossSums,
    distance_sequences,
)
from redundancy_trace.metrics import ModelScores, Value


def score_module(
    model: Any,
    token_ids: np.ndarray,
    *,
    batch_size: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> ModelScores:
    """Score a loaded model where it is and in the dtype it has.

    Args:
        model: A causal language model of transformers; its training mode is put back at the end.
        token_ids: Calibration, shape (N, T), integers.
        batch_size: Sequences a forward.
        on_batch: Called with (batches done, batches in all).

    Raises:
        CheckpointError: If the proof fails or a state is not finite.
        InputError: If the token ids do not fit the model.
    """
    _, layers = find_layers(model)
    check_calibration(token_ids, model)
    embedding = model.get_input_embeddings().weight
    dtype = next(p.dtype for p in layers.parameters() if p.is_floating_point())
    ids = torch.as_tensor(token_ids, dtype=torch.long, device=embedding.device)
    training = model.training
    model.eval()
    try:
        proven = _prove_kinds(model, layers, ids[:1, :PROBE_TOKENS])
        with torch.inference_mode():
            return _score(model, layers, proven, ids, batch_size, dtype, on_batch)
    finally:
        model.train(training)


def _prove_kinds(model: Any, layers: nn.ModuleList, ids: Tensor) -> list[Decomposition]:
    """The decomposition of every layer; one layer of each kind is probed in float32."""
    given: dict[int, tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = {}

    def keep(index: int, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keywords = dict(kwargs)
        x, rest = (args[0], args[1:]) if args else (keywords.pop("hidden_states"), ())
        given[index] = x.clone(), rest, keywords

    first: dict[Hashable, int] = {}
    for index in range(len(layers)):
        first.setdefault(layer_kind(layers, index, model.config), index)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    with ExitStack() as hooks, torch.no_grad():
        for index in first.values():
            hook = layers[index].register_forward_pre_hook(partial(keep, index), with_kwargs=True)
            hooks.callback(hook.remove)
        if dtype != torch.float32:
            model.float()
        try:
            model.base_model(input_ids=ids, use_cache=False)
            proven = {kind: prove(layers[index], index, *given[index], model.config) for kind, index in first.items()}
        finally:
            if dtype != torch.float32:
                model.to(dtype)
    return [proven[layer_kind(layers, index, model.config)] for index in range(len(layers))]


def _score(
    model: Any,
    layers: nn.ModuleList,
    proven: list[Decomposition],
    ids: Tensor,
    batch_size: int,
    dtype: torch.dtype,
    on_batch: Callable[[int, int], None] | None,
) -> ModelScores:
    sums = [LayerSums(index, dtype) for index in range(len(layers))]
    loss = LossSums(dtype)
    kept: list[list[Tensor]] = [[] for _ in range(len(layers) + 1)]
    wanted = 0
    seen_sequences = 0

    def on_states(index: int, states: LayerStates) -> None:
        nonlocal wanted
        if seen_sequences == 0:
            check_identity(states, index)
            wanted = distance_sequences(len(ids), ids.shape[1], width=states.resid_pre.shape[-1], n_layers=len(layers))
        sums[index].add(states)
        more = wanted - seen_sequences
        if more > 0:
            if index == 0:
                kept[0].append(states.resid_pre[:more].clone())
            kept[index + 1].append(states.resid_post[:more].clone())

    batches = ids.split(batch_size)
    with ExitStack() as taps:
        for index, layer in enumerate(layers):
            taps.enter_context(tap(layer, proven[index], partial(on_states, index)))
        for done, batch in enumerate(batches, start=1):
            loss.add(model(input_ids=batch, use_cache=False).logits, batch)
            seen_sequences += len(batch)
            if on_batch is not None:
                on_batch(done, len(batches))
    distances = DistanceSums(wanted)
    for states in kept:
        for state in states:
            distances.add(state)
        distances.close()
    values: list[Value] = [value for layer_sums in sums for value in layer_sums.values()]
    return ModelScores((*values, loss.value()), distances.distances())
