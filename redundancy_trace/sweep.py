"""The order of the work: list → fetch → score → store → draw. The only module that knows it."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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
from redundancy_trace.fetching import Fetched, discard, fetch
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


@dataclass(frozen=True)
class SweepResult:
    """What a sweep did.

    Attributes:
        folder: The run folder.
        scored: Checkpoints scored now.
        kept: Checkpoints that were stored before.
        failures: Names of those that could not be scored, with the reason.
        figures: The files that were drawn.
    """

    folder: Path
    scored: int
    kept: int
    failures: dict[str, str]
    figures: tuple[Path, ...]


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
    return "\n".join(
        [f"{len(lines)} of {total} checkpoints could not be scored; they are tried again next time.", *lines]
    )


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
    listing_file = folder / "listing.json"
    known, remembered = _known_listing(listing_file, settings.model)
    listing = list_checkpoints(
        settings.model,
        settings.revisions,
        endpoint=settings.endpoint,
        offline=settings.offline,
        tokens_per_step=settings.tokens_per_step,
        remembered=remembered,
        known=known,
    )
    run = store.open_run(
        folder,
        model=model,
        trust_remote_code=settings.trust_remote_code,
        dtype=None if settings.dtype == "auto" else settings.dtype,
        tokens_per_step=settings.tokens_per_step,
    )
    if run is None:
        from redundancy_trace.engine import choose_device, choose_dtype

        dtype = str(choose_dtype(settings.dtype, choose_device(settings.device))).removeprefix("torch.")
        run = store.Run(folder, model, dtype, settings.trust_remote_code, settings.tokens_per_step, ())
        store.write_run(run, _plain(settings))
    calibration, run = _calibrate(settings, listing, run)
    listing, failures = _with_commits(listing, remembered)
    tasks, kept = _open_tasks(listing, run, calibration)
    store.write_json(listing_file, listing_to_json(listing, remembered))
    store.write_run(run, _plain(settings))

    reporter.start(kept + len(tasks) + len(failures), kept + len(failures))
    if kept:
        reporter.line(f"{kept} of {kept + len(tasks)} checkpoints are in {folder} already.")
    scored = 0
    if tasks:
        scored, failed = _score_all(settings, listing, run, calibration, tasks, reporter)
        failures |= failed
    figures = _draw(folder, reporter, needed=scored > 0) if scored or kept else ()
    return SweepResult(folder, scored, kept, failures, figures)


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
    import json

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
        candidates.append(TokenizerSource(listing.model))
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

    label = next(r.label for r in run.calibrations if r.sha256 == calibration.sha256)
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
                fetched = ahead.result()
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
            except InputError:
                raise  # wrong for every checkpoint
            except Exception as error:
                # Whatever one checkpoint does, the others go on.
                reason = str(error) if isinstance(error, TraceError) else f"{type(error).__name__}: {error}"
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


@contextmanager
def _fetching(
    settings: TraceSettings, listing: Listing, folder: Path, reporter: Reporter
) -> "Iterator[Callable[[_Task], Future[Fetched]]]":
    """A thread that fetches one checkpoint at a time; when the sweep ends early, it stops at the next chunk."""
    stopped = Event()
    hub = _hub(settings)
    started: list[Future[Fetched]] = []

    def on_bytes(count: int) -> None:
        if stopped.is_set():
            raise InterruptedError("the sweep has ended")
        reporter.moved(count)

    def work(task: _Task) -> Fetched:
        reporter.fetching(task.checkpoint.name, task.checkpoint.bytes if task.checkpoint.path is None else None)
        commit = task.labels.commit or ""
        return fetch(listing.model, task.checkpoint, hub, folder / ".fetched" / commit, on_bytes)

    def begin(task: _Task) -> "Future[Fetched]":
        future = pool.submit(work, task)
        started.append(future)
        return future

    pool = ThreadPoolExecutor(1, "fetching")
    try:
        yield begin
    except BaseException:
        stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)
        for future in started:
            if future.done() and not future.cancelled() and future.exception() is None and not settings.keep:
                discard(future.result())
        raise
    finally:
        pool.shutdown(wait=True)
        if not settings.keep:
            _remove_if_empty(folder / ".fetched")


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # another process fetches there, or it was never made


def _draw(folder: Path, reporter: Reporter, *, needed: bool) -> tuple[Path, ...]:
    """Draw the figures, unless nothing has changed since they were drawn."""
    pictures = folder / "figures"
    if not needed and pictures.is_dir() and any(pictures.iterdir()):
        return tuple(sorted(pictures.iterdir()))
    from redundancy_trace.figures import draw_figures
    from redundancy_trace.store import read_scores

    reporter.line("Drawing the figures …")
    return tuple(draw_figures(read_scores(folder), pictures))
