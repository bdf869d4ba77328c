"""How fast a model prefills and decodes, and in how much memory: whole and with parts dropped, in turns in one run."""

import inspect
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from statistics import fmean, median, stdev
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from redundancy_trace.errors import CheckpointError, InputError
from redundancy_trace.evaluation.memory import (
    cache_bytes,
    computed_cache_bytes,
    layers_without_attention,
    peak_memory,
    read_weight_bytes,
    weight_bytes,
)
from redundancy_trace.store import Evaluated

_SEED = 20240622


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


# The counter itself knows attention on GPUs only.
_ATTENTION_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@dataclass(frozen=True)
class Load:
    """What is generated while time and memory are measured; the tokens are random, as only their number matters.

    Attributes:
        batch_size: Sequences at a time.
        prompt_tokens: Tokens of each prompt.
        new_tokens: Tokens decoded behind each, greedily.
        rounds: How often each is timed; medians are told.
    """

    batch_size: int = 1
    prompt_tokens: int = 512
    new_tokens: int = 32
    rounds: int = 5


# A form of a model: opens it, whole or with components dropped; called once a round.
Variant = Callable[[], AbstractContextManager[Any]]


@dataclass
class _Timings:
    """Seconds of each round: of the prefill, and the median of its decoding steps."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Costs:
    """What does not change from round to round."""

    prefill_flops: int
    decode_flops: int
    read_bytes: int
    weights: int
    cache: int
    computed_cache: int | None
    rise: int | None

    @property
    def step_bytes(self) -> int:
        """Bytes that a decoding step reads: weights and cache."""
        return self.read_bytes + self.cache


def measure_speed(model: Any, variants: Sequence[Variant], load: Load) -> list[list[Evaluated]]:
    """Time and memory of a model in several forms, which take turns, so that what slows the machine slows all alike.

    Each form runs once before it is timed. Every form behind the first is also told as a ratio to the first: the median
    over rounds of the ratio of two neighbours in time. The bound on such a speed-up is the larger of two ratios, of the
    multiply-adds and, for decoding, of the bytes of weights and cache that a step reads. It holds where these take the
    time; what else a dropped part did (norms, rotations, calls) counts for something on small models.

    Args:
        model: A causal language model of transformers with a KV cache, in eval mode.
        variants: The forms, the first being what the others are compared with.
        load: What is generated.

    Returns:
        The numbers of each form. `peak_memory_bytes` is the weights of the form plus the highest rise of memory while
        it generates.

    Raises:
        InputError: The prompt and new tokens are more than the model's positions.
        CheckpointError: The model returns no cache.
    """
    _check(model, load)
    ids = _prompts(model, load)
    costs = []
    for variant in variants:
        with variant():
            costs.append(_costs(model, ids, load))
    timings = [_Timings() for _ in variants]
    for _ in range(load.rounds):
        for variant, timing in zip(variants, timings, strict=True):
            with variant():
                _time(model, ids, load, timing)
    return [_told(load, timings, costs, k) for k in range(len(variants))]


def _check(model: Any, load: Load) -> None:
    for name, value in vars(load).items():
        if value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
    positions = positions_in(model.config)
    if positions is not None and load.prompt_tokens + load.new_tokens > positions:
        raise InputError(
            f"--prompt-tokens {load.prompt_tokens} and --new-tokens {load.new_tokens} are more than the model's "
            f"{positions:,} positions; give fewer."
        )


def positions_in(config: Any) -> int | None:
    """The longest sequence that a model of this configuration takes, in tokens; None where it has no limit."""
    config = config.get_text_config(decoder=True)
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    return found if isinstance(found, int) and found > 0 else None


def _prompts(model: Any, load: Load) -> torch.Tensor:
    embedding = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(embedding.shape[0], (load.batch_size, load.prompt_tokens), generator=generator)
    return ids.to(embedding.device)


class _Decoder:
    """A generation, step by step: the prompt, then one token at a time behind it."""

    def __init__(self, model: Any) -> None:
        self._model = model
        parameters = inspect.signature(model.forward).parameters
        # As in generation: the logits of the last token alone.
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"

    def prefill(self, ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Next tokens (B, 1) and the cache behind prompts (B, T)."""
        return self._forward(ids)

    def step(self, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        """Next tokens and the cache behind one token of each sequence."""
        return self._forward(ids, **{self._cache_name: cache})

    def _forward(self, ids: torch.Tensor, **given: Any) -> tuple[torch.Tensor, Any]:
        output = self._model(input_ids=ids, use_cache=True, **self._last_only, **given)
        cache = getattr(output, self._cache_name, None)
        if cache is None:
            raise CheckpointError(f"{type(self._model).__name__} returns no KV cache; its decoding cannot be timed.")
        return output.logits[:, -1:].argmax(dim=-1), cache


@torch.no_grad()
def _costs(model: Any, ids: torch.Tensor, load: Load) -> _Costs:
    """Two untimed generations, which also warm up; the step that is counted is the last of the first one."""
    decoder = _Decoder(model)
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION_ON_CPU) as prefill:
        token, cache = decoder.prefill(ids)
    for _ in range(load.new_tokens - 1):
        token, cache = decoder.step(token, cache)
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION_ON_CPU) as step:
        token, cache = decoder.step(token, cache)
    held = cache_bytes(cache)
    del cache
    with peak_memory(ids.device) as peak:
        token, cache = decoder.prefill(ids)
        for _ in range(load.new_tokens):
            token, cache = decoder.step(token, cache)
    computed = computed_cache_bytes(
        model.config,
        batch_size=load.batch_size,
        tokens=load.prompt_tokens + load.new_tokens,
        element_bytes=model.get_input_embeddings().weight.element_size(),
        dropped=layers_without_attention(model),
    )
    return _Costs(
        prefill_flops=prefill.get_total_flops(),
        decode_flops=step.get_total_flops(),
        read_bytes=read_weight_bytes(model),
        weights=weight_bytes(model),
        cache=held,
        computed_cache=computed,
        rise=peak.rise,
    )


@torch.no_grad()
def _time(model: Any, ids: torch.Tensor, load: Load, timing: _Timings) -> None:
    decoder = _Decoder(model)
    steps = []
    _wait(ids.device)
    started = time.perf_counter()
    token, cache = decoder.prefill(ids)
    _wait(ids.device)
    timing.prefill.append(time.perf_counter() - started)
    for _ in range(load.new_tokens):
        started = time.perf_counter()
        token, cache = decoder.step(token, cache)
        _wait(ids.device)
        steps.append(time.perf_counter() - started)
    timing.decode.append(median(steps))


def _wait(device: torch.device) -> None:
    """Wait until a device has done what it was given: its work runs behind the clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _told(load: Load, timings: Sequence[_Timings], costs: Sequence[_Costs], k: int) -> list[Evaluated]:
    """The numbers of form k."""
    base = Evaluated(
        metric="",
        value=None,
        batch_size=load.batch_size,
        prompt_tokens=load.prompt_tokens,
        new_tokens=load.new_tokens,
    )
    timed = replace(base, n_samples=load.rounds)
    mine, cost = timings[k], costs[k]
    numbers = [
        _rate(timed, "prefill_tokens_per_second", load.batch_size * load.prompt_tokens, mine.prefill),
        _rate(timed, "decode_tokens_per_second", load.batch_size, mine.decode),
    ]
    exact: dict[str, float | None] = {
        "prefill_flops": cost.prefill_flops,
        "decode_flops": cost.decode_flops,
        "decode_bytes": cost.step_bytes,
        "weight_bytes": cost.weights,
        "kv_cache_bytes": cost.cache,
        "kv_cache_bytes_computed": cost.computed_cache,
        "peak_memory_bytes": None if cost.rise is None else cost.weights + cost.rise,
    }
    if k:
        whole, first = timings[0], costs[0]
        numbers += [
            _ratio(timed, "prefill_speedup", whole.prefill, mine.prefill),
            _ratio(timed, "decode_speedup", whole.decode, mine.decode),
        ]
        prefill, decode = first.prefill_flops / cost.prefill_flops, first.decode_flops / cost.decode_flops
        exact |= {
            "prefill_speedup_bound": prefill,
            "decode_speedup_bound": max(decode, first.step_bytes / cost.step_bytes),
        }
    numbers += [replace(base, metric=name, value=float(v)) for name, v in exact.items() if v is not None]
    return numbers


def _rate(base: Evaluated, name: str, count: int, seconds: list[float]) -> Evaluated:
    return replace(base, metric=name, value=count / median(seconds), stderr=_error([count / one for one in seconds]))


def _ratio(base: Evaluated, name: str, before: list[float], after: list[float]) -> Evaluated:
    ratios = [first / second for first, second in zip(before, after, strict=True)]
    return replace(base, metric=name, value=median(ratios), stderr=_error(ratios))


def _error(values: list[float]) -> float | None:
    """Standard error of the rounds' mean; None of one round."""
    return stdev(values, fmean(values)) / len(values) ** 0.5 if len(values) > 1 else None
