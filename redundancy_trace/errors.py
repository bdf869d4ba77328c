"""What can go wrong, and how it is told: every error a user meets is a `TraceError` with an exit code."""

import difflib
from collections.abc import Iterable


class TraceError(Exception):
    """A fault that is told in one message, without a traceback. Exit code 1."""

    exit_code = 1


class InputError(TraceError):
    """The user's input cannot be used: the message says what is wrong, what exists, what to type next."""

    exit_code = 2


class CheckpointError(TraceError):
    """One checkpoint cannot be scored; the others of a run go on, and this one is tried again next time."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The names of `known` that look most like `name`, best first, for use in an error message.

    Example:
        >>> nearest("step1500", ["step1000", "step2000", "main"])
        ['step1000', 'step2000']
    """
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)


def first_line(error: BaseException | None) -> str:
    """The first line of the error's text that says something, else the name of its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
