"""The model card of an export: what was dropped of what, why, what it cost, and how it was proven."""

from dataclasses import dataclass

from redundancy_trace.metrics import COMPONENT_LABELS, COMPONENTS
from redundancy_trace.pruning.plans import DropPlan
from redundancy_trace.pruning.proving import Proof
from redundancy_trace.versions import library_versions

_USE = {
    "native": "A stock model with fewer layers: load it as any other.\n\n{python}",
    "zeroed": (
        "The stock architecture, in which the output projections of what was dropped are zero. It runs wherever the "
        "original runs, and computes the pruned model; it is **not** smaller or faster.\n\n{python}"
    ),
    "hf": (
        "What was dropped is absent from the files, is not computed, and takes two numbers a token in the cache of "
        "keys and values. `modeling_pruned.py` is the code that does it, hence `trust_remote_code`.\n\n{python}"
    ),
    "nemotron-nas": (
        "For vLLM (`DeciLMForCausalLM`): `vllm serve FOLDER --trust-remote-code`. transformers has no class for it."
    ),
    "gguf": "For llama.cpp and what builds on it: `llama-cli -m model.gguf`.",
}
_PYTHON = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER"{code})
```"""


@dataclass(frozen=True)
class Effect:
    """What a drop cost on a calibration.

    Attributes:
        calibration: On what.
        n_tokens: Predicted tokens.
        before: Mean loss of the whole model, nats per token.
        after: Mean loss of the pruned one.
        dtype: In which both were computed.
    """

    calibration: str
    n_tokens: int
    before: float
    after: float
    dtype: str

    def told(self) -> str:
        """The losses in a line."""
        return (
            f"loss on {self.calibration}: {self.before:.4f} before, {self.after:.4f} after (nats per token, "
            f"{self.n_tokens:,} tokens, {self.dtype})"
        )


@dataclass(frozen=True)
class Sizes:
    """What a drop saves.

    Attributes:
        parameters: Of the whole model, and of the export.
        cache_bytes: Bytes of keys and values that a token takes, likewise.
        dtype: In which the cache was measured.
    """

    parameters: tuple[int, int]
    cache_bytes: tuple[float, float]
    dtype: str

    def told(self) -> str:
        """The sizes in a line."""
        (whole, left), (held, rest) = self.parameters, self.cache_bytes
        if (left, rest) == (whole, held):
            return f"{whole:,} parameters, keys and values of a token {held:,.0f} bytes ({self.dtype}), all as before"
        return (
            f"{whole:,} parameters, {left:,} after the drop; keys and values of a token {held:,.0f} bytes, {rest:,.0f} "
            f"after ({self.dtype})"
        )


def model_card(
    plan: DropPlan,
    source: str,
    commit: str,
    form: str,
    proof: Proof,
    sizes: Sizes,
    effect: Effect | None,
    *,
    brings_code: bool,
) -> str:
    """The text of README.md.

    Args:
        plan: What was dropped.
        source: The model, as the user knows it.
        commit: Its commit.
        form: The export's format.
        proof: How it was proven.
        sizes: Of model and cache.
        effect: What the drop cost; None where it was not measured.
        brings_code: Whether the export holds code that loading it runs.
    """
    base = f"base_model: {source}\n" if "/" in source else ""
    python = _PYTHON.format(code=", trust_remote_code=True" if brings_code else "")
    scores = "none: the components were named" if plan.order == "named" and plan.identity is None else None
    if scores is None:
        scores = f"identity `{plan.identity or 'not recorded'}`, on {plan.calibration or 'no named calibration'}"
    of = " at ".join(filter(None, (plan.model, plan.revision)))
    listed = "\n".join(
        f"| {COMPONENT_LABELS[one.component]} | {one.layer} | "
        f"{'' if one.importance is None else format(one.importance, '.5f')} |"
        for one in plan.components
    )
    counts = ", ".join(
        f"{count} {name}" for name in COMPONENTS if (count := sum(one.component == name for one in plan.components))
    )
    made = ", ".join(f"{name} {number}" for name, number in library_versions().items())
    return f"""---
{base}library_name: transformers
tags:
- pruned
---

# {source} without {counts} ({plan.drop}, {form})

{_USE[form].format(python=python)}

- Source: `{source}`, commit `{commit}`.
- Plan: `{plan.drop}`, order {plan.order}, from scores of {of or "the model"}; {plan.n_layers} layers. `drop_plan.json`
  holds it whole.
- Scores: {scores}.
- Size: {sizes.told()}.
- Effect: {effect.told() if effect else "not measured"}.
- Proof: {proof.told()}.
- Made with {made}.

What was dropped, in this order (importance = 1 − mean cosine of what goes into the component and what comes out):

| component | layer | importance |
|---|---|---|
{listed}
"""
