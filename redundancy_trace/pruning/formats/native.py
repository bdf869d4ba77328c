"""`native`: whole blocks are left out; the result is a stock model with fewer layers, faster everywhere."""

import re
from pathlib import Path

from redundancy_trace.blocks import find_layers
from redundancy_trace.errors import InputError
from redundancy_trace.pruning.configs import check_same_layers, shortened
from redundancy_trace.pruning.formats.folders import OnBytes, write_config, write_tensors
from redundancy_trace.pruning.plans import DropPlan
from redundancy_trace.pruning.proving import prove_in_transformers
from redundancy_trace.pruning.selecting import DropSpec
from redundancy_trace.pruning.sources import Source, StoredTensor

# How an export is proven.
prove = prove_in_transformers
_ALONE = "--format hf (faster, with a small file of code), or --format zeroed (stock, not faster)"


def check_request(_source: Source, spec: DropSpec | None) -> None:
    """Refuse attentions or MLPs alone, whichever they will be.

    Raises:
        InputError: They are asked for.
    """
    if spec is not None and spec.wanted in ("attn", "mlp"):
        raise InputError(
            f"--format native leaves out whole blocks, and --drop {spec.text} drops only the {spec.wanted} of layers. "
            f"Use --drop block=2 or the like; or {_ALONE}."
        )


def check(source: Source, plan: DropPlan) -> None:
    """Refuse a plan that drops single sublayers.

    Raises:
        InputError: It does; names the first.
    """
    for layer, lost in plan.by_layer().items():
        if len(lost) == 1:
            (component,) = lost
            raise InputError(
                f"--format native leaves out whole blocks, and the plan drops only the {component} of layer {layer}. "
                f"Use {_ALONE}."
            )
    _short_model(source, plan)


def write(source: Source, plan: DropPlan, folder: Path, shard_bytes: int, on_bytes: OnBytes) -> None:
    """Write config and tensors of the kept layers, renumbered."""
    config = _short_model(source, plan)
    kept = _kept(source, plan)

    def name_of(tensor: StoredTensor) -> str | None:
        if tensor.layer is None:
            return tensor.name
        return _renumbered(tensor, source.layers_name, kept.index(tensor.layer)) if tensor.layer in kept else None

    write_config(source, config, folder)
    write_tensors(source, name_of, folder, shard_bytes, on_bytes)


def _kept(source: Source, plan: DropPlan) -> list[int]:
    return [layer for layer in range(len(source.layers)) if layer not in plan.blocks]


def _short_model(source: Source, plan: DropPlan) -> object:
    """Configuration of the shorter model, once its layers are seen to be those that were kept."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    kept = _kept(source, plan)
    config = shortened(source.config, kept)
    with init_empty_weights(include_buffers=False):
        model = type(source.empty.model)(config) if source.has_own_code else AutoModelForCausalLM.from_config(config)
    check_same_layers(source.layers, find_layers(model)[1], kept)
    return config


def _renumbered(tensor: StoredTensor, layers_name: str, number: int) -> str:
    """The stored name with another number of layer; files may leave out what stands in front of the list's own name."""
    own = layers_name.rpartition(".")[2]
    renamed, count = re.subn(rf"(^|\.){own}\.{tensor.layer}\.", rf"\g<1>{own}.{number}.", tensor.name, count=1)
    if not count:
        raise InputError(f"The tensor {tensor.name} does not tell its layer as {own}.{tensor.layer}; use --format hf.")
    return renamed
