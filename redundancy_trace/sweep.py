"""The order of the work: list → fetch → score → store → draw. The only module that knows it."""

import json
import re
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from redundancy_trace.checkpoints import (
    Checkpoint,
    Listing,
    is_local,
    list_checkpoints,
    listing_from_json,
    listing_to_json,
    local_commit,
    remembered_from_json,
)
from redundancy_trace.errors import CheckpointError, InputError, TraceError
from redundancy_trace.fetching import Fetched, abandon, discard, fetch
from redundancy_trace.hub import Hub
from redundancy_trace.progress import Reporter, reporting
from redundancy_trace.settings import TraceSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import polars as pl

    from redundancy_trace.calibration import Calibration
    from redundancy_trace.store import Labels, Run

DEFAULT_SEQUENCE_LENGTH = 512
DEMO_SEQUENCE_LENGTH = 128
_FAILURES_TOLD = 20
_PATIENCE_SECONDS = 2.0


@dataclass(frozen=True)
class SweepResult:
    """What a sweep did.

    Attributes:
        folder: The run folder.
        scored: Checkpoints scored now.
        kept: Checkpoints that were stored before.
        failures: Names of those that could not be scored, with the reason.
        figures: The files that were drawn.
        calibration: The calibration of this sweep, as the rows name it; a run may hold others.
    """

    folder: Path
    scored: int
    kept: int
    failures: dict[str, str]
    figures: tuple[Path, ...]
    calibration: str


@dataclass(frozen=True)
class _Task:
    """One checkpoint to be scored, and what its rows will say of it."""

    checkpoint: Checkpoint
    labels: "Labels"


def trace(**settings: Any) -> "pl.DataFrame":
    """Sweep the checkpoints of a model and return their scores: what `trace` does on the command line.

    Args:
        **settings: The fields of `redundancy_trace.settings.TraceSettings`: `model` (Hub repository or folder),
            `revisions` ("log:20"), `out` (run folder), `calibration`, `samples`, `sequence_length`, `device`, `dtype`,
            `engine` and so on. `demo=True` needs no model and no network.

    Returns:
        All scores of the run, as `read_scores` gives them. Checkpoints that could not be scored are told on stderr
        and noted in the run's `failures/`.

    Raises:
        InputError: If the input cannot be used.
        CheckpointError: If no checkpoint could be scored.

    Example:
        >>> scores = trace(model="EleutherAI/pythia-160m", revisions="log:20")  # doctest: +SKIP
    """
    from redundancy_trace.store import read_scores

    chosen = settings_from(settings)
    with reporting(quiet=chosen.quiet) as reporter:
        result = run_sweep(chosen, reporter)
    if not result.scored and not result.kept:
        raise CheckpointError(failure_summary(result))
    return read_scores(result.folder)


def settings_from(fields: dict[str, Any]) -> TraceSettings:
    """Settings from keyword arguments; an unknown one is an `InputError` that names the nearest."""
    from redundancy_trace.errors import nearest

    known = TraceSettings.__dataclass_fields__
    for name in fields:
        if name not in known:
            near = nearest(name, known, count=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}."
            raise InputError(f"There is no setting {name!r}. {hint}")
    if isinstance(fields.get("out"), str):
        fields = {**fields, "out": Path(fields["out"])}
    if isinstance(fields.get("model"), Path):
        fields = {**fields, "model": str(fields["model"])}
    return TraceSettings(**fields)


def failure_summary(result: SweepResult) -> str:
    """The failures of a sweep in a few lines, each checkpoint with its reason."""
    lines = [f"  {name}: {reason}" for name, reason in result.failures.items()]
    total = result.scored + result.kept + len(lines)
    head = f"{len(lines)} of {total} checkpoints could not be scored; they are tried again next time."
    if len(lines) > _FAILURES_TOLD:
        more = len(lines) - _FAILURES_TOLD
        lines[_FAILURES_TOLD:] = [f"  and {more} more; all of them are in {result.folder / 'failures'}"]
    return "\n".join([head, *lines])


def run_sweep(settings: TraceSettings, reporter: Reporter) -> SweepResult:
    """Sweep a model's checkpoints: everything that is not stored yet is scored, then the figures are drawn.

    Args:
        settings: What to sweep and how.
        reporter: Told how it goes.

    Returns:
        What was done. A checkpoint that fails does not end the sweep.

    Raises:
        InputError: If the input cannot be used; nothing is half-written.
    """
    from redundancy_trace import store

    if settings.demo:
        settings = _with_demo(settings, reporter)
    assert settings.model is not None  # held by the settings
    model = _model_label(settings.model)
    folder = settings.out or Path("runs") / model.rsplit("/", 1)[-1]
    found = store.open_run(
        folder,
        model=model,
        trust_remote_code=settings.trust_remote_code,
        dtype=None if settings.dtype == "auto" else settings.dtype,
        tokens_per_step=settings.tokens_per_step,
    )
    listing_file = folder / "listing.json"
    known, remembered = _known_listing(listing_file, settings.model)
    listing = list_checkpoints(
        settings.model,
        settings.revisions,
        endpoint=settings.endpoint,
        offline=settings.offline,
        tokens_per_step=found.tokens_per_step if found else settings.tokens_per_step,
        remembered=remembered,
        known=known,
    )
    if (run := found) is None:
        from redundancy_trace.engine import choose_device, choose_dtype

        dtype = str(choose_dtype(settings.dtype, choose_device(settings.device))).removeprefix("torch.")
        run = store.Run(folder, model, dtype, settings.trust_remote_code, settings.tokens_per_step, ())
    calibration, run = _calibrate(settings, listing, run)
    listing, failures = _with_commits(listing, remembered)
    tasks, kept = _open_tasks(listing, run, calibration)
    run = store.write_run(run, _plain(settings))
    store.write_json(listing_file, listing_to_json(listing, remembered))

    reporter.start(kept + len(tasks) + len(failures), kept + len(failures))
    if kept:
        reporter.line(f"{kept} of {kept + len(tasks)} checkpoints are in {folder} already.")
    scored = 0
    if tasks:
        try:
            scored, failed = _score_all(settings, listing, run, calibration, tasks, reporter, any_stored=kept > 0)
        except InputError:
            if found is None:
                store.withdraw_run(run, _plain(settings))
            raise
        failures |= failed
    label = _calibration_label(run, calibration)
    figures = _draw(run, listing, label, reporter) if scored or kept else ()
    return SweepResult(folder, scored, kept, failures, figures, label)


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


def _with_demo(settings: TraceSettings, reporter: Reporter) -> TraceSettings:
    """The settings of a sweep over the demo's checkpoints, which are trained now unless the cache has them."""
    from redundancy_trace.demo import demo_checkpoints

    told = False

    def on_step(step: int, steps: int) -> None:
        nonlocal told
        if not told:
            reporter.line(f"Training the demo model for {steps} steps (once; kept in the cache) …")
            told = True
        reporter.scoring(f"training step {step}")
        reporter.step(step, steps)

    checkpoints = demo_checkpoints(on_step=on_step)
    return replace(
        settings,
        demo=False,
        model=str(checkpoints),
        revisions="all" if settings.revisions == TraceSettings.revisions else settings.revisions,
        out=settings.out or Path("runs") / "demo",
        calibration=settings.calibration or "pydoc",
        sequence_length=settings.sequence_length or DEMO_SEQUENCE_LENGTH,
    )


def _model_label(model: str) -> str:
    """The model as rows name it: the repository, or the folder's own name (no reader needs an absolute path)."""
    return Path(model).expanduser().resolve().name if is_local(model) else model.strip()


def _plain(settings: TraceSettings) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}


def _known_listing(file: Path, model: str) -> tuple[Listing | None, dict[Any, str]]:
    """The listing that the run holds, and its hashes of local files; nothing if there is none or it is damaged."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        listing = listing_from_json(data)
        return (listing if listing.model == model else None), remembered_from_json(data)
    except (OSError, ValueError, TraceError):
        return None, {}


def _calibrate(settings: TraceSettings, listing: Listing, run: "Run") -> "tuple[Calibration, Run]":
    """The run's token ids, made or taken up again, and the run with them on record."""
    from redundancy_trace.calibration import TokenizerSource, load_calibration
    from redundancy_trace.store import CalibrationRecord

    local = listing.source == "local"
    name = settings.calibration or ("pydoc" if local or settings.offline else "c4")
    chosen = listing.chosen
    if local:
        folder = Path(settings.model or "").expanduser()
        places: list[Path | str] = [folder, *(c.path for c in reversed(chosen) if c.path is not None)]
        candidates = [TokenizerSource(place) for place in places]
    else:
        candidates = [TokenizerSource(listing.model, c.commit) for c in chosen[-1:] if c.commit]
        candidates += [TokenizerSource(place) for place in dict.fromkeys((listing.model, _final_model(listing.model)))]
    calibration = load_calibration(
        name,
        samples=settings.samples,
        sequence_length=settings.sequence_length or DEFAULT_SEQUENCE_LENGTH,
        tokenizer=settings.tokenizer,
        candidates=candidates,
        hub=_hub(settings),
        run=run.folder,
        trust_remote_code=settings.trust_remote_code,
    )
    if any(record.sha256 == calibration.sha256 for record in run.calibrations):
        return calibration, run
    sequences, length = calibration.token_ids.shape
    label = f"{calibration.name} {sequences}x{length}"
    taken = {record.label for record in run.calibrations}
    if label in taken:  # a text file that was changed, say
        label = f"{label} {calibration.sha256[:8]}"
    file = "token_ids.npy" if not run.calibrations else f"token_ids-{calibration.sha256[:12]}.npy"
    record = CalibrationRecord(label, calibration.sha256, file)
    return calibration, replace(run, calibrations=(*run.calibrations, record))


def _final_model(repo: str) -> str:
    """The repository of the finished model that one of checkpoints is named after (bloom-7b1-intermediate, say)."""
    return re.sub(r"(-intermediate)?(-checkpoints)?$", "", repo, flags=re.IGNORECASE)


def _calibration_label(run: "Run", calibration: "Calibration") -> str:
    """What the rows of this calibration are called in the run."""
    return next(record.label for record in run.calibrations if record.sha256 == calibration.sha256)


def _hub(settings: TraceSettings) -> Hub:
    return Hub(endpoint=settings.endpoint, offline=settings.offline)


def _with_commits(listing: Listing, remembered: dict[Any, str]) -> tuple[Listing, dict[str, str]]:
    """The listing with the commits of chosen local checkpoints, and why some have none; reads files not yet hashed."""
    failures: dict[str, str] = {}

    def with_commit(checkpoint: Checkpoint) -> Checkpoint:
        if checkpoint.path is None or not checkpoint.chosen:
            return checkpoint
        try:
            return replace(checkpoint, commit=local_commit(checkpoint.path, remembered))
        except CheckpointError as error:
            failures[checkpoint.name] = str(error)
            return checkpoint

    return replace(listing, checkpoints=tuple(map(with_commit, listing))), failures


def _open_tasks(listing: Listing, run: "Run", calibration: "Calibration") -> tuple[list[_Task], int]:
    """The chosen checkpoints that are not stored yet, and how many are."""
    from redundancy_trace import store

    label = _calibration_label(run, calibration)
    number_settings = {"dtype": run.dtype, "trust_remote_code": run.trust_remote_code}
    finished = store.finished_parts(run.folder)
    tasks: list[_Task] = []
    kept = 0
    seen: set[str] = set()
    for checkpoint in listing.chosen:
        commit = checkpoint.commit
        if commit is None:
            continue  # among the failures
        identity = store.row_identity(commit, calibration.sha256, number_settings)
        part = store.part_name(commit, identity)
        if part in seen:
            continue  # the same commit under another name: one set of rows
        seen.add(part)
        if part in finished:
            kept += 1
            continue
        labels = store.Labels(
            model=run.model,
            revision=checkpoint.name,
            commit=commit,
            kind=checkpoint.kind,
            stage=checkpoint.stage,
            ingredient=checkpoint.ingredient,
            seed=checkpoint.seed,
            step=checkpoint.step,
            tokens=checkpoint.tokens,
            calibration=label,
            identity=identity,
        )
        tasks.append(_Task(checkpoint, labels))
    return tasks, kept


def _score_all(
    settings: TraceSettings,
    listing: Listing,
    run: "Run",
    calibration: "Calibration",
    tasks: list[_Task],
    reporter: Reporter,
    *,
    any_stored: bool,
) -> tuple[int, dict[str, str]]:
    """Score the tasks in order, the next one being fetched meanwhile; returns how many, and the failures."""
    import torch

    from redundancy_trace import store
    from redundancy_trace.engine import choose_device, score_checkpoint

    device = choose_device(settings.device)
    scored, failures = 0, {}
    with _fetching(settings, listing, run.folder, reporter) as begin:
        ahead = begin(tasks[0])
        for number, task in enumerate(tasks):
            name = task.checkpoint.name
            started = time.monotonic()
            fetched: Fetched | None = None
            try:
                fetched = _awaited(ahead)
                if number + 1 < len(tasks):
                    ahead = begin(tasks[number + 1])
                reporter.scoring(name)
                scores = score_checkpoint(
                    fetched.folder,
                    calibration.token_ids,
                    device=device,
                    dtype=getattr(torch, run.dtype),
                    batch_size=settings.batch_size,
                    engine=settings.engine,
                    trust_remote_code=settings.trust_remote_code,
                    on_progress=reporter.step,
                )
            except Exception as error:
                # Input that fits none is told at once; what others bore is a fault of this one, and they go on.
                if isinstance(error, InputError) and not (scored or any_stored):
                    raise
                reason = _reason(error)
                failures[name] = reason
                store.write_failure(run.folder, task.labels, reason)
                reporter.finished(f"{name}: not scored: {reason}")
                if fetched is None and number + 1 < len(tasks):
                    ahead = begin(tasks[number + 1])
                continue
            finally:
                if fetched is not None and not settings.keep:
                    discard(fetched)
            store.write_part(run.folder, task.labels, scores)
            scored += 1
            reporter.finished(f"{name} scored in {time.monotonic() - started:.1f} s")
    return scored, failures


def _awaited(future: "Future[Fetched]") -> Fetched:
    """The result, waited for in short turns: once polars has run, a signal no longer ends the wait for a lock."""
    while not wait([future], timeout=0.2).done:
        pass
    return future.result()


@contextmanager
def _fetching(
    settings: TraceSettings, listing: Listing, folder: Path, reporter: Reporter
) -> "Iterator[Callable[[_Task], Future[Fetched]]]":
    """A thread that fetches one checkpoint at a time; when the sweep ends early, its files are deleted at once."""
    hub = _hub(settings)
    started: list[tuple[_Task, Future[Fetched], Event]] = []

    def place(task: _Task) -> Path:
        return folder / ".fetched" / (task.labels.commit or "")

    def work(task: _Task, stopped: Event) -> Fetched:
        reporter.fetching(task.checkpoint.name, task.checkpoint.bytes if task.checkpoint.path is None else None)
        return fetch(listing.model, task.checkpoint, hub, place(task), reporter.moved, stopped)

    def begin(task: _Task) -> "Future[Fetched]":
        stopped = Event()
        future = pool.submit(work, task, stopped)
        started.append((task, future, stopped))
        return future

    pool = ThreadPoolExecutor(1, "fetching")
    try:
        yield begin
    except BaseException:
        for _, _, stopped in started:
            stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
        # A download ends at its next chunk; one that waits for a busy server is not waited for.
        wait([future for _, future, _ in started], timeout=_PATIENCE_SECONDS)
        for task, future, _ in started:
            if not settings.keep or not future.done():
                abandon(place(task))
        raise
    else:
        pool.shutdown()
    finally:
        _remove_if_empty(folder / ".fetched")


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # another process fetches there, or it was never made


def _reason(error: Exception) -> str:
    """Why a checkpoint has no scores; of a fault that nobody foresaw, what it was and where."""
    if isinstance(error, TraceError):
        return str(error)
    lines = str(error).strip().splitlines()
    place = traceback.extract_tb(error.__traceback__)[-1]
    told = (
        f"{type(error).__name__}{f': {lines[0]}' if lines else ''} (in {place.name}, {place.filename}:{place.lineno})"
    )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        told += ". Not even one sequence fits: try a shorter --sequence-length, --engine stream, or --device cpu"
    return told


def _draw(run: "Run", listing: Listing, calibration: str, reporter: Reporter) -> tuple[Path, ...]:
    """Draw the figures, unless what they show is what it was when all of them were drawn."""
    from redundancy_trace.store import finished_parts, read_scores, write_json

    folder = run.folder / "figures"
    mark = folder / ".drawn.json"
    shown = {
        "scores": sorted(finished_parts(run.folder)),
        "checkpoints": [[checkpoint.name, checkpoint.commit, checkpoint.tokens] for checkpoint in listing],
        "tokens_per_step": run.tokens_per_step,
        "calibration": calibration,
    }
    try:
        drawn = json.loads(mark.read_text(encoding="utf-8"))
        files = tuple(folder / name for name in drawn["files"])
        if drawn["shown"] == shown and all(file.is_file() for file in files):
            return files
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not drawn yet, or not to the end
    from redundancy_trace.analysis import one_calibration
    from redundancy_trace.figures import draw_figures

    reporter.line("Drawing the figures …")
    files = tuple(draw_figures(one_calibration(read_scores(run.folder), calibration), folder))
    write_json(mark, {"shown": shown, "files": [file.name for file in files]})
    return files
