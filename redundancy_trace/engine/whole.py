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
    TOLERANCE,
    Decomposition,
    LayerStates,
    find_layers,
    layer_input,
    layer_kind,
    not_finite,
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
from redundancy_trace.errors import CheckpointError, InputError
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
        model: A causal language model of transformers, float32, bfloat16 or float64; it is left as it is.
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
    if embedding.dtype not in TOLERANCE:
        raise InputError(
            f"The model is in {str(embedding.dtype).removeprefix('torch.')}, which overflows where training does not; "
            "score model.float() or model.bfloat16()."
        )
    ids = torch.as_tensor(token_ids, dtype=torch.long, device=embedding.device)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # Not inference_mode: buffers that a forward renews must stay usable in the owner's training.
        with torch.no_grad():
            proven = _prove_kinds(model, layers, ids[:1, :PROBE_TOKENS])
            return _score(model, layers, proven, ids, batch_size, on_batch)
    finally:
        for module, mode in training.items():
            module.training = mode


def _prove_kinds(model: Any, layers: nn.ModuleList, ids: Tensor) -> list[Decomposition]:
    """The decomposition of every layer; one layer of each kind is probed."""
    given: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def keep(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, rest, keywords = layer_input(args, kwargs)
        given.append((x.clone(), rest, keywords))

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
        model.base_model(input_ids=ids, use_cache=False)
    if len(given) != len(layers):
        raise CheckpointError(f"{type(model).__name__} runs {len(given)} layers in a forward, but has {len(layers)}.")
    proven: dict[Hashable, Decomposition] = {}
    kinds = [layer_kind(layers, index, model.config) for index in range(len(layers))]
    for index, kind in enumerate(kinds):
        x, args, kwargs = given[index]
        if not bool(torch.isfinite(x).all()):
            where = f"the output of layer {index - 1}" if index else "the embedding"
            raise CheckpointError(not_finite(where, x.dtype))
        if kind not in proven:
            proven[kind] = prove(layers[index], index, x, args, kwargs, model.config)
    return [proven[kind] for kind in kinds]


def _score(
    model: Any,
    layers: nn.ModuleList,
    proven: list[Decomposition],
    ids: Tensor,
    batch_size: int,
    on_batch: Callable[[int, int], None] | None,
) -> ModelScores:
    sums = [LayerSums(index, len(ids)) for index in range(len(layers))]
    loss = LossSums(len(ids), ids.device)
    kept: list[list[Tensor]] = [[] for _ in range(len(layers) + 1)]
    wanted = 0
    seen_sequences = 0

    def on_states(index: int, states: LayerStates) -> None:
        nonlocal wanted
        sums[index].add(states)  # tells by name what is not finite
        sums[index].settle()
        if seen_sequences == 0:
            check_identity(states, index)
            wanted = distance_sequences(len(ids), ids.shape[1], width=states.resid_pre.shape[-1], n_layers=len(layers))
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
