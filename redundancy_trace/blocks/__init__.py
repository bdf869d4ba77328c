"""A model's decoder layers: found, proven, tapped.

`finding` knows which modules they are, `proof` where attention and MLP join the residual stream, `states` is what a
layer did to it, `taps` hands that over while a model runs.
"""

from redundancy_trace.blocks.finding import ATTENTION_NAMES, find_layers, layer_input, layer_kind
from redundancy_trace.blocks.proof import MLP_NAMES, PROBE_TOKENS, prove
from redundancy_trace.blocks.states import TOLERANCE, Decomposition, LayerStates, Update, not_finite
from redundancy_trace.blocks.taps import tap

__all__ = [
    "ATTENTION_NAMES",
    "MLP_NAMES",
    "PROBE_TOKENS",
    "TOLERANCE",
    "Decomposition",
    "LayerStates",
    "Update",
    "find_layers",
    "layer_input",
    "layer_kind",
    "not_finite",
    "prove",
    "tap",
]
