"""What an export is made from: a checkpoint's tensors by place, its configuration, and how each layer is cut.

Nothing but headers is read. How a layer is cut is found on layers with random weights, see `blocks.dropping`.
"""

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from redundancy_trace.blocks import find_layers, layer_kind
from redundancy_trace.blocks.dropping import parts_to_skip, surround_with_random_weights_, trial_layers
from redundancy_trace.blocks.zeroing import parameters_to_zero
from redundancy_trace.pruning.inplace import check_layers
from redundancy_trace.pruning.plans import DropPlan
from redundancy_trace.weights import EmptyModel, build_empty_model


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint.

    Attributes:
        name: Its name in the files.
        parameter: The parameter of the model that it fills, alone or with others.
        layer: Number of its layer; None outside of the layers.
        inside: The parameter's name within its layer; None outside.
        converted: Whether it is more than renamed on the way, as experts are that become one parameter.
    """

    name: str
    parameter: str
    layer: int | None
    inside: str | None
    converted: bool


@dataclass(frozen=True)
class Source:
    """A checkpoint folder, opened for an export.

    Attributes:
        folder: The checkpoint.
        empty: Its model without weights, and its files.
        layers_name: Dotted name of the decoder layers.
        layers: The layers, without weights.
    """

    folder: Path
    empty: EmptyModel
    layers_name: str
    layers: nn.ModuleList

    @property
    def config(self) -> Any:
        """Configuration of the model; not to be changed."""
        return self.empty.model.config

    @property
    def class_name(self) -> str:
        """Class of the model."""
        return type(self.empty.model).__name__

    @property
    def has_own_code(self) -> bool:
        """Whether the model's class is not one of transformers."""
        return not type(self.empty.model).__module__.startswith("transformers.models.")

    @property
    def n_parameters(self) -> int:
        """Numbers that are stored for the model."""
        return sum(self._sizes().values())

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype that most of the stored numbers have."""
        sizes = self._sizes()
        return max(sizes, key=sizes.__getitem__)

    def tensors(self) -> Iterator[StoredTensor]:
        """Every tensor that the model needs, in file order; buffers that are recomputed are left out."""
        for name in self.empty.weights.info:
            if name in self.empty.targets:
                parameter, converted = self.empty.targets[name]
                yield StoredTensor(name, parameter, *self._place(parameter), converted)

    def parts(self, plan: DropPlan) -> dict[int, list[tuple[Any, ...]]]:
        """Parts of layers that a plan skips, as `skipping.skip_` takes them."""
        check_layers(plan, len(self.layers))
        return parts_to_skip(self.empty.model, plan.by_layer())

    def zeros(self, plan: DropPlan) -> frozenset[str]:
        """Parameters that, zero, make the model compute what it does without the plan's components."""
        check_layers(plan, len(self.layers))
        trials = {self._kind(trial.index): trial for trial in trial_layers(self.empty.model)}
        found: dict[tuple[Hashable, str], tuple[str, ...]] = {}
        names: set[str] = set()
        for layer, components in plan.by_layer().items():
            for component in components:
                key = self._kind(layer), component
                if key not in found:
                    found[key] = parameters_to_zero(trials[key[0]], component)
                names |= {f"{self.layers_name}.{layer}.{inside}" for inside in found[key]}
        return frozenset(names)

    def _sizes(self) -> dict[torch.dtype, int]:
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.tensors():
            info = self.empty.weights.info[tensor.name]
            sizes[info.dtype] = sizes.get(info.dtype, 0) + math.prod(info.shape)
        return sizes

    def _kind(self, index: int) -> Hashable:
        return layer_kind(self.layers, index, self.config)

    def _place(self, parameter: str) -> tuple[int | None, str | None]:
        if not parameter.startswith(f"{self.layers_name}."):
            return None, None
        number, _, inside = parameter.removeprefix(f"{self.layers_name}.").partition(".")
        return int(number), inside


def open_source(folder: Path, *, trust_remote_code: bool = False) -> Source:
    """Open a checkpoint folder for an export.

    Raises:
        CheckpointError: A tensor is missing, unexpected or misshapen, or the model has no layers.
    """
    cpu = torch.device("cpu")
    empty = build_empty_model(folder, device=cpu, dtype=torch.float32, trust_remote_code=trust_remote_code)
    surround_with_random_weights_(empty.model)
    return Source(folder, empty, *find_layers(empty.model))
