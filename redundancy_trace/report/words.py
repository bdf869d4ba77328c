"""What the statistics of a run say, in sentences."""

from collections import Counter
from typing import Any

import numpy as np

from redundancy_trace.analysis import TrainingStats
from redundancy_trace.analysis.agreement import quarter
from redundancy_trace.analysis.published import BesidePublished
from redundancy_trace.metrics import COMPONENT_LABELS
from redundancy_trace.report.gathering import Sources

_NAMED = 6


def lead(sources: Sources) -> str:
    """What was scored, on what, in one paragraph."""
    stats, run = sources.stats, sources.run
    names = stats.series.checkpoints["revision"].to_list()
    span = (
        f"{len(names)} checkpoints, from {names[0]} to {names[-1]}" if len(names) > 1 else f"one checkpoint, {names[0]}"
    )
    n_layers = 1 + stats.series.last_layer
    series = f" ({stats.series.name}, the longest series of the run)" if stats.series.name else ""
    on = f" on the text {stats.calibration}" if stats.calibration else ""
    return (
        f"{_listed([COMPONENT_LABELS[name] for name in stats.series.grids])} of {n_layers} "
        f"layer{'s' if n_layers > 1 else ''} were scored at {span}{series},{on} in {run.dtype}."
    )


def left_out(stats: TrainingStats) -> list[str]:
    """The checkpoints that do not count, those with one reason together."""
    reasons: dict[str, list[str]] = {}
    for one in stats.left_out:
        reasons.setdefault(one.reason, []).append(one.revision)
    return [f"{_listed(names)}: {reason}" for reason, names in reasons.items()]


def findings(stats: TrainingStats) -> list[tuple[str, str]]:
    """A heading and a paragraph for each component, for attention and MLP together, and for published orders."""
    found = [(COMPONENT_LABELS[name], _of_component(stats, name)) for name in stats.series.grids]
    joint = _of_attention_and_mlp(stats)
    sources = [f"{source}." for source in dict.fromkeys(one.source for one in stats.published)]
    published = " ".join([*(_of_published(one) for one in stats.published), *sources])
    more = (("Attention against MLP", joint), ("Against published orders", published))
    return [*found, *((heading, text) for heading, text in more if text)]


def answers(stats: TrainingStats) -> str:
    """How many of the questions are answered how."""
    count = Counter(check.answer for check in stats.checks)
    return f"{count['yes']} yes, {count['no']} no, {count['undecided']} undecided"


def most_redundant(stats: TrainingStats, component: str) -> list[int]:
    """The most redundant quarter of the layers at the last checkpoint, the first to be dropped first."""
    grid = stats.series.grids[component]
    order = np.argsort(grid.values[-1], kind="stable")[: quarter(len(grid.layers))]
    return [grid.layers[column] for column in order]


def _of_component(stats: TrainingStats, component: str) -> str:
    n_layers = len(stats.series.grids[component].layers)
    layers = most_redundant(stats, component)
    several = stats.series.checkpoints.height > 1
    which = f"{len(layers)} most redundant" if len(layers) > 1 else "most redundant"
    verb = "are" if len(layers) > 1 else "is"
    at = "At the last checkpoint the" if several else "The"
    said = [f"{at} {which} of {n_layers} layers {verb} {_in_a_row(list(map(str, layers)))}."]
    if several:
        said += _of_order(stats, component)
    trend = stats.trends.filter(component=component, layers="inner").row(0, named=True)
    if trend["first"] is not None:
        said.append(_of_mean(trend, several=several))
    return " ".join(said)


def _of_order(stats: TrainingStats, component: str) -> list[str]:
    """When the most redundant layers settled, and how the first checkpoint's order agrees with the last one's."""
    names = stats.series.checkpoints["revision"]
    said = []
    if (onset := stats.onset(component)) is not None:
        is_last = onset["revision"] == names[-1]
        text = "The checkpoint before has others" if is_last else f"They are so from {onset['revision']} on, for good"
        if onset["low"] is not None and onset["low"] != onset["high"]:
            text += f" (the standard errors leave open from {onset['low']} to {onset['high']})"
        said.append(text + ".")
    overlap, order = (_at_first(stats, component, name) for name in ("overlap", "spearman"))
    chance = f"{stats.chance(component):.2f} by chance"
    said.append(f"Their overlap (Jaccard) with those of {names[0]} is {_banded(overlap, chance)}.")
    if order["value"] is not None:
        correlation = _banded(order, "0 by chance")
        said.append(f"Spearman's correlation of the whole order with that of {names[0]} is {correlation}.")
    return said


def _of_mean(trend: dict[str, Any], *, several: bool) -> str:
    if not several:
        return f"The mean importance without the first and the last layer is {trend['first']:.3g}."
    mean = "The mean importance without the first and the last layer"
    text = f"{mean} goes from {trend['first']:.3g} to {trend['last']:.3g}"
    if trend["spearman"] is None:
        return text + "."
    ends = {end: trend[f"spearman_{end}"] for end in ("low", "high")}
    return f"{text}; Spearman with the place in training: {_banded({'value': trend['spearman'], **ends})}."


def _of_attention_and_mlp(stats: TrainingStats) -> str:
    curves = stats.curves.filter(component="joint")
    below, first = (curves.filter(statistic=name)["value"].to_list() for name in ("attn_below_mlp", "attn_first"))
    n_layers = len(stats.series.grids["attn"].layers) if "attn" in stats.series.grids else 0
    several = stats.series.checkpoints.height > 1
    said = []
    if below:
        then = f" at the first checkpoint and {below[-1]:.0%} at the last" if several else ""
        said.append(f"Attention is less important than the MLP of its layer in {below[0]:.0%} of the layers{then}.")
    if first:
        then = f" at the first checkpoint and {first[-1]:.0f} at the last" if several else ""
        said.append(
            f"Were both ordered together and dropped one by one, {first[0]:.0f} of {n_layers} attentions would go "
            f"before the first MLP{then}."
        )
    return " ".join(said)


def _of_published(one: BesidePublished) -> str:
    k = len(one.published)
    return (
        f"{COMPONENT_LABELS[one.component]}: of the {k} layers that were published as the first to drop, {one.shared} "
        f"are among the {k} most redundant of {one.revision} (Jaccard {one.overlap:.2f}; {one.chance:.2f} by chance)."
    )


def _at_first(stats: TrainingStats, component: str, statistic: str) -> dict[str, Any]:
    return stats.curves.filter(component=component, statistic=statistic).row(0, named=True)


def _banded(row: dict[str, Any], chance: str = "") -> str:
    """A value, and in brackets what the standard errors leave open and what would be expected by chance."""
    band = "" if row["low"] is None else f"{row['low']:.2f} to {row['high']:.2f}"
    aside = "; ".join(filter(None, (band, chance)))
    return f"{row['value']:.2f}" + (f" ({aside})" if aside else "")


def _listed(names: list[str]) -> str:
    """Names in a row; of many the first ones and how many more."""
    return _in_a_row(names if len(names) <= _NAMED else [*names[: _NAMED - 1], f"{len(names) - _NAMED + 1} more"])


def _in_a_row(names: list[str]) -> str:
    """As in `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
