"""`hf`: a folder with a small file of code of its own; dropped parts are absent, not computed and not cached.

The class in it is the stock class, built as ever, whose dropped parts are then replaced by stand-ins without weights.
The type in config.json is one that transformers does not know: it would load a known one without the code, too, and
fill what is absent with random numbers.
"""

from copy import deepcopy
from importlib.resources import files
from pathlib import Path

from redundancy_trace.errors import InputError
from redundancy_trace.pruning.formats.folders import OnBytes, write_config, write_tensors
from redundancy_trace.pruning.plans import DropPlan
from redundancy_trace.pruning.proving import prove_in_transformers
from redundancy_trace.pruning.selecting import DropSpec
from redundancy_trace.pruning.sources import Source, StoredTensor

MODULE = "modeling_pruned"
_CODE = '''

class PrunedConfig({config}):
    """{config} under a type of its own: without this file, no one takes it for that of the whole model."""

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        fields, more = super().get_config_dict(*args, **kwargs)
        return {{**fields, "model_type": cls.model_type}}, more

    def to_dict(self):
        return {{**super().to_dict(), "model_type": "pruned_{model_type}"}}


class {pruned}({stock}):
    """{stock} without the parts that `skipped_parts` in its config.json names."""

    config_class = PrunedConfig

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        skipped = config.skipped_parts
        skip_(self.get_submodule(skipped["layers"]), skipped["parts"])
'''

# How an export is proven.
prove = prove_in_transformers


def check_request(source: Source, _spec: DropSpec | None) -> None:
    """Refuse a model that has code of its own.

    Raises:
        InputError: It has.
    """
    if source.has_own_code:
        raise InputError(
            f"{source.class_name} is code of the checkpoint's own, and --format hf builds on a class of transformers. "
            "Use --format zeroed."
        )


def check(source: Source, plan: DropPlan) -> None:
    """Refuse a plan that cannot be carried out.

    Raises:
        CheckpointError: What is dropped cannot be proven.
    """
    source.parts(plan)


def write(source: Source, plan: DropPlan, folder: Path, shard_bytes: int, on_bytes: OnBytes) -> None:
    """Write config, code, and the tensors of what is left."""
    parts = source.parts(plan)
    gone = {layer: {child for child, *_ in skipped} for layer, skipped in parts.items()}

    def name_of(tensor: StoredTensor) -> str | None:
        if tensor.layer in gone and str(tensor.inside).split(".")[0] in gone[tensor.layer]:
            return None
        # transformers renames nothing on the way into a class that is not its own.
        return tensor.name if tensor.converted else tensor.parameter

    pruned = f"Pruned{source.class_name}"
    config = deepcopy(source.config)
    config.auto_map = {"AutoConfig": f"{MODULE}.PrunedConfig", "AutoModelForCausalLM": f"{MODULE}.{pruned}"}
    config.skipped_parts = {
        "layers": source.layers_name,
        "parts": {str(layer): [list(part) for part in skipped] for layer, skipped in parts.items()},
    }
    write_config(source, config, folder, architecture=pruned, model_type=f"pruned_{config.model_type}")
    (folder / f"{MODULE}.py").write_text(_code(source, pruned), encoding="utf-8")
    write_tensors(source, name_of, folder, shard_bytes, on_bytes)


def _code(source: Source, pruned: str) -> str:
    skipping = files("redundancy_trace.blocks").joinpath("skipping.py").read_text(encoding="utf-8")
    last_import = "from torch import nn\n"
    assert last_import in skipping
    config = type(source.config)
    stock = ", ".join(sorted((source.class_name, config.__name__)))
    head = skipping.replace(last_import, f"{last_import}from transformers import {stock}\n", 1).rstrip("\n")
    return f"{head}\n" + _CODE.format(
        stock=source.class_name, pruned=pruned, config=config.__name__, model_type=config.model_type
    )
