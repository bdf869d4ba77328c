"""Plans carried out on one model in memory, one after the other, and the loss under each."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from redundancy_trace.blocks import find_layers
from redundancy_trace.blocks.dropping import parts_to_skip
from redundancy_trace.blocks.skipping import skip_
from redundancy_trace.evaluation.loss import TextLoss, text_loss
from redundancy_trace.evaluation.windows import Windows
from redundancy_trace.pruning import DropPlan
from redundancy_trace.pruning.inplace import check_layers
from redundancy_trace.store import Evaluated

_Drop = dict[int, frozenset[str]]


class Dropper:
    """Drops components of one model again and again; what stands in for a layer's parts is proven once and kept."""

    def __init__(self, model: Any) -> None:
        """Make ready for `model`, a causal language model of transformers; it is changed only while a drop is open."""
        self.model = model
        self._parts: dict[tuple[int, frozenset[str]], list[tuple[Any, ...]]] = {}

    def check(self, plan: DropPlan) -> None:
        """Refuse a plan of a model with another number of layers.

        Raises:
            InputError: It is.
        """
        check_layers(plan, len(find_layers(self.model)[1]))

    @contextmanager
    def dropped(self, plan: DropPlan) -> Iterator[Any]:
        """The model without the components of a plan, as long as this is open.

        Raises:
            InputError: The plan is of a model with another number of layers.
            CheckpointError: What is to be dropped cannot be proven.
        """
        _, layers = find_layers(self.model)
        check_layers(plan, len(layers))
        wanted = plan.by_layer()
        for kind in {lost for layer, lost in wanted.items() if (layer, lost) not in self._parts}:
            found = parts_to_skip(self.model, dict.fromkeys(range(len(layers)), kind))
            self._parts |= {(layer, kind): parts for layer, parts in found.items()}
        replaced = skip_(layers, {layer: self._parts[layer, lost] for layer, lost in wanted.items()})
        try:
            yield self.model
        finally:
            for layer, name, original in replaced:
                setattr(layer, name, original)


class DropLosses:
    """The loss of one model on one text, under any number of plans; what drops the same is measured once."""

    def __init__(
        self,
        dropper: Dropper,
        windows: Windows,
        *,
        batch_size: int | None = None,
        on_measured: Callable[[], None] | None = None,
    ) -> None:
        """Measure `dropper.model` on `windows`; `on_measured` is told of every loss that was measured."""
        self._dropper = dropper
        self._windows = windows
        self._batch_size = batch_size
        self._on_measured = on_measured
        self._known: dict[tuple[tuple[int, frozenset[str]], ...], TextLoss] = {}

    def of(self, plan: DropPlan | None) -> TextLoss:
        """The loss without the components of a plan, or of the whole model."""
        key = () if plan is None else tuple(plan.by_layer().items())
        if key not in self._known:
            if plan is None:
                self._known[key] = self._measure()
            else:
                with self._dropper.dropped(plan):
                    self._known[key] = self._measure()
            if self._on_measured is not None:
                self._on_measured()
        return self._known[key]

    def rows(self, plan: DropPlan | None, *, every: bool = False) -> list[Evaluated]:
        """The loss as a number, with what was dropped and how much that added; all that follows from it if `every`."""
        found = self.of(plan)
        numbers = found.numbers() if every else [found.loss()]
        if plan is not None:
            numbers.append(found.added_to(self.of(None)))
        return [with_plan(number, plan) for number in numbers]

    def _measure(self) -> TextLoss:
        return text_loss(self._dropper.model, self._windows, batch_size=self._batch_size)


def distinct_drops(plans: Sequence[DropPlan | None]) -> int:
    """How many of the plans drop different components: so many losses are measured."""
    return len({() if plan is None else tuple(plan.by_layer().items()) for plan in plans})


def with_plan(number: Evaluated, plan: DropPlan | None) -> Evaluated:
    """A number with what was dropped when it was measured."""
    if plan is None:
        return replace(number, n_dropped=0)
    order, _, seed = plan.order.partition(":")
    last = plan.components[-1]
    return replace(
        number,
        plan=plan.drop,
        plan_revision=plan.revision,
        plan_sha256=plan_hash(plan),
        component=dropped_kind(plan),
        n_dropped=len(plan.components),
        order=order,
        order_seed=int(seed) if seed else None,
        last_component=last.component,
        last_layer=last.layer,
    )


def dropped_kind(plan: DropPlan) -> str:
    """attn, mlp or block where a plan drops nothing else; `joint` where it drops both sublayers; else `mixed`."""
    if plan.drop.startswith("joint"):
        return "joint"
    kinds = {one.component for one in plan.components}
    return kinds.pop() if len(kinds) == 1 else "joint" if kinds == {"attn", "mlp"} else "mixed"


def plan_hash(plan: DropPlan) -> str:
    """SHA-256 over all that a plan says."""
    return hashlib.sha256(json.dumps(asdict(plan), sort_keys=True).encode()).hexdigest()


def beginnings(plan: DropPlan) -> list[DropPlan]:
    """The plans that drop the first 1, 2, … components of a plan."""
    wanted = plan.drop.partition("=")[0]
    return [
        replace(plan, drop=f"{wanted}={count}", components=plan.components[:count])
        for count in range(1, len(plan.components) + 1)
    ]


def most_that_can_go(component: str, order: str, n_layers: int) -> int:
    """How many of a kind can be dropped at most under an order: one block stays, of deepest first the last layer."""
    each = 2 if component == "joint" else 1
    whole = each * n_layers - (1 if component in ("block", "joint") else 0)
    return min(whole, each * (n_layers - 1)) if order == "deepest" else whole
