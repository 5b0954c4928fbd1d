"""What this package's pydantic models have in common: an unknown field is an error, and a value never changes."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError


class Strict(BaseModel):
    """A model that refuses unknown fields and cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Section(Strict):
    """A section of a configuration: its numbers are finite, too."""

    model_config = ConfigDict(allow_inf_nan=False)


def first_problem(error: ValidationError) -> str:
    """The first thing wrong, as `field: message, found value`."""
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}, found {first['input']!r:.60}"
