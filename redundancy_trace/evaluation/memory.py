"""Bytes: of a model's weights, of a KV cache as measured and by formula, and at the peak of a computation."""

import ctypes
import gc
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
# Written there, the highest resident memory counts anew from now (Linux, proc_pid_clear_refs).
_RESET_PEAK = "5"


def weight_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers; what is tied counts once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(map(_bytes, tensors.values()))


def read_weight_bytes(model: Any) -> int:
    """Bytes of weights that one step of decoding reads: all but an embedding matrix that is no output head too.

    Of a mixture of experts all experts are counted, though a token reads some of them.
    """
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    return weight_bytes(model) - (0 if tied else _bytes(embedding))


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors that a KV cache of transformers holds, the placeholders of dropped attentions included."""
    layers = getattr(cache, "layers", ())
    tensors = (
        value
        for layer in layers
        for name, value in vars(layer).items()
        if isinstance(value, Tensor) and not name.startswith("_")
    )
    return sum(map(_bytes, tensors))


def computed_cache_bytes(
    config: Any, *, batch_size: int, tokens: int, element_bytes: int, dropped: Collection[int] = ()
) -> int | None:
    """Bytes of a KV cache: 2 · KV heads · head width · bytes · batch · tokens, of every attention that is left.

    A layer with a sliding window keeps the window less the token that is being decoded. (arXiv 2406.15786, section 5)

    Args:
        config: Configuration of the model.
        batch_size: Sequences.
        tokens: Tokens in each.
        element_bytes: Bytes of a number.
        dropped: Layers whose attention is dropped; they hold nothing.

    Returns:
        None where the configuration does not tell the shape of keys and values.
    """
    config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    kv_heads = _kv_heads(config, heads)
    if width is None or kv_heads is None or getattr(config, "kv_lora_rank", None) is not None:
        return None
    window = getattr(config, "sliding_window", None)
    n_layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * n_layers
    if set(kinds) - {"full_attention", "sliding_attention"}:
        return None
    kept = [kind for layer, kind in enumerate(kinds) if layer not in dropped]
    held: int = sum(min(tokens, window - 1) if kind == "sliding_attention" and window else tokens for kind in kept)
    return 2 * kv_heads * int(width) * element_bytes * batch_size * held


def _kv_heads(config: Any, heads: int | None) -> int | None:
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1  # Falcon-7B
    for name in ("num_key_value_heads", "num_kv_heads"):
        if isinstance(found := getattr(config, name, None), int):
            return found
    return heads


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass
class Peak:
    """By how many bytes memory rose at most; None where this device and system do not tell."""

    rise: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure how far memory rises while this is open, above what was in use before.

    On CUDA that is the memory of torch's tensors, on a CPU under Linux the resident memory of the process.
    """
    found = Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        torch.cuda.synchronize(device)
        found.rise = torch.cuda.max_memory_allocated(device) - before
        return
    started = _begin_resident() if device.type == "cpu" else None
    yield found
    highest = _resident("VmHWM") if started is not None else None
    if started is not None and highest is not None:
        found.rise = max(0, highest - started)


def _begin_resident() -> int | None:
    """The resident memory now, from which on the highest is counted."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what the C library keeps of freed memory would hide the rise
    try:
        _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        return None
    return _resident("VmRSS")


def _resident(name: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = next((line.split()[1] for line in lines if line.startswith(f"{name}:")), None)
    return None if kilobytes is None else 1024 * int(kilobytes)
