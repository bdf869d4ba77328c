"""One sweep from the listing to the figures: list → calibrate → fetch and score → store → draw."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redundancy_trace.checkpoints import (
    Checkpoint,
    Listing,
    hashed,
    list_checkpoints,
    listing_from_json,
    listing_to_json,
    remembered_from_json,
    reselected,
)
from redundancy_trace.cluster import Places, open_places
from redundancy_trace.errors import CheckpointError, InputError, TraceError
from redundancy_trace.fetching import sweep_out
from redundancy_trace.hub import Hub
from redundancy_trace.loading import DEMO_MODEL, model_label
from redundancy_trace.locking import alone_in
from redundancy_trace.progress import Reporter
from redundancy_trace.settings import TraceSettings
from redundancy_trace.sweep.calibrating import asked_for, calibrate, calibration_label
from redundancy_trace.sweep.pipeline import not_scored, score_all
from redundancy_trace.sweep.planning import SweepPlan, check_plan, plan_sweep
from redundancy_trace.sweep.tasks import Task, all_tasks, labels_of, open_tasks

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
        calibrations: Those of this sweep, as the rows name them, in the order asked for; a run may hold others.
        plan: What was to be done.
        listing: The checkpoints, chosen or not.
        stored: Chosen checkpoints that have scores now; of a shard, those of the others too.
    """

    folder: Path
    scored: int
    kept: int
    failures: dict[str, str]
    figures: tuple[Path, ...]
    calibrations: tuple[str, ...]
    plan: SweepPlan
    listing: Listing
    stored: int = 0


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
    with open_places(settings.device, settings.devices, settings.cluster, reporter.line) as places:
        return _sweep(settings, reporter, places)


def _sweep(settings: TraceSettings, reporter: Reporter, places: Places) -> SweepResult:
    from redundancy_trace import store

    if settings.demo:
        settings = _with_demo_defaults(settings)
    given = _plain(settings)
    model = DEMO_MODEL if settings.model is None else model_label(settings.model)
    folder = (settings.out or Path("runs") / model.rsplit("/", 1)[-1]).expanduser()
    found = store.open_run(
        folder,
        model=model,
        trust_remote_code=settings.trust_remote_code,
        dtype=None if settings.dtype == "auto" else settings.dtype,
        tokens_per_step=settings.tokens_per_step,
    )
    store.tidy_run(folder)
    if settings.demo:
        settings = replace(settings, demo=False, model=str(_trained_demo(reporter)))
    assert settings.model is not None  # held by the settings
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
        run = store.Run(
            folder, model, places.dtype(settings.dtype), settings.trust_remote_code, settings.tokens_per_step, ()
        )
    plan = plan_sweep(settings, listing, found, hub, places.count)
    check_plan(settings, listing, plan)
    if settings.dry_run:
        asked = tuple(asked.label for asked in asked_for(settings, listing))
        return SweepResult(folder, 0, plan.stored, {}, (), asked, plan, listing)
    reporter.line(plan.told())
    calibrations, run = calibrate(settings, listing, run, hub)
    told = listing.notes
    # Of several processes that begin together, one reads all local files, the others take up what it found.
    with alone_in(folder) if listing.source == "local" else nullcontext():
        remembered |= _known_listing(listing_file, settings.model)[1]
        listing, failures = _with_commits(listing, remembered, settings.revisions)
        store.write_json(listing_file, listing_to_json(listing, remembered))
    for note in listing.notes[len(told) :]:
        reporter.line(note)
    run = store.write_run(run, given)
    work = all_tasks(listing, run, calibrations)
    tasks, kept = open_tasks(work, store.finished_parts(folder), settings.shard)
    labels = tuple(calibration_label(run, calibration) for calibration in calibrations)

    reporter.start(kept + len(tasks) + len(failures), kept)
    if kept:
        reporter.line(f"{kept} of {kept + len(tasks)} checkpoints are in {folder} already.")
    for label in labels:
        store.clear_failures(folder, _stored_names(listing, work, folder) - set(failures), label)
    for checkpoint in listing.chosen:
        if (reason := failures.get(checkpoint.name)) is not None:
            for label in labels:
                store.write_failure(folder, labels_of(checkpoint, run, label), reason)
            reporter.finished(checkpoint.name, not_scored(checkpoint.name, reason))
    scored = 0
    if tasks:
        try:
            scored, failed = score_all(settings, listing, run, tasks, hub, reporter, places, any_stored=kept > 0)
        except InputError:
            if found is None:
                store.withdraw_run(run, given)
            raise
        failures |= failed
    names = _stored_names(listing, work, folder)
    if not settings.keep:
        names = _stored_names(listing, work, folder)
        sweep_out(folder, listing, (c for c in listing.chosen if c.name in names))
    with _turn_to_draw(folder):
        finished = store.finished_parts(folder)
        stored = sum(not task.parts_left(finished) for task in work)
        if settings.shard is not None:
            reporter.line(f"Table and figures show what is stored so far: {stored} of {len(work)} checkpoints.")
        figures = _draw(run, listing, labels[0], reporter) if stored else ()
    return SweepResult(folder, scored, kept, failures, figures, labels, plan, listing, stored)


def _stored_names(listing: Listing, work: Sequence[Task], folder: Path) -> set[str]:
    """Names of the chosen checkpoints that have scores, whichever process made them."""
    from redundancy_trace.store import finished_parts

    finished = finished_parts(folder)
    done = {(t.checkpoint.commit, t.checkpoint.subfolder) for t in work if not t.parts_left(finished)}
    return {c.name for c in listing.chosen if (c.commit, c.subfolder) in done}


def failure_summary(result: SweepResult, *, told: bool = False) -> str:
    """The failures of a sweep in a few lines.

    Args:
        result: What the sweep did.
        told: Whether each was told with its reason when it happened; then only the names are told again.
    """
    names = list(result.failures)
    head = f"{len(names)} of {result.scored + result.kept + len(names)} checkpoints could not be scored"
    more = len(names) - _FAILURES_TOLD
    rest = f"and {more} more; all of them are in {result.folder / 'failures'}" if more > 0 else ""
    names = names[:_FAILURES_TOLD]
    if told:
        listed = ", ".join([*names, *([rest] if rest else [])])
        return f"{head}, for the reasons above: {listed}. They are tried again next time."
    lines = [f"  {name}: {result.failures[name]}" for name in names]
    return "\n".join([f"{head}; they are tried again next time.", *lines, *([f"  {rest}"] if rest else [])])


def _with_demo_defaults(settings: TraceSettings) -> TraceSettings:
    """What is taken for the demo where the user gave nothing."""
    texts = settings.calibration or ("pydoc",)
    own_length = all(text.startswith("tokens:") for text in texts)
    return replace(
        settings,
        revisions="all" if settings.revisions == TraceSettings.revisions else settings.revisions,
        calibration=texts,
        sequence_length=settings.sequence_length or (None if own_length else DEMO_SEQUENCE_LENGTH),
    )


def _trained_demo(reporter: Reporter) -> Path:
    """The folder of the demo's checkpoints, which are trained now unless the cache has them."""
    from redundancy_trace.demo import demo_checkpoints

    told = False

    def on_step(step: int, steps: int) -> None:
        nonlocal told
        if not told:
            reporter.line(f"Training the demo model for {steps} steps (once; kept in the cache) …")
            told = True
        reporter.training(step, steps)

    return demo_checkpoints(on_step=on_step)


def _plain(settings: TraceSettings) -> dict[str, Any]:
    """The settings as JSON gives them back."""
    plain = {Path: str, tuple: list}
    return {
        name: next((kind(value) for of, kind in plain.items() if isinstance(value, of)), value)
        for name, value in asdict(settings).items()
    }


def _known_listing(file: Path, model: str) -> tuple[Listing | None, dict[Any, str]]:
    """The listing that the run holds, and its hashes of local files; nothing if there is none or it is damaged."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        listing = listing_from_json(data)
        return (listing if listing.model == model else None), remembered_from_json(data)
    except (OSError, ValueError, TraceError):
        return None, {}


def _with_commits(listing: Listing, remembered: dict[Any, str], revisions: str) -> tuple[Listing, dict[str, str]]:
    """The listing with the commits of chosen local checkpoints, and why some have none; reads files not yet hashed.

    Those whose weights turn out to be another's are replaced by others, as on the Hub.
    """
    failures = {c.name: f"{c.repo} gave no commit" for c in listing.chosen if c.kind == "repo" and c.commit is None}

    def with_commit(checkpoint: Checkpoint) -> Checkpoint:
        if checkpoint.path is None or not checkpoint.chosen:
            return checkpoint
        try:
            return hashed(checkpoint, remembered)
        except CheckpointError as error:
            failures[checkpoint.name] = str(error)
            return checkpoint

    listing = replace(listing, checkpoints=tuple(map(with_commit, listing)))
    if listing.source != "local":
        return listing, failures
    again = reselected(listing, revisions)
    if again.chosen != listing.chosen:
        # What is to be told of it comes at the end, once.
        again, more = _with_commits(replace(again, notes=listing.notes), remembered, revisions)
        failures = {c.name: reason for c in again.chosen if (reason := (failures | more).get(c.name)) is not None}
    return again, failures


@contextmanager
def _turn_to_draw(run: Path) -> Iterator[None]:
    """One process at a time counts and draws, so that the last of several draws what all of them stored."""
    if not (run / "scores").is_dir():
        yield  # there is nothing to draw
        return
    with suppress(OSError):  # told when the first figure is written
        (run / "figures").mkdir(exist_ok=True)
    with alone_in(run / "figures"):
        yield


def _draw(run: "Run", listing: Listing, calibration: str, reporter: Reporter) -> tuple[Path, ...]:
    """Draw the figures, unless what they show is what it was when all of them were drawn."""
    from redundancy_trace.store import finished_parts, read_distances, read_duplicates, read_scores, write_json

    folder = run.folder / "figures"
    mark = folder / ".drawn.json"
    shown = {
        "scores": sorted(finished_parts(run.folder)),
        "checkpoints": [[c.name, c.commit, c.tokens, c.duplicate_of or c.partial_duplicate_of] for c in listing],
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
    from redundancy_trace.analysis import calibration_first
    from redundancy_trace.figures import draw_figures

    reporter.line("Drawing the figures …")
    files = tuple(
        draw_figures(
            calibration_first(read_scores(run.folder), calibration),
            folder,
            duplicates=read_duplicates(run.folder),
            distances=read_distances(run.folder),
        )
    )
    write_json(mark, {"shown": shown, "files": [file.name for file in files]})
    return files
