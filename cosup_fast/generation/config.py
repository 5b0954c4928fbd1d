"""How Gen writes: the settings of an answer, a question to be answered, and what is asked of an index."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from cosup_fast.data.records import Passage
from cosup_fast.generation.answer import AnswerSegment
from cosup_fast.index import SequenceIndex

Found = Sequence[tuple[Passage, float]]
"""Passages with their scores, best first."""

Retrieve = Callable[[Tensor, int], Found]
"""From a query (D,) and k to at most k passages."""


class GenerationConfig(BaseModel):
    """How Gen writes, and how often it may retrieve."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_new_tokens: int = Field(
        default=256, ge=1, description="most tokens that Gen chooses; inserted passages do not count"
    )
    max_retrievals: int = Field(
        default=4, ge=0, description="[NSP] is banned after so many; 0 answers without passages"
    )
    ret_first: bool = Field(default=False, description="force [NSP] as the first token of the output")
    ctx_truncate: bool = Field(
        default=False,
        description="drop a passage from the context at its [Ce]; the text grounded on it is read again without it",
    )
    candidates: int = Field(
        default=5, ge=1, description="passages reported for each retrieval; only the best is inserted"
    )
    temperature: float = Field(default=0.0, ge=0, description="logits are divided by it; 0 takes the likeliest token")
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="sample from the smallest set of likeliest tokens with this probability in sum",
    )
    seed: int = Field(default=0, ge=0, description="random seed of every answer when temperature > 0")
    stop: list[str] = Field(
        default=[], description="texts that end an answer where they appear; they are no part of it"
    )

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: list[str]) -> list[str]:
        if "" in stop:
            raise ValueError(f"stop={stop} holds an empty text, which appears everywhere: leave it out")
        return stop

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.ret_first and self.max_retrievals == 0:
            raise ValueError("ret_first=true forces a retrieval and max_retrievals=0 forbids it: change one of them")
        return self


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


Index = SequenceIndex | Searcher | Retrieve
"""What a decoder searches."""
