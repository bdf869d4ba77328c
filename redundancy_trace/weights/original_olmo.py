"""OLMo's original layout (`hf_olmo`), read as the model of transformers that computes the same.

OLMo-7B, OLMo-1B and DataDecide publish their training steps as Ai2's own code names its tensors. transformers knows no
`hf_olmo`, and where config.json says `olmo` it makes a model of its own names and leaves every number random.
`OlmoForCausalLM` is the same model where the norms have no weights, `LlamaForCausalLM` where they are RMSNorms with
weights.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from redundancy_trace.errors import CheckpointError, first_line
from redundancy_trace.weights.completeness import refuse_incomplete
from redundancy_trace.weights.files import TensorInfo, WeightFiles

_OWN_NAME = re.compile(r"(model\.)?transformer\.(blocks|block_groups\.\d+)\.\d+\.(attn_out|ff_proj)\.weight")

# What `olmo.config.ModelConfig` of ai2-olmo 0.6.0 takes a field to be that config.json leaves out.
_DEFAULTS: dict[str, Any] = {
    "n_kv_heads": None,
    "multi_query_attention": None,
    "clip_qkv": None,
    "mlp_ratio": 4,
    "mlp_hidden_size": None,
    "activation_type": "swiglu",
    "block_type": "sequential",
    "block_group_size": 1,
    "alibi": False,
    "rope": False,
    "rope_theta": 10_000,
    "attention_layer_norm": False,
    "embedding_layer_norm": False,
    "layer_norm_type": "default",
    "layer_norm_with_affine": True,
    "layer_norm_eps": 1e-5,
    "bias_for_layer_norm": None,
    "include_bias": True,
    "scale_logits": False,
    "norm_after": False,
    "max_sequence_length": 1024,
    "embedding_size": 50304,
    "weight_tying": True,
}
# What both native models are; anything else is refused.
_ALWAYS: dict[str, tuple[Any, ...]] = {
    "activation_type": ("swiglu",),
    "block_type": ("sequential",),
    "block_group_size": (1,),
    "alibi": (False,),
    "rope": (True,),
    "attention_layer_norm": (False,),
    "embedding_layer_norm": (False,),
    "include_bias": (False,),
    "scale_logits": (False,),
    "norm_after": (False,),
}
# LayerNorm without weights; the three differ only in what mixed precision rounds. Its epsilon is fixed.
_OLMO = {
    "layer_norm_type": ("default", "low_precision", "amd_compatible"),
    "layer_norm_with_affine": (False,),
    "layer_norm_eps": (1e-5,),
}
# RMSNorm with weights. A bias of None is one as `include_bias` says.
_LLAMA = {
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "bias_for_layer_norm": (False, None),
    "clip_qkv": (None,),
}


def is_original_olmo(fields: Any, names: Iterable[str]) -> bool:
    """Whether a config.json and the names of the stored tensors are of the original layout.

    Its `model_type` is not asked: it was `olmo` at first, as native models have it.
    """
    return isinstance(fields, dict) and "d_model" in fields and any(_OWN_NAME.fullmatch(name) for name in names)


def native_config(fields: Mapping[str, Any], file: Path) -> Any:
    """The configuration of the native model that computes what a config.json of the original layout describes.

    Args:
        fields: The content of config.json.
        file: Where it is, for messages.

    Raises:
        CheckpointError: If a field asks for what neither native model has, or is no such number; it is named.
    """
    given = _DEFAULTS | dict(fields)
    rms = given["layer_norm_type"] == "rms"
    known = _ALWAYS | (_LLAMA if rms else _OLMO)
    if foreign := [name for name, values in known.items() if given[name] not in values]:
        model = "LlamaForCausalLM" if rms else "OlmoForCausalLM"
        raise CheckpointError(
            f"{file} describes an original OLMo that cannot be read as {model} of transformers: "
            + ", ".join(f"{name} = {given[name]!r}, not {_told(known[name])}" for name in foreign)
            + "."
        )
    width, heads = _count(given, "d_model", file), _count(given, "n_heads", file)
    if given["mlp_hidden_size"] is None:
        inner = _count(given, "mlp_ratio", file) * width
    else:
        inner = _count(given, "mlp_hidden_size", file)
    shared_heads, clip = _key_value_heads(given, file), given["clip_qkv"]
    for fits, told in (
        (width % heads == 0, f"d_model = {width} is no multiple of n_heads = {heads}"),
        (heads % shared_heads == 0, f"n_heads = {heads} is no multiple of n_kv_heads = {shared_heads}"),
        (inner % 2 == 0, f"mlp_hidden_size = {inner} is odd, and is to be halved"),
        (clip is None or (isinstance(clip, int | float) and clip > 0), f"clip_qkv = {clip!r} is no positive number"),
    ):
        if not fits:
            raise CheckpointError(f"{file} cannot be used: {told}.")
    rows = _count(given, "vocab_size" if given["embedding_size"] is None else "embedding_size", file)
    shared = {
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": inner // 2,  # swiglu: one half is the gate
        "num_hidden_layers": _count(given, "n_layers", file),
        "num_attention_heads": heads,
        "num_key_value_heads": shared_heads,
        "max_position_embeddings": _count(given, "max_sequence_length", file),
        "rope_parameters": {"rope_type": "default", "rope_theta": given["rope_theta"]},
        "tie_word_embeddings": given["weight_tying"],
        "bos_token_id": None,
        "eos_token_id": given.get("eos_token_id"),
        "pad_token_id": None,
    }
    from transformers import LlamaConfig, OlmoConfig

    try:
        if rms:
            return LlamaConfig(**shared, rms_norm_eps=given["layer_norm_eps"], architectures=["LlamaForCausalLM"])
        return OlmoConfig(**shared, clip_qkv=given["clip_qkv"], architectures=["OlmoForCausalLM"])
    except Exception as error:  # the library raises many kinds; each means that a field cannot be used
        raise CheckpointError(f"{file} cannot be used: {first_line(error)}") from error


def native_weights(weights: WeightFiles, config: Any) -> WeightFiles:
    """The tensors of the original layout under their native names, fused ones as rows of what is stored.

    Args:
        weights: The open files.
        config: Their `native_config`.

    Raises:
        CheckpointError: If a tensor is missing, unexpected or misshapen; it is named as the file names it.
    """
    prefix = "model." if any(name.startswith("model.transformer.") for name in weights.info) else ""
    fused = {prefix + name: parts for name, parts in _stored(config).items()}
    refuse_incomplete(
        weights.folder,
        missing=fused.keys() - weights.info.keys(),
        unexpected=weights.info.keys() - fused.keys(),
        misshapen=[
            (name, weights.info[name].shape, parts.shape)
            for name, parts in fused.items()
            if name in weights.info and weights.info[name].shape != parts.shape
        ],
    )
    info, places = {}, {}
    for name, parts in fused.items():
        start = 0
        for part, rows in parts.rows.items():
            info[part] = TensorInfo((rows, *parts.columns), weights.info[name].dtype)
            places[part] = _Place(name, start, start + rows, whole=len(parts.rows) == 1)
            start += rows
    return _NativeWeights(weights.folder, info, {}, weights, places)


@dataclass(frozen=True)
class _Place:
    """Rows of a stored tensor, or the whole of it."""

    stored: str
    start: int
    stop: int
    whole: bool

    def of(self, tensor: Any) -> Any:
        """These rows of the tensor, or of what reads itself when it is indexed."""
        if self.whole:
            return tensor
        return tensor[self.start : self.stop] if isinstance(tensor, Tensor) else _Rows(tensor, self.start, self.stop)


@dataclass(frozen=True)
class _NativeWeights(WeightFiles):
    """Stored tensors under native names; of those that are fused each is read once for all that lie in it."""

    _base: WeightFiles
    _places: Mapping[str, _Place]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: part[...] for name, part in self.slices(names).items()}

    def slices(self, names: Iterable[str]) -> dict[str, Any]:
        places = {name: self._places[name] for name in names}
        stored = self._base.slices(dict.fromkeys(place.stored for place in places.values()))
        return {name: place.of(stored[place.stored]) for name, place in places.items()}

    def rows(self, name: str, rows: Tensor) -> Tensor:
        place = self._places[name]
        return self._base.rows(place.stored, rows + place.start)


@dataclass(frozen=True)
class _Fused:
    """A stored tensor: native tensors one below the other.

    Attributes:
        rows: Native name to its number of rows, from the top.
        columns: The other axes.
    """

    rows: dict[str, int]
    columns: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(self.rows.values()), *self.columns)


def _stored(config: Any) -> dict[str, _Fused]:
    """What a file of the original layout holds, by stored name without its prefix."""
    width, inner = config.hidden_size, config.intermediate_size
    shared = width // config.num_attention_heads * config.num_key_value_heads
    weighted_norms = config.model_type == "llama"
    stored = {"transformer.wte.weight": _Fused({"model.embed_tokens.weight": config.vocab_size}, (width,))}
    for index in range(config.num_hidden_layers):
        block, layer = f"transformer.blocks.{index}", f"model.layers.{index}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        queries, keys, values = (f"{attention}.{part}_proj.weight" for part in "qkv")
        stored[f"{block}.att_proj.weight"] = _Fused({queries: width, keys: shared, values: shared}, (width,))
        stored[f"{block}.attn_out.weight"] = _Fused({f"{attention}.o_proj.weight": width}, (width,))
        # The first half is multiplied by the second, which goes through the activation.
        up_and_gate = {f"{mlp}.up_proj.weight": inner, f"{mlp}.gate_proj.weight": inner}
        stored[f"{block}.ff_proj.weight"] = _Fused(up_and_gate, (width,))
        stored[f"{block}.ff_out.weight"] = _Fused({f"{mlp}.down_proj.weight": width}, (inner,))
        if weighted_norms:
            stored[f"{block}.attn_norm.weight"] = _Fused({f"{layer}.input_layernorm.weight": width}, ())
            stored[f"{block}.ff_norm.weight"] = _Fused({f"{layer}.post_attention_layernorm.weight": width}, ())
    if weighted_norms:
        stored["transformer.ln_f.weight"] = _Fused({"model.norm.weight": width}, ())
    if not config.tie_word_embeddings:
        stored["transformer.ff_out.weight"] = _Fused({"lm_head.weight": config.vocab_size}, (width,))
    return stored


class _Rows:
    """Some rows of a stored matrix; reads no others, and these only when it is indexed."""

    def __init__(self, stored: Any, start: int, stop: int) -> None:
        self._stored, self._start, self._stop = stored, start, stop

    def __getitem__(self, index: Any) -> Tensor:
        rows: Tensor = self._stored[self._start : self._stop]
        return rows[index]


def _count(given: Mapping[str, Any], name: str, file: Path) -> int:
    value = given.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{file} cannot be used: {name} = {value!r} is no positive whole number.")
    return value


def _key_value_heads(given: Mapping[str, Any], file: Path) -> int:
    heads = _count(given, "n_heads", file)
    # The older field says what the newer one may say again.
    older = given["multi_query_attention"]
    if given["n_kv_heads"] is None:
        return 1 if older else heads
    count = _count(given, "n_kv_heads", file)
    if older is not None and count != (1 if older else heads):
        raise CheckpointError(
            f"{file} cannot be used: n_kv_heads = {count} and multi_query_attention = {older!r} contradict each other."
        )
    return count


def _told(values: tuple[Any, ...]) -> str:
    return " or ".join(repr(value) for value in values)
