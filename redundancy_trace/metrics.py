"""What each metric is called, how far it reaches, which way it points, and the numbers of one checkpoint."""

from dataclasses import dataclass
from typing import Literal

Component = Literal["attn", "mlp", "block"]
COMPONENTS: tuple[Component, ...] = ("attn", "mlp", "block")
COMPONENT_LABELS: dict[str, str] = {"attn": "Attention", "mlp": "MLP", "block": "Block"}


@dataclass(frozen=True)
class Metric:
    """One quantity.

    Attributes:
        name: The name in the `metric` column, or of a quantity derived from one that is stored.
        label: What an axis or a colour bar says.
        low: Smallest possible value (None = unbounded).
        high: Largest possible value (None = unbounded).
        redundant: The value of a component that changes nothing; None where the metric has no such point.
        version: Raised whenever the numbers change; part of every row's identity.
    """

    name: str
    label: str
    low: float | None
    high: float | None
    redundant: float | None
    version: int


# Stored for every (checkpoint, layer, component). X and Y: the residual stream before and after the component.
LAYER_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("cosine_similarity", "cosine similarity cos(X, Y)", -1.0, 1.0, 1.0, 1),
        Metric("angular_distance", "angular distance (share of half a turn)", 0.0, 1.0, 0.0, 1),
        Metric("relative_norm", "relative update norm ‖update‖ / ‖X‖", 0.0, None, 0.0, 1),
        Metric("update_cosine", "cos(update, X)", -1.0, 1.0, None, 1),
    )
}
# Stored once a checkpoint, component `model`, layer null.
LOSS = Metric("loss", "loss (nats per token)", 0.0, None, None, 1)
# Of a model with components dropped, on the same tokens as the whole one.
ADDED_LOSS = Metric("added_loss", "loss above the whole model's (nats per token)", None, None, 0.0, 1)
# Derived on reading: 1 - cosine_similarity (arXiv 2406.15786, eq. 1-6).
IMPORTANCE = Metric("importance", "importance 1 − cos(X, Y)", 0.0, 2.0, 0.0, 1)
# Stored for every pair of residual states h_i, h_j with i < j.
DISTANCE_METRICS: dict[str, Metric] = {name: LAYER_METRICS[name] for name in ("cosine_similarity", "angular_distance")}
METRICS: dict[str, Metric] = {**LAYER_METRICS, LOSS.name: LOSS, IMPORTANCE.name: IMPORTANCE}
# What an evaluation measures, beside the metrics of tasks. A ratio to the whole model is 1 where nothing changes.
EVALUATION_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        LOSS,
        ADDED_LOSS,
        Metric("perplexity", "perplexity exp(loss)", 1.0, None, None, 1),
        Metric("bits_per_byte", "bits per byte of text", 0.0, None, None, 1),
        Metric("prefill_tokens_per_second", "prefill (tokens per second)", 0.0, None, None, 1),
        Metric("decode_tokens_per_second", "decode (tokens per second)", 0.0, None, None, 1),
        Metric("prefill_speedup", "prefill speed-up", 0.0, None, 1.0, 1),
        Metric("decode_speedup", "decode speed-up", 0.0, None, 1.0, 1),
        Metric("prefill_speedup_bound", "bound on the prefill speed-up", 1.0, None, 1.0, 1),
        Metric("decode_speedup_bound", "bound on the decode speed-up", 1.0, None, 1.0, 1),
        Metric("prefill_flops", "floating-point operations of a prefill (two a multiply-add)", 0.0, None, None, 1),
        Metric("decode_flops", "floating-point operations of a decode step (two a multiply-add)", 0.0, None, None, 1),
        Metric("decode_bytes", "bytes that a decode step reads", 0.0, None, None, 1),
        Metric("weight_bytes", "bytes of the weights", 0.0, None, None, 1),
        Metric("kv_cache_bytes", "bytes of the KV cache", 0.0, None, None, 1),
        Metric("kv_cache_bytes_computed", "bytes of the KV cache, by formula", 0.0, None, None, 1),
        Metric("peak_memory_bytes", "peak memory (bytes)", 0.0, None, None, 1),
    )
}


def metric_versions() -> dict[str, int]:
    """Name to version of every stored metric: a part of the identity of a row."""
    return {metric.name: metric.version for metric in (*LAYER_METRICS.values(), LOSS)}


@dataclass(frozen=True)
class Value:
    """One number of one checkpoint.

    Attributes:
        layer: Index of the layer, None for the loss.
        component: attn, mlp, block, or model for the loss.
        metric: A name in `METRICS`.
        value: Mean over tokens; None if no token counts.
        stderr: Standard error over sequences; None with fewer than two.
        n_sequences: Sequences with a token that counts.
        n_tokens: Tokens that count.
    """

    layer: int | None
    component: str
    metric: str
    value: float | None
    stderr: float | None
    n_sequences: int
    n_tokens: int


@dataclass(frozen=True)
class Distance:
    """One cell of the block-distance matrix: residual state `layer` against `to_layer`, 0 = embeddings."""

    layer: int
    to_layer: int
    metric: str
    value: float | None
    n_tokens: int


@dataclass(frozen=True)
class ModelScores:
    """All numbers of one checkpoint."""

    values: tuple[Value, ...]
    distances: tuple[Distance, ...]
