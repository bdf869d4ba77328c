"""What a drop plan is: which components of one checkpoint go, in which order, and why. A small JSON."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from redundancy_trace.errors import InputError
from redundancy_trace.metrics import COMPONENTS, Component
from redundancy_trace.writing import write_whole

_VERSION = 1


@dataclass(frozen=True)
class DroppedComponent:
    """One component that is dropped.

    Attributes:
        component: `attn`, `mlp` or `block`.
        layer: Layer, from 0.
        importance: Its importance S when it was chosen (0 = redundant); None where it was named without scores. Of
            consecutive blocks, that of all of them together: 1 − mean cosine of the states in front of and behind them.
    """

    component: Component
    layer: int
    importance: float | None = None

    def __str__(self) -> str:
        return f"{self.component}:{self.layer}"


@dataclass(frozen=True)
class DropPlan:
    """Components to drop, in drop order.

    Attributes:
        model: The model, as the scores name it.
        revision: The checkpoint whose scores decided.
        commit: Its commit; None of a model that was scored in memory.
        identity: Identity of the scores' rows; None where no scores decided, or they have none.
        calibration: What the scores were measured on.
        drop: What was asked for, such as `attn=8`.
        order: `importance`, `random:SEED`, `deepest`, `consecutive`, `iterative` or `named`.
        n_layers: Layers of the model, before.
        components: What is dropped, in order.
    """

    model: str | None
    revision: str | None
    commit: str | None
    identity: str | None
    calibration: str | None
    drop: str
    order: str
    n_layers: int
    components: tuple[DroppedComponent, ...]

    def __post_init__(self) -> None:
        check_components(self.components, self.n_layers)

    def by_layer(self) -> dict[int, frozenset[str]]:
        """Layer to the sublayers it loses, `attn`, `mlp` or both (a block is both); layers ascending."""
        lost: dict[int, set[str]] = {}
        for one in self.components:
            lost.setdefault(one.layer, set()).update(("attn", "mlp") if one.component == "block" else (one.component,))
        return {layer: frozenset(lost[layer]) for layer in sorted(lost)}

    @property
    def blocks(self) -> tuple[int, ...]:
        """Layers of which nothing stays, ascending."""
        return tuple(layer for layer, lost in self.by_layer().items() if len(lost) == 2)

    def layers_of(self, component: str) -> tuple[int, ...]:
        """Layers that lose their `attn` or `mlp`, ascending; those of dropped blocks are among them."""
        return tuple(layer for layer, lost in self.by_layer().items() if component in lost)

    def told(self) -> str:
        """The plan in a line.

        Example:
            >>> DropPlan("org/m", "step8", None, None, None, "attn=2", "importance", 4,
            ...          (DroppedComponent("attn", 3, 0.01), DroppedComponent("attn", 1, 0.02))).told()
            'attn=2 of org/m at step8 (4 layers), order importance: attn 3 1'
        """
        of = " at ".join(filter(None, (self.model, self.revision))) or "a model"
        listed = "; ".join(
            f"{name} {' '.join(layers)}"
            for name in COMPONENTS
            if (layers := [str(one.layer) for one in self.components if one.component == name])
        )
        return f"{self.drop} of {of} ({self.n_layers} layers), order {self.order}: {listed}"

    def write(self, path: str | Path) -> Path:
        """Write the plan as JSON, whole or not at all; `read_plan` reads it.

        Raises:
            InputError: It cannot be written.
        """
        file = Path(path).expanduser()
        text = json.dumps({"version": _VERSION, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"
        try:
            return write_whole(file, lambda part: part.write_text(text, encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{file} cannot be written ({error.strerror or error}).") from error


def read_plan(path: str | Path) -> DropPlan:
    """The plan that `DropPlan.write` wrote, or another hand in its form.

    Raises:
        InputError: There is none, a field is missing or of another kind, or what it drops cannot be dropped.
    """
    file = Path(path).expanduser()
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"There is no plan {file} ({error.strerror}). trace prune --drop SPEC makes one.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is no plan: it is no valid JSON ({error}).") from error
    try:
        return plan_from_json(held)
    except InputError as error:
        raise InputError(f"{file} is no plan that can be used: {error}") from error


def plan_from_json(held: Any) -> DropPlan:
    """A plan from the content of its JSON.

    Raises:
        InputError: A field is missing or of another kind, or what it drops cannot be dropped.
    """
    if not isinstance(held, dict) or held.get("version") != _VERSION:
        raise InputError(f"its version is not {_VERSION}; make it anew with this program.")
    texts = ("model", "revision", "commit", "identity", "calibration")
    for name, kind in (
        *((name, str | None) for name in texts), ("drop", str), ("order", str), ("n_layers", int), ("components", list)
    ):  # fmt: skip
        if name not in held or not isinstance(held[name], kind) or isinstance(held[name], bool):
            raise InputError(f"its field {name!r} is missing or of another kind.")
    components = tuple(map(_component_from_json, held["components"]))
    fields = {name: held[name] for name in (*texts, "drop", "order", "n_layers")}
    return DropPlan(**fields, components=components)


def _component_from_json(held: Any) -> DroppedComponent:
    if not isinstance(held, dict) or held.get("component") not in get_args(Component):
        raise InputError(f"{held!r} names no component; known are {', '.join(COMPONENTS)}.")
    layer, importance = held.get("layer"), held.get("importance")
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise InputError(f"{held!r} names no layer.")
    if importance is not None and not (isinstance(importance, (int, float)) and math.isfinite(importance)):
        raise InputError(f"{held!r} has an importance that is no number.")
    return DroppedComponent(held["component"], layer, importance)


def check_components(components: tuple[DroppedComponent, ...], n_layers: int) -> None:
    """Refuse what cannot be dropped from a model of so many layers.

    Raises:
        InputError: Nothing, a layer that is not there, something twice, or every block.
    """
    if not components:
        raise InputError("The plan drops nothing. Ask for at least one component, such as attn=1.")
    sublayers: set[tuple[str, int]] = set()
    for one in components:
        if not 0 <= one.layer < n_layers:
            raise InputError(f"{one}: there is no layer {one.layer}; the layers are 0 to {n_layers - 1}.")
        lost = {(name, one.layer) for name in (("attn", "mlp") if one.component == "block" else (one.component,))}
        if lost & sublayers:
            raise InputError(f"{one} is dropped already by what stands before it in the plan; name it once.")
        sublayers |= lost
    if len(sublayers) == 2 * n_layers:
        raise InputError(f"All {n_layers} blocks would be dropped: no model is left. Keep at least one.")
