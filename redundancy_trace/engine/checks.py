"""What must hold before and while a model is scored."""

from typing import Any

import numpy as np

from redundancy_trace.blocks import TOLERANCE, LayerStates
from redundancy_trace.calibration import check_ids, check_length
from redundancy_trace.engine.sums import tile_tokens
from redundancy_trace.errors import CheckpointError, InputError


def check_calibration(token_ids: np.ndarray, model: Any) -> None:
    """Refuse token ids that the model has no embedding row or no position for.

    Args:
        token_ids: Shape (N, T), integers.
        model: The model; its parameters may be on the meta device.

    Raises:
        InputError: Names the id or length and the model's limit.
    """
    config = model.config
    if int(token_ids.min()) < 0:
        raise InputError(f"The calibration holds the token id {int(token_ids.min())}; ids count from 0.")
    check_ids(token_ids, model.get_input_embeddings().weight.shape[0])
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    check_length(token_ids.shape[1], positions if isinstance(positions, int) and positions > 0 else None)


def check_identity(states: LayerStates, layer: int) -> None:
    """Hold the proven decomposition against a batch that is being scored.

    Raises:
        CheckpointError: If x + a + m misses the layer's output by more than the compute dtype explains.
    """
    dtype = states.resid_post.dtype
    tiles = states.tiles(tile_tokens(states.resid_post.device, states.resid_post.shape[-1]))
    error = max(tile.identity_error() for tile in tiles)
    if error > TOLERANCE[dtype]:
        raise CheckpointError(
            f"Layer {layer}: input + attention + MLP misses the layer's own output by {error:.1e} (relative; "
            f"{TOLERANCE[dtype]:.0e} is allowed in {str(dtype).removeprefix('torch.')}), though the proof held on the "
            "probe. The model is refused; try --engine whole, and --dtype float32."
        )
