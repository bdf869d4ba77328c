"""Weight files → tensors by name → a model's parameters, complete or not at all."""

from redundancy_trace.weights.files import WeightFiles, open_weights
from redundancy_trace.weights.loading import (
    EmptyModel,
    build_empty_model,
    load_whole_model,
    read_config,
    release_,
)

__all__ = [
    "EmptyModel",
    "WeightFiles",
    "build_empty_model",
    "load_whole_model",
    "open_weights",
    "read_config",
    "release_",
]
