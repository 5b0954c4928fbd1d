"""One configuration file for a run: YAML, checked field by field, every field overridable as `section.field=value`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from cosup_fast.config.reading import read_yaml
from cosup_fast.config.rules import RULES
from cosup_fast.config.sections import Sections
from cosup_fast.data.records import nearest
from cosup_fast.errors import CosupError


class ConfigError(CosupError, ValueError):
    """A configuration that cannot be used; the message names the field, its value and the remedy."""


class RunConfig(Sections):
    """Everything that decides a run; no rule is broken."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for rule in RULES:
            for message in rule(self):
                raise ValueError(message)
        return self


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies `section.field=value` overrides.

    An override's value is YAML too, but that of a text field is taken as it stands unless it is quoted, or null.

    Raises:
        ConfigError: the file is missing or no YAML mapping, a key is unknown (the nearest one is suggested), or a
            value is not what its field takes.
    """
    raw = _read(Path(path)) if path is not None else {}
    source = str(path) if path is not None else "the configuration"
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r}: expected section.field=value, as in training.lr=1e-4")
        _set(raw, key.split("."), _parse(value, is_text=_fields().get(key) in (str, str | None)), override)
    _reject_unknown(raw, RunConfig, source)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {explain(e)}" for e in error.errors())) from None


def config_of(checkpoint: Path) -> RunConfig | None:
    """The configuration of the run that a checkpoint is of, or None when it stands alone.

    Args:
        checkpoint: the run's folder, or a checkpoint in it.
    """
    runs = [folder for folder in (checkpoint, checkpoint.parent.parent) if (folder / "config.yaml").is_file()]
    return load_config(runs[0] / "config.yaml") if runs else None


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def field_names() -> list[str]:
    """Every dotted field name, sections opened."""
    return list(_fields())


def _fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> dict[str, Any]:
    """The type of every field by its dotted name."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= _fields(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field.annotation
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(raw).__name__}")
    return raw


def _parse(value: str, *, is_text: bool) -> Any:
    if is_text and value not in ("", "null") and value[0] not in "'\"":  # {text} would be a mapping, 2024 a number
        return value
    try:
        parsed = read_yaml(value)
    except yaml.YAMLError:
        return value
    if isinstance(parsed, str) and not is_text:  # YAML 1.1 reads 1e-4 as text
        try:
            return float(parsed)
        except ValueError:
            return parsed
    return parsed


def _set(raw: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        raw = raw.setdefault(key, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"override {override!r}: {key!r} is not a section")
    raw[keys[-1]] = value


def _reject_unknown(raw: dict[str, Any], model: type[BaseModel], source: str, prefix: str = "") -> None:
    for key, value in raw.items():
        if key not in model.model_fields:
            names = field_names()
            same_leaf = next((name for name in names if name.split(".")[-1] == key), None)
            hint = f", did you mean '{same_leaf}'?" if same_leaf else nearest(prefix + str(key), names)
            raise ConfigError(f"{source}: unknown field {prefix + str(key)!r}{hint}")
        inner = model.model_fields[key].annotation
        if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, BaseModel):
            _reject_unknown(value, inner, source, f"{prefix}{key}.")


def explain(error: Any) -> str:
    """One of pydantic's errors in a line: the field, what is expected, what was found."""
    field = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("list_type", "tuple_type") and isinstance(error["input"], str):
        message += f" (write {field}=[{error['input']}])"
    return f"{field}: {message}, found {error['input']!r}" if field and error["type"] != "value_error" else message
