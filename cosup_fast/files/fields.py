"""Nested JSON objects as fields with dotted names: where two of them differ, and values short enough for a message."""

from __future__ import annotations

import json
from typing import Any


def flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as fields with dotted names; a name with dots may also be given at any depth."""
    fields: dict[str, Any] = {}
    for name, value in section.items():
        fields |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return fields


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """The values in which two objects differ, by dotted name: before and now, None where there is none."""
    first, second = flat(before), flat(now)
    names = dict.fromkeys((*second, *first))
    return {name: [first.get(name), second.get(name)] for name in names if first.get(name) != second.get(name)}


def short(value: Any) -> str:
    """A value as JSON, its end left out where that is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
