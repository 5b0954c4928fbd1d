"""A question to be answered, and what is asked of an index."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from cosup_fast.config.generation import GenerationConfig
from cosup_fast.data.records import Passage
from cosup_fast.errors import CosupError
from cosup_fast.generation.answer import AnswerSegment
from cosup_fast.index import NonparametricIndex

Found = Sequence[tuple[Passage, float]]
"""Passages with their scores, best first."""

Retrieve = Callable[[Tensor, int], Found]
"""From a query (D,) and k to at most k passages."""


class PromptError(CosupError, ValueError):
    """A question that Gen cannot read: it is too long with its instruction, or not Unicode text."""


@dataclass(frozen=True)
class Request:
    """A question to be answered, and what is different for it from the other requests of its batch."""

    question: str
    instruction: str = ""
    config: GenerationConfig | None = None
    """How to write; None: as the generator does."""
    index: Index | None = None
    """What to search, such as the question's own candidates; None: what the generator searches."""
    forced: Mapping[int, int] = field(default_factory=dict)
    """Tokens that are taken instead of chosen, by their place in the output: `ret_first` is {0: [NSP]}."""


@dataclass(frozen=True)
class Asked:
    """One [NSP] that Gen has written."""

    request: Request
    query: Tensor
    """(D,) Gen's hidden state there."""
    segments: tuple[AnswerSegment, ...]
    """What it wrote before."""
    retrievals: int
    """How many there were before."""


@runtime_checkable
class Searcher(Protocol):
    """Finds passages by more than a query, and for all requests that ask in a step at once."""

    def search_all(self, asked: Sequence[Asked], k: int) -> Sequence[Found]:
        """For each [NSP] at most k passages, at least one; an error is looked for by asking one by one again."""
        ...


Index = NonparametricIndex | Searcher | Retrieve
"""What a decoder searches."""
