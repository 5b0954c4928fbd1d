"""Commands whose options are the fields of one settings object."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer
from pydantic import BaseModel


def with_options(settings: type[BaseModel]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command with an option for each field of `settings`, which it is given as `options`.

    A field's description is its option's help, and its default the option's. A field that is false has a flag that sets
    it, one that is null or a boolean has a flag for each. Errors of a value are pydantic's.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "options"]
        hints = {name: hint for name, hint in get_type_hints(command, include_extras=True).items() if name != "options"}
        fields = settings.model_fields
        shown = {}
        for name, field in fields.items():
            flag = [f"--{name.replace('_', '-')}"] if field.default is False else []
            default = field.get_default(call_default_factory=True)
            option = typer.Option(*flag, help=field.description, show_default=default not in (None, [], False))
            shown[name] = Annotated[list[str] | None if default == [] else field.annotation, option]  # type: ignore[valid-type]

        def run(**given: Any) -> None:
            values = {name: given.pop(name) for name in fields}
            command(**given, options=settings(**{name: v for name, v in values.items() if v is not None}))

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__annotations__ = hints | shown
        parameters = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.get_default(call_default_factory=True) or None
                if fields[name].default is not False
                else False,
                annotation=shown[name],
            )
            for name, field in fields.items()
        ]
        positional = [p.replace(annotation=hints[p.name]) for p in own]
        run.__signature__ = inspect.Signature([*positional, *parameters])  # type: ignore[attr-defined]
        return run

    return decorate
