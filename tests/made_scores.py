"""Scores of given importances, for what must be found in them."""

import numpy as np
import polars as pl
from fake_scores import SCHEMA


def scores_of(importances, steps, *, errors=None, names=None, calibration="pydoc", **labels):
    """A frame in the store's columns.

    Args:
        importances: Component → shape (checkpoints, layers).
        steps: One a checkpoint; None where a name tells none.
        errors: One standard error for all, or component → shape as the importances; None = unknown.
        names: Revisions.
        calibration: Its name.
        labels: Other columns, one value each or one a checkpoint.
    """
    rows = []
    for component, values in importances.items():
        values = np.asarray(values, dtype=float)
        known = (
            errors
            if isinstance(errors, dict)
            else {component: np.full(values.shape, np.nan if errors is None else errors)}
        )
        for k, step in enumerate(steps):
            more = {name: value[k] if isinstance(value, list) else value for name, value in labels.items()}
            for layer, value in enumerate(values[k]):
                rows.append(
                    {
                        "model": "org/model",
                        "revision": names[k] if names else f"step{step}",
                        "commit": f"{k:040x}",
                        "kind": "branch",
                        "step": step,
                        "calibration": calibration,
                        "layer": layer,
                        "component": component,
                        "metric": "cosine_similarity",
                        "value": 1 - value,
                        "stderr": None if np.isnan(known[component][k][layer]) else float(known[component][k][layer]),
                        "n_sequences": 8,
                        "n_tokens": 4096,
                        "identity": "x",
                        **more,
                    }
                )
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def ranked(order, n_layers, size=0.1):
    """Importances (eighths, exact in binary) whose most redundant layers are `order`, the others behind by index."""
    whole = [*order, *(layer for layer in range(n_layers) if layer not in order)]
    return [(whole.index(layer) + 1) * size for layer in range(n_layers)]
