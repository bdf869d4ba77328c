"""From scores to a plan: the grammar of `--drop`, and the orders in which components go."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from redundancy_trace.errors import InputError, nearest
from redundancy_trace.metrics import COMPONENTS, Component
from redundancy_trace.pruning.plans import DroppedComponent, DropPlan

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

SPECS = "attn=8, mlp=25%, block<0.01, joint=6, attn:3,mlp:5,block:7"
ORDERS = "importance, random:SEED, deepest, consecutive, iterative"
Wanted = Literal["attn", "mlp", "block", "joint"]
Candidate = tuple[Component, int]
_SPEC = re.compile(r"(attn|mlp|block|joint)\s*(?:=\s*(\d+)(\.\d+)?(%)?|<\s*(\d*\.?\d+(?:[eE][-+]?\d+)?))")
_NAMED = re.compile(r"(attn|mlp|block):(\d+)")


@dataclass(frozen=True)
class DropSpec:
    """What is asked for; of `count`, `share`, `below` and `named` one is set.

    Attributes:
        text: As it is written.
        wanted: Which components may go: one kind, or `joint`, attention and MLP sorted together.
        count: How many.
        share: How many, as a share of all of them (0 to 1).
        below: All whose importance is below.
        named: These.
    """

    text: str
    wanted: Wanted | None = None
    count: int | None = None
    share: float | None = None
    below: float | None = None
    named: tuple[Candidate, ...] = ()


def parse_spec(text: str) -> DropSpec:
    """What `--drop` says.

    Raises:
        InputError: The grammar is not kept.

    Example:
        >>> parse_spec("mlp=25%").share, parse_spec("attn:3,block:7").named
        (0.25, (('attn', 3), ('block', 7)))
    """
    compact = text.strip()
    if match := _SPEC.fullmatch(compact):
        kind, whole, decimals, percent, below = match.groups()
        wanted: Any = kind
        compact = re.sub(r"\s+", "", compact)
        if below is not None:
            return DropSpec(compact, wanted, below=float(below))
        if percent:
            return DropSpec(compact, wanted, share=float(whole + (decimals or "")) / 100)
        if decimals is None:
            return DropSpec(compact, wanted, count=int(whole))
        raise InputError(f"--drop {text}: {whole}{decimals} is no number of components; a share is written 25%.")
    items = [item.strip() for item in compact.split(",") if item.strip()]
    named = [_NAMED.fullmatch(item) for item in items]
    if not items or not all(named):
        wrong = next((item for item, match in zip(items, named, strict=True) if match is None), text)
        raise InputError(f"--drop {text!r}: {wrong!r} is not understood. It is written like one of: {SPECS}.")
    found: Any = tuple((match[1], int(match[2])) for match in named if match)
    return DropSpec(",".join(items), named=found)


def plan_drop(
    scores: "pl.DataFrame | str | Path",
    revision: str | None = None,
    *,
    attn: int | str | None = None,
    mlp: int | str | None = None,
    block: int | str | None = None,
    joint: int | str | None = None,
    names: str | Sequence[str] | None = None,
    drop: str | None = None,
    order: str = "importance",
    calibration: str | None = None,
    distances: "pl.DataFrame | None" = None,
    model: Any = None,
    token_ids: "np.ndarray | Any" = None,
) -> DropPlan:
    """Plan which components of a checkpoint to drop (arXiv 2406.15786, attention, MLP, block and joint layer drop).

    Sorted by importance once, the lowest go; equal ones by layer, attention before MLP. `joint` sorts attention and MLP
    together as they are.

    Args:
        scores: Scores with the columns of `read_scores`, or a run folder.
        revision: Which checkpoint's; may be left out where there is only one.
        attn: How many attentions: 8, "25%" (of all, rounded), or "<0.01" (importance below).
        mlp: How many MLPs, likewise.
        block: How many whole layers, likewise.
        joint: How many of both sublayers together, likewise; a share is one of 2 · layers.
        names: These, in this order: "attn:3,mlp:5,block:7", or a list of such names.
        drop: The same as the command line has it: "attn=8", "mlp=25%", "block<0.01", "joint=6", "attn:3,mlp:5".
        order: `importance`; or what it is to be compared with: `random:SEED`, `deepest` (from the end, but the last
            layer is kept), `consecutive` (blocks: the n in a row whose input and output are most alike), `iterative`
            (scored anew after each drop; needs `model` and `token_ids`).
        calibration: Which calibration's scores; None = the first.
        distances: For `consecutive`: block distances as `read_distances` gives them; taken from a run folder.
        model: For `iterative`: the model in memory, as `load_model` gives it; it is as before afterwards.
        token_ids: For `iterative`: what to score on, shape (N, T).

    Returns:
        The plan.

    Raises:
        InputError: More than there is, all blocks, an unknown layer, revision or order; or a score that is missing or
            no number. Says what is there.

    Example:
        >>> plan_drop("runs/pythia-160m", "step143000", attn=8).write("plan.json")  # doctest: +SKIP
    """
    from redundancy_trace.store import read_distances, read_scores

    spec = _one_spec({"attn": attn, "mlp": mlp, "block": block, "joint": joint}, names, drop)
    if isinstance(scores, (str, Path)):
        if order == "consecutive" and distances is None:
            distances = read_distances(scores)
        scores = read_scores(scores)
    rows = _rows_of(scores, revision, calibration)
    importance = _importance(rows)
    n_layers = 1 + max(layer for _, layer in importance)
    first = rows.row(0, named=True)
    same = {name: first.get(name) for name in ("model", "revision", "commit", "identity", "calibration")}
    if order == "iterative":
        components = _iterative(spec, model, token_ids)
    elif order == "consecutive":
        components = _consecutive(spec, n_layers, _gaps(distances, first))
    else:
        components = choose(spec, order, n_layers, importance)
    kept = "named" if spec.named else order
    return DropPlan(**same, drop=spec.text, order=kept, n_layers=n_layers, components=components)


def plan_named(
    spec: DropSpec, n_layers: int, *, model: str | None, revision: str | None, commit: str | None
) -> DropPlan:
    """A plan of what is named, of a checkpoint without scores.

    Raises:
        InputError: It cannot be dropped.
    """
    components = tuple(DroppedComponent(name, layer) for name, layer in spec.named)
    return DropPlan(model, revision, commit, None, None, spec.text, "named", n_layers, components)


def choose(
    spec: DropSpec, order: str, n_layers: int, importance: dict[Candidate, float]
) -> tuple[DroppedComponent, ...]:
    """The components that a spec means under an order, in drop order.

    Args:
        spec: What is asked for.
        order: `importance`, `random:SEED` or `deepest`.
        n_layers: Layers of the model.
        importance: Importance of each component and layer.

    Raises:
        InputError: More than there is, no such order, or an importance that is missing.
    """
    if spec.named:
        if order != "importance":
            raise InputError(f"--drop {spec.text} names the components itself; leave out --order {order}.")
        for _, layer in spec.named:
            if layer >= n_layers:
                raise InputError(f"--drop {spec.text}: there is no layer {layer}; the layers are 0 to {n_layers - 1}.")
        return tuple(DroppedComponent(name, layer, importance.get((name, layer))) for name, layer in spec.named)
    found = candidates(spec, n_layers)
    if order == "importance":
        ranked = ranking(found, importance)
    elif order == "deepest":
        last = n_layers - 1
        ranked = sorted((c for c in found if c[1] < last), key=lambda c: (-c[1], c[0] == "attn"))
    elif match := re.fullmatch(r"random:(\d+)", order):
        ranked = _shuffled(found, int(match[1]))
    else:
        like = nearest(order, ("importance", "random:0", "deepest", "consecutive", "iterative"), count=1)
        hint = f" Did you mean {like[0]}?" if like else ""
        raise InputError(f"--order {order!r} is none of {ORDERS}.{hint}")
    if spec.below is not None:
        return _below(spec, order, ranked, importance)
    count = number_of(spec, n_layers)
    if count > len(ranked):
        kept = " (the last layer is kept)" if order == "deepest" else ""
        raise InputError(f"--drop {spec.text}: of {n_layers} layers, {len(ranked)} can be dropped at most{kept}.")
    return tuple(DroppedComponent(name, layer, importance.get((name, layer))) for name, layer in ranked[:count])


def check_request(spec: DropSpec, order: str, n_layers: int) -> None:
    """Refuse what no scores of a model of so many layers make possible, before it is scored.

    Raises:
        InputError: As `plan_drop`.
    """
    if order == "consecutive":
        _check_consecutive(spec)
    elif order == "iterative":
        check_iterative(spec)
    elif spec.below is None or order != "importance":
        choose(spec, order, n_layers, {(name, layer): 0.0 for name in COMPONENTS for layer in range(n_layers)})
    if spec.wanted is not None and spec.below is None:
        number_of(spec, n_layers)


def check_iterative(spec: DropSpec) -> None:
    """Refuse names where what goes is found by scoring again.

    Raises:
        InputError: Components are named.
    """
    if spec.named:
        raise InputError(f"--drop {spec.text} names the components itself; leave out --order iterative.")


def _check_consecutive(spec: DropSpec) -> None:
    if spec.wanted != "block" or spec.below is not None:
        raise InputError(f"--order consecutive takes a number or share of blocks, such as block=4, not {spec.text}.")


def candidates(spec: DropSpec, n_layers: int) -> list[Candidate]:
    """All components that a spec may mean, by layer, attention before MLP."""
    kinds: tuple[Component, ...]
    assert spec.wanted is not None
    kinds = ("attn", "mlp") if spec.wanted == "joint" else (spec.wanted,)
    return [(kind, layer) for layer in range(n_layers) for kind in kinds]


def ranking(found: Sequence[Candidate], importance: dict[Candidate, float]) -> list[Candidate]:
    """Components by importance, the most redundant first; equal ones stay as they are.

    Raises:
        InputError: One has no importance; a missing number is no rank.
    """
    for name, layer in found:
        if (name, layer) not in importance:
            raise InputError(
                f"These scores lack the importance of {name} in layer {layer}, or it is no number; score the "
                "checkpoint again."
            )
    return sorted(found, key=importance.__getitem__)


def number_of(spec: DropSpec, n_layers: int) -> int:
    """How many components are asked for: a share is rounded, halves up.

    Raises:
        InputError: None, or more than there are, or every block.
    """
    total = len(candidates(spec, n_layers))
    count = spec.count if spec.share is None else math.floor(spec.share * total + 0.5)
    assert count is not None
    if count < 1:
        raise InputError(f"--drop {spec.text}: that is none of {total}. Ask for at least one.")
    if count > total or (spec.share or 0) > 1:
        raise InputError(f"--drop {spec.text}: there are only {total} ({n_layers} layers). Ask for fewer.")
    if count == total and spec.wanted in ("block", "joint"):
        raise InputError(
            f"--drop {spec.text}: all {n_layers} blocks would be dropped and no model left. Ask for fewer."
        )
    return count


def _one_spec(amounts: dict[str, int | str | None], names: str | Sequence[str] | None, drop: str | None) -> DropSpec:
    given = [
        f"{name}{value if str(value).startswith('<') else f'={value}'}"
        for name, value in amounts.items()
        if value is not None
    ]
    if names is not None:
        given.append(names if isinstance(names, str) else ",".join(names))
    if drop is not None:
        given.append(drop)
    if len(given) != 1:
        said = f"{len(given)} are given ({', '.join(given)})" if given else "nothing is given"
        raise InputError(f"One of attn, mlp, block, joint, names and drop says what to drop; {said}.")
    return parse_spec(given[0])


def _rows_of(scores: "pl.DataFrame", revision: str | None, calibration: str | None) -> "pl.DataFrame":
    import polars as pl

    from redundancy_trace.analysis import one_calibration

    rows = one_calibration(scores, calibration)
    known = rows["revision"].unique(maintain_order=True).to_list()
    if revision is None:
        if len(known) > 1:
            raise InputError(
                f"These scores are of {len(known)} checkpoints, {known[0]} to {known[-1]}. Name one: revision="
                f"{known[-1]!r}, or --revision {known[-1]}."
            )
        revision = known[0]
    if revision not in known:
        like = nearest(revision, known) or known[-3:]
        raise InputError(
            f"There are no scores of {revision!r}; of its {len(known)} checkpoints nearest: {', '.join(like)}."
        )
    return rows.filter(pl.col("revision") == revision)


def _importance(rows: "pl.DataFrame") -> dict[Candidate, float]:
    """Importance of each component and layer; what is null or no finite number is left out, and never a rank."""
    from redundancy_trace.analysis import metric_values

    values = metric_values(rows, "importance").select("component", "layer", "value").rows()
    finite = {(name, layer): value for name, layer, value in values if value is not None and math.isfinite(value)}
    if not finite:
        raise InputError("These scores hold no importance; score the checkpoint again.")
    return finite


def _below(
    spec: DropSpec, order: str, ranked: Sequence[Candidate], importance: dict[Candidate, float]
) -> tuple[DroppedComponent, ...]:
    if order != "importance":
        raise InputError(f"--drop {spec.text} goes by importance; --order {order} takes a number or a share of them.")
    limit = spec.below or 0.0
    found = tuple(DroppedComponent(*one, importance[one]) for one in ranked if importance[one] < limit)
    if not found:
        name, layer = ranked[0]
        raise InputError(
            f"--drop {spec.text}: none is; the least important is {name} {layer} with {importance[ranked[0]]:.4g}."
        )
    return found


def _shuffled(found: Sequence[Candidate], seed: int) -> list[Candidate]:
    import numpy as np

    return [found[i] for i in np.random.default_rng(seed).permutation(len(found))]


def _gaps(distances: "pl.DataFrame | None", like: dict[str, Any]) -> dict[tuple[int, int], float]:
    """(i, j) → 1 − mean cosine of h_i and h_j, of the checkpoint and calibration that the row `like` is of."""
    import polars as pl

    if distances is None:
        raise InputError(
            "--order consecutive needs the block distances of a run: plan_drop(RUN, …), or "
            "distances=read_distances(RUN)."
        )
    wanted = pl.col("metric") == "cosine_similarity"
    for name in ("revision", "commit", "calibration"):
        wanted &= pl.col(name).eq_missing(pl.lit(like.get(name), dtype=pl.String))
    rows = distances.filter(wanted & pl.col("value").is_not_null())
    return {(i, j): 1.0 - value for i, j, value in rows.select("layer", "to_layer", "value").rows()}


def _consecutive(spec: DropSpec, n_layers: int, gaps: dict[tuple[int, int], float]) -> tuple[DroppedComponent, ...]:
    """The n blocks in a row whose input h_i and output h_(i + n) are most alike.

    The code published with the paper reads the column of the gap n + 1 here.
    """
    _check_consecutive(spec)
    count = number_of(spec, n_layers)
    starts = [i for i in range(n_layers - count + 1) if (i, i + count) in gaps]
    if len(starts) < n_layers - count + 1:
        raise InputError("The block distances of this checkpoint are not complete; score it again.")
    first = min(starts, key=lambda i: gaps[i, i + count])
    return tuple(DroppedComponent("block", layer, gaps[first, first + count]) for layer in range(first, first + count))


def _iterative(spec: DropSpec, model: Any, token_ids: Any) -> tuple[DroppedComponent, ...]:
    if model is None or token_ids is None:
        raise InputError(
            "--order iterative scores the model again after each drop: plan_drop(…, model=load_model(…), token_ids=…)."
        )
    from redundancy_trace.pruning.iterating import drop_one_by_one

    return drop_one_by_one(spec, model, token_ids)


Scorer = Callable[[], dict[Candidate, float]]


def importance_of(values: Sequence[Any]) -> dict[Candidate, float]:
    """Importance of each component and layer from the values of one scoring."""
    return {
        (value.component, value.layer): 1.0 - value.value
        for value in values
        if value.metric == "cosine_similarity" and value.component in COMPONENTS and value.value is not None
    }
