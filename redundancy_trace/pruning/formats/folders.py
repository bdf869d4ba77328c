"""What every folder of Hugging Face has: config.json, safetensors, written tensor by tensor."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor

from redundancy_trace.pruning.sources import Source, StoredTensor
from redundancy_trace.weights import write_shards

OnBytes = Callable[[int], None] | None


def write_config(
    source: Source, config: Any, folder: Path, architecture: str | None = None, model_type: str | None = None
) -> None:
    """Write config.json, with the dtype of the stored tensors, and copy the code that it names."""
    config = deepcopy(config)
    config.architectures = [architecture or source.class_name]
    config.dtype = str(source.stored_dtype).removeprefix("torch.")
    fields = json.loads(config.to_json_string(use_diff=True))
    if model_type is not None:
        fields["model_type"] = model_type
    text = json.dumps(fields, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    if source.has_own_code:
        for file in source.folder.glob("*.py"):
            (folder / file.name).write_bytes(file.read_bytes())


def write_tensors(
    source: Source,
    name_of: Callable[[StoredTensor], str | None],
    folder: Path,
    shard_bytes: int,
    on_bytes: OnBytes = None,
    changed: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor,
) -> None:
    """Write the tensors of a checkpoint under the names that `name_of` gives, in their stored dtype; None: left out."""
    weights = source.empty.weights
    names = {new: tensor.name for tensor in source.tensors() if (new := name_of(tensor)) is not None}

    def read(new: str) -> Tensor:
        return changed(names[new], weights.read([names[new]])[names[new]])

    info = {new: weights.info[stored] for new, stored in names.items()}
    write_shards(folder, info, read, shard_bytes=shard_bytes, on_bytes=on_bytes)
