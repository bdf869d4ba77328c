"""`trace eval` of one checkpoint: opened, measured part by part, each part stored as soon as it is there."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redundancy_trace.checkpoints import is_local
from redundancy_trace.progress import Reporter
from redundancy_trace.settings import EvaluationSettings, listed
from redundancy_trace.store import (
    Evaluated,
    Labels,
    evaluation_file,
    evaluations_frame,
    open_evaluations,
    read_evaluations,
    write_evaluations,
)
from redundancy_trace.sweep.folders import check_measurable
from redundancy_trace.sweep.subjects import InMemory, OnDisk, Subject

if TYPE_CHECKING:
    import polars as pl

    from redundancy_trace.evaluation import Windows
    from redundancy_trace.evaluation.tasks import LoadedTasks
    from redundancy_trace.loading import OpenCheckpoint
    from redundancy_trace.pruning import DropPlan
    from redundancy_trace.store import Purpose


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation did.

    Attributes:
        place: Where its rows are.
        rows: Its rows, whether measured now or before.
        measured: Parts, or checkpoints, measured now.
        kept: Those that were stored before.
        failures: Names of checkpoints that could not be measured, with the reason.
        figures: The files that were drawn.
    """

    place: Path
    rows: "pl.DataFrame"
    measured: int
    kept: int
    failures: dict[str, str]
    figures: tuple[Path, ...] = ()


@dataclass(frozen=True)
class _Part:
    """One part of an evaluation: what its rows depend on, and how they are measured."""

    name: str
    purpose: "Purpose"
    facts: dict[str, Any]
    measure: Callable[[], list[Evaluated]]
    repeats: bool = True  # a stored number would come out again


def run_evaluation(
    settings: EvaluationSettings, reporter: Reporter, plan: "DropPlan | None" = None
) -> EvaluationResult:
    """Measure one checkpoint, whole and under a plan, or for every number dropped.

    Losses and tasks that are stored already are not measured again; times are.

    Args:
        settings: What to measure of which checkpoint; not `along`.
        reporter: Told how it goes.
        plan: In place of `settings.plan`.

    Raises:
        InputError: If the input cannot be used.
        CheckpointError: If the checkpoint cannot be had, or not be measured.
    """
    import polars as pl

    from redundancy_trace.engine import choose_device
    from redundancy_trace.loading import open_checkpoint
    from redundancy_trace.pruning.planning import check_model

    choose_device(settings.device)  # refused before anything is fetched
    assert settings.model is not None  # held by the settings
    if is_local(settings.model):
        named = Path(settings.model).expanduser()
        check_measurable(named, trust_remote_code=settings.trust_remote_code)
    plan = plan or _plan_in(settings)
    tasks = _tasks(settings)
    kept = measured = 0
    identities = []
    with open_checkpoint(
        settings.model,
        settings.revision,
        trust_remote_code=settings.trust_remote_code,
        endpoint=settings.endpoint,
        offline=settings.offline,
    ) as checkpoint:
        if plan is not None:
            check_model(plan.model, plan.commit, checkpoint, "plan")
        subject = OnDisk(settings, checkpoint, reporter)
        place = _place(settings, checkpoint)
        stored = open_evaluations(place, checkpoint.model, checkpoint.commit)
        for part in _parts(subject, plan, tasks, reporter):
            identity = _identity(subject, plan, part)
            identities.append(identity)
            if part.repeats and identity in stored:
                kept += 1
                reporter.line(f"{part.name}: in {place} already.")
                continue
            labels = replace(subject.labels, identity=identity)
            rows = evaluations_frame(labels, part.purpose, part.measure())
            write_evaluations(evaluation_file(place, labels), rows)
            measured += 1
            reporter.line(f"{part.name}: measured.")
    stored_rows = read_evaluations(place)
    rows = stored_rows.filter(pl.col("identity").is_in(identities))
    here = rows if settings.curve else _of_checkpoint(stored_rows, subject.labels)
    figures = _draw(
        here, _figure_names(settings, plan), (place.parent if place.suffix == ".parquet" else place) / "figures"
    )
    return EvaluationResult(place, rows, measured, kept, {}, tuple(figures))


def _of_checkpoint(rows: "pl.DataFrame", labels: Labels) -> "pl.DataFrame":
    return rows.filter((rows["revision"] == labels.revision) & (rows["commit"] == labels.commit))


def _figure_names(settings: EvaluationSettings, plan: "DropPlan | None") -> list[str]:
    """The figures of what was measured just now."""
    if settings.curve:
        return ["quality", *(["joint"] if "joint" in listed(settings.curve) else [])]
    return ["tradeoff"] if plan is not None and {"loss", "speed"} <= set(listed(settings.measure)) else []


def _draw(rows: "pl.DataFrame", names: list[str], folder: Path) -> list[Path]:
    if not names:
        return []
    from redundancy_trace.figures import draw_evaluations

    return draw_evaluations(rows, folder, names)


def evaluate_in_memory(
    settings: EvaluationSettings,
    reporter: Reporter,
    model: Any,
    plan: "DropPlan | None",
    token_ids: Any,
    tokenizer: Any,
) -> "pl.DataFrame":
    """The rows of a model in memory, which is as before afterwards; nothing is stored.

    Raises:
        InputError: If the input cannot be used.
        CheckpointError: If the model cannot be measured.
    """
    import polars as pl

    plan = plan or _plan_in(settings)
    subject = InMemory(settings, model, token_ids, tokenizer)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        parts = _parts(subject, plan, _tasks(settings), reporter)
        return pl.concat([evaluations_frame(subject.labels, part.purpose, part.measure()) for part in parts])
    finally:
        for module, mode in training.items():
            module.training = mode


def _plan_in(settings: EvaluationSettings) -> "DropPlan | None":
    from redundancy_trace.pruning import read_plan

    return None if settings.plan is None else read_plan(settings.plan)


def identity_of_facts(facts: dict[str, Any]) -> str:
    """SHA-256 over all that rows depend on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def windows_facts(windows: "Windows") -> dict[str, Any]:
    """What a loss depends on of its text."""
    return {"tokens": windows.sha256, "counted": windows.first.tolist(), "bytes": windows.n_bytes is not None}


def _parts(
    subject: Subject, plan: "DropPlan | None", tasks: "LoadedTasks | None", reporter: Reporter
) -> Iterator[_Part]:
    """What is asked for, in order; nothing is loaded before a part is reached."""
    from redundancy_trace.evaluation import curve_rows, loss_rows, speed_rows, task_rows
    from redundancy_trace.evaluation.dropping import plan_hash

    settings = subject.settings
    plans = [None] if plan is None else [None, plan]
    size = settings.batch_size
    if settings.curve:
        along = _curve_plans(subject)
        facts = {**windows_facts(subject.windows), "plans": [plan_hash(one) for one in along]}
        name = "loss for every number dropped"

        def curve() -> list[Evaluated]:
            reporter.scoring(name)
            tell = partial(reporter.step, name)
            return curve_rows(subject.model, subject.windows, along, batch_size=size, on_loss=tell)

        yield _Part(name, "curve", facts, curve)
        return
    if "loss" in listed(settings.measure):

        def loss() -> list[Evaluated]:
            return loss_rows(subject.model, subject.windows, plans, batch_size=size)

        yield _Part("loss", "model", windows_facts(subject.windows), loss)
    if "speed" in listed(settings.measure):
        load = subject.load

        def speed() -> list[Evaluated]:
            return speed_rows(subject.model, load, plans)

        facts = {"load": vars(load), "device": settings.device}
        yield _Part("speed and memory", "model", facts, speed, repeats=False)
    if tasks is not None:

        def asked() -> list[Evaluated]:
            return task_rows(subject.model, subject.tokenizer, tasks, plans, batch_size=size)

        facts = {
            "tasks": listed(settings.tasks),
            "limit": settings.limit,
            "shots": settings.shots,
            "lm_eval": tasks.version,
            "files": _hashes(settings.task_folder),
        }
        yield _Part(", ".join(listed(settings.tasks)), "model", facts, asked)


def _curve_plans(subject: Subject) -> "Sequence[DropPlan]":
    """Plans from the scores of a run, else from scores that are made now on the same text."""
    from redundancy_trace.engine import choose_batch_size, score_module
    from redundancy_trace.evaluation import curve_plans
    from redundancy_trace.store import scores_frame

    settings = subject.settings
    orders, components = listed(settings.orders), listed(settings.curve)
    if settings.scores is not None:
        stored = subject.scores(settings.scores)
        return curve_plans(stored, stored["revision"][0], components, orders)
    ids = subject.windows.ids
    device = subject.model.get_input_embeddings().weight.device
    size = choose_batch_size(settings.batch_size, ids.shape[1], len(ids), device)
    scores = score_module(subject.model, ids, batch_size=size)
    labels = replace(subject.labels, calibration=subject.windows.name)
    return curve_plans(scores_frame(labels, scores.values), None, components, orders)


def _hashes(folder: Path | None) -> dict[str, str]:
    """SHA-256 of every task that a folder describes; of their data, only the names are in there."""
    files = () if folder is None else sorted(folder.rglob("*.yaml"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _tasks(settings: EvaluationSettings) -> "LoadedTasks | None":
    """The tasks that are asked for, loaded before anything is fetched; None without."""
    if not settings.tasks:
        return None
    from redundancy_trace.evaluation.tasks import LoadedTasks, TaskSet

    names = TaskSet(listed(settings.tasks), settings.task_folder, settings.limit, settings.shots)
    return LoadedTasks(names, shows_progress=not settings.quiet and sys.stderr.isatty())


def _place(settings: EvaluationSettings, checkpoint: "OpenCheckpoint") -> Path:
    """A checkpoint's own folder, if that is what the user named and no cache; else the run of its model."""
    from redundancy_trace.loading import is_cached
    from redundancy_trace.store import ONE_FILE

    if settings.out is not None:
        return settings.out.expanduser()
    folder = checkpoint.folder.resolve()
    is_named = is_local(settings.model or "") and Path(settings.model or "").expanduser().resolve() == folder
    if is_named and not is_cached(folder):
        return checkpoint.folder / ONE_FILE
    return Path("runs") / checkpoint.model.rsplit("/", 1)[-1]


def _identity(subject: OnDisk, plan: "DropPlan | None", part: _Part) -> str:
    from redundancy_trace.evaluation.dropping import plan_hash
    from redundancy_trace.metrics import EVALUATION_METRICS

    return identity_of_facts(
        {
            "commit": subject.labels.commit,
            "revision": subject.labels.revision,
            "dtype": str(subject.dtype),
            "trust_remote_code": subject.settings.trust_remote_code,
            "metrics": {name: metric.version for name, metric in EVALUATION_METRICS.items()},
            "plan": None if plan is None else plan_hash(plan),
            "part": part.name,
            **part.facts,
        }
    )
