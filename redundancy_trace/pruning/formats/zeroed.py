"""`zeroed`: output projections are zero; the stock architecture computes the pruned model anywhere, no faster."""

from pathlib import Path

import torch
from torch import Tensor

from redundancy_trace.pruning.formats.folders import OnBytes, write_config, write_tensors
from redundancy_trace.pruning.plans import DropPlan
from redundancy_trace.pruning.proving import prove_in_transformers
from redundancy_trace.pruning.selecting import DropSpec
from redundancy_trace.pruning.sources import Source

# How an export is proven.
prove = prove_in_transformers


def check_request(_source: Source, _spec: DropSpec | None) -> None:
    """Any model may lose anything; whether zeros express it is found where they are looked for."""


def check(source: Source, plan: DropPlan) -> None:
    """Refuse a plan that zeros cannot express.

    Raises:
        CheckpointError: No zeros make a sublayer add nothing.
    """
    source.zeros(plan)


def write(source: Source, plan: DropPlan, folder: Path, shard_bytes: int, on_bytes: OnBytes) -> None:
    """Write the config as it is, and all tensors, of which the last projections of what is dropped are zero."""
    zero = source.zeros(plan)
    stored = {tensor.name for tensor in source.tensors() if tensor.parameter in zero}

    def changed(name: str, tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor) if name in stored else tensor

    write_config(source, source.config, folder)
    write_tensors(source, lambda tensor: tensor.name, folder, shard_bytes, on_bytes, changed)
