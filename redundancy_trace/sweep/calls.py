"""The sweep, and the scores of one model, as functions for Python and Jupyter."""

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from redundancy_trace.errors import CheckpointError, InputError, nearest
from redundancy_trace.progress import reporting
from redundancy_trace.settings import TraceSettings
from redundancy_trace.sweep.running import failure_summary, run_sweep

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

# Settings that may be given as a text or as a path.
_PATHS = ("model", "out", "calibration", "tokenizer")


def trace(model: str | Path | None = None, **settings: Any) -> "pl.DataFrame":
    """Sweep the checkpoints of a model and return their scores: what `trace` does on the command line.

    Args:
        model: Hub repository (`org/name`) or local folder of checkpoints; none with `demo=True`.
        **settings: The flags of the command line, with `_` for `-`; they are listed below.

    Returns:
        The scores of the run, as `read_scores` gives them; where the run holds several calibrations, those of this
        one's. Checkpoints that could not be scored are told on stderr (unless `quiet`) and noted in the run's
        `failures/`. With `dry_run`, the listing instead, as `list_checkpoints(…).to_frame()`.

    Raises:
        InputError: If the input cannot be used; an unknown setting is told with the nearest known one.
        CheckpointError: If no checkpoint could be scored.

    Example:
        >>> scores = trace("EleutherAI/pythia-160m", revisions="log:20")  # doctest: +SKIP
    """
    from redundancy_trace.analysis import one_calibration
    from redundancy_trace.store import read_scores

    chosen = settings_from({"model": model, **settings})
    with reporting(quiet=chosen.quiet) as reporter:
        result = run_sweep(chosen, reporter)
        if chosen.dry_run:
            reporter.line(result.plan.told())
    if chosen.dry_run:
        return result.listing.to_frame()
    if result.failures and not result.stored:
        raise CheckpointError(failure_summary(result))
    return one_calibration(read_scores(result.folder), result.calibration)


def _described(call: Callable[..., Any]) -> None:
    """Show the settings that a call takes as keywords to `help` and to completion: names, types, defaults, texts."""
    hints = {
        name: hint | str | Path if name in _PATHS else hint for name, hint in get_type_hints(TraceSettings).items()
    }
    kinds = {"model": inspect.Parameter.POSITIONAL_OR_KEYWORD}
    parameters = [
        inspect.Parameter(
            field.name,
            kinds.get(field.name, inspect.Parameter.KEYWORD_ONLY),
            default=field.default,
            annotation=hints[field.name],
        )
        for field in fields(TraceSettings)
    ]
    result = inspect.signature(call).return_annotation
    call.__signature__ = inspect.Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]
    lines = [f"{field.name}: {field.metadata['help']}" for field in fields(TraceSettings)]
    told = [textwrap.fill(line, 100, initial_indent=" " * 4, subsequent_indent=" " * 8) for line in lines]
    call.__doc__ = "\n".join([f"{inspect.getdoc(call)}\n", "Settings:", *told, ""])


_described(trace)


def settings_from(given: dict[str, Any]) -> TraceSettings:
    """Settings from keyword arguments; an unknown one is an `InputError` that names the nearest."""
    known = TraceSettings.__dataclass_fields__
    for name in given:
        if name not in known:
            near = nearest(name, known, count=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}."
            raise InputError(f"There is no setting {name!r}. {hint}")
    texts = {name: str(given[name]) for name in _PATHS if isinstance(given.get(name), Path)}
    out = {} if given.get("out") is None else {"out": Path(given["out"])}
    return TraceSettings(**{**given, **texts, **out})


def score_model(
    model: Any,
    token_ids: "np.ndarray | Any",
    *,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    engine: str = "stream",
    trust_remote_code: bool = False,
) -> "pl.DataFrame":
    """Score one model on given token ids; no Hub, no run folder.

    Args:
        model: A checkpoint folder (config.json and weights), or a causal language model of transformers, which is
            hooked where it is, in its own dtype.
        token_ids: Calibration, shape (N, T), integers; a numpy array, a torch tensor or nested lists.
        batch_size: Sequences a forward; None = about 4096 tokens.
        device: For a folder: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
        dtype: For a folder: `auto`, `float32`, `bfloat16`.
        engine: For a folder: `stream` or `whole`.
        trust_remote_code: Whether model code in the folder may be run.

    Returns:
        One row a value, with the columns of `read_scores`; what is unknown of a single model is null.

    Raises:
        InputError: If the ids do not fit the model, or the folder is none.
        CheckpointError: If the model cannot be scored: incomplete weights, failed proof, a state not finite.
    """
    import numpy as np

    from redundancy_trace import engine as engines
    from redundancy_trace.store import Labels, scores_frame

    ids = np.asarray(token_ids.cpu() if hasattr(token_ids, "cpu") else token_ids)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise InputError(
            f"token_ids has shape {ids.shape} and dtype {ids.dtype}; integers of shape (N, T >= 2) are needed."
        )
    if isinstance(model, (str, Path)):
        folder = Path(model).expanduser()
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder; score_model takes a checkpoint folder or a loaded model.")
        at = engines.choose_device(device)
        settings = TraceSettings(model=str(model), dtype=dtype, engine=engine)  # refuses unknown names
        scores = engines.score_checkpoint(
            folder,
            ids,
            device=at,
            dtype=engines.choose_dtype(settings.dtype, at),
            batch_size=batch_size,
            engine=engine,
            trust_remote_code=trust_remote_code,
        )
        name = folder.resolve().name
    else:
        size = engines.choose_batch_size(batch_size, ids.shape[1], len(ids))
        scores = engines.score_module(model, ids, batch_size=size)
        name = type(model).__name__
    return scores_frame(Labels(model=name, revision=name), scores.values)
