"""`gguf`: for llama.cpp, whose architecture `deci` has a number of heads and an MLP width for each layer.

Three of its traps are met: the head size is derived from layer 0, so a first attention that goes leaves its number of
query heads and a zero projection; an MLP width of 0 skips the attention too, so an MLP that goes leaves one of width
32 and zeros; and blocks that go whole are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redundancy_trace.errors import CheckpointError, InputError
from redundancy_trace.pruning.formats import gguf_reload
from redundancy_trace.pruning.formats.folders import OnBytes
from redundancy_trace.pruning.formats.gguf_vocabulary import Vocabulary, vocabulary_of
from redundancy_trace.pruning.formats.llama_shaped import LlamaShape, kept_layers, llama_shape, rope_factors
from redundancy_trace.pruning.plans import DropPlan
from redundancy_trace.pruning.proving import Proof, Reference, ask_fresh_process
from redundancy_trace.pruning.selecting import DropSpec
from redundancy_trace.pruning.sources import Source

FILE = "model.gguf"
TOLERANCE = 1e-4  # of the largest logit, in float32: the order of sums is another one
_TWIN = "float32.gguf"
_ROWS = 4096  # that are compared at a time
_ROPE = "rope_freqs.weight"
_EMPTY_MLP = 32  # the narrowest width that every kernel takes
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TEXTS = (
    "The capital of France is Paris.\n\nIn 1984, 3.14159 was 42% more;  two  spaces\tand a tab.",
    "def f(x):\n    return x**2  # don't, we'll, I'M\n",
    "Ünïcödé — 日本語のテキスト, emoji 🙂 and numbers 1234567890.",
)


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file: its shape, the dtype in which it is kept, and how it is had."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def check_request(source: Source, _spec: DropSpec | None) -> None:
    """Refuse other shapes than Llama's, and a machine on which nothing could be written or proven.

    Raises:
        InputError: Says what is in the way.
    """
    llama_shape(source, "gguf")
    rope_factors(source)
    for package in ("gguf", "xllamacpp"):
        try:
            __import__(package)
        except ImportError:
            raise InputError(
                f"--format gguf needs the package {package}, to write and to prove: pip install "
                "'redundancy-trace[gguf]'."
            ) from None


def check(source: Source, plan: DropPlan) -> None:
    """Refuse a plan that leaves no attention.

    Raises:
        InputError: It does.
        CheckpointError: What is dropped cannot be proven.
    """
    source.parts(plan)
    if all("attn" in kept.lost for kept in kept_layers(plan)):
        raise InputError("llama.cpp takes no model without any attention. Keep one, or use --format hf or zeroed.")


def write(source: Source, plan: DropPlan, folder: Path, _shard_bytes: int, on_bytes: OnBytes) -> None:
    """Write `model.gguf`, tensor by tensor; the tokenizer is taken from the folder.

    Of a model of 16 bits a copy in float32 is written beside it, for the proof: the kernels of llama.cpp for 16 bits
    also round what goes into a matrix, which would hide a fault.

    Raises:
        InputError: There is no tokenizer, or none that llama.cpp reads alike.
    """
    shape = llama_shape(source, "gguf")
    vocabulary = vocabulary_of(folder, source.config.vocab_size)
    tensors = _tensors(source, plan, shape)
    files = {FILE: tensors}
    if any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        files[_TWIN] = {name: replace(tensor, dtype=torch.float32) for name, tensor in tensors.items()}
    for name, held in files.items():
        _write_file(folder / name, held, vocabulary, source, plan, shape, on_bytes if name == FILE else None)


def prove(folder: Path, reference: Reference) -> Proof:
    """Let llama.cpp compute next-token probabilities, decode and cut text in a fresh process, and compare.

    Raises:
        CheckpointError: It does not load.
    """
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    cut = [loaded(text, add_special_tokens=False)["input_ids"] for text in _TEXTS]
    file, twin = folder / FILE, folder / _TWIN
    if not twin.is_file():
        return _asked(file, reference, cut)
    try:
        _check_twin(file, twin)
        exact = _asked(twin, reference, cut)
    finally:
        twin.unlink()
    own = _asked(file, reference, cut)
    note = f"computed in float32; with its own kernels of 16 bits {own.error:.1e}"
    return replace(exact, note="; ".join(filter(None, (exact.note, note))))


def _asked(file: Path, reference: Reference, cut: list[list[int]]) -> Proof:
    """What llama.cpp computes of a file, against the drop in place."""
    import gguf

    held = gguf.GGUFReader(file)
    heads, width = (held.fields[f"deci.attention.{name}"].contents() for name in ("head_count_kv", "key_length"))
    answer = ask_fresh_process(Path(gguf_reload.__file__), file, reference, *_TEXTS)
    logits = torch.from_numpy(reference.logits[0]).double()
    expected = torch.log_softmax(logits, dim=-1).numpy()[answer["lengths"] - 1]
    found = np.take_along_axis(expected, answer["top_ids"], axis=-1)
    largest = float(np.abs(reference.logits[0]).max())
    error = float(np.abs(found - answer["top_logprobs"]).max()) / largest
    same_cut = all(ids == answer[f"text{index}"].tolist() for index, ids in enumerate(cut))
    equal = reference.tokens == answer["tokens"]
    place = len(equal) if equal.all() else int(np.argmin(equal))
    return Proof(
        engine="llama.cpp",
        what="largest difference of the ten likeliest tokens' log-probabilities, relative to the largest logit,",
        error=error if same_cut and np.isfinite(error) else float("inf"),
        tolerance=TOLERANCE,
        equal_tokens=place,
        n_tokens=len(equal),
        n_parameters=sum(int(tensor.n_elements) for tensor in held.tensors if tensor.name != _ROPE),
        cache_bytes=2.0 * sum(heads) * width * getattr(torch, reference.dtype).itemsize,
        note="" if same_cut else "it cuts text into other tokens than the tokenizer",
        parted_at_a_tie=place < len(equal) and _is_tied(answer, reference, place, TOLERANCE * largest),
    )


def _is_tied(answer: dict[str, np.ndarray], reference: Reference, place: int, tolerance: float) -> bool:
    """Whether the token that was decoded at a place is as likely as the one that should have been."""
    ids, logprobs = answer["step_ids"][place], answer["step_logprobs"][place]
    wanted, found = (logprobs[ids == token] for token in (reference.tokens[place], answer["tokens"][place]))
    return len(wanted) == len(found) == 1 and bool(abs(found[0] - wanted[0]) <= tolerance)


def _check_twin(file: Path, twin: Path) -> None:
    """The copy that is computed with holds what the file holds: same fields, same numbers.

    Raises:
        CheckpointError: It does not.
    """
    import gguf

    one, other = gguf.GGUFReader(file), gguf.GGUFReader(twin)
    fields = [{name: field.contents() for name, field in reader.fields.items()} for reader in (one, other)]
    names = [[tensor.name for tensor in reader.tensors] for reader in (one, other)]
    same = all(_holds(a, b) for a, b in zip(one.tensors, other.tensors, strict=False))
    if fields[0] != fields[1] or names[0] != names[1] or not same:
        raise CheckpointError(f"{FILE} does not hold what it should; it is deleted. Please report this.")


def _holds(tensor: Any, wide: Any) -> bool:
    """Whether a tensor of a file has the numbers of one in float32; some rows at a time, as it may be large."""
    import gguf

    rows = [range(0, len(held.data), _ROWS) for held in (tensor, wide)]
    return rows[0] == rows[1] and all(
        np.array_equal(
            gguf.dequantize(tensor.data[first : first + _ROWS], tensor.tensor_type), wide.data[first : first + _ROWS]
        )
        for first in rows[0]
    )


def _write_file(
    path: Path,
    tensors: dict[str, _Tensor],
    vocabulary: Vocabulary,
    source: Source,
    plan: DropPlan,
    shape: LlamaShape,
    on_bytes: OnBytes,
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "deci")
    _write_numbers(writer, source, plan, shape)
    _write_vocabulary(writer, vocabulary)
    for name, tensor in tensors.items():
        size = torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, raw_dtype=_kind(tensor.dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors.values():
        data = tensor.read().to(tensor.dtype).contiguous()
        writer.write_tensor_data(data.view(-1).view(torch.uint8).numpy())
        if on_bytes is not None:
            on_bytes(data.numel() * data.itemsize)
    writer.close()


def _tensors(source: Source, plan: DropPlan, shape: LlamaShape) -> dict[str, _Tensor]:
    weights = source.empty.weights
    stored = {tensor.parameter: tensor.name for tensor in source.tensors()}
    found: dict[str, _Tensor] = {}

    def add(name: str, parameter: str, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        file_name = stored[parameter]
        info = weights.info[file_name]
        # Vectors are read as float32 by every kernel.
        dtype = torch.float32 if len(info.shape) == 1 else info.dtype
        found[name] = _Tensor(info.shape, dtype, lambda: change(weights.read([file_name])[file_name]))

    def add_zeros(name: str, *sides: int) -> None:
        found[name] = _Tensor(sides, torch.float32, lambda: torch.zeros(sides))

    for parameter, name in _OUTSIDE.items():
        if parameter in stored:
            add(name, parameter)
    _, factors = rope_factors(source)
    if factors is not None:
        found[_ROPE] = _Tensor(tuple(factors.shape), torch.float32, lambda: factors)
    heads = {"self_attn.q_proj": shape.heads, "self_attn.k_proj": shape.kv_heads}
    for kept in kept_layers(plan):
        for parameter in stored:
            inside = parameter.removeprefix(f"model.layers.{kept.layer}.")
            part, _, what = inside.rpartition(".")
            if inside == parameter or part not in _INSIDE:
                continue
            if _is_dropped(part, kept.lost) and part != "post_attention_layernorm":
                continue
            name = f"blk.{kept.number}.{_INSIDE[part]}.{what}"
            if part in heads:
                add(name, parameter, _reordered(heads[part], shape.head_dim))
            else:
                add(name, parameter)
        if "attn" in kept.lost and kept.number == 0:
            add("blk.0.attn_norm.weight", f"model.layers.{kept.layer}.input_layernorm.weight")
            add_zeros("blk.0.attn_output.weight", shape.width, shape.width)
        if "mlp" in kept.lost:
            for part in ("ffn_gate", "ffn_up"):
                add_zeros(f"blk.{kept.number}.{part}.weight", _EMPTY_MLP, shape.width)
            add_zeros(f"blk.{kept.number}.ffn_down.weight", shape.width, _EMPTY_MLP)
    return found


def _is_dropped(part: str, lost: frozenset[str]) -> bool:
    is_attention = part.startswith(("self_attn", "input_layernorm"))
    return ("attn" if is_attention else "mlp") in lost


def _reordered(heads: int, head_dim: int) -> Callable[[Tensor], Tensor]:
    """llama.cpp rotates neighbours where transformers rotates halves: rows are re-ordered within each head."""

    def change(tensor: Tensor) -> Tensor:
        split = tensor.reshape(heads, 2, head_dim // 2, *tensor.shape[1:])
        return split.transpose(1, 2).reshape(tensor.shape)

    return change


def _write_numbers(writer: Any, source: Source, plan: DropPlan, shape: LlamaShape) -> None:
    config, layers = source.config, kept_layers(plan)
    theta, _ = rope_factors(source)
    first = {layer.number for layer in layers if layer.number == 0}
    writer.add_name(f"{plan.model or source.folder.name} without {plan.drop}")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(len(layers))
    writer.add_head_count([0 if "attn" in x.lost and x.number not in first else shape.heads for x in layers])
    writer.add_head_count_kv([0 if "attn" in x.lost else shape.kv_heads for x in layers])
    writer.add_feed_forward_length([_EMPTY_MLP if "mlp" in x.lost else shape.mlp_width for x in layers])
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _write_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.cut is not None:
        writer.add_tokenizer_pre(vocabulary.cut)
    writer.add_token_list(list(vocabulary.pieces))
    writer.add_token_types(list(vocabulary.kinds))
    if vocabulary.scores is not None:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    for name, token in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_space_prefix(vocabulary.adds_space)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _kind(dtype: torch.dtype) -> Any:
    import gguf

    kinds = gguf.GGMLQuantizationType
    known = {torch.float32: kinds.F32, torch.float16: kinds.F16, torch.bfloat16: kinds.BF16, torch.float64: kinds.F64}
    return known[dtype]
