"""Bytes: of a model's weights, of a KV cache as measured and by formula, and at the peak of a computation."""

import gc
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redundancy_trace.blocks import ATTENTION_NAMES, find_layers
from redundancy_trace.blocks.skipping import Skipped
from redundancy_trace.heap import give_back_freed_memory

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
# Written there, the highest resident memory counts anew from now (Linux, proc_pid_clear_refs).
_RESET_PEAK = "5"
# Kinds of attention, as `layer_types` of a configuration names them.
_FULL, _SLIDING, _LINEAR = "full_attention", "sliding_attention", "linear_attention"
_KINDS = {_FULL, _SLIDING, _LINEAR}


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
    """Bytes of all tensors in a cache of transformers: keys, values, states of linear attention, placeholders."""
    held = (vars(layer).items() for layer in getattr(cache, "layers", ()))
    public = (value for items in held for name, value in items if not name.startswith("_"))
    each = (one for value in public for one in (value.values() if isinstance(value, dict) else (value,)))
    return sum(_bytes(one) for one in each if isinstance(one, Tensor))


def computed_cache_bytes(
    config: Any, *, batch_size: int, tokens: int, element_bytes: int, dropped: Collection[int] = ()
) -> int | None:
    """Bytes of a cache by formula: 2 · KV heads · head width · bytes · batch · tokens, of every attention that is left.

    That is the KV cache of arXiv 2406.15786, section 5. A layer with a sliding window keeps the window less the token
    that is being decoded; a gated delta net (arXiv 2412.06464) keeps a state of fixed size; a dropped attention keeps
    two numbers a token, from which the cache knows its length, and a dropped delta net nothing.

    Args:
        config: Configuration of the model.
        batch_size: Sequences.
        tokens: Tokens in each.
        element_bytes: Bytes of a number in the model's dtype.
        dropped: Layers whose attention is dropped.

    Returns:
        None where the configuration does not tell the shapes.
    """
    config = config.get_text_config(decoder=True)
    per_token, state = _numbers_per_token(config), _delta_state(config, element_bytes)
    kinds = _kinds(config)
    if per_token is None or set(kinds) - _KINDS or (_LINEAR in kinds and state is None):
        return None
    window = getattr(config, "sliding_window", None)
    total = 0
    for layer, kind in enumerate(kinds):
        if kind == _LINEAR:
            total += 0 if layer in dropped else batch_size * (state or 0)
        else:
            kept = min(tokens, window - 1) if kind == _SLIDING and window else tokens
            total += batch_size * kept * element_bytes * (2 if layer in dropped else per_token)
    return total


def layers_without_attention(model: Any) -> tuple[int, ...]:
    """Layers whose attention is dropped, be it in place or in an export of `trace prune --format hf`."""
    _, layers = find_layers(model)

    def is_gone(layer: Any) -> bool:
        # By name: an export brings a class of its own along, written in the same words.
        return any(type(getattr(layer, name, None)).__name__ == Skipped.__name__ for name in ATTENTION_NAMES)

    return tuple(index for index, layer in enumerate(layers) if is_gone(layer))


def _kinds(config: Any) -> list[str]:
    """The kind of each layer's attention."""
    everywhere = _SLIDING if getattr(config, "sliding_window", None) else _FULL
    return list(getattr(config, "layer_types", None) or [everywhere] * config.num_hidden_layers)


def _numbers_per_token(config: Any) -> int | None:
    """Numbers that one attention keeps of one token: its keys and values."""
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    kv_heads = _kv_heads(config, heads)
    if width is None or kv_heads is None or getattr(config, "kv_lora_rank", None) is not None:
        return None
    return 2 * kv_heads * int(width)


def _kv_heads(config: Any, heads: int | None) -> int | None:
    if getattr(config, "new_decoder_architecture", False):
        return heads  # Falcon-40B: transformers keeps its keys and values once for every head
    if getattr(config, "multi_query", False):
        return 1  # Falcon-7B
    for name in ("num_key_value_heads", "num_kv_heads"):
        if isinstance(found := getattr(config, name, None), int):
            return found
    return heads


def _delta_state(config: Any, element_bytes: int) -> int | None:
    """Bytes that a gated delta net keeps of one sequence: the last inputs of its convolution, and its float32 state."""
    names = ("num_key_heads", "key_head_dim", "num_value_heads", "value_head_dim", "conv_kernel_dim")
    shape = [getattr(config, f"linear_{name}", 0) for name in names]
    if not all(shape):
        return None
    key_heads, key_width, value_heads, value_width, kernel = map(int, shape)
    channels = 2 * key_heads * key_width + value_heads * value_width
    return channels * kernel * element_bytes + value_heads * key_width * value_width * torch.float32.itemsize


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
    give_back_freed_memory()  # what is kept of it would hide the rise
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
