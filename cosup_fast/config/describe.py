"""Every field of a configuration with its type, default and description, for `train --show` and docs/configuration.md.

python -m cosup_fast.config.describe > docs/configuration.md
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cosup_fast.config.run import RunConfig


class Described(NamedTuple):
    """A field: its dotted name, what it may be, its default as JSON, what it means."""

    name: str
    allowed: str
    default: str
    description: str


def describe(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[Described]:
    """All fields in the order of the file, sections opened."""
    for name, field in model.model_fields.items():
        if _is_section(field.annotation):
            yield from describe(cast(type[BaseModel], field.annotation), f"{prefix}{name}.")
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        if isinstance(default, tuple):
            default = list(default)
        yield Described(
            prefix + name, _allowed(field), json.dumps(default, ensure_ascii=False), field.description or ""
        )


def dump_commented(config: BaseModel, indent: str = "") -> str:
    """A configuration as YAML that `load_config` reads back, each field under its description."""
    lines: list[str] = []
    for name, value in config.model_dump(mode="json").items():
        section = getattr(config, name)
        if isinstance(section, BaseModel):
            lines.append(f"{indent}{name}:\n{dump_commented(section, indent + '  ')}")
            continue
        if description := type(config).model_fields[name].description:
            lines.append(f"{indent}# {description}\n")
        dumped = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True)
        lines += [f"{indent}{line}\n" for line in dumped.splitlines()]
    return "".join(lines)


def page() -> str:
    """docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "Every field of a run, as `cosup-fast train --show` prints it with your values. A field can be set in a YAML "
        "file (`nsp: {weight: 0.5}`), on the command line (`nsp.weight=0.5`), or both; the command line wins. Unknown "
        "fields and values out of range are errors before anything is loaded. This page is generated: "
        "`python -m cosup_fast.config.describe > docs/configuration.md`.",
    ]
    section = None
    for field in describe():
        name = field.name.rpartition(".")[0]
        if name != section:
            section = name
            lines += ["", f"## {name or 'The run'}", "", "| field | allowed | default | |", "|---|---|---|---|"]
        cells = (f"`{field.name}`", field.allowed, f"`{field.default}`", field.description)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _allowed(field: FieldInfo) -> str:
    """What a field may be, in words."""
    bounds = []
    for constraint in field.metadata:
        for attribute, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
            if (limit := getattr(constraint, attribute, None)) is not None:
                bounds.append(f"{sign} {limit:g}")
    return ", ".join([_kind(field.annotation), *bounds])


def _kind(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join("null" if one is type(None) else _kind(one) for one in arguments)
    if origin in (list, tuple):
        return f"list of {_kind(arguments[0])}"
    if origin is not None:  # Annotated
        return _kind(arguments[0])
    words = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}
    return words.get(getattr(annotation, "__name__", ""), "see the description")


if __name__ == "__main__":
    print(page(), end="")
