"""A corpus as an evaluation sees it: its passages by id, what identifies it, and what chance alone would find in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from math import comb
from typing import Any, Self

from cosup_fast.data.passages import Passages
from cosup_fast.data.records import Passage
from cosup_fast.evaluation.metrics import page_of
from cosup_fast.index import SequenceIndex


class Corpus:
    """Passages that retrievers search or hand over.

    Args:
        passages: ids unique; they may stay in the files of an index.
        name: what reports call it, such as the prepared set it is.
        by_id: the same passages by id; made here when omitted.
    """

    def __init__(
        self, passages: Sequence[Passage], name: str = "corpus", *, by_id: Mapping[str, Passage] | None = None
    ):
        self.name = name
        self.passages = passages
        self.by_id: Mapping[str, Passage] = {p.id: p for p in passages} if by_id is None else by_id

    @classmethod
    def of(cls, passages: Corpus | Sequence[Passage]) -> Corpus:
        """The corpus itself, or one of these passages."""
        return passages if isinstance(passages, Corpus) else cls(passages)

    @classmethod
    def indexed(cls, index: SequenceIndex, name: str = "corpus") -> Self:
        """What an index holds, left where it is."""
        return cls(index.passages, name, by_id=index.by_id)

    def __len__(self) -> int:
        return len(self.passages)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the passages in their order."""
        rows = self.passages if isinstance(self.passages, Passages) else Passages([self.passages])
        return rows.digest()

    @property
    def identity(self) -> dict[str, Any]:
        """What decides what can be found, JSON values."""
        return {"passages": len(self), "corpus": self.digest}

    def paragraphs(self, page: str) -> Sequence[str]:
        """The ids of the passages that are paragraphs of a page (`metrics.is_gold`), in order."""
        return self._pages.get(page, ())

    def found(self, gold: Collection[str]) -> list[str]:
        """A passage for each gold id that the corpus has: that of the id, or the first paragraph of that page."""
        return [
            *(name for name in gold if name in self.by_id),
            *(names[0] for page in gold if page not in self.by_id and (names := self.paragraphs(page))),
        ]

    def chance(self, gold: Collection[str], k: int) -> float:
        """Recall at k of a ranking drawn at random: the mean over the gold ids of 1 - C(M - n, k) / C(M, k).

        M is the size of the corpus and n the number of passages that satisfy an id: 1, which makes it k / M, or the
        paragraphs of a page, or 0.
        """
        size, k = len(self), min(k, len(self))
        counts = [1 if name in self.by_id else len(self.paragraphs(name)) for name in gold]
        found = [k / size if n == 1 else 1 - comb(size - n, k) / comb(size, k) for n in counts]
        return sum(found) / len(found)

    @cached_property
    def _pages(self) -> dict[str, list[str]]:
        pages: dict[str, list[str]] = defaultdict(list)
        for name in self.by_id:
            if (page := page_of(name)) != name:
                pages[page].append(name)
        return dict(pages)
