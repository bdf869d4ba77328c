"""The table of metrics: what is stored is described, and without torch."""

import subprocess
import sys

import pytest

from redundancy_trace.metrics import (
    COMPONENT_LABELS,
    COMPONENTS,
    DISTANCE_METRICS,
    IMPORTANCE,
    LAYER_METRICS,
    LOSS,
    METRICS,
    metric_versions,
)


def test_everything_stored_is_described():
    from redundancy_trace.similarity import COMPARED

    assert tuple(LAYER_METRICS) == COMPARED
    assert tuple(DISTANCE_METRICS) == COMPARED[:2]
    assert set(METRICS) == {*LAYER_METRICS, "loss", "importance"}
    assert set(COMPONENT_LABELS) == set(COMPONENTS)


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_ranges_hold_the_point_of_no_change(metric):
    assert METRICS[metric.name] is metric
    assert metric.label
    assert metric.version >= 1
    if metric.redundant is not None:
        assert metric.low is None or metric.low <= metric.redundant
        assert metric.high is None or metric.redundant <= metric.high


def test_importance_is_derived_and_has_no_version_of_its_own():
    assert set(metric_versions()) == {*LAYER_METRICS, LOSS.name}
    assert IMPORTANCE.redundant == 1 - LAYER_METRICS["cosine_similarity"].redundant


def test_table_needs_no_torch():
    code = "import sys, redundancy_trace.metrics; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
