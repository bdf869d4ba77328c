"""Frames of made-up scores in the store's columns, with the shape that real ones have."""

import numpy as np
import polars as pl

from redundancy_trace.store import DISTANCE_SCHEMA

PYTHIA_STEPS = [0, *(2**k for k in range(10)), *range(1000, 144000, 1000)]
COMPONENT_SCALES = {"attn": 0.05, "mlp": 0.12, "block": 0.15}
SCHEMA = {
    "model": pl.String,
    "revision": pl.String,
    "commit": pl.String,
    "kind": pl.String,
    "stage": pl.Int64,
    "ingredient": pl.Int64,
    "seed": pl.String,
    "step": pl.Int64,
    "tokens": pl.Int64,
    "calibration": pl.String,
    "layer": pl.Int64,
    "component": pl.String,
    "metric": pl.String,
    "value": pl.Float64,
    "stderr": pl.Float64,
    "n_sequences": pl.Int64,
    "n_tokens": pl.Int64,
    "identity": pl.String,
}


def fake_scores(
    steps,
    n_layers=4,
    *,
    names=None,
    tokens=None,
    stages=None,
    loss=True,
    model="org/model",
    calibration="pydoc",
    seed=0,
    update_cosine=False,
):
    """Importance falls with depth, grows over training, and is far higher in layer 0; one row a value."""
    rng = np.random.default_rng(seed)
    rows = []
    for k, step in enumerate(steps):
        checkpoint = {
            "model": model,
            "revision": names[k] if names else f"step{step}",
            "commit": f"{k:040x}",
            "kind": "branch",
            "stage": stages[k] if stages else None,
            "step": step,
            "tokens": tokens[k] if tokens else None,
            "calibration": calibration,
            "n_sequences": 8,
            "identity": "x",
        }
        for layer in range(n_layers):
            for component, size in COMPONENT_SCALES.items():
                importance = size * np.exp(-2 * layer / n_layers) * (1 + k / len(steps)) * rng.uniform(0.9, 1.1)
                importance = importance + 0.5 if layer == 0 else importance
                metrics = {"cosine_similarity": 1 - importance, "relative_norm": importance**0.5}
                if update_cosine:
                    metrics["update_cosine"] = 0.5 - importance
                for metric, value in metrics.items():
                    rows.append(
                        {
                            **checkpoint,
                            "layer": layer,
                            "component": component,
                            "metric": metric,
                            "value": value,
                            "stderr": 0.002,
                            "n_tokens": 4096,
                        }
                    )
        if loss:
            value = 4 - k / len(steps)
            row = {"component": "model", "metric": "loss", "value": value, "stderr": 0.02, "n_tokens": 4088}
            rows.append({**checkpoint, **row})
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def fake_distances(steps, n_layers=4, *, calibration="pydoc"):
    """Block distances that grow with the gap and fall with depth, in the store's columns."""
    rows = [
        {
            **dict.fromkeys(("stage", "ingredient", "seed", "tokens")),
            "model": "org/model", "revision": f"step{step}", "commit": f"{step:040x}", "kind": "branch", "step": step,
            "calibration": calibration, "layer": layer, "to_layer": to, "metric": metric, "value": value,
            "n_tokens": 512, "identity": "x",
        }
        for step in steps
        for layer in range(n_layers)
        for to in range(layer + 1, n_layers + 1)
        for distance in [0.4 * (to - layer) / (n_layers + layer)]
        for metric, value in (("angular_distance", distance), ("cosine_similarity", np.cos(np.pi * distance)))
    ]  # fmt: skip
    return pl.DataFrame(rows, schema=DISTANCE_SCHEMA)
