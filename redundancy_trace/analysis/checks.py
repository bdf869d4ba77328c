"""What others found, asked of a run: each a question that its numbers can answer with no, by a rule told beforehand."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from redundancy_trace.analysis.agreement import quarter
from redundancy_trace.analysis.ranks import Array, chance_overlap
from redundancy_trace.analysis.series import Series, interval
from redundancy_trace.analysis.trends import JOINT, Curve, mean_importance, slopes, trend_of

Answer = Literal["yes", "no", "undecided"]
# Fewer checkpoints make no trend.
FEWEST = 5
EARLY = 0.2
# Arxiv 2406.15786: the first MLP goes after more than 14 of 32 and 18 of 40 attentions.
MOST_ATTENTION_FIRST = 0.4
_BAND = "95 % interval of the standard errors, or the value itself where there are none"

_MARGIN = "1.96 standard errors of the difference, or the values themselves where there are none"
_UNMEASURED = "not measured: scores do not tell it, trace eval --along RUN does"
_ORDERS = {"importance": "by importance", "random": "at random", "deepest": "deepest first"}
# Added loss in nats per token, and its standard error where that is known.
_Cost = tuple[float, float | None]


@dataclass(frozen=True)
class Check:
    """One question, its answer and how it was decided.

    Attributes:
        name: Short, for programs.
        question: With the source that claims it.
        answer: `undecided` where the run does not hold what is needed, or its errors allow both.
        figure: The numbers that decided.
        rule: When the answer is yes, and when no.
    """

    name: str
    question: str
    answer: Answer
    figure: str
    rule: str


def all_checks(
    series: Series,
    curves: Iterable[Curve],
    onsets: Mapping[str, pl.DataFrame],
    calibrations: pl.DataFrame,
    costs: pl.DataFrame,
) -> tuple[Check, ...]:
    """Every check of `reference` papers on a series.

    Args:
        series: The series.
        curves: From `curves_of`.
        onsets: `onset_of` by component.
        calibrations: From `calibration_agreement`.
        costs: From `drop_costs`; empty where dropping was not measured.
    """
    by_name = {(curve.component, curve.statistic): curve for curve in curves}
    found = [_attention_below_mlp(series, by_name.get((JOINT, "attn_below_mlp")))]
    found += [_rises(series, component) for component in ("mlp", "block") if component in series.grids]
    found.append(_attention_moves_less(series))
    found.append(_first_layer_apart(series, [c for c in by_name.values() if c.statistic == "first_layer"]))
    found.append(_last_layer_jumps(series, by_name.get(("block", "last_layer"))))
    found += [_from_the_start(series, component, by_name[component, "overlap"]) for component in series.grids]
    found += [_settles_early(series, component, onset) for component, onset in onsets.items()]
    found += [_attention_drops_free(series, costs), _importance_beats_others(series, costs)]
    found.append(_attention_first(series, by_name.get((JOINT, "attn_first"))))
    found.append(_calibration(series, calibrations))
    return tuple(found)


def _attention_below_mlp(series: Series, curve: Curve | None) -> Check:
    question = "Is attention less important than the MLP of its layer at every stage (arXiv 2406.15786, Fig. 7)?"
    rule = f"yes: in more than half of the layers at every checkpoint; no: in less than half at one; by the {_BAND}"
    if curve is None:
        return Check("attention-below-mlp", question, "undecided", "attention and MLP are not both scored", rule)
    low, high = _band(curve)
    fewest = int(curve.values.argmin())
    figure = (
        f"{curve.values.mean():.0%} of the cells (layer, checkpoint); fewest {curve.values[fewest]:.0%} at "
        f"{_name(series, fewest)}, {curve.values[-1]:.0%} at the last"
    )
    answer = _answer(yes=bool((low > 0.5).all()), no=bool((high < 0.5).any()))
    return Check("attention-below-mlp", question, answer, figure, rule)


def _rises(series: Series, component: str) -> Check:
    label = _label(component)
    question = f"Does the importance of the {label} rise with training (arXiv 2406.15786, Fig. 7)?"
    return _trend_check(
        series, f"{component}-rises", question, mean_importance(series, component, "inner"), "inner layers"
    )


def _last_layer_jumps(series: Series, curve: Curve | None) -> Check:
    question = "Does the jump of the last layer grow with training (arXiv 2601.18302)?"
    return _trend_check(
        series, "last-layer-jumps", question, curve, "block of the last layer ÷ median of the inner ones"
    )


def _trend_check(series: Series, name: str, question: str, curve: Curve | None, of: str) -> Check:
    rule = (
        f"Spearman of the value ({of}) with the place in training: yes above 0.5, no below 0; by the {_BAND}; "
        f"undecided with fewer than {FEWEST} checkpoints"
    )
    if curve is None or np.isnan(curve.values).any():
        return Check(name, question, "undecided", "the model has no such layers", rule)
    trend = trend_of(series, curve)
    figure = f"{_shown(curve.values[0])} → {_shown(curve.values[-1])}"
    rho = trend.get("spearman")
    if rho is None:
        return Check(name, question, "undecided", figure, rule)
    ends = [trend[f"spearman_{end}"] for end in ("low", "high")]
    low, high = (float(rho if end is None else end) for end in ends)
    figure += f", Spearman {float(rho):.2f}" + ("" if ends[0] is None else f" ({low:.2f} to {high:.2f})")
    enough = len(curve.values) >= FEWEST
    return Check(name, question, _answer(yes=enough and low > 0.5, no=enough and high < 0), figure, rule)


def _attention_moves_less(series: Series) -> Check:
    question = "Does the importance of attention move far less than that of the MLP (arXiv 2406.15786, Fig. 7)?"
    rule = (
        "size of the slope per tenfold of training, attention ÷ MLP, inner layers: yes below 0.5, no above 1; by the "
        f"{_BAND}; undecided with fewer than {FEWEST} checkpoints"
    )
    found = [
        slope
        for name in ("attn", "mlp")
        if name in series.grids
        and (curve := mean_importance(series, name, "inner")) is not None
        and (slope := slopes(series, curve)) is not None
    ]
    if len(found) < 2:
        return Check("attention-moves-less", question, "undecided", "no slope can be told", rule)
    (attn, attn_draws), (mlp, mlp_draws) = found
    figure = f"{_shown(attn, signed=True)} against {_shown(mlp, signed=True)} per tenfold of {series.axis.column}"
    if mlp == 0:
        return Check("attention-moves-less", question, "undecided", figure, rule)
    ratio = abs(attn / mlp)
    band = interval(None if attn_draws is None or mlp_draws is None else np.abs(attn_draws / mlp_draws))
    low, high = (ratio, ratio) if band is None else (float(band[0]), float(band[1]))
    figure += f", ratio {ratio:.2f}" + ("" if band is None else f" ({low:.2f} to {high:.2f})")
    enough = series.checkpoints.height >= FEWEST
    return Check(
        "attention-moves-less", question, _answer(yes=enough and high < 0.5, no=enough and low > 1), figure, rule
    )


def _first_layer_apart(series: Series, curves: list[Curve]) -> Check:
    question = "Does layer 0 stand far above the others at every stage (arXiv 2406.15786, Fig. 7)?"
    rule = (
        "importance of layer 0 ÷ median of the inner layers: yes above 2 for every component and checkpoint, no below "
        f"2 for one; by the {_BAND}"
    )
    known = [curve for curve in curves if not np.isnan(curve.values).any()]
    if not known:
        return Check("first-layer-apart", question, "undecided", "the model has no such layers", rule)
    bands = [_band(curve) for curve in known]
    least = min(known, key=lambda curve: curve.values.min())
    at = int(least.values.argmin())
    figure = (
        f"at least {least.values[at]:.1f} times ({_label(least.component)} at {_name(series, at)}); at the last "
        + ", ".join(f"{_label(curve.component)} {curve.values[-1]:.1f}" for curve in known)
    )
    answer = _answer(
        yes=all(bool((low > 2).all()) for low, _ in bands), no=any(bool((high < 2).any()) for _, high in bands)
    )
    return Check("first-layer-apart", question, answer, figure, rule)


def _from_the_start(series: Series, component: str, curve: Curve) -> Check:
    n_layers = len(series.grids[component].layers)
    k = quarter(n_layers)
    likely = float(chance_overlap(n_layers)[1][k - 1])
    question = (
        f"Are the most redundant layers ({_label(component)}) the same from the start (TMLR version of arXiv "
        "2406.15786: the redundancy is there in random weights)?"
    )
    rule = (
        f"overlap (Jaccard) of the {k} most redundant layers of the first and the last checkpoint: yes above "
        f"{likely:.2f}, which 95 of 100 random sets stay within, no at or below it; by the {_BAND}"
    )
    if series.checkpoints.height < 2:
        return Check(f"{component}-from-the-start", question, "undecided", "one checkpoint", rule)
    low, high = _band(curve)
    figure = f"{curve.values[0]:.2f} at {_name(series, 0)}" + _told(curve, 0)
    answer = _answer(yes=bool(low[0] > likely), no=bool(high[0] <= likely))
    return Check(f"{component}-from-the-start", question, answer, figure, rule)


def _settles_early(series: Series, component: str, onset: pl.DataFrame) -> Check:
    k = quarter(len(series.grids[component].layers))
    question = (
        f"Are the most redundant layers ({_label(component)}) settled after a fifth of the training (arXiv 2410.11451: "
        "most layers of large models are)?"
    )
    rule = (
        f"the first checkpoint from which the {k} most redundant layers are those of the last: yes within the first "
        f"fifth of the training, no behind it; by the {_BAND}; undecided with fewer than {FEWEST} checkpoints"
    )
    name = f"{component}-settles-early"
    rows = onset.filter(pl.col("k") == k)
    if rows.is_empty() or series.checkpoints.height < FEWEST:
        return Check(name, question, "undecided", "too few checkpoints or layers", rule)
    row = rows.row(0, named=True)
    share = _shares(series)
    ends = [row["order"] if row[end] is None else row[end] for end in ("low_order", "high_order")]
    figure = f"{row['revision']}, {share[row['order']]:.1%} of the way"
    if row["low_order"] is not None:
        figure += f" ({_name(series, ends[0])} to {_name(series, ends[1])})"
    answer = _answer(yes=share[ends[1]] <= EARLY, no=share[ends[0]] > EARLY)
    return Check(name, question, answer, figure, rule)


def _attention_drops_free(series: Series, costs: pl.DataFrame) -> Check:
    name = "attention-drops-free"
    question = "Does dropping attention cost far less than dropping MLPs or blocks (arXiv 2406.15786, Table 1)?"
    rule = (
        "loss that is added by dropping as many of each by importance, about a quarter, at the last checkpoint where "
        "that was measured: yes if attention adds less than half of what MLP and block each add, no if it adds more "
        f"than one of them; by {_MARGIN}"
    )
    kinds = ("attn", "mlp", "block")
    by_kind = costs.filter(pl.col("order") == "importance")
    found = _at_one_number(series, by_kind, "component", kinds, n_needed=2, share=0.25)
    if found is None:
        return Check(name, question, "undecided", _UNMEASURED, rule)
    at, dataset, count, cells = found
    attn, others = cells["attn"], [cells[kind] for kind in kinds[1:] if kind in cells]
    figure = f"{count} dropped at {_name(series, at)} on {dataset} add " + ", ".join(
        f"{_label(kind)} {_added(cell)}" for kind, cell in cells.items()
    )
    same = by_kind.filter((pl.col("dataset") == dataset) & (pl.col("n_dropped") == count))
    wide = same.pivot("component", index="at", values="added").drop_nulls()
    if wide.height > 1:
        least = pl.min_horizontal([pl.col(kind) for kind in kinds[1:] if kind in wide.columns])
        figure += f"; less than half at {wide.filter(pl.col('attn') < least / 2).height} of {wide.height} checkpoints"
    answer = _answer(
        yes=all(_is_less(attn, other, 0.5) for other in others), no=any(_is_less(other, attn) for other in others)
    )
    return Check(name, question, answer, figure, rule)


def _importance_beats_others(series: Series, costs: pl.DataFrame) -> Check:
    name = "importance-beats-others"
    question = (
        "Does dropping attention by importance cost less than at random and deepest first (arXiv 2406.15786, Table 7)?"
    )
    rule = (
        "loss that is added by dropping as many attentions in each order, about half, at the last checkpoint where "
        "that was measured: yes if by importance adds less than the mean of random orders and than deepest first, no "
        f"if it adds more than one of them; by {_MARGIN}"
    )
    orders = ("importance", "random", "deepest")
    n_layers = len(series.grids["attn"].layers) if "attn" in series.grids else 0
    of_attention = costs.filter((pl.col("component") == "attn") & (pl.col("n_dropped") < n_layers))
    found = _at_one_number(series, of_attention, "order", orders, n_needed=3, share=0.5)
    if found is None:
        return Check(name, question, "undecided", _UNMEASURED, rule)
    at, dataset, count, cells = found
    best, others = cells["importance"], [cells[order] for order in orders[1:]]
    figure = f"{count} of {n_layers} dropped at {_name(series, at)} on {dataset} add " + ", ".join(
        f"{_ORDERS[order]} {_added(cell)}" for order, cell in cells.items()
    )
    answer = _answer(yes=all(_is_less(best, other) for other in others), no=any(_is_less(o, best) for o in others))
    return Check(name, question, answer, figure, rule)


def _at_one_number(
    series: Series, costs: pl.DataFrame, column: str, wanted: tuple[str, ...], *, n_needed: int, share: float
) -> tuple[int, str, int, dict[str, _Cost]] | None:
    """What drops of one size add at the last checkpoint where they can be compared.

    Args:
        series: The series.
        costs: Rows of `drop_costs`.
        column: What is compared, `component` or `order`.
        wanted: Its values; the first `n_needed` must be there.
        n_needed: How many of them are needed.
        share: Of all layers: of several sizes, the nearest to it; of several texts, the one of most checkpoints.

    Returns:
        Place of the checkpoint, text, number dropped, and what each adds; None where nothing can be compared.
    """
    there = pl.col(column).filter(pl.col(column).is_in(wanted)).n_unique()
    needed = pl.col(column).filter(pl.col(column).is_in(wanted[:n_needed])).n_unique() == n_needed
    sizes = costs.group_by("at", "dataset", "n_dropped", maintain_order=True).agg(enough=needed, n=there)
    sizes = sizes.filter(pl.col("enough"))
    if sizes.is_empty():
        return None
    off = (pl.col("n_dropped") - share * (1 + series.last_layer)).abs()
    spread = pl.len().over("dataset", "n_dropped")
    last = sizes.with_columns(spread=spread).filter(pl.col("at") == pl.col("at").max())
    one = last.sort(off, "n", "spread", descending=[False, True, True], maintain_order=True).head(1)
    rows = costs.join(one, on=["at", "dataset", "n_dropped"], how="semi")
    cells = {row[column]: (row["added"], row["stderr"]) for row in rows.iter_rows(named=True)}
    at, dataset, count = one.select("at", "dataset", "n_dropped").row(0)
    return at, dataset, count, {name: cells[name] for name in wanted if name in cells}


def _is_less(cost: _Cost, other: _Cost, part: float = 1.0) -> bool:
    """Whether what is added is surely less than that part of another."""
    (value, error), (limit, spread) = cost, other
    margin = 1.96 * float(np.hypot(error or 0.0, part * (spread or 0.0)))
    return value + margin < part * limit


def _added(cost: _Cost) -> str:
    value, error = cost
    return f"{value:+.3f}" + ("" if error is None else f" ± {error:.2g}")


def _attention_first(series: Series, curve: Curve | None) -> Check:
    question = "Does joint dropping take many attentions before the first MLP (arXiv 2406.15786, sec. 7)?"
    rule = (
        f"share of the attentions that are less important than every MLP, at the last checkpoint: yes from "
        f"{MOST_ATTENTION_FIRST:.0%} (the paper: over 14 of 32, 18 of 40), no below; by the {_BAND}"
    )
    if curve is None:
        return Check("attention-first", question, "undecided", "attention and MLP are not both scored", rule)
    n_layers = len(series.grids["attn"].layers)
    low, high = _band(curve)
    figure = f"{curve.values[-1]:.0f} of {n_layers} at the last checkpoint{_told(curve, -1, digits=0)}"
    if series.checkpoints.height > 1:
        figure += f", {curve.values[0]:.0f} at {_name(series, 0)}"
    least = MOST_ATTENTION_FIRST * n_layers
    return Check(
        "attention-first", question, _answer(yes=bool(low[-1] >= least), no=bool(high[-1] < least)), figure, rule
    )


def _calibration(series: Series, calibrations: pl.DataFrame) -> Check:
    question = "Do the most redundant layers depend little on the calibration (arXiv 2406.15786, Figs. 2, 3, 10)?"
    rule = (
        "most redundant quarter of the layers at the last checkpoint that all calibrations scored: yes if every two "
        "calibrations share three of four, for every component; no if not; undecided with one calibration"
    )
    within = calibrations.join(series.checkpoints.select("order", "revision"), on="revision", maintain_order="left")
    if within.is_empty():
        return Check("calibration-matters-little", question, "undecided", "one calibration", rule)
    last = within.filter(pl.col("order") == pl.col("order").max())
    least = last.row(int(np.argmin(last["shared"].to_numpy() / last["k"].to_numpy())), named=True)
    figure = (
        f"at {least['revision']} at least {least['shared']} of {least['k']} shared ({_label(least['component'])}, "
        f"{least['calibration']} and {least['other_calibration']})"
    )
    same = bool((last["shared"] * 4 >= last["k"] * 3).all())
    return Check("calibration-matters-little", question, "yes" if same else "no", figure, rule)


def _answer(*, yes: bool, no: bool) -> Answer:
    return "yes" if yes else "no" if no else "undecided"


def _band(curve: Curve) -> tuple[Array, Array]:
    """Interval at every checkpoint, without standard errors the values themselves."""
    band = interval(curve.draws)
    return (curve.values, curve.values) if band is None else band


def _told(curve: Curve, at: int, digits: int = 2) -> str:
    band = interval(curve.draws)
    return "" if band is None else f" ({band[0][at]:.{digits}f} to {band[1][at]:.{digits}f})"


def _shares(series: Series) -> Array:
    """How far into the series each checkpoint is, 0 … 1."""
    places = np.array([np.nan if value is None else value for value in series.axis.values])
    return np.asarray(places / places[-1])


def _shown(value: float, *, signed: bool = False) -> str:
    return f"{value:+.2g}" if signed else f"{value:.3g}"


def _name(series: Series, order: int) -> str:
    return str(series.checkpoints["revision"][order])


def _label(component: str) -> str:
    return {"attn": "attention", "mlp": "MLP", "block": "block"}.get(component, component)
