"""`NonparametricIndex`: what every index can do, wherever its embeddings are stored.

Shapes: N queries, M passages, D Gen's width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cosup_fast.data.corpus import Corpus, open_corpus
from cosup_fast.data.records import Passage
from cosup_fast.index import search as nearest
from cosup_fast.index.build import Options
from cosup_fast.index.embed import Precision
from cosup_fast.index.origin import Origin

if TYPE_CHECKING:
    from cosup_fast.model import CoSupervisionModel


class NonparametricIndex(ABC):
    """Passages and their sequence embeddings, searched by inner product."""

    origin: Origin
    """What made the embeddings."""
    precision: Precision
    """Of the products that made them."""
    name: str
    """Where it lives, as messages and reports call it."""
    passages: Sequence[Passage]
    """In the order of the rows."""
    by_id: Mapping[str, Passage]

    def __len__(self) -> int:
        return len(self.passages)

    def __contains__(self, name: object) -> bool:
        return name in self.by_id

    @property
    @abstractmethod
    def dim(self) -> int:
        """D."""

    @abstractmethod
    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """The embeddings (n, D) fp32 of rows (n,)."""

    @abstractmethod
    def blocks(self) -> Iterator[Tensor]:
        """The embeddings in the order of the rows, block by block, (m, D) fp32 each; not to be changed."""

    @abstractmethod
    def candidates(self) -> tuple[nearest.Propose, bool]:
        """What proposes candidates, and whether these are the best ones but for its rounding."""

    def add(
        self,
        model: CoSupervisionModel,
        corpus: str | Path | Sequence[Passage],
        *,
        options: Options | None = None,
        progress: bool = True,
        work: Path | None = None,
    ) -> None:
        """Embeds and appends passages; what was interrupted is completed by the same call.

        An index in memory or in a folder takes all of them at once and one in Milvus row by row. An approximate index
        takes them without being trained again.

        Args:
            model: the one that made the index.
            corpus: passages, or what `open_corpus` takes.
            options: how to embed.
            progress: show progress bars on stderr.
            work: a folder that all ranks see, under which an index in Milvus keeps the shards until they are sent.

        Raises:
            ValueError: another model than the one that made the index, an id that is there already, or what a build
                refuses; the index is then left as it was.
        """
        origin = Origin.of(model)
        if difference := self.origin.difference(origin):
            raise ValueError(f"these passages would not match the index, whose {difference}: build a new index")
        if not isinstance(corpus, str | Path) and not corpus:
            return
        options = options or Options(progress=progress, precision=self.precision)
        if options.precision != self.precision:
            raise ValueError(f"precision={options.precision!r}: this index was built with {self.precision!r}")
        self._append(model, open_corpus(corpus), origin, options, work)

    @abstractmethod
    def _append(
        self, model: CoSupervisionModel, source: Corpus, origin: Origin, options: Options, work: Path | None
    ) -> None:
        """Embeds and appends a corpus, whose `origin` is that of the index."""

    @abstractmethod
    def delete(self, ids: Iterable[str]) -> None:
        """Removes passages.

        Raises:
            ValueError: an id is not there, or no passage would be left; the index is then as it was.
        """

    def describe(self) -> dict[str, str]:
        """What it holds, what made it and where it is stored, for people."""
        return {
            "passages": f"{len(self):,}",
            "width": str(self.dim),
            "products": self.precision,
            "checkpoint": self.origin.fingerprint,
            "similarity": self.origin.similarity,
            "passage template": self.origin.text.passage,
            "longest passage": f"{self.origin.text.max_passage_tokens} tokens",
        }

    @property
    def embeddings(self) -> Tensor:
        """A copy of the sequence embeddings in memory, (M, D) fp32."""
        return torch.cat(list(self.blocks()))

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The passages with the largest inner products, best first; equal scores by row.

        Args:
            queries: (N, D).
            k: how many; all passages when there are fewer.

        Returns:
            Scores (N, min(k, M)) fp32 and rows of `passages` (N, min(k, M)) int64, on the CPU. An approximate index may
            find fewer: then the last scores are minus infinity and the rows -1.

        Raises:
            ValueError: `k` below 1, queries of another width, or queries that are not finite.
        """
        if k < 1:
            raise ValueError(f"k={k}: ask for at least one passage")
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(f"queries must be (N, {self.dim}), got shape {tuple(queries.shape)}")
        if not queries.isfinite().all():
            raise ValueError("queries must be finite: the weights are damaged, or training diverged")
        propose, exact = self.candidates()
        queries = queries.detach().float().contiguous()
        return nearest.search(propose, self.vectors, queries, min(k, len(self)), len(self), exact=exact)

    def retrieve(self, query: Tensor, k: int) -> list[tuple[Passage, float]]:
        """The k best passages for one query (D,) with their scores, best first; `search` says what is refused."""
        return self.retrieve_all(query[None], k)[0]

    def retrieve_all(self, queries: Tensor, k: int) -> list[list[tuple[Passage, float]]]:
        """`retrieve` for each of the queries (N, D), by one search."""
        scores, rows = self.search(queries, k)
        return [
            [(self.passages[row], score) for row, score in zip(*found, strict=True) if row >= 0]
            for found in zip(rows.tolist(), scores.tolist(), strict=True)
        ]


def check_made_by(model: CoSupervisionModel, name: str, dim: int, origin: Origin, *, allow_stale: bool) -> None:
    """Refuses an index that another model made, or, with `allow_stale`, one of another width only.

    Raises:
        ValueError: how they differ.
    """
    if dim != model.width:
        raise ValueError(f"{name} has vectors of width {dim}, this model has {model.width}: build a new index")
    if not allow_stale and (difference := origin.difference(Origin.of(model))):
        raise ValueError(
            f"{name} was not built by this model: its {difference}. Build it again with this checkpoint, load "
            "the checkpoint that built it, or pass allow_stale=True (--allow-stale) to search it all the same"
        )


def check_deletion(ids: Iterable[str], found: Mapping[str, int], count: int) -> None:
    """Refuses to delete what is not there, or everything.

    Args:
        ids: each once.
        found: those that are there.
        count: M.
    """
    wanted = list(ids)
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(
            f"no passage has the id {missing[0]!r}"
            + (f" ({len(missing)} of {len(wanted)} ids are not there)" if len(missing) > 1 else "")
            + ": nothing was deleted"
        )
    if len(found) == count:
        raise ValueError("all passages would be deleted, and an index needs at least one: nothing was deleted")
