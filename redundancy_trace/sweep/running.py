"""One sweep from the listing to the figures: list → calibrate → fetch and score → store → draw."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
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
from redundancy_trace.hub import Hub
from redundancy_trace.progress import Reporter
from redundancy_trace.settings import TraceSettings
from redundancy_trace.sweep.calibrating import calibrate, calibration_label
from redundancy_trace.sweep.pipeline import score_all
from redundancy_trace.sweep.tasks import open_tasks

if TYPE_CHECKING:
    from redundancy_trace.store import Run

DEMO_SEQUENCE_LENGTH = 128
_FAILURES_TOLD = 20


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
    hub = Hub(endpoint=settings.endpoint, offline=settings.offline)
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
    for note in listing.notes:
        reporter.line(note)
    if (run := found) is None:
        from redundancy_trace.engine import choose_device, choose_dtype

        dtype = str(choose_dtype(settings.dtype, choose_device(settings.device))).removeprefix("torch.")
        run = store.Run(folder, model, dtype, settings.trust_remote_code, settings.tokens_per_step, ())
    calibration, run = calibrate(settings, listing, run, hub)
    listing, failures = _with_commits(listing, remembered)
    tasks, kept = open_tasks(listing, run, calibration)
    run = store.write_run(run, _plain(settings))
    store.write_json(listing_file, listing_to_json(listing, remembered))

    reporter.start(kept + len(tasks) + len(failures), kept + len(failures))
    if kept:
        reporter.line(f"{kept} of {kept + len(tasks)} checkpoints are in {folder} already.")
    scored = 0
    if tasks:
        try:
            scored, failed = score_all(settings, listing, run, calibration, tasks, hub, reporter, any_stored=kept > 0)
        except InputError:
            if found is None:
                store.withdraw_run(run, _plain(settings))
            raise
        failures |= failed
    label = calibration_label(run, calibration)
    figures = _draw(run, listing, label, reporter) if scored or kept else ()
    return SweepResult(folder, scored, kept, failures, figures, label)


def failure_summary(result: SweepResult) -> str:
    """The failures of a sweep in a few lines, each checkpoint with its reason."""
    lines = [f"  {name}: {reason}" for name, reason in result.failures.items()]
    total = result.scored + result.kept + len(lines)
    head = f"{len(lines)} of {total} checkpoints could not be scored; they are tried again next time."
    if len(lines) > _FAILURES_TOLD:
        more = len(lines) - _FAILURES_TOLD
        lines[_FAILURES_TOLD:] = [f"  and {more} more; all of them are in {result.folder / 'failures'}"]
    return "\n".join([head, *lines])


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


def _with_commits(listing: Listing, remembered: dict[Any, str]) -> tuple[Listing, dict[str, str]]:
    """The listing with the commits of chosen local checkpoints, and why some have none; reads files not yet hashed."""
    failures = {c.name: f"{c.repo} gave no commit" for c in listing.chosen if c.kind == "repo" and c.commit is None}

    def with_commit(checkpoint: Checkpoint) -> Checkpoint:
        if checkpoint.path is None or not checkpoint.chosen:
            return checkpoint
        try:
            return replace(checkpoint, commit=local_commit(checkpoint.path, remembered))
        except CheckpointError as error:
            failures[checkpoint.name] = str(error)
            return checkpoint

    return replace(listing, checkpoints=tuple(map(with_commit, listing))), failures


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
