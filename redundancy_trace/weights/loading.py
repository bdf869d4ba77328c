"""Tensors by name → parameters of a transformers model, as transformers itself does it, but strictly complete.

The only module that calls internals of transformers (`core_model_loading`, `conversion_mapping`); the whole-model
loader at the end goes the public way and is the check of the rest.
"""

import contextlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from redundancy_trace.errors import CheckpointError, first_line
from redundancy_trace.heap import letting_go
from redundancy_trace.weights.completeness import refuse_incomplete
from redundancy_trace.weights.files import WeightFiles, open_weights
from redundancy_trace.weights.original_olmo import is_original_olmo, native_config, native_weights


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a checkpoint folder.

    Raises:
        CheckpointError: If `config.json` is missing, broken, or of an architecture that this transformers lacks.
    """
    from transformers import AutoConfig

    file = folder / "config.json"
    _config_fields(file)
    try:
        with _quiet():
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # the library raises many kinds; each means that this config cannot be used
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{folder} brings model code of its own, which transformers lacks. Look at it, then run it with "
                "--trust-remote-code."
            ) from error
        raise CheckpointError(f"{file} cannot be used: {first_line(error)}") from error


def _config_fields(file: Path) -> Any:
    if not file.is_file():
        raise CheckpointError(f"{file.parent} has no config.json.")
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{file} is no valid JSON: {error}.") from error


@dataclass(frozen=True)
class _Stored:
    """What a checkpoint folder holds.

    Attributes:
        config: The configuration of a model of transformers.
        weights: The tensors of that model.
        translated: Whether the files have another layout, which transformers does not read by itself.
    """

    config: Any
    weights: WeightFiles
    translated: bool


def _stored(folder: Path, *, trust_remote_code: bool, weights: WeightFiles | None = None) -> _Stored:
    """Open a checkpoint folder. A layout that we translate is never left to the folder's own code."""
    file = folder / "config.json"
    fields = _config_fields(file)
    weights = weights or open_weights(folder)
    if is_original_olmo(fields, weights.info):
        config = native_config(fields, file)
        return _Stored(config, native_weights(weights, config), translated=True)
    return _Stored(read_config(folder, trust_remote_code=trust_remote_code), weights, translated=False)


@dataclass(frozen=True)
class EmptyModel:
    """A model without memory for its parameters, and which stored tensors belong where.

    Attributes:
        model: Parameters on the meta device, buffers real.
        weights: The open weight files.
        dtype: Compute dtype of floating parameters.
        device: Where parameters are put when they are loaded.
        targets: Stored name to (name of the parameter it fills, whether it is converted on the way).
    """

    model: Any
    weights: WeightFiles
    dtype: torch.dtype
    device: torch.device
    targets: dict[str, tuple[str, bool]]
    _mapping: list[Any]

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """At the end the model is as empty as it was before, whatever was loaded meanwhile; its memory is free."""
        before = [(module, dict(module._parameters)) for module in self.model.modules()]
        embedding = self.model.get_input_embeddings()
        padding = getattr(embedding, "padding_idx", None)
        try:
            yield
        finally:
            with letting_go():
                for module, parameters in before:
                    module._parameters.update(parameters)
                embedding.padding_idx = padding

    def stored_names(self, module_name: str) -> tuple[str, ...]:
        """Stored names of the tensors that fill the parameters of the submodule `module_name`."""
        return tuple(stored for stored, (target, _) in self.targets.items() if target.startswith(module_name + "."))

    def load_(self, stored_names: Iterable[str], read: Mapping[str, Tensor] | None = None) -> None:
        """Fill the parameters that the stored tensors belong to, in place, converted as transformers does.

        Args:
            stored_names: The tensors.
            read: The same, where they have been read already.
        """
        slices = dict(read) if read is not None else self.weights.slices(stored_names)
        info = _convert(self.model, slices, self._mapping, self.device, self.dtype)
        _refuse(self.weights.folder, info, missing=())

    def load_embedding_rows_(self, rows: Tensor) -> bool:
        """Fill the input embedding with the given rows of its matrix only; False if that cannot be done."""
        embedding = self.model.get_input_embeddings()
        stored = self._stored_for(f"{_name_of(self.model, embedding)}.weight")
        if stored is None:
            return False
        matrix = self.weights.rows(stored, rows).to(self.device, self.dtype)
        embedding.weight = nn.Parameter(matrix, requires_grad=False)
        # torch refuses a padding index beyond the rows; it only matters to gradients.
        embedding.padding_idx = None
        return True

    def load_head_(self) -> None:
        """Fill the output head: its own tensors, and the whole embedding matrix where that is tied to it."""
        head = self.model.get_output_embeddings()
        name = _name_of(self.model, head)
        own = self.stored_names(name)
        self.load_(own)
        # As transformers does: a head of its own in the file wins over the tie in the configuration.
        if not any(self.targets[stored][0] == f"{name}.weight" for stored in own):
            stored = self._stored_for(f"{name}.weight")
            assert stored is not None  # else it would have been missing
            matrix = self.weights.read([stored])[stored].to(self.device, self.dtype)
            head.weight = nn.Parameter(matrix, requires_grad=False)

    def _stored_for(self, parameter: str) -> str | None:
        """Stored name of the tensor that is a parameter, its own before a tied one; None if it must be converted."""
        stored = {target: name for name, (target, converted) in self.targets.items() if not converted}
        return next((stored[name] for name in _tied_with(self.model, parameter) if name in stored), None)


def build_empty_model(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    weights: WeightFiles | None = None,
) -> EmptyModel:
    """Build a checkpoint's model on the meta device and match its files to the parameters, by headers alone.

    Args:
        folder: A checkpoint folder: config.json and weights.
        device: Where parameters go when they are loaded.
        dtype: Compute dtype.
        trust_remote_code: Whether model code in the folder may be run.
        weights: The weights, where they are not in the folder.

    Raises:
        CheckpointError: If a tensor is missing, unexpected or misshapen (named), or files or config cannot be used.
    """
    stored = _stored(folder, trust_remote_code=trust_remote_code, weights=weights)
    return _matched(stored, device=device, dtype=dtype, trust_remote_code=trust_remote_code)


class ModelBuilder:
    """Builds empty models, and has the last one ready for the next checkpoint that needs the same.

    The checkpoints of a run have one configuration and one set of tensors: their model is built, and held against the
    names and shapes in the files, once. Not for several threads at a time.
    """

    def __init__(self) -> None:
        self._built: tuple[Any, EmptyModel] | None = None

    def build(
        self,
        folder: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        trust_remote_code: bool = False,
        weights: WeightFiles | None = None,
    ) -> EmptyModel:
        """As `build_empty_model`; a model that was given out before must be empty again (`EmptyModel.released`)."""
        stored = _stored(folder, trust_remote_code=trust_remote_code, weights=weights)
        config = stored.config.to_dict()
        config.pop("_name_or_path", None)
        wanted = type(stored.config), config, dict(stored.weights.info), device, dtype
        # Another commit may bring other code.
        if self._built is not None and not trust_remote_code and self._built[0] == wanted:
            return replace(self._built[1], weights=stored.weights)
        self._built = None  # its memory first
        empty = _matched(stored, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        # Without the files: they could not be deleted while they are open.
        self._built = wanted, replace(empty, weights=WeightFiles(stored.weights.folder, stored.weights.info, {}))
        return empty


def _matched(stored: _Stored, *, device: torch.device, dtype: torch.dtype, trust_remote_code: bool) -> EmptyModel:
    """As `build_empty_model`, of what is open already."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping

    folder, config, weights = stored.weights.folder, stored.config, stored.weights
    try:
        # Buffers stay real: they are computed from the configuration, not read.
        with _quiet(), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
            # The constructor computed them in `dtype`; loading a model, transformers computes them again outside of it.
            for module in model.modules():
                module._is_hf_initialized = False
            model.initialize_weights()
    except Exception as error:  # any failure means that this config makes no causal language model
        raise CheckpointError(
            f"{folder / 'config.json'} ({type(config).__name__}) makes no causal language model: {first_line(error)}"
        ) from error
    model.eval().requires_grad_(False)
    with _quiet():
        mapping = get_model_conversion_mapping(model)
    targets = _targets(model, mapping, weights.info)
    shapes = {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in weights.info.items()}
    report = _convert(model, shapes, mapping, torch.device("meta"), dtype)
    _refuse(folder, report, missing=_truly_missing(model, report.missing_keys))
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":  # meta: in the files, and loaded with the rest
                module._buffers[name] = buffer.to(device)
    return EmptyModel(model, weights, dtype, device, targets, mapping)


def release_(module: nn.Module) -> None:
    """Put all parameters of a module back on the meta device, in place; their memory goes back to the system."""
    with letting_go():
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and parameter.device.type != "meta":
                    empty = torch.empty_like(parameter, device="meta")
                    part._parameters[name] = nn.Parameter(empty, requires_grad=False)


def load_whole_model(folder: Path, *, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """Load a checkpoint as transformers does, and refuse what it would fill with random numbers.

    Raises:
        CheckpointError: As `build_empty_model`.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    stored = _stored(folder, trust_remote_code=trust_remote_code)
    # By headers alone: what does not fit is named before a parameter takes memory.
    _matched(stored, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    settings: dict[str, Any] = {
        "config": stored.config,
        "dtype": dtype,
        "local_files_only": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    try:
        with _quiet():
            if stored.translated:
                model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(stored.config)]
                # Memory-mapped, so that this takes no memory.
                tensors = stored.weights.read(stored.weights.info)
                loaded: Any = model_class.from_pretrained(None, state_dict=tensors, **settings)
            else:
                loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code, **settings)
    except Exception as error:  # the library raises many kinds; each means that this cannot be loaded
        raise CheckpointError(f"{folder} cannot be loaded: {first_line(error)}") from error
    model, info = loaded
    _refuse(folder, _LoadingInfo(**info), missing=info["missing_keys"])
    return model.eval().requires_grad_(False).to(device)


@dataclass(frozen=True)
class _LoadingInfo:
    """What transformers reports of a loading."""

    missing_keys: Any = ()
    unexpected_keys: Any = ()
    mismatched_keys: Any = ()
    error_msgs: Any = ()
    conversion_errors: Any = ()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, reports and warnings of transformers: what they would tell is raised as an error instead."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _convert(model: Any, stored: dict[str, Any], mapping: list[Any], device: torch.device, dtype: torch.dtype) -> Any:
    """Rename, fuse and set the stored tensors as transformers does; returns its report."""
    from copy import deepcopy

    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    config = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        # Converters remember what they were given.
        weight_mapping=deepcopy(mapping),
    )
    with _quiet():
        info, _ = convert_and_load_state_dict_in_model(model, stored, config)
    return info


def _targets(model: Any, mapping: list[Any], stored: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Stored name → (name of the parameter it goes into, whether it is converted on the way)."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    state = model.state_dict()
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    targets = {}
    for name in stored:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if renamed in state:  # the rest is a buffer that is recomputed, or is refused by name
            targets[name] = renamed, pattern is not None
    return targets


def _truly_missing(model: Any, missing: Iterable[str]) -> list[str]:
    """Missing names that nothing else fills: neither tied to a present one nor declared optional by the model."""
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = set(missing)
    return sorted(
        name
        for name in missing
        if missing.issuperset(_tied_with(model, name)) and not any(pattern.search(name) for pattern in optional)
    )


def _tied_with(model: Any, parameter: str) -> list[str]:
    """Names of all parameters that are one with `parameter`, itself first."""
    tied = model.all_tied_weights_keys
    source = tied.get(parameter, parameter)
    return [parameter, source, *(name for name, other in tied.items() if other == source)]


def _refuse(folder: Path, info: Any, missing: Iterable[str]) -> None:
    """Raise unless the report is clean; `missing` are the names of parameters without a stored tensor."""
    refuse_incomplete(
        folder,
        missing=missing,
        unexpected=info.unexpected_keys,
        misshapen=info.mismatched_keys,
        not_convertible=info.conversion_errors or (),
    )


def _name_of(model: Any, wanted: Any) -> str:
    """Dotted name of a submodule."""
    return next((name for name, module in model.named_modules() if module is wanted), "")
