"""Computing in float32 with weights that stay as they are stored: for models whose copy in float32 has no room."""

from typing import Any

from torch import nn


def widen_(model: Any) -> Any:
    """Let every module of a model read its weights as float32 while it runs, and only then, in place.

    Of weights that are mapped from their files no more is in memory than the largest module's. For models whose
    modules use no weights but their own, and keep no constants in the dtype of the weights (as Gemma does), so for
    Llama-shaped ones.

    Args:
        model: A causal language model on the CPU.

    Returns:
        The model.
    """
    for module in model.modules():
        if any(parameter.is_floating_point() for parameter in module.parameters(recurse=False)):
            module.register_forward_pre_hook(_widen)
            module.register_forward_hook(_put_back, always_call=True)
    return model


def _widen(module: Any, _inputs: Any) -> None:
    module.stored_parameters = stored = dict(module._parameters)
    for name, parameter in stored.items():
        if parameter is not None and parameter.is_floating_point():
            module._parameters[name] = nn.Parameter(parameter.float(), requires_grad=False)


def _put_back(module: Any, _inputs: Any, _output: Any) -> None:
    module._parameters.update(module.stored_parameters)
    del module.stored_parameters
