"""Benchmark tasks by EleutherAI's lm-evaluation-harness, on a model in memory. Needs the extra `eval`."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from redundancy_trace.errors import InputError, first_line, nearest
from redundancy_trace.store import Evaluated

_INSTALL = "pip install 'redundancy-trace[eval]'"
# Draws the examples that stand in front of a question, whatever the caller's state; lm-eval's own default.
_FEWSHOT_SEED = 1234
_BATCH = 8
# Draws for the standard error of a metric that has no formula for it.
_BOOTSTRAPS = 1000


@dataclass(frozen=True)
class TaskSet:
    """Which tasks, and how they are asked.

    Attributes:
        names: Of tasks or groups, as lm-eval knows them.
        folder: A folder with YAML files of further tasks, such as ones whose data are on this machine.
        limit: Only so many questions of each task.
        shots: Examples in front of each question; None = as many as the task says.
    """

    names: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None
    shots: int | None = None


def load_harness() -> Any:
    """The package lm_eval.

    Raises:
        InputError: It is not installed; says how to.
    """
    # Read once, at the import: datasets that are on this machine need nobody's permission.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise InputError(f"--tasks needs lm-eval ({first_line(error)}). Install it: {_INSTALL}") from error
    return lm_eval


class LoadedTasks:
    """Tasks with their data, asked again and again."""

    def __init__(self, tasks: TaskSet, *, shows_progress: bool = False) -> None:
        """Load them.

        Args:
            tasks: Which.
            shows_progress: Whether lm-eval's bars are shown while a model is asked.

        Raises:
            InputError: lm-eval is not installed; there is no such folder; no task of that name (names the nearest); or
                its data cannot be had.
        """
        self._harness = load_harness()
        self._shows_progress = shows_progress
        self.version: str = self._harness.__version__
        with _undisturbed(shows_progress=False):
            manager = self._manager(tasks)
            with _told_of(tasks):
                self._loaded = manager.load(list(tasks.names))
        self._limit = tasks.limit
        for task in self._loaded["tasks"].values():
            # As lm-eval has it: a task that says 0 examples itself gets none.
            given = task.get_config("num_fewshot")
            if given is None or (tasks.shots is not None and given != 0):
                task.set_config(key="num_fewshot", value=tasks.shots or 0)
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        self._tasks = tasks

    def _manager(self, tasks: TaskSet) -> Any:
        """What knows the tasks."""
        if tasks.folder is not None and not tasks.folder.is_dir():
            raise InputError(f"--task-folder {tasks.folder} is no folder.")
        with _told_of(tasks):
            if tasks.folder is not None:  # those of lm-eval itself take seconds to list
                manager = self._harness.tasks.TaskManager(include_path=str(tasks.folder), include_defaults=False)
                if set(tasks.names) <= set(manager.all_subtasks):
                    return manager
            manager = self._harness.tasks.TaskManager(include_path=None if tasks.folder is None else str(tasks.folder))
        known = manager.all_tasks
        for name in tasks.names:
            if name not in known:
                like = nearest(name, known)
                hint = f" Did you mean {', '.join(like)}?" if like else ""
                raise InputError(f"lm-eval knows no task {name!r} among its {len(known):,}.{hint}")
        return manager

    def ask(self, model: Any, tokenizer: Any, *, batch_size: int | None = None) -> list[Evaluated]:
        """Every metric of every task, as lm-eval itself computes it, with its standard error.

        Args:
            model: A causal language model of transformers.
            tokenizer: Its tokenizer.
            batch_size: Questions at a time; None = 8.

        Raises:
            InputError: lm-eval cannot do these tasks with this model.
        """
        with _undisturbed(shows_progress=self._shows_progress), _told_of(self._tasks):
            lm = self._harness.models.huggingface.HFLM(
                pretrained=model, tokenizer=tokenizer, batch_size=batch_size or _BATCH
            )
            found = self._harness.evaluate(
                lm, self._loaded, limit=self._limit, log_samples=False, bootstrap_iters=_BOOTSTRAPS
            )
        return list(_numbers(found))


@contextmanager
def _told_of(tasks: TaskSet) -> Iterator[None]:
    """What fetching and reading a task's data raises, told as the user's."""
    try:
        yield
    except AssertionError as error:
        raise InputError(
            f"lm-eval cannot ask this model {', '.join(tasks.names)} ({first_line(error)}): an answer may be longer "
            "than the model's positions."
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(
            f"lm-eval cannot do {', '.join(tasks.names)}: {first_line(error)}. Without a network, give tasks whose "
            "data are here with --task-folder."
        ) from error


def _numbers(found: dict[str, Any]) -> Iterator[Evaluated]:
    """`{"acc,none": 0.5, "acc_stderr,none": 0.1}` of every task, as numbers."""
    for task, values in found["results"].items():
        counted = found.get("n-samples", {}).get(task, {}).get("effective")
        shots = found.get("n-shot", {}).get(task)
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            yield Evaluated(
                metric=metric if filtered == "none" else key,
                value=float(value),
                stderr=float(error) if isinstance(error, (int, float)) else None,
                n_samples=counted,
                dataset=task,
                shots=shots,
            )


@contextmanager
def _undisturbed(*, shows_progress: bool) -> Iterator[None]:
    """No remarks, no bars unless wanted; the caller's random states are as before afterwards."""
    import random
    import warnings

    import numpy as np
    import torch
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    bars = is_progress_bar_enabled()
    logger = logging.getLogger("lm_eval")
    level = logger.level
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - what lm-eval draws from
    logger.setLevel(logging.ERROR)
    disable_progress_bar()
    try:
        with (
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),
            nullcontext() if shows_progress else redirect_stderr(StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        logger.setLevel(level)
        if bars:
            enable_progress_bar()
