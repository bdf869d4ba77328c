"""Exports take the memory of a tensor, not of the model; and float32 is had of weights that stay as they are stored."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from families import build, token_ids
from saved_models import byte_level_tokenizer, save
from transformers import AutoModelForCausalLM, LlamaConfig

from redundancy_trace.pruning import DroppedComponent, DropPlan
from redundancy_trace.pruning.sources import open_source
from redundancy_trace.pruning.widening import widen_
from redundancy_trace.weights import load_whole_model, write_shards
from redundancy_trace.weights.files import TensorInfo

pytestmark = pytest.mark.usefixtures("one_thread")
STATUS = Path("/proc/self/status")
LAYERS = 24
LARGEST = 2 * 512 * 2048  # bytes of an MLP's matrix in bfloat16
DROP = (DroppedComponent("attn", 0), DroppedComponent("mlp", 5))


def anonymous_bytes():
    """What this process holds of memory, without pages of files."""
    return next(1024 * int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A Llama of 200 MB in bfloat16, of matrices of 2 MB at most; its weights are all alike."""
    path = tmp_path_factory.mktemp("large") / "llama"
    config = LlamaConfig(
        vocab_size=288, hidden_size=512, intermediate_size=2048, num_hidden_layers=LAYERS, num_attention_heads=8,
        bos_token_id=0, eos_token_id=0, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(path)
    with init_empty_weights():
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    info = {name: TensorInfo(tuple(shape), torch.bfloat16) for name, shape in shapes.items()}
    total = write_shards(path, info, lambda name: torch.ones(info[name].shape, dtype=torch.bfloat16))
    assert total > 2e8
    return path, total


@pytest.mark.skipif(not STATUS.is_file(), reason="memory is read from /proc")
@pytest.mark.parametrize("form", ["native", "zeroed", "hf", "nemotron_nas", "gguf"])
def test_writing_holds_some_tensors_and_not_the_model(form, large, tmp_path):
    whole, total = large
    components = (DroppedComponent("block", 3),) if form == "native" else DROP
    plan = DropPlan("large", None, None, None, None, "drop", "named", LAYERS, components)
    byte_level_tokenizer().save_pretrained(tmp_path)
    source = open_source(whole)
    written = import_module(f"redundancy_trace.pruning.formats.{form}")
    written.check(source, plan)
    held, seen = [], []

    def note(size):
        held.append(anonymous_bytes())
        seen.append(size)

    before = anonymous_bytes()
    written.write(source, plan, tmp_path, 2**40, note)
    assert sum(seen) > 0.9 * total
    assert max(held) - before < 16 * LARGEST < total / 6


@pytest.mark.parametrize("family", ["llama", "llama_tied", "mistral", "qwen2"])
def test_widened_weights_compute_in_float32_and_stay_as_they_are(family, tmp_path):
    """Against the copy in float32, of the families of llama.cpp; biases, norms and tied heads included."""
    path = save(build(family).to(torch.bfloat16), tmp_path / family)
    cpu, ids = torch.device("cpu"), torch.from_numpy(token_ids(2))
    exact = load_whole_model(path, device=cpu, dtype=torch.float32)
    model = load_whole_model(path, device=cpu, dtype=torch.bfloat16)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        expected = exact(ids).logits
        assert torch.equal(widen_(model)(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
