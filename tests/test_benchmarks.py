"""The benchmarks run at the size of a test, and what they compare with computes the same numbers."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import redundancy_trace as rt  # noqa: E402
from benchmarks import __main__ as benchmarks  # noqa: E402
from benchmarks import scoring  # noqa: E402
from benchmarks.decoders import Shape, random_ids, save_decoder  # noqa: E402
from benchmarks.naive import naive_similarities  # noqa: E402
from benchmarks.ratios import Ratio, median_ratio, table  # noqa: E402
from redundancy_trace.weights import load_whole_model  # noqa: E402


@pytest.fixture(autouse=True)
def environment_as_it_is(monkeypatch):
    """That of the tests is closed to the network already, and must stay for those that come after."""
    monkeypatch.setattr(benchmarks, "_set_environment", lambda: None)


def test_every_benchmark_is_registered():
    modules = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if not path.stem.startswith("__")}
    assert modules - {"decoders", "naive", "ratios"} == {*benchmarks.TABLE, *benchmarks.APART}


def test_the_naive_way_gives_the_same_numbers(tmp_path):
    import torch

    folder = save_decoder(Shape(width=64, layers=2, vocabulary=64), tmp_path / "model")
    ids = random_ids(64, 3, 48)
    scores = rt.score_model(folder, ids, device="cpu", dtype="float32").filter(metric="cosine_similarity")
    model = load_whole_model(folder, device=torch.device("cpu"), dtype=torch.float32)
    for component, values in naive_similarities(model, ids).items():
        ours = scores.filter(component=component).sort("layer")["value"].to_numpy()
        np.testing.assert_allclose(values, ours, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_table_is_printed_and_written(tmp_path, capsys):
    out = tmp_path / "scoring.json"
    assert benchmarks.main(["scoring", "--toy", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    rows = json.loads(out.read_text())["ratios"]
    assert [row["name"] in told for row in rows] == [True] * 4
    assert all(row["value"] > 0 and row["bound"] is None for row in rows)


def test_a_missed_bound_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scoring, "measure", lambda options: [Ratio("a", 1.0, 2.0), Ratio("b", 3.0, 4.0, "higher")])
    assert benchmarks.main(["scoring", "--out", str(tmp_path / "out.json")]) == 1
    told = capsys.readouterr()
    assert "MISSED" in told.out
    assert told.err == "Bound missed: b\n"
    assert median_ratio([(2.0, 1.0), (9.0, 3.0), (8.0, 2.0)]) == 3.0
    assert "≤ 2 ×  met" in table([Ratio("a", 1.0, 2.0)])
