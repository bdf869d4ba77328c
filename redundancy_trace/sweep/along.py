"""`trace eval --along RUN`: what dropping costs at each checkpoint of a run, and its plan at the last one."""

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redundancy_trace.checkpoints import Checkpoint, Listing, listing_from_json
from redundancy_trace.cluster import told
from redundancy_trace.errors import InputError
from redundancy_trace.fetching import Fetched, discard, is_kept, keep
from redundancy_trace.hub import Hub
from redundancy_trace.progress import Reporter
from redundancy_trace.settings import EvaluationSettings, TraceSettings, listed
from redundancy_trace.store import (
    Labels,
    Run,
    evaluation_file,
    evaluations_frame,
    finished_evaluations,
    read_duplicates,
    read_evaluations,
    read_run,
    read_scores,
    tidy_run,
    write_evaluations,
)
from redundancy_trace.sweep.evaluating import EvaluationResult, identity_of_facts, windows_facts
from redundancy_trace.sweep.interrupting import interrupts_kept
from redundancy_trace.sweep.pipeline import awaited, fetching_ahead
from redundancy_trace.sweep.tasks import Task, labels_of

if TYPE_CHECKING:
    import polars as pl

    from redundancy_trace.evaluation import Windows
    from redundancy_trace.pruning import DropPlan


@dataclass(frozen=True)
class _Step:
    """One checkpoint of the run, and the plans that are carried out on it."""

    task: Task
    labels: Labels
    plans: "tuple[DropPlan, ...]"


def run_along(settings: EvaluationSettings, reporter: Reporter) -> EvaluationResult:
    """Measure the loss under plans at each scored checkpoint of a run, each being fetched again and loaded once.

    At every checkpoint: the whole model; each of `drops` in each of `orders`, planned by the run's stored scores of it.
    At the last checkpoint also the plans by importance of every other one. The text is the run's own, in its own shape,
    from where its calibration ends.

    Args:
        settings: With `along`.
        reporter: Told how it goes.

    Returns:
        What was done; a checkpoint that fails does not end it.

    Raises:
        InputError: There is no such run, it has no scores, or its text is too short; nothing is half-written.
    """
    from redundancy_trace.engine import choose_device

    folder = (settings.along or Path()).expanduser()
    choose_device(settings.device)  # refused before anything is fetched
    run, listing = _run_in(folder)
    tidy_run(folder)
    scores = _scores_of(folder)
    hub = Hub(endpoint=settings.endpoint, offline=settings.offline)
    windows = _held_out(settings, run, listing, hub, reporter)
    steps = _steps(settings, run, listing, scores, windows)
    stored = finished_evaluations(folder)
    identities = [step.labels.identity for step in steps]
    left = [step for step in steps if step.labels.identity not in stored]
    reporter.line(
        f"{len(steps)} checkpoints, {sum(1 + len(step.plans) for step in steps)} losses on {windows.name} "
        f"({windows.n_tokens:,} tokens)."
    )
    reporter.start(len(steps), len(steps) - len(left))
    failures = _measure_all(settings, run, listing, hub, windows, left, reporter) if left else {}
    rows = _rows(run, identities)
    figures = () if rows.is_empty() else tuple(_draw(rows, folder / "figures"))
    return EvaluationResult(folder, rows, len(left) - len(failures), len(steps) - len(left), failures, figures)


def _rows(run: Run, identities: list[str | None]) -> "pl.DataFrame":
    """What is stored of these checkpoints."""
    import polars as pl

    if not finished_evaluations(run.folder).intersection(identities):
        return evaluations_frame(Labels(model=run.model, revision=""), "along", ())
    return read_evaluations(run.folder).filter(pl.col("identity").is_in(identities))


def _draw(rows: "pl.DataFrame", folder: Path) -> list[Path]:
    from redundancy_trace.figures import draw_evaluations

    return draw_evaluations(rows, folder, ["drop-along"])


def _run_in(folder: Path) -> tuple[Run, Listing]:
    run = read_run(folder)
    if run is None:
        raise InputError(
            f"--along {folder} is no run: it has no settings.json. A run is what `trace --model … --out` writes."
        )
    file = folder / "listing.json"
    try:
        return run, listing_from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}). Give the sweep's command again to list anew.") from error


def _scores_of(folder: Path) -> "pl.DataFrame":
    """Scores by the run's first calibration, without checkpoints that repeat another's weights."""
    from redundancy_trace.analysis import leave_out_duplicates, one_calibration

    return leave_out_duplicates(one_calibration(read_scores(folder)), read_duplicates(folder))


def _held_out(settings: EvaluationSettings, run: Run, listing: Listing, hub: Hub, reporter: Reporter) -> "Windows":
    """Windows in the shape of the run's calibration: of the same text from where that ends, or of another text."""
    from redundancy_trace.calibration import load_stream, made_from, tokenizer_sources
    from redundancy_trace.evaluation import cut_windows, text_errors, tokens_needed

    record = run.calibrations[0]
    source = made_from(run.folder, record.sha256)
    if source is None:
        raise InputError(
            f"{run.folder} does not say what {record.file} was made from; restore {record.file[:-4]}.json."
        )
    name = settings.text or source["calibration"]
    samples = source["samples"] if settings.samples is None else settings.samples
    length = settings.sequence_length or source["sequence_length"]
    same = name == source["calibration"]
    cut: dict[str, Any] = {"samples": samples, "sequence_length": length, "stride": settings.stride}
    with text_errors():
        stream = load_stream(
            name,
            at_most=tokens_needed(**cut, skip=source["samples"] * source["sequence_length"] if same else 0),
            tokenizer=settings.tokenizer or source["tokenizer"],
            candidates=tokenizer_sources(listing),
            hub=hub,
            trust_remote_code=run.trust_remote_code,
        )
        calibrated = source["samples"] * (source["sequence_length"] - len(stream.prefix))
        windows = cut_windows(stream, **cut, skip=calibrated if same else 0)
    shape = {"samples": source["samples"], "sequence_length": source["sequence_length"]}
    if same and cut_windows(stream, **shape).sha256 != record.sha256:
        reporter.line(f"{name} is no longer the text that the run was scored on: the two may overlap.")
    return windows


def _steps(
    settings: EvaluationSettings, run: Run, listing: Listing, scores: "pl.DataFrame", windows: "Windows"
) -> list[_Step]:
    """The run's checkpoints in training order, with plans and identities."""
    from redundancy_trace.analysis import checkpoint_order
    from redundancy_trace.evaluation.dropping import plan_hash
    from redundancy_trace.metrics import ADDED_LOSS, LOSS
    from redundancy_trace.pruning import plan_drop

    drops, orders = listed(settings.drops), listed(settings.orders)
    if not drops or not orders:
        raise InputError("--drops and --orders say what is dropped and in which orders; give at least one of each.")
    known = {(checkpoint.name, checkpoint.commit): checkpoint for checkpoint in listing}
    found: list[tuple[Checkpoint, tuple[DropPlan, ...]]] = []
    at_the_end: list[DropPlan] = []
    for row in checkpoint_order(scores).iter_rows(named=True):
        checkpoint = known.get((row["revision"], row["commit"]))
        if checkpoint is None:
            continue  # no longer listed, so it cannot be fetched
        plans = tuple(plan_drop(scores, row["revision"], drop=drop, order=order) for drop in drops for order in orders)
        found.append((checkpoint, plans))
        at_the_end += [plan for plan in plans if plan.order == "importance"]
    if not found:
        raise InputError(f"{run.folder} holds no scores of a checkpoint that its listing has; sweep it again.")
    last, own = found.pop()
    found.append((last, (*own, *(plan for plan in at_the_end if plan.revision != last.name))))
    steps = []
    for checkpoint, plans in found:
        facts = {
            "commit": checkpoint.commit,
            "subfolder": checkpoint.subfolder,
            "dtype": run.dtype,
            "trust_remote_code": run.trust_remote_code,
            "metrics": {metric.name: metric.version for metric in (LOSS, ADDED_LOSS)},
            "plans": [plan_hash(plan) for plan in plans],
            **windows_facts(windows),
        }
        labels = labels_of(checkpoint, run, run.calibrations[0].label, identity_of_facts(facts))
        steps.append(_Step(Task(checkpoint, ()), labels, plans))
    return steps


def _measure_all(
    settings: EvaluationSettings,
    run: Run,
    listing: Listing,
    hub: Hub,
    windows: "Windows",
    steps: list[_Step],
    reporter: Reporter,
) -> dict[str, str]:
    """Fetch, load, measure and store each; returns the failures."""
    fetching = TraceSettings(
        model=listing.model,
        engine="whole",  # every plan needs the whole model in memory
        trust_remote_code=run.trust_remote_code,
        endpoint=settings.endpoint,
        offline=settings.offline,
    )
    failures: dict[str, str] = {}
    with interrupts_kept() as look, fetching_ahead(fetching, listing, run.folder, hub, reporter) as begin:
        ahead = begin(steps[0].task)
        for number, step in enumerate(steps):
            look()
            name = step.task.checkpoint.name
            started = time.monotonic()
            fetched: Fetched | None = None
            rows: pl.DataFrame | None = None
            following = steps[number + 1].task if number + 1 < len(steps) else None
            try:
                fetched = awaited(ahead)
                if following is not None:
                    ahead = begin(following)
                reporter.scoring(name)
                rows = _measured(settings, run, windows, step, fetched.folder, reporter)
            except Exception as error:
                if isinstance(error, InputError) and number == len(failures):
                    raise  # none could be measured so far: it is the input, not this checkpoint
                failures[name] = str(told(error))
                reporter.finished(name, f"{name}: not measured: {failures[name]}")
                if fetched is None and following is not None:
                    ahead = begin(following)
            if rows is not None:
                write_evaluations(evaluation_file(run.folder, step.labels), rows)
                reporter.finished(name, f"{name} measured in {time.monotonic() - started:.1f} s")
            if fetched is not None:
                (keep if is_kept(fetched) else discard)(fetched)
    return failures


def _measured(
    settings: EvaluationSettings, run: Run, windows: "Windows", step: _Step, folder: Path, reporter: Reporter
) -> "pl.DataFrame":
    import torch

    from redundancy_trace.engine import choose_device
    from redundancy_trace.evaluation import along_rows
    from redundancy_trace.weights import load_whole_model

    model = load_whole_model(
        folder,
        device=choose_device(settings.device),
        dtype=getattr(torch, run.dtype),
        trust_remote_code=run.trust_remote_code,
    )
    tell = partial(reporter.step, step.task.checkpoint.name)
    numbers = along_rows(model, windows, step.plans, batch_size=settings.batch_size, on_loss=tell)
    return evaluations_frame(step.labels, "along", numbers)
