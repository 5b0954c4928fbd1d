"""Commands whose options are the fields of settings objects."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command with an option for each field of those of its parameters that are settings, that is pydantic models.

    A field's description is its option's help, and its default the option's. A field that is false has a flag that sets
    it, one that is null or a boolean has a flag for each. Errors of a value are pydantic's.
    """
    signature, hints = inspect.signature(command), get_type_hints(command, include_extras=True)
    settings = {name: kind for name, kind in hints.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name in settings:
            parameters += [_option(*field) for field in settings[name].model_fields.items()]
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))

    def run(**given: Any) -> None:
        for name, kind in settings.items():
            values = {field: given.pop(field) for field in kind.model_fields}
            given[name] = kind(**{field: value for field, value in values.items() if value is not None})
        command(**given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    flag = [f"--{name.replace('_', '-')}"] if field.default is False else []
    default = field.get_default(call_default_factory=True)
    option = typer.Option(*flag, help=field.description, show_default=default not in (None, [], False))
    kind = Annotated[list[str] | None if default == [] else field.annotation, option]  # type: ignore[valid-type]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None if default == [] else default, annotation=kind
    )
