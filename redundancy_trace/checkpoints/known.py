"""What no listing of the Hub tells: runs of one repository a checkpoint, names in an order, repositories that moved.

The facts are in `published.json`; nothing of them is needed for models that publish branches, tags or folders.
"""

import fnmatch
import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from redundancy_trace.checkpoints.names import parse_name


@dataclass(frozen=True)
class RepositoryRun:
    """A run whose every checkpoint is a repository.

    Attributes:
        name: What a user calls the run; the repositories' names start like it. It need not be one itself.
        repositories: Those that are known.
        searched: Whether the Hub is asked for more of them.
    """

    name: str
    repositories: tuple[str, ...]
    searched: bool

    def holds(self, repo: str) -> bool:
        """Whether a repository is one of this run's checkpoints, as far as its name tells.

        Example:
            >>> known_run("google/multiberts").holds("google/multiberts-seed_0-step_20k")
            True
        """
        return repo.startswith(self.name) and parse_name(repo.rpartition("/")[2], "repo") is not None


def known_run(model: str) -> RepositoryRun | None:
    """The run that a model's name means: its own name, or that of one of its repositories."""
    asked = moved_to(model) or model
    return next((run for run in _runs() if asked == run.name or run.holds(asked)), None)


def known_order(model: str) -> tuple[str, ...]:
    """Names of a model's refs in training order, where they tell no step; else nothing."""
    return tuple(_facts()["ordered_refs"].get(model, ()))


def known_note(model: str) -> str | None:
    """What a user should know of this model's checkpoints."""
    matching = (
        entry["note"]
        for entry in _facts()["notes"]
        if any(fnmatch.fnmatchcase(model, pattern) for pattern in entry["models"])
    )
    return next(matching, None)


def moved_to(model: str) -> str | None:
    """The present name of a repository that was renamed, or whose owner was.

    Example:
        >>> moved_to("LLM360/Amber"), moved_to("PY007/TinyLlama-1.1B-step-50K-105b"), moved_to("IFM/Amber")
        ('IFM/Amber', 'TinyLlama/TinyLlama-1.1B-step-50K-105b', None)
    """
    owner, _, name = model.partition("/")
    renamed: dict[str, str] = _facts()["renamed"]
    if model in renamed:
        return renamed[model]
    return f"{renamed[f'{owner}/']}{name}" if f"{owner}/" in renamed else None


@cache
def _runs() -> tuple[RepositoryRun, ...]:
    return tuple(
        RepositoryRun(run["name"], tuple(run.get("repositories") or _by_rule(run)), run.get("searched", False))
        for run in _facts()["repository_runs"]
    )


def _by_rule(run: dict[str, Any]) -> list[str]:
    return [run["pattern"].format(seed=seed, kilosteps=k) for seed in run["seeds"] for k in run["kilosteps"]]


@cache
def _facts() -> dict[str, Any]:
    text = resources.files(__package__).joinpath("published.json").read_text(encoding="utf-8")
    facts: dict[str, Any] = json.loads(text)
    return facts
