"""The streaming engine on CUDA: numbers of the CPU, memory of two layers, copies beside the work, memory that ends."""

import json

import pytest
import torch
from families import token_ids
from saved_models import CPU, apart, by_metric, folder, loss_of, save, score
from transformers import LlamaConfig, LlamaForCausalLM

from redundancy_trace.engine import scoring
from redundancy_trace.errors import CheckpointError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
CUDA = torch.device("cuda")
VOCAB = 1024


def saved_llama(path, layers, width=1024):
    config = LlamaConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, vocab_size=VOCAB, max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return save(LlamaForCausalLM(config), path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved_llama(tmp_path_factory.mktemp("models") / "llama-12", 12)


def ids(sequences, length):
    return torch.randint(VOCAB, (sequences, length), generator=torch.Generator().manual_seed(0)).numpy()


def peak_of(run):
    """Most bytes of tensors on the device while it runs, beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


def merged(spans):
    """Spans of time, those that touch made one."""
    found = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_layers_give_the_numbers_of_the_cpu(llama, dtype):
    some = ids(3, 64)
    on_cpu, on_cuda = (score(llama, ids=some, device=device, dtype=dtype, batch_size=2) for device in (CPU, CUDA))
    bound = 1e-5 if dtype == torch.float32 else 5e-3
    found = by_metric(on_cuda)
    for key, values in by_metric(on_cpu).items():
        assert abs(values - found[key]).max() < bound * max(1.0, abs(values).max())
    assert loss_of(on_cuda) == pytest.approx(loss_of(on_cpu), abs=10 * bound)


def test_device_memory_is_of_two_layers_however_deep(llama, tmp_path):
    some = ids(2, 32)
    shallow = saved_llama(tmp_path / "llama-4", 4)
    layer_bytes = 4 * (4 * 1024**2 + 3 * 4 * 1024**2)
    _, deep_peak = peak_of(lambda: score(llama, ids=some, device=CUDA, batch_size=2))
    _, shallow_peak = peak_of(lambda: score(shallow, ids=some, device=CUDA, batch_size=2))
    # States and distances of these few tokens are less than a tenth of a layer.
    assert deep_peak < 2.5 * layer_bytes
    assert deep_peak < shallow_peak + 0.5 * layer_bytes


@pytest.mark.filterwarnings("ignore")  # of the profiler
def test_the_next_layer_is_copied_beside_the_work(llama, tmp_path):
    some = ids(64, 512)
    score(llama, ids=some[:2], device=CUDA, batch_size=2)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiled:
        score(llama, ids=some, device=CUDA, batch_size=8)
        torch.cuda.synchronize()
    trace = tmp_path / "trace.json"
    profiled.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("ph") == "X"]
    kernels = [e for e in events if e.get("cat") == "kernel"]
    working = {e["args"]["stream"] for e in kernels}
    copies = [
        e
        for e in events
        if e.get("cat") == "gpu_memcpy" and "HtoD" in e["name"] and e["args"]["stream"] not in working
        and e["args"]["bytes"] > 2**20
    ]  # fmt: skip
    # Seven matrices a layer, all of them on a stream of their own.
    assert len(copies) == 7 * 12
    assert all("Pinned" in e["name"] for e in copies)
    # Short kernels leave gaps in which the next is started; a device that waits for a copy stands still for longer.
    busy = [(e["ts"] - 100, e["ts"] + e["dur"] + 100) for e in kernels]
    beside = [c for c in copies if any(start < c["ts"] and c["ts"] + c["dur"] < end for start, end in merged(busy))]
    assert len(beside) > len(copies) / 2


def test_the_batch_is_halved_when_the_device_is_full(llama, monkeypatch):
    some = ids(16, 512)
    sizes = []
    original = scoring.score_folder

    def watched(*args, batch_size, **settings):
        sizes.append(batch_size)
        return original(*args, batch_size=batch_size, **settings)

    monkeypatch.setattr(scoring, "score_folder", watched)
    expected, small = peak_of(lambda: score(llama, ids=some, device=CUDA, batch_size=2))
    _, large = peak_of(lambda: score(llama, ids=some, device=CUDA, batch_size=16))
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    try:
        torch.cuda.set_per_process_memory_fraction((before + (small + large) / 2) / total)
        sizes.clear()
        found = score(llama, ids=some, device=CUDA, batch_size=16)
        assert sizes[0] == 16
        assert sizes == [max(1, 16 >> i) for i in range(len(sizes))]
        assert len(sizes) > 1
        assert apart(found, expected) < 1e-5
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((before + 2**20) / total)
        with pytest.raises(CheckpointError, match=r"does not fit the memory of cuda; try"):
            score(llama, ids=some, device=CUDA, batch_size=2)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_what_is_asked_for_by_itself_is_bfloat16_on_cuda():
    device = scoring.choose_device("auto")
    assert device.type == "cuda"
    assert scoring.choose_dtype("auto", device) == torch.bfloat16
    some = token_ids(2)
    assert apart(score(folder("llama"), ids=some, device=device), score(folder("llama"), ids=some, device=CUDA)) == 0
