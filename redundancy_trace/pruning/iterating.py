"""Iterative dropping: after each drop the model is scored anew, and what is least important then goes next."""

from contextlib import ExitStack
from typing import Any

import numpy as np

from redundancy_trace.errors import InputError
from redundancy_trace.pruning.plans import DroppedComponent
from redundancy_trace.pruning.selecting import (
    Candidate,
    DropSpec,
    candidates,
    check_iterative,
    importance_of,
    number_of,
    ranking,
)


def drop_one_by_one(spec: DropSpec, model: Any, token_ids: Any) -> tuple[DroppedComponent, ...]:
    """Drop components one at a time, each time what is least important in the model that is left.

    Args:
        spec: How many of what; a threshold ends the dropping when nothing is below it.
        model: A model in memory; it is as before afterwards.
        token_ids: What to score on, shape (N, T), integers.

    Raises:
        InputError: Components are named, or there are not so many, or none is below the threshold.
    """
    from redundancy_trace.blocks import find_layers
    from redundancy_trace.blocks.dropping import drop_layers_
    from redundancy_trace.engine import choose_batch_size, score_module

    check_iterative(spec)
    ids = np.asarray(token_ids.cpu() if hasattr(token_ids, "cpu") else token_ids)
    size = choose_batch_size(None, ids.shape[1], len(ids), model.get_input_embeddings().weight.device)
    n_layers = len(find_layers(model)[1])
    left: list[Candidate] = candidates(spec, n_layers)
    most = len(left) - 1 if spec.below is not None else number_of(spec, n_layers)
    found: list[DroppedComponent] = []
    with ExitStack() as undoing:
        while len(found) < most:
            scores = score_module(model, ids, batch_size=size)
            importance = importance_of(scores.values)
            best = ranking(left, importance)[0]
            if spec.below is not None and importance[best] >= spec.below:
                break
            found.append(DroppedComponent(*best, importance[best]))
            left.remove(best)
            name, layer = best
            lost = frozenset(("attn", "mlp") if name == "block" else (name,))
            undoing.callback(drop_layers_(model, {layer: lost}))
    if not found:
        raise InputError(f"--drop {spec.text}: none is; the least important is {best[0]} {best[1]}.")
    return tuple(found)
