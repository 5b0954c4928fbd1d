"""Citations, search results and timelines, as clients see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, Field

from cosup_fast.data.records import Passage
from cosup_fast.serve.stream import Evidence, Grounded, Span

SNIPPET = 1000
"""Most characters of a passage in a search result."""


class SearchResult(BaseModel):
    """A passage that was found."""

    id: str
    title: str
    snippet: str = Field(description=f"the passage, or its first {SNIPPET} characters")
    score: float = Field(description="inner product of query and sequence embedding, or the retriever's own")
    url: str
    retrieval: int = Field(default=0, description="which retrieval of the answer, from 0")
    rank: int = Field(description="0 is the best; during an answer Gen reads that one")
    at: int | None = Field(default=None, description="how many characters of the answer were written before it")


class Phase(BaseModel):
    """What a request was busy with: wait, read, write or retrieve."""

    phase: str
    start_ms: float
    end_ms: float


class Cited:
    """The evidence of one answer as it comes in.

    Args:
        url: the URL of a passage from its id and title.
    """

    def __init__(self, url: UrlOf):
        self.results: list[SearchResult] = []
        self.annotations: list[dict[str, Any]] = []
        self._url = url
        self._titles: dict[str, str] = {}

    def found(self, evidence: Evidence) -> list[SearchResult]:
        """The results of one retrieval."""
        new = results(evidence.found, self._url, evidence.number, evidence.at)
        self._titles |= {one.id: one.title for one in new}
        self.results += new
        return new

    def cite(self, grounded: Grounded) -> dict[str, Any]:
        """The citation of a grounded segment."""
        title = self._titles.get(grounded.passage, "")
        one = {
            "start_index": grounded.start,
            "end_index": grounded.end,
            "title": title,
            "url": self._url(grounded.passage, title),
        }
        self.annotations.append(one)
        return one


class UrlOf:
    """The URL of a passage: an id that is one itself, the server's template, or the server's own page.

    Args:
        base: the server's address, with a slash at its end.
        template: has {id} and {title}, or None.
    """

    def __init__(self, base: str, template: str | None):
        self._base, self._template = base, template

    def __call__(self, name: str, title: str) -> str:
        if self._template is not None:
            return self._template.format(id=quote(name, safe=""), title=quote(title.replace(" ", "_"), safe=""))
        if name.startswith(("http://", "https://")):
            return name
        return f"{self._base}passages/{quote(name, safe='')}"


def results(
    found: Sequence[tuple[Passage, float]], url: UrlOf, retrieval: int = 0, at: int | None = None
) -> list[SearchResult]:
    """Passages with scores as search results, best first."""
    return [
        SearchResult(
            id=passage.id,
            title=passage.title,
            snippet=passage.text[:SNIPPET],
            score=score,
            url=url(passage.id, passage.title),
            retrieval=retrieval,
            rank=rank,
            at=at,
        )
        for rank, (passage, score) in enumerate(found)
    ]


def phases(timeline: Sequence[Span]) -> list[dict[str, Any]]:
    """A timeline as JSON."""
    return [{"phase": span.phase, "start_ms": span.start, "end_ms": span.end} for span in timeline]
