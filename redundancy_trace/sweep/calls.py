"""The sweep, the scores of one model and evaluations, as functions for Python and Jupyter."""

import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from types import GenericAlias
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

from redundancy_trace.errors import CheckpointError, InputError, nearest
from redundancy_trace.progress import reporting
from redundancy_trace.settings import EvaluationSettings, TraceSettings, is_several
from redundancy_trace.sweep.running import failure_summary, run_sweep

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

    from redundancy_trace.pruning import DropPlan
    from redundancy_trace.sweep.evaluating import EvaluationResult

_Settings = TypeVar("_Settings", TraceSettings, EvaluationSettings)
# Settings that may be given as a text or as a path.
_PATHS = ("model", "out", "calibration", "tokenizer", "along", "plan", "scores", "text", "task_folder")


def trace(model: str | Path | None = None, **settings: Any) -> "pl.DataFrame":
    """Sweep the checkpoints of a model and return their scores: what `trace` does on the command line.

    Args:
        model: Hub repository (`org/name`) or local folder of checkpoints; none with `demo=True`.
        **settings: The flags of the command line, with `_` for `-`; they are listed below.

    Returns:
        The scores of the run, as `read_scores` gives them; where the run holds several calibrations, the rows of those
        that were asked for. Checkpoints that could not be scored are told on stderr (unless `quiet`) and noted in the
        run's `failures/`. With `dry_run`, the listing instead, as `list_checkpoints(…).to_frame()`.

    Raises:
        InputError: If the input cannot be used; an unknown setting is told with the nearest known one.
        CheckpointError: If no checkpoint could be scored.

    Example:
        >>> scores = trace("EleutherAI/pythia-160m", revisions="log:20")  # doctest: +SKIP
    """
    import polars as pl

    from redundancy_trace.store import SCORE_SCHEMA, read_scores

    chosen = settings_from({"model": model, **settings})
    with reporting(quiet=chosen.quiet) as reporter:
        result = run_sweep(chosen, reporter)
        if chosen.dry_run:
            reporter.line(result.plan.told())
    if chosen.dry_run:
        return result.listing.to_frame()
    if result.failures and not result.stored:
        raise CheckpointError(failure_summary(result))
    if not result.stored:  # of a shard that has none to score, before the others have
        return pl.DataFrame(schema=SCORE_SCHEMA)
    scores = read_scores(result.folder)
    return pl.concat(scores.filter(calibration=name) for name in result.calibrations)


def _described(call: Callable[..., Any], settings: type[Any], without: tuple[str, ...] = ()) -> None:
    """Show the settings that a call takes as keywords to `help` and to completion: names, types, defaults, texts."""
    hints: dict[str, Any] = {}
    for name, hint in get_type_hints(settings).items():
        one: Any = get_args(hint)[0] if is_several(hint) else hint
        one = one | str | Path if name in _PATHS else one
        hints[name] = one | GenericAlias(Sequence, (one,)) if is_several(hint) else one
    signature = inspect.signature(call)
    own = {name: one for name, one in signature.parameters.items() if one.kind is not inspect.Parameter.VAR_KEYWORD}
    taken = [field for field in fields(settings) if field.name not in without]
    for field in taken:
        kind = own[field.name].kind if field.name in own else inspect.Parameter.KEYWORD_ONLY
        own[field.name] = inspect.Parameter(field.name, kind, default=field.default, annotation=hints[field.name])
    call.__signature__ = signature.replace(parameters=[*own.values()])  # type: ignore[attr-defined]
    lines = [f"{field.name}: {field.metadata['help']}" for field in taken]
    told = [textwrap.fill(line, 100, initial_indent=" " * 4, subsequent_indent=" " * 8) for line in lines]
    call.__doc__ = "\n".join([f"{inspect.getdoc(call)}\n", "Settings:", *told, ""])


_described(trace, TraceSettings)


def settings_from(given: dict[str, Any]) -> TraceSettings:
    """Settings from keyword arguments; an unknown one is an `InputError` that names the nearest."""
    return _settings(TraceSettings, given)


def _settings(settings: type[_Settings], given: dict[str, Any]) -> _Settings:
    known = [field.name for field in fields(settings)]
    for name in given:
        if name not in known:
            near = nearest(name, known, count=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}."
            raise InputError(f"There is no setting {name!r}. {hint}")
    hints = get_type_hints(settings)
    changed = {name: value for name, value in given.items() if value is not None}
    for name, value in changed.items():
        changed[name] = Path(value) if hints[name] == Path | None else _as_text(value)
    return settings(**{**given, **changed})


def _as_text(given: Any) -> Any:
    """A path as text, of several each."""
    if isinstance(given, list | tuple):
        return [_as_text(one) for one in given]
    return str(given) if isinstance(given, Path) else given


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
        batch_size: Sequences a forward; None = about 4096 tokens, on the CPU 1024.
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
        at = model.get_input_embeddings().weight.device
        size = engines.choose_batch_size(batch_size, ids.shape[1], len(ids), at)
        scores = engines.score_module(model, ids, batch_size=size)
        name = type(model).__name__
    return scores_frame(Labels(model=name, revision=name), scores.values)


def evaluate(
    model: Any,
    revision: str | None = None,
    *,
    plan: "DropPlan | str | Path | None" = None,
    token_ids: "np.ndarray | Any" = None,
    tokenizer: Any = None,
    **settings: Any,
) -> "pl.DataFrame":
    """Measure one model, whole and under a plan: what `trace eval` does on the command line.

    Args:
        model: Hub repository, local folder, or a causal language model of transformers in memory, which is as before
            afterwards; of one in memory nothing is stored.
        revision: Which checkpoint; may be left out where there is only one.
        plan: A drop plan, or the file of one; measured before and after, in turns.
        token_ids: For a model in memory: its text, integers of shape (W, T).
        tokenizer: For a model in memory: its tokenizer, for `tasks`. Else a repository or folder that has it.
        **settings: The flags of `trace eval`, with `_` for `-`; they are listed below.

    Returns:
        One row a number, with the columns of `read_evaluations`.

    Raises:
        InputError: If the input cannot be used; an unknown setting is told with the nearest known one.
        CheckpointError: If the checkpoint cannot be had, or not be measured.

    Example:
        >>> evaluate("EleutherAI/pythia-160m", "step143000", plan=plan, measure="loss")  # doctest: +SKIP
    """
    from redundancy_trace.pruning import DropPlan
    from redundancy_trace.sweep.evaluating import evaluate_in_memory, run_evaluation

    in_memory = not isinstance(model, (str, Path))
    made = plan if isinstance(plan, DropPlan) else None
    given: dict[str, Any] = {**settings, "revision": revision, "plan": None if made else plan}
    given |= {"model": type(model).__name__} if in_memory else {"model": model, "tokenizer": tokenizer}
    chosen = _settings(EvaluationSettings, given)
    with reporting(quiet=chosen.quiet) as reporter:
        if in_memory:
            return evaluate_in_memory(chosen, reporter, model, made, token_ids, tokenizer)
        if token_ids is not None:
            raise InputError(
                "token_ids are for a model in memory; of a checkpoint, name a text: text='tokens:FILE.npy'."
            )
        return run_evaluation(chosen, reporter, made).rows


_described(evaluate, EvaluationSettings, without=("along",))


def evaluate_along(run: str | Path, **settings: Any) -> "pl.DataFrame":
    """Measure what dropping costs at every checkpoint of a run: what `trace eval --along RUN` does.

    Args:
        run: Run folder of a sweep.
        **settings: `drops`, `orders`, `text`, `samples`, `sequence_length`, `stride`, `batch_size`, `device`,
            `endpoint`, `offline` and `quiet`, as `evaluate` has them.

    Returns:
        One row a loss, with the columns of `read_evaluations`: at each checkpoint the whole model, and each drop in
        each order; at the last also the plans of all others, told apart by `plan_revision`.

    Raises:
        InputError: If the input cannot be used.
        CheckpointError: If no checkpoint could be measured.
    """
    from redundancy_trace.sweep.along import run_along

    chosen = _settings(EvaluationSettings, {**settings, "along": run})
    with reporting(quiet=chosen.quiet) as reporter:
        result = run_along(chosen, reporter)
    if result.rows.is_empty():
        raise CheckpointError(evaluation_failures(result))
    return result.rows


def evaluation_failures(result: "EvaluationResult") -> str:
    """The checkpoints that could not be measured, with the reasons."""
    lines = [f"  {name}: {reason}" for name, reason in result.failures.items()]
    return "\n".join([f"{len(lines)} checkpoints could not be measured; give the same command to try again.", *lines])
