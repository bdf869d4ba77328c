"""Benchmark tasks by EleutherAI's lm-evaluation-harness, on a model in memory. Needs the extra `eval`."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redundancy_trace.errors import InputError, first_line, nearest
from redundancy_trace.store import Evaluated

_INSTALL = "pip install 'redundancy-trace[eval]'"
# Questions that are drawn for few-shot examples come from these, whatever the caller's state.
_SEEDS = {
    "random_seed": 0,
    "numpy_random_seed": 1234,
    "torch_random_seed": 1234,
    "fewshot_random_seed": 1234,
}


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


def check_tasks(tasks: TaskSet) -> Any:
    """The manager that knows the tasks.

    Raises:
        InputError: lm-eval is not installed, there is no such folder, or no task of that name (names the nearest).
    """
    harness = load_harness()
    if tasks.folder is not None and not tasks.folder.is_dir():
        raise InputError(f"--task-folder {tasks.folder} is no folder.")
    with _quiet():
        manager = harness.tasks.TaskManager(include_path=None if tasks.folder is None else str(tasks.folder))
    known = manager.all_tasks
    for name in tasks.names:
        if name not in known:
            like = nearest(name, known)
            hint = f" Did you mean {', '.join(like)}?" if like else ""
            raise InputError(f"lm-eval knows no task {name!r} among its {len(known):,}.{hint}")
    return manager


def measure_tasks(model: Any, tokenizer: Any, tasks: TaskSet, *, batch_size: int | None = None) -> list[Evaluated]:
    """Every metric of every task, as lm-eval itself computes it, with its standard error.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        tasks: Which tasks.
        batch_size: Questions at a time; None = 8.

    Raises:
        InputError: lm-eval is not installed, knows no such task, or cannot have its data.
    """
    manager = check_tasks(tasks)
    harness = load_harness()
    with _quiet():
        lm = harness.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size or 8)
        try:
            found = harness.simple_evaluate(
                model=lm,
                tasks=list(tasks.names),
                num_fewshot=tasks.shots,
                limit=tasks.limit,
                task_manager=manager,
                log_samples=False,
                bootstrap_iters=1000,
                **_SEEDS,
            )
        except (OSError, ValueError, RuntimeError) as error:  # what fetching and reading data raises
            raise InputError(
                f"lm-eval cannot do {', '.join(tasks.names)}: {first_line(error)}. Without a network, give tasks whose "
                "data are here with --task-folder."
            ) from error
    return list(_numbers(found))


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
def _quiet() -> Iterator[None]:
    """No remarks and bars of lm-eval and datasets, and the caller's random states as they were."""
    import random
    import warnings

    import numpy as np
    import torch
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    bars = is_progress_bar_enabled()
    logger = logging.getLogger("lm_eval")
    level = logger.level
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - what lm-eval seeds
    logger.setLevel(logging.ERROR)
    disable_progress_bar()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        logger.setLevel(level)
        if bars:
            enable_progress_bar()
