"""Weight files → tensors by name → a model's parameters, complete or not at all."""

from redundancy_trace.weights.files import WeightFiles, open_weights
from redundancy_trace.weights.loading import (
    EmptyModel,
    ModelBuilder,
    build_empty_model,
    load_whole_model,
    read_config,
    release_,
)
from redundancy_trace.weights.remote import open_remote_weights
from redundancy_trace.weights.shards import SHARD_BYTES, write_shards

__all__ = [
    "SHARD_BYTES",
    "EmptyModel",
    "ModelBuilder",
    "WeightFiles",
    "build_empty_model",
    "load_whole_model",
    "open_remote_weights",
    "open_weights",
    "read_config",
    "release_",
    "write_shards",
]
