"""Commands whose options are the fields of a settings dataclass, so that a flag is defined in one place."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from types import GenericAlias
from typing import Annotated, Any, get_args, get_type_hints

import typer

from redundancy_trace.settings import flag_of, is_several


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
            annotation=hinted(
                as_list(hints[field.name]),
                option_of(field.name, field.metadata, field.default, metavar_of(hints[field.name])),
            ),
        )
        for field in fields(settings)
    ]
    parameters = [*first, *options, *last]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def option_of(name: str, metadata: Mapping[str, Any], default: object, metavar: str | None = None) -> Any:
    """The option of one field."""
    return typer.Option(flag_of(name), help=metadata["help"], show_default=bool(default), metavar=metavar)


def as_list(hint: Any) -> Any:
    """The type that the parser knows for a flag that may be given again; any other as it is."""
    return GenericAlias(list, get_args(hint)[:1]) if is_several(hint) else hint


def metavar_of(hint: Any) -> str | None:
    """What help shows of a flag that may be given again: one value of it."""
    return f"<{get_args(hint)[0].__name__}>" if is_several(hint) else None


def hinted(hint: Any, option: Any) -> Any:
    """The annotation that the parser reads; built by call, for with brackets it would be a type to the checker."""
    return Annotated.__class_getitem__((hint, option))  # type: ignore[attr-defined]
