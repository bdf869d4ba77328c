"""A tokenizer of transformers as llama.cpp keeps it: pieces, kinds, merges, and the rule that cuts text beforehand."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redundancy_trace.errors import InputError

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The regular expression by which text is cut → what llama.cpp calls it.
_CUTS = {_LLAMA_3: "llama-bpe", _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF says of its tokenizer.

    Attributes:
        model: `gpt2` (byte-level BPE) or `llama` (SentencePiece).
        cut: The rule that cuts text before the merges; None of `llama`.
        pieces: Text of each token id, as many as the embedding has rows.
        kinds: Of each: 1 normal, 3 control, 4 defined by the user, 5 unused, 6 a byte.
        scores: Of `llama`: a higher one is merged first.
        merges: Of `gpt2`: in order, two pieces with a space between.
        special: `bos`, `eos`, `unk`, `pad` → id, where there is one.
        adds_bos: Whether BOS is put in front of a text.
        adds_space: Whether a space is put in front of a text.
        chat_template: As the tokenizer has it.
    """

    model: str
    cut: str | None
    pieces: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...] | None
    merges: tuple[str, ...]
    special: dict[str, int]
    adds_bos: bool
    adds_space: bool
    chat_template: str | None


def vocabulary_of(folder: Path, rows: int) -> Vocabulary:
    """The vocabulary of a folder's `tokenizer.json`.

    Args:
        folder: Holds the tokenizer's files.
        rows: Rows of the embedding; ids without a piece are called unused.

    Raises:
        InputError: There is none, or none that llama.cpp is known to read alike.
    """
    from transformers import AutoTokenizer

    from redundancy_trace.calibration import prefix_ids

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise InputError("A GGUF needs a tokenizer with a tokenizer.json; name one with --tokenizer.")
    held = json.loads(file.read_text(encoding="utf-8"))
    model = held["model"]
    if model["type"] != "BPE":
        raise InputError(f"{model['type']} tokenizers are not written to GGUF, only BPE; convert it with llama.cpp.")
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    pieces, kinds = _pieces(model["vocab"], held.get("added_tokens") or (), rows)
    merges = tuple(m if isinstance(m, str) else " ".join(m) for m in model["merges"])
    special = {name: getattr(loaded, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    prefix = prefix_ids(loaded)
    is_sentencepiece = bool(model.get("byte_fallback"))
    return Vocabulary(
        model="llama" if is_sentencepiece else "gpt2",
        cut=None if is_sentencepiece else _cut(held.get("pre_tokenizer"), held.get("normalizer")),
        pieces=pieces,
        kinds=kinds,
        scores=_scores(pieces, merges) if is_sentencepiece else None,
        merges=() if is_sentencepiece else merges,
        special={name: token for name, token in special.items() if token is not None},
        adds_bos=special["bos"] is not None and prefix[:1] == (special["bos"],),
        adds_space=_adds_space(held),
        chat_template=loaded.chat_template if isinstance(loaded.chat_template, str) else None,
    )


def _adds_space(held: Any) -> bool:
    rules = json.dumps([held.get("normalizer"), held.get("pre_tokenizer")])
    return any(mark in rules for mark in ('"Prepend"', '"add_prefix_space": true', '"prepend_scheme": "first"'))


def _pieces(vocab: dict[str, int], added: Any, rows: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    pieces = [f"[PAD{index}]" for index in range(rows)]
    kinds = [5] * rows
    for text, index in vocab.items():
        if index < rows:
            pieces[index], kinds[index] = text, 6 if _BYTE.fullmatch(text) else 1
    for token in added:
        if token["id"] < rows:
            pieces[token["id"]], kinds[token["id"]] = token["content"], 3 if token["special"] else 4
    return tuple(pieces), tuple(kinds)


def _scores(pieces: tuple[str, ...], merges: tuple[str, ...]) -> tuple[float, ...]:
    """SentencePiece merges what scores highest: the earlier a merge, the higher the piece that it makes."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return tuple(-float(ranks.get(piece, len(merges))) for piece in pieces)


def _cut(rule: Any, normalizer: Any) -> str:
    """What llama.cpp calls the rule of a byte-level tokenizer."""
    steps = rule["pretokenizers"] if rule and rule["type"] == "Sequence" else [rule] if rule else []
    kinds = [step["type"] for step in steps]
    regex = next((step["pattern"].get("Regex") for step in steps if step["type"] == "Split"), None)
    plain = normalizer is None or normalizer.get("type") == "NFC"
    found: str | None = None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        found = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        found = "smollm"
    elif kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        found = _CUTS.get(regex or "")
    if found is None or not plain:
        raise InputError(
            f"The tokenizer cuts text by a rule that is not known to llama.cpp by name ({', '.join(kinds) or 'none'}"
            f"{f': {regex}' if regex else ''}). Use --format hf or zeroed, and convert the latter with llama.cpp."
        )
    return found
