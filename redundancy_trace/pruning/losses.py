"""Mean next-token loss of a model in memory, as a sweep stores it."""

from typing import Any

import numpy as np
import torch

from redundancy_trace.engine import choose_batch_size
from redundancy_trace.engine.sums import LossSums


def mean_loss(model: Any, token_ids: np.ndarray) -> tuple[float, int]:
    """Mean loss in nats per token, and the number of predicted tokens.

    Args:
        model: A causal language model, in eval mode.
        token_ids: Shape (N, T), integers.

    Raises:
        CheckpointError: The loss is not finite.
    """
    device = model.get_input_embeddings().weight.device
    sums = LossSums(len(token_ids), device)
    ids = torch.as_tensor(token_ids, dtype=torch.long, device=device)
    with torch.no_grad():
        for batch in ids.split(choose_batch_size(None, ids.shape[1], len(ids), ids.device)):
            sums.add(model(input_ids=batch, use_cache=False).logits, batch)
    found = sums.value()
    assert found.value is not None
    return found.value, found.n_tokens
