"""Names of checkpoints, as published by the projects that publish them, to step, tokens, stage, ingredient, seed.

A table of patterns in place of code: the first that matches the whole name wins. A name that no pattern matches is no
training checkpoint as far as its name tells (`main`, `fp32`, `it-SFT`).
"""

import re
from dataclasses import dataclass, fields
from typing import Any, Literal

Where = Literal["ref", "folder", "repo"]


@dataclass(frozen=True, kw_only=True)
class ParsedName:
    """What a name says.

    Attributes:
        step: Optimizer steps.
        tokens: Tokens seen.
        index: A running number (or, for BabyLM, millions of words) that is neither steps nor tokens.
        stage: Stage or phase of the training.
        ingredient: One of several parallel anneals.
        seed: Name of the random seed, or of the seeded variant.
        tag: Name of a part of the training that has no number, such as `longctx`.
    """

    step: int | None = None
    tokens: int | None = None
    index: int | None = None
    stage: int | None = None
    ingredient: int | None = None
    seed: str | None = None
    tag: str | None = None

    def fields(self) -> dict[str, Any]:
        """What a checkpoint takes over: all but the tag."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "tag"}


_TOKENS = r"(?P<tokens>\d+(?:\.\d+)?)"
# Branches and tags. Beside each its families.
REF_PATTERNS: tuple[str, ...] = (
    # Pythia, OLMo 1-3, OLMoE, Comma, Apertus, Lucie, Ettin
    r"(?:stage(?P<stage>\d+)-)?(?:ingredient(?P<ingredient>\d+)-)?step(?P<step>\d+)"
    rf"(?:-tokens{_TOKENS}(?P<unit>[KMBT]))?",
    r"step(?P<step>\d+)-seed-(?P<seed>[A-Za-z0-9-]+)",  # DataDecide
    r"(?:stage(?P<stage>\d+)-)?step-(?P<step>\d+)",  # SmolLM2, SmolLM3
    rf"step-(?P<step>\d+)-{_TOKENS}(?P<unit>[MBT])T?",  # FineWeb ablations: 2BT = 2 billion tokens
    # Gaperon
    r"step-(?P<step>\d+)_tokens-(?P<tokens>\d+)(?P<unit>[MBT])(?:-phase(?P<stage>\d+)|-(?P<tag>[a-z-]+))",
    r"global_step_?(?P<step>\d+)",  # BLOOM, StableLM-2
    r"CrystalCoder_phase(?P<stage>\d+)_checkpoint_(?P<step>\d+)",
    r"ckpt_(?P<index>\d+)",  # Amber, K2: chunks of data, not steps
    r"checkpoint-(?P<step>\d+)(?:step)?",  # transformers' Trainer, the Stanford GPT-2 runs
    r"step_(?P<step>\d+)",  # post-training runs
    # Apertus, Lucie
    r"(?P<tag>longctx|extension|lc)[-_]step-?_?(?P<step>\d+)" rf"(?:-tokens{_TOKENS}(?P<unit>[KMBT]))?",
    r"(?P<tag>lc-\d+k-to-\d+k)-step-(?P<step>\d+)",  # SmolLM3: longer and longer context
    r"train_(?P<tokens>\d+)(?P<unit>[BT])",  # Baichuan-2
    rf"{_TOKENS}(?P<unit>[bt])_tokens",  # RedPajama-INCITE
    r"chck_(?P<index>\d+)M",  # BabyLM: words
)
REPO_PATTERNS: tuple[str, ...] = (
    rf"TinyLlama-1\.1B(?:-intermediate)?-step-(?P<kilosteps>\d+)[kK]-(?:token-)?{_TOKENS}(?P<unit>[bBT])",
    r"multiberts-seed_(?P<seed>\d+)-step_(?P<kilosteps>\d+)k",
)
FOLDER_PATTERNS: tuple[str, ...] = (
    rf"hf_ckpt/{_TOKENS}(?P<unit>[MBT])",  # MAP-Neo scaling, Aquila
    r"iter_(?P<step>\d{7})",  # Megatron
    r"[\w.-]*?(?:checkpoint-|global_step)(?P<step>\d+)(?:step)?",
)
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COMPILED: dict[Where, tuple[re.Pattern[str], ...]] = {
    "ref": tuple(map(re.compile, REF_PATTERNS)),
    # Whatever a project calls its branches, it calls its folders too.
    "folder": tuple(map(re.compile, REF_PATTERNS + FOLDER_PATTERNS)),
    "repo": tuple(map(re.compile, REPO_PATTERNS)),
}


def parse_name(name: str, where: Where = "ref") -> ParsedName | None:
    """Read a checkpoint's name.

    Args:
        name: Name of a branch or tag, of a folder (relative to the run), or of a repository (without its owner).
        where: Which of these it is.

    Returns:
        The fields, or None if no published scheme matches.

    Example:
        >>> parse_name("stage1-step928646-tokens3896B")
        ParsedName(step=928646, tokens=3896000000000, index=None, stage=1, ingredient=None, seed=None, tag=None)
        >>> parse_name("main") is None
        True
    """
    for pattern in _COMPILED[where]:
        if match := pattern.fullmatch(name):
            return _fields(match.groupdict())
    return None


def _fields(found: dict[str, str | None]) -> ParsedName:
    step = _integer(found.get("step"))
    if (kilosteps := _integer(found.get("kilosteps"))) is not None:
        step = kilosteps * 1000
    return ParsedName(
        step=step,
        tokens=_tokens(found.get("tokens"), found.get("unit")),
        index=_integer(found.get("index")),
        stage=_integer(found.get("stage")),
        ingredient=_integer(found.get("ingredient")),
        seed=found.get("seed"),
        tag=found.get("tag"),
    )


def _integer(digits: str | None) -> int | None:
    return None if digits is None else int(digits)


def _tokens(number: str | None, unit: str | None) -> int | None:
    if number is None or unit is None:
        return None
    return round(float(number) * _UNITS[unit.upper()])  # rounded: 16.78 * 1e9 is not whole in binary
