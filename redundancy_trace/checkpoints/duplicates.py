"""Checkpoints whose weights are, whole or in part, those of another: found from hashes, before a byte is moved.

A name is no proof of content: branches of published runs have been seen to serve the final model, or one file of it.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace

from redundancy_trace.checkpoints.formats import weight_files
from redundancy_trace.checkpoints.ordering import is_first, last_of_each_series
from redundancy_trace.checkpoints.records import Checkpoint


def mark_duplicates(checkpoints: Sequence[Checkpoint]) -> tuple[Checkpoint, ...]:
    """Mark each checkpoint that repeats the weights of another with the name of that one.

    Of a group with equal weights one that holds step 0 keeps step 0, one that holds the last step or `main` keeps that;
    in any other nothing tells which name is right: each points at the first, the first at the second. Weight files that
    checkpoints with otherwise different weights share mark them in the same way as partial duplicates.

    Args:
        checkpoints: All of a listing, in training order. Those without files, or with a weight file whose hash is not
            known, are compared with none.

    Returns:
        The same, with `duplicate_of` and `partial_duplicate_of` as they now stand.
    """
    hashes = {index: found for index, c in enumerate(checkpoints) if (found := _hashes(c)) is not None}
    keepers = _Keepers(checkpoints)
    equals = _groups((found, index) for index, found in hashes.items())
    exact: dict[int, int] = {}
    for group in equals:
        exact |= keepers.pointers(group)
    partial: dict[int, int] = {}
    # One of each group of equals stands for it: the one that is kept, else the first.
    single = sorted(next((index for index in group if index not in exact), group[0]) for group in equals)
    for group in _groups((file, index) for index in single for file in set(hashes[index])):
        for index, kept in keepers.pointers(group).items():
            if index not in exact:
                partial.setdefault(index, kept)

    def name(kept: int | None) -> str | None:
        return None if kept is None else checkpoints[kept].name

    return tuple(
        replace(c, duplicate_of=name(exact.get(index)), partial_duplicate_of=name(partial.get(index)))
        for index, c in enumerate(checkpoints)
    )


def duplicates_note(checkpoints: Sequence[Checkpoint]) -> str | None:
    """One line on the checkpoints that are left out for repeating another's weights; None if there are none.

    Args:
        checkpoints: All of a listing, marked.
    """
    left = [c for c in checkpoints if c.repeats and not c.chosen]
    if not left:
        return None
    shown = [
        f"{c.name} = {c.duplicate_of}" if c.duplicate_of else f"{c.name} in part = {c.partial_duplicate_of}"
        for c in left[:3]
    ]
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    one = len(left) == 1
    of = sum(_hashes(c) is not None for c in checkpoints)
    repeat, are = ("repeats", "is") if one else ("repeat", "are")
    return (
        f"Of {of} checkpoints that were looked at, {len(left)} {repeat} the weights of another and {are} left out: "
        f"{', '.join(shown)}{more}. Name one to score it all the same."
    )


class _Keepers:
    """Which of a group of checkpoints with equal weights has the name that is right."""

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self._checkpoints = checkpoints
        self._last = last_of_each_series(checkpoints)

    def pointers(self, group: Sequence[int]) -> dict[int, int]:
        """Index → index of the one it repeats, of all but the one that is kept."""
        if len(group) < 2:
            return {}
        kept = self._kept(group)
        if kept is not None:
            return {index: kept for index in group if index != kept}
        return dict.fromkeys(group[1:], group[0]) | {group[0]: group[1]}

    def _kept(self, group: Sequence[int]) -> int | None:
        first = [index for index in group if is_first(self._checkpoints[index])]
        last = [index for index in group if index in self._last]
        main = [index for index in group if self._checkpoints[index].name == "main"]
        return next(iter([*first, *reversed(last), *main]), None)


def _groups(keyed: Iterable[tuple[Hashable, int]]) -> list[list[int]]:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for key, index in keyed:
        groups[key].append(index)
    return list(groups.values())


def _hashes(checkpoint: Checkpoint) -> tuple[str, ...] | None:
    """SHA-256 of each weight file, in order of the shards; None where one is not known."""
    weights = weight_files(checkpoint.files or ())
    known = tuple(file.sha256 for file in weights.files if file.sha256 is not None)
    return known if known and len(known) == len(weights.files) else None
