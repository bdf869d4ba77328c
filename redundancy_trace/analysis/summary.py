"""A row a checkpoint."""

import polars as pl

from redundancy_trace.analysis.frames import checked, ordered, values_of
from redundancy_trace.metrics import COMPONENTS, IMPORTANCE, LOSS


def training_summary(scores: pl.DataFrame) -> pl.DataFrame:
    """One row a checkpoint: mean importance of each component over the layers, and the loss.

    Returns:
        `revision`, `commit`, `stage`, `ingredient`, `seed`, `step`, `tokens`; `attn`, `mlp`, `block`: mean
        importance over all layers; `attn_inner`, `mlp_inner`, `block_inner`: without the first and the last
        layer, which stand far above the rest; `loss` in nats per token. Null where a layer that other
        checkpoints have is missing (a mean over other layers is another quantity), or nothing is stored.
    """
    rows = checked(scores)
    summary = ordered(rows)
    values = values_of(rows, IMPORTANCE.name)
    last = values["layer"].max()
    inner = values.filter((pl.col("layer") > 0) & (pl.col("layer") < last))
    for suffix, layers in (("", values), ("_inner", inner)):
        for component in COMPONENTS:
            there = layers.filter((pl.col("component") == component) & pl.col("value").is_not_null())
            n_layers = there["layer"].n_unique()
            means = there.group_by("order").agg(
                pl.when(pl.len() == n_layers).then(pl.col("value").mean()).alias(component + suffix)
            )
            summary = summary.join(means, on="order", how="left")
    loss = values_of(rows, LOSS.name).select("order", pl.col("value").alias("loss"))
    return summary.join(loss, on="order", how="left").sort("order").drop("order")
