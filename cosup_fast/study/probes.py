"""Closer looks at a trained model, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cosup_fast.data.records import nearest

if TYPE_CHECKING:
    from cosup_fast.evaluation import Workbench
    from cosup_fast.study.cell import Questions
    from cosup_fast.study.config import Cell

Probe = Callable[["Workbench", "Questions", "Cell"], dict[str, Any]]

PROBES: Mapping[str, Probe] = {}


def check_probe(name: str) -> None:
    """Refuses a probe that does not exist.

    Raises:
        ValueError: naming it and the nearest one.
    """
    if name not in PROBES:
        raise ValueError(f"probes: {name!r} is unknown{nearest(name, PROBES)}: expected one of {', '.join(PROBES)}")
