"""Which parameters of a layer must be zero for a sublayer to add nothing: its output projection, found by trying."""

import torch
from torch import Tensor

from redundancy_trace.blocks.dropping import TrialLayer, nothing_of, parts_of
from redundancy_trace.errors import CheckpointError


def parameters_to_zero(trial: TrialLayer, component: str) -> tuple[str, ...]:
    """The parameters that, zero, make a layer compute the same as without its `attn` or `mlp`.

    From all of the sublayer's own, those are left out one by one without which it still adds nothing; norms and biases
    first, then matrices as they are registered. What is left is the last projection and its bias, of all experts where
    there are several; and what the trial does not feel, such as an expert that no token was sent to.

    Args:
        trial: The layer, with random weights.
        component: `attn` or `mlp`.

    Returns:
        Names within the layer.

    Raises:
        CheckpointError: Zeros alone do not do it.
    """
    layer = trial.layer
    with nothing_of(layer, trial.update_of(component)):
        without = trial.run()
    parts = [part.child for part in parts_of(trial, frozenset({component}))]
    own = {name: p for name, p in layer.named_parameters() if name.split(".")[0] in parts}
    kept = {name: parameter.detach().clone() for name, parameter in own.items()}

    def adds_nothing(zero: set[str]) -> bool:
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(torch.zeros_like(parameter) if name in zero else kept[name])
        return torch.equal(trial.run(), without)

    chosen = set(own)
    try:
        whole = trial.run()
        felt = [name for name in own if _is_felt(trial, own[name], kept[name], whole)]
        if not adds_nothing(chosen):
            raise CheckpointError(
                f"No zeros in the weights of layer {trial.index} ({type(layer).__name__}) make its {component} add "
                "nothing. Use --format hf."
            )
        for name in sorted(felt, key=lambda name: own[name].ndim > 1):
            if adds_nothing(chosen - {name}):
                chosen.discard(name)
    finally:
        _put_back(own, kept)
    return tuple(name for name in own if name in chosen)


def _is_felt(trial: TrialLayer, parameter: torch.nn.Parameter, kept: Tensor, whole: Tensor) -> bool:
    """Whether the layer's output changes when a parameter does."""
    with torch.no_grad():
        parameter.copy_(1.5 * kept + 0.1)
    changed = not torch.equal(trial.run(), whole)
    with torch.no_grad():
        parameter.copy_(kept)
    return changed


def _put_back(own: dict[str, torch.nn.Parameter], kept: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(kept[name])
