"""Folders that `trace eval` cannot measure as they are: runs, and exports that need consent or another program."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from redundancy_trace.errors import InputError

_PLAN = "drop_plan.json"


def check_measurable(folder: Path, *, trust_remote_code: bool) -> None:
    """Refuse a run, an export whose code may not be run, and one that transformers does not run.

    Args:
        folder: What the user named.
        trust_remote_code: Whether code in it may be run.

    Raises:
        InputError: Says what it is, and what measures it.
    """
    from redundancy_trace.pruning.formats.hf import MODULE
    from redundancy_trace.store import read_run

    run = None
    with suppress(InputError):  # a settings.json of another program's
        run = read_run(folder)
    if run is not None:
        raise InputError(
            f"{folder} is a run of {run.model}, not a model. trace eval --along {folder} measures what dropping costs "
            f"at its checkpoints; trace eval --model {_json(folder / 'listing.json').get('model', run.model)} "
            f"--revision … --out {folder} measures one of them."
        )
    if (folder / f"{MODULE}.py").is_file() and not trust_remote_code:
        raise InputError(
            f"{folder} is what trace prune --format hf wrote: a short file of code comes with it. Add "
            "--trust-remote-code to run it."
        )
    engine = _engine(folder)
    if engine is not None:
        plan = _json(folder / _PLAN)
        raise InputError(
            f"{folder} is an export for {engine}, which transformers does not run. Measure the same drop in the model "
            f"it was made from: trace eval --model {_place(plan)} --plan {folder / _PLAN}."
        )


def _engine(folder: Path) -> str | None:
    """The program that an export is for; None where transformers runs it."""
    if not (folder / _PLAN).is_file():
        return None
    if any(folder.glob("*.gguf")):
        return "llama.cpp"
    return "vLLM" if _json(folder / "config.json").get("model_type") == "nemotron-nas" else None


def _place(plan: dict[str, Any]) -> str:
    """Where a plan's model is, as far as the plan tells: of a folder it holds the name alone."""
    model, revision = plan.get("model") or "MODEL", plan.get("revision") or "REVISION"
    there = model if "/" in model or not plan.get("model") else f"PATH/TO/{model}"
    return there if revision == model else f"{there} --revision {revision}"


def _json(file: Path) -> dict[str, Any]:
    """What a file holds; nothing if it is not there, or damaged."""
    with suppress(OSError, ValueError):
        held = json.loads(file.read_text(encoding="utf-8"))
        return held if isinstance(held, dict) else {}
    return {}
