"""One pass over a calibration gives every number of a checkpoint: layer by layer, or the whole model hooked."""

from redundancy_trace.engine.kept import Kept
from redundancy_trace.engine.scoring import choose_batch_size, choose_device, choose_dtype, score_checkpoint
from redundancy_trace.engine.whole import score_module

__all__ = [
    "Kept",
    "choose_batch_size",
    "choose_device",
    "choose_dtype",
    "score_checkpoint",
    "score_module",
]
