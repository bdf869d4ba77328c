"""The grammar of `--revisions`: which of the listed checkpoints are meant.

`all`, `every:10`, `log:20`, `linear:20`, `1000..50000`, `1000..50000/5`, `tokens:0..100B`, `stage:1`, a name, a glob,
a commit (7 digits or more), `@file`; several, separated by commas, mean all of them together.
"""

import fnmatch
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from redundancy_trace.checkpoints.ordering import place_of, training_positions
from redundancy_trace.checkpoints.records import Checkpoint
from redundancy_trace.errors import InputError, nearest

EXAMPLES = (
    "all, every:10, log:20, linear:20, 1000..50000, 1000..50000/5, tokens:0..100B, stage:1, step1000,step2000, "
    "stage2-*, a commit, @names.txt"
)
_FULL_COMMIT = re.compile(r"[0-9a-f]{40}")
_COMMIT = re.compile(r"[0-9a-fA-F]{7,40}")
_NUMBER = r"\d[\d_]*(?:\.\d+)?[KMBTkmbt]?"
_RANGE = re.compile(rf"(?P<tokens>tokens:)?(?P<low>{_NUMBER})?\.\.(?P<high>{_NUMBER})?(?:/(?P<every>\d+))?")
_UNITS = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def selector_items(revisions: str, names: Sequence[str] = ()) -> list[str]:
    """The single selectors of a `--revisions` text, files read.

    Args:
        revisions: What the user typed.
        names: Names that exist; one that contains a comma is not taken apart.

    Raises:
        InputError: Nothing is there, or the file cannot be read.
    """
    text = revisions.strip()
    if text in names:
        return [text]
    items: list[str] = []
    for part in text.split(","):
        item = part.strip()
        items += _file_items(item[1:]) if item.startswith("@") else [item] if item else []
    if not items:
        raise InputError(f"--revisions {revisions!r} names nothing. Examples: {EXAMPLES}.")
    return items


def full_commits(items: Sequence[str], checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Those items that are commits of which no listed checkpoint is; the Hub may know them all the same."""
    known = {checkpoint.commit for checkpoint in checkpoints} | {checkpoint.name for checkpoint in checkpoints}
    return [item for item in items if _FULL_COMMIT.fullmatch(item) and item not in known]


def select(checkpoints: Sequence[Checkpoint], revisions: str, model: str) -> tuple[int, ...]:
    """Which checkpoints a selector means.

    Args:
        checkpoints: All that are listed, in training order. Those that are marked as repeating another's weights are
            chosen by name or commit alone; `log:` and `linear:` take others in their place, the rest goes without.
        revisions: The selector.
        model: Name of the model, for messages.

    Returns:
        Positions in `checkpoints`, ascending; none only where all that is meant repeats another's weights.

    Raises:
        InputError: The grammar is not kept, a name is unknown (the nearest are told), or nothing is selected.
    """
    items = selector_items(revisions, [checkpoint.name for checkpoint in checkpoints])
    return tuple(sorted({index for item in items for index in _select_one(checkpoints, item, model)}))


def _select_one(checkpoints: Sequence[Checkpoint], item: str, model: str) -> list[int]:
    """Positions of what one selector means: of a name or a commit that one, of any other what repeats no other."""
    named = [index for index, checkpoint in enumerate(checkpoints) if checkpoint.name == item]
    if found := named or _of_commit(checkpoints, item, model):
        return found
    return [index for index in _select_many(checkpoints, item, model) if not checkpoints[index].repeats]


def spread(positions: Sequence[float], count: int) -> list[int]:
    """Choose `count` points that lie evenly, the first and the last among them.

    Args:
        positions: Where the points stand, on the scale on which they shall lie evenly.
        count: How many, at least 2; all if there are no more.

    Returns:
        Their indices, ascending. First the points nearest to evenly spaced marks, each once; what is then missing,
        because several marks share a point, comes from halving the widest gap again and again.
    """
    if len(positions) <= count:
        return list(range(len(positions)))
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    used = {0, len(positions) - 1}
    low, high = positions[order[0]], positions[order[-1]]
    for number in range(count):
        mark = low + (high - low) * number / (count - 1)
        near = min(order, key=lambda index: abs(positions[index] - mark))
        if len(used) < count:
            used.add(near)
    while len(used) < count:
        used.add(_halve_widest_gap(positions, order, used))
    return sorted(used)


def _halve_widest_gap(positions: Sequence[float], order: Sequence[int], used: set[int]) -> int:
    """The unused point nearest to the middle of the widest gap between used ones that has a point inside."""
    ranks = [rank for rank, index in enumerate(order) if index in used]
    gaps = [
        (positions[order[right]] - positions[order[left]], -left, left, right)
        for left, right in itertools.pairwise(ranks)
        if right - left > 1
    ]
    if not gaps:  # what is left stands beyond the first and the last of the order
        return next(index for index in order if index not in used)
    _, _, left, right = max(gaps)
    middle = (positions[order[left]] + positions[order[right]]) / 2
    return min((order[rank] for rank in range(left + 1, right)), key=lambda index: abs(positions[index] - middle))


def _select_many(checkpoints: Sequence[Checkpoint], item: str, model: str) -> list[int]:
    """Positions of what a selector means that is neither a name nor a commit."""
    parsed = [index for index, checkpoint in enumerate(checkpoints) if checkpoint.is_parsed]
    word, colon, value = item.partition(":")
    if item == "all" or (colon and word in _COUNTED):
        if len(checkpoints) == 1 and checkpoints[0].kind == "local":
            return [0]  # a single folder is meant, whatever it is called
        _refuse_unplaced(checkpoints, parsed, item, model)
        if item == "all":
            return parsed
        # A number of models is filled up; each tenth of them stays each tenth.
        among = parsed if word == "every" else [index for index in parsed if not checkpoints[index].repeats]
        within = _COUNTED[word]([checkpoints[index] for index in among], _count(item, value, _LEAST[word]))
        return [among[index] for index in within]
    if colon and word == "stage":
        return _of_stage(checkpoints, item, value, model)
    if match := _RANGE.fullmatch(item):
        _refuse_unplaced(checkpoints, parsed, item, model)
        return _in_range(checkpoints, parsed, match, model)
    if any(mark in item for mark in "*?["):
        found = [i for i, checkpoint in enumerate(checkpoints) if fnmatch.fnmatchcase(checkpoint.name, item)]
        return found or _refuse(checkpoints, item, model)
    return _refuse(checkpoints, item, model)


def _every(checkpoints: Sequence[Checkpoint], count: int) -> list[int]:
    return sorted(index for series in _seeds(checkpoints) for index in {*series[::count], series[-1]})


def _log(checkpoints: Sequence[Checkpoint], count: int) -> list[int]:
    return _spread_over_seeds(
        checkpoints, [math.log1p(position) for position in training_positions(checkpoints)], count
    )


def _linear(checkpoints: Sequence[Checkpoint], count: int) -> list[int]:
    return _spread_over_seeds(checkpoints, training_positions(checkpoints), count)


def _spread_over_seeds(checkpoints: Sequence[Checkpoint], positions: Sequence[float], count: int) -> list[int]:
    """`count` of them, every seed's share of it evenly spread; of so few that a seed would get one, over all."""
    seeds = sorted(_seeds(checkpoints), key=len)
    if count < 2 * len(seeds):
        return spread(positions, count)
    found: list[int] = []
    for number, series in enumerate(seeds):  # the shortest first: what one cannot fill, the others get
        share = (count - len(found)) // (len(seeds) - number)
        found += [series[index] for index in spread([positions[index] for index in series], share)]
    return sorted(found)


def _seeds(checkpoints: Sequence[Checkpoint]) -> list[list[int]]:
    """Positions of the checkpoints of each seed."""
    found: dict[str | None, list[int]] = defaultdict(list)
    for index, checkpoint in enumerate(checkpoints):
        found[checkpoint.seed].append(index)
    return list(found.values())


_COUNTED: dict[str, Callable[[Sequence[Checkpoint], int], list[int]]] = {
    "every": _every,
    "log": _log,
    "linear": _linear,
}
_LEAST = {"every": 1, "log": 2, "linear": 2}  # first and last are always kept


def _count(item: str, value: str, least: int) -> int:
    if not value.isdecimal() or int(value) < least:
        raise InputError(
            f"--revisions {item}: behind the colon stands a whole number from {least} on. Examples: {EXAMPLES}."
        )
    return int(value)


def _of_stage(checkpoints: Sequence[Checkpoint], item: str, value: str, model: str) -> list[int]:
    stages = sorted({checkpoint.stage for checkpoint in checkpoints if checkpoint.stage is not None})
    wanted = _count(item, value, 0)
    found = [index for index, checkpoint in enumerate(checkpoints) if checkpoint.stage == wanted]
    if not found:
        there = f"its stages: {', '.join(map(str, stages))}" if stages else "its names tell no stage"
        raise InputError(f"--revisions {item} selects nothing of {model}; {there}.")
    return found


def _in_range(checkpoints: Sequence[Checkpoint], parsed: Sequence[int], match: re.Match[str], model: str) -> list[int]:
    by_tokens = match["tokens"] is not None
    low = _number(match["low"], 0)
    high = _number(match["high"], math.inf)
    every = int(match["every"] or 1)
    if low > high or every < 1 or not (match["low"] or match["high"]):
        raise InputError(
            f"--revisions {match[0]} is an empty range; write it like 1000..50000, 1000..50000/5 or tokens:0..100B."
        )
    counted = [(index, checkpoints[index].tokens if by_tokens else place_of(checkpoints[index])) for index in parsed]
    known = [place for _, place in counted if place is not None]
    if not known:
        raise InputError(
            f"--revisions {match[0]}: the names of {model} tell no tokens. Give --tokens-per-step, or a range of "
            "steps such as 1000..50000."
        )
    found = [index for index, place in counted if place is not None and low <= place <= high]
    if not found:
        raise InputError(
            f"--revisions {match[0]} selects nothing of {model}; its {'tokens' if by_tokens else 'steps'} go from "
            f"{min(known):,} to {max(known):,}."
        )
    return [found[index] for index in sorted({*range(0, len(found), every), len(found) - 1})]


def _number(text: str | None, absent: float) -> float:
    if text is None:
        return absent
    unit = _UNITS.get(text[-1].lower())
    return float(text[:-1]) * unit if unit else float(text)


def _of_commit(checkpoints: Sequence[Checkpoint], item: str, model: str) -> list[int]:
    """The first checkpoint in training order of the one commit that starts like this."""
    if not _COMMIT.fullmatch(item):
        return []
    found = [i for i, c in enumerate(checkpoints) if c.commit and c.commit.startswith(item.lower())]
    if len({checkpoints[index].commit for index in found}) > 1:
        names = ", ".join(f"{checkpoints[index].commit} ({checkpoints[index].name})" for index in found[:3])
        raise InputError(f"Several commits of {model} start with {item}: {names}. Give more digits.")
    return found[:1]


def _refuse_unplaced(checkpoints: Sequence[Checkpoint], parsed: Sequence[int], item: str, model: str) -> None:
    if parsed:
        return
    names = [checkpoint.name for checkpoint in checkpoints if checkpoint.kind != "other"]
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    raise InputError(
        f"{model} has no checkpoints whose names tell a step, so --revisions {item} selects nothing. There is: "
        f"{shown or 'nothing'}. To score one, name it: --revisions {names[-1] if names else 'main'}"
    )


def _refuse(checkpoints: Sequence[Checkpoint], item: str, model: str) -> list[int]:
    names = [checkpoint.name for checkpoint in checkpoints]
    like = nearest(item, names)
    known = f"nearest: {', '.join(like)}" if like else f"there are {len(names)}, such as {', '.join(names[:3])}"
    raise InputError(f"{model} has no checkpoint {item!r}; {known}. --revisions takes {EXAMPLES}.")


def _file_items(name: str) -> list[str]:
    try:
        lines = Path(name).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InputError(
            f"--revisions @{name}: the file cannot be read ({reason}). It holds one name a line."
        ) from error
    items = [line.split("#", 1)[0].strip() for line in lines]
    found = [item for item in items if item]
    if not found:
        raise InputError(f"--revisions @{name}: the file names nothing. It holds one name a line, # starts a comment.")
    return found
