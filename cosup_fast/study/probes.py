"""Closer looks at a model, by the name that `probes` of a condition gives them.

attention   of the trained model: `attention.attention_by_layer`
spaces      while it is trained, at every held-out evaluation: `spaces.look`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cosup_fast.data.records import nearest

if TYPE_CHECKING:
    from cosup_fast.evaluation import Corpus, TestSet
    from cosup_fast.model import CoSupervisionModel

SPACES = "spaces"
Probe = Callable[["CoSupervisionModel", "Sequence[TestSet]", "Sequence[Corpus]"], dict[str, Any]]


def _attention(model: CoSupervisionModel, tests: Sequence[TestSet], corpora: Sequence[Corpus]) -> dict[str, Any]:
    from cosup_fast.study.attention import attention_by_layer

    return attention_by_layer(model, tests, {corpus.name: corpus for corpus in corpora})


AFTERWARDS: Mapping[str, Probe] = {"attention": _attention}
"""Those of the trained model."""


def check_probe(name: str) -> None:
    """Refuses a probe that does not exist.

    Raises:
        ValueError: naming it and the nearest one.
    """
    names = (*AFTERWARDS, SPACES)
    if name not in names:
        raise ValueError(f"probes: {name!r} is unknown{nearest(name, names)}: expected one of {', '.join(names)}")
