"""Commands whose options are the fields of a settings dataclass, so that a flag is defined in one place."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import typer

from redundancy_trace.settings import flag_of


def with_settings(
    command: Callable[..., Any],
    settings: type[Any],
    *,
    first: tuple[inspect.Parameter, ...] = (),
    last: tuple[inspect.Parameter, ...] = (),
) -> Any:
    """`command` with one option for each field of `settings`.

    Args:
        command: Called with the values by name.
        settings: A dataclass; the metadata `help` of a field is the help of its flag.
        first: Parameters in front of the options.
        last: Parameters behind them.
    """
    hints = get_type_hints(settings)
    options = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hinted(hints[field.name], option_of(field.name, field.metadata, field.default)),
        )
        for field in fields(settings)
    ]
    parameters = [*first, *options, *last]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def option_of(name: str, metadata: Mapping[str, Any], default: object) -> Any:
    """The option of one field."""
    return typer.Option(flag_of(name), help=metadata["help"], show_default=bool(default))


def hinted(hint: Any, option: Any) -> Any:
    """The annotation that the parser reads; built by call, for with brackets it would be a type to the checker."""
    return Annotated.__class_getitem__((hint, option))  # type: ignore[attr-defined]
