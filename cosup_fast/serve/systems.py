"""The models that a server offers: one Gen, with passages from its own index, from another retriever, or with none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cosup_fast.data.records import Example, Segment, nearest
from cosup_fast.generation import Asked, Request
from cosup_fast.generation.request import Found, Index
from cosup_fast.index import NonparametricIndex

if TYPE_CHECKING:
    from cosup_fast.evaluation.retrievers import Retriever
    from cosup_fast.model import CoSupervisionModel

CO_SUPERVISED, CLOSED_BOOK = "co-supervised", "closed-book"


@dataclass(frozen=True)
class Offered:
    """One entry of /v1/models."""

    name: str
    index: Index | None = None  # None: what the decoder searches
    retrieves: bool = True


class RetrieverSearch:
    """A retriever of an evaluation as what a decoder searches."""

    def __init__(self, retriever: Retriever):
        self._retriever = retriever

    def search_all(self, asked: Sequence[Asked], k: int) -> Sequence[Found]:
        """For each [NSP] at most k passages."""
        from cosup_fast.evaluation import retrievers

        return self._retriever.retrieve(
            [
                retrievers.Request(
                    Example(id="asked", question=one.request.question, instruction=one.request.instruction, output=[]),
                    one.query,
                    tuple(Segment(text=s.text, passage=s.passage) for s in one.segments if s.text.strip()),
                    one.retrievals,
                )
                for one in asked
            ],
            k,
        )


def offer(
    model: CoSupervisionModel, index: NonparametricIndex | None, others: Iterable[str] = ()
) -> dict[str, Offered]:
    """The systems of a server, by name.

    Args:
        model: Gen and Embseq.
        index: what Gen searches; None offers closed-book answers alone.
        others: retrievers over the same passages to compare with, as `cosup-fast evaluate --system` names them.

    Raises:
        ValueError: a system that cannot answer arbitrary questions, or that does not exist.
    """
    offered = {} if index is None else {CO_SUPERVISED: Offered(CO_SUPERVISED)}
    offered[CLOSED_BOOK] = Offered(CLOSED_BOOK, retrieves=False)
    if not (others := [name for name in others if name not in offered]):
        return offered
    if index is None:
        raise ValueError(f"--system {others[0]} retrieves passages of the index, and max_retrievals=0 uses none")
    from cosup_fast.evaluation.corpus import Corpus
    from cosup_fast.evaluation.workbench import Workbench

    bench, corpus = Workbench(model), Corpus.indexed(index, index.name)
    for name in others:
        if name in ("gold", "untrained"):
            raise ValueError(f"--system {name}: a server has no gold passages and one model; try bm25 or dense:minilm")
        system = bench.system(name, corpus)
        search = RetrieverSearch(system.retriever)  # type: ignore[arg-type]
        # A first search makes a retriever read the corpus, for which the answers of others would wait.
        search.search_all([Asked(Request("word"), torch.zeros(model.width), (), 0)], 1)
        offered[system.name] = Offered(system.name, search)
    return offered


def unknown(name: str, offered: Iterable[str]) -> str:
    """The error for a client that asks for another model."""
    names = list(offered)
    return f"the model {name[:80]!r} does not exist{nearest(name, names)}: this server has {', '.join(names)}"
