"""`nemotron-nas`: for vLLM, whose `DeciLMForCausalLM` has attention and MLP of each layer on or off.

vLLM needs the attention of the first layer to be there: where that is dropped, it stays with a zero output projection,
which computes the same. Blocks that go whole are left out.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redundancy_trace.pruning.formats import nemotron_nas_reload
from redundancy_trace.pruning.formats.folders import OnBytes, write_tensors
from redundancy_trace.pruning.formats.llama_shaped import (
    ATTENTION,
    MLP,
    KeptLayer,
    LlamaShape,
    kept_layers,
    llama_shape,
    rope_factors,
)
from redundancy_trace.pruning.plans import DropPlan
from redundancy_trace.pruning.proving import TOLERANCE, Proof, Reference, ask_fresh_process, compared
from redundancy_trace.pruning.selecting import DropSpec
from redundancy_trace.pruning.sources import Source, StoredTensor

CONFIGURATION = "configuration_decilm"
_MULTIPLE = 256  # to which vLLM rounds the width that it computes from `ffn_mult`
_KEPT = (
    "attention_bias", "bos_token_id", "dtype", "eos_token_id", "hidden_act", "hidden_size", "initializer_range",
    "intermediate_size", "max_position_embeddings", "mlp_bias", "num_attention_heads", "pad_token_id", "rms_norm_eps",
    "rope_parameters", "tie_word_embeddings", "use_cache", "vocab_size",
)  # fmt: skip


def check_request(source: Source, _spec: DropSpec | None) -> None:
    """Refuse other shapes than Llama's.

    Raises:
        InputError: Says in what it differs.
    """
    llama_shape(source, "nemotron-nas")
    rope_factors(source)


def check(source: Source, plan: DropPlan) -> None:
    """Refuse a plan that cannot be carried out.

    Raises:
        CheckpointError: What is dropped cannot be proven.
    """
    source.parts(plan)


def write(source: Source, plan: DropPlan, folder: Path, shard_bytes: int, on_bytes: OnBytes) -> None:
    """Write config, its class, and the tensors of what is left."""
    shape = llama_shape(source, "nemotron-nas")
    layers = {kept.layer: kept for kept in kept_layers(plan)}
    (folder / "config.json").write_text(json.dumps(_config(source, plan, shape), indent=2) + "\n", encoding="utf-8")
    code = files(__package__).joinpath(f"{CONFIGURATION}.py").read_text(encoding="utf-8")
    (folder / f"{CONFIGURATION}.py").write_text(code, encoding="utf-8")
    zero: set[str] = set()

    def name_of(tensor: StoredTensor) -> str | None:
        if tensor.parameter == "lm_head.weight" and source.config.tie_word_embeddings:
            return None
        if tensor.layer is None or tensor.inside is None:
            return tensor.parameter
        if (kept := layers.get(tensor.layer)) is None:
            return None
        child = tensor.inside.split(".")[0]
        gone = (*(ATTENTION if "attn" in kept.lost else ()), *(MLP if "mlp" in kept.lost else ()))
        if child in gone and not (child in ATTENTION and _has_attention(kept)):
            return None
        if child in gone and tensor.inside.startswith("self_attn.o_proj."):
            zero.add(tensor.name)
        return f"model.layers.{kept.number}.{tensor.inside}"

    def changed(name: str, tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor) if name in zero else tensor

    write_tensors(source, name_of, folder, shard_bytes, on_bytes, changed)


def prove(folder: Path, reference: Reference) -> Proof:
    """Check the form, and put the model together anew from it in a fresh process, with code of our own for what is off.

    vLLM itself is not asked: its environment excludes this one. `benchmarks/vllm_check.py` does, in one of its own.

    Raises:
        CheckpointError: The form is not as vLLM wants it.
    """
    script = Path(nemotron_nas_reload.__file__)
    answer = ask_fresh_process(script, folder, reference, reference.dtype)
    note = "structure checked, put together by this program, not by vLLM"
    return compared("re-assembly", answer, reference, TOLERANCE, note)


def ffn_mult(mlp_width: int, width: int) -> float | None:
    """The factor from which vLLM computes a width back; None where it cannot: the width is no multiple of 256.

    Example:
        >>> round(ffn_mult(1536, 576), 7), ffn_mult(1500, 576)
        (3.9986979, None)
    """
    return (mlp_width - 0.5) * 1.5 / width if mlp_width % _MULTIPLE == 0 else None


def _has_attention(kept: KeptLayer) -> bool:
    return "attn" not in kept.lost or kept.number == 0


def _config(source: Source, plan: DropPlan, shape: LlamaShape) -> dict[str, Any]:
    whole = source.config.to_dict()
    layers = kept_layers(plan)
    fields = {name: whole[name] for name in _KEPT if name in whole}
    if source.config.model_type == "qwen2":  # biases of queries, keys and values, none behind
        fields |= {"qkv_bias": True, "attention_bias": False}
    return {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{CONFIGURATION}.DeciLMConfig"},
        "block_configs": [_block(kept, shape) for kept in layers],
        **fields,
        "dtype": str(source.stored_dtype).removeprefix("torch."),
        "head_dim": shape.head_dim,
        "model_type": "nemotron-nas",
        "num_hidden_layers": len(layers),
        "num_key_value_heads": shape.kv_heads,
    }


def _block(kept: KeptLayer, shape: LlamaShape) -> dict[str, Any]:
    has_attention, has_mlp = _has_attention(kept), "mlp" not in kept.lost
    attention = {
        "n_heads_in_group": shape.heads // shape.kv_heads if has_attention else None,
        "no_op": not has_attention,
        "num_sink_tokens": None,
        "replace_with_linear": False,
        "sparsify": None,
        "unshifted_sink": False,
        "use_prefill_window_in_sink_attention": False,
        "window_length": None,
    }
    factor = ffn_mult(shape.mlp_width, shape.width)
    ffn: dict[str, Any] = {"no_op": not has_mlp, "replace_with_linear": False, "sparsify": None}
    if not has_mlp:
        ffn["ffn_mult"] = None
    elif factor is not None:
        ffn["ffn_mult"] = factor
    else:  # without the key: a null in its place is computed with
        ffn["intermediate_size"] = shape.mlp_width
    return {"attention": attention, "ffn": ffn}
