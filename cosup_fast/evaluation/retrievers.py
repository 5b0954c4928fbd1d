"""Where passages come from: the interface of retrievers, and those that search with a model's queries or not at all.

`text_retrievers` has those that search with text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from cosup_fast.data.records import Example, Passage, Segment
from cosup_fast.evaluation.corpus import Corpus
from cosup_fast.evaluation.ranks import asked
from cosup_fast.generation.request import Found
from cosup_fast.index import NonparametricIndex, embed_queries
from cosup_fast.index.embed import embed_asking

if TYPE_CHECKING:
    from cosup_fast.model import CoSupervisionModel

_RANKED_AT_ONCE = 256

Ranking = list[tuple[str, float]]
"""Ids of passages with their scores, best first."""


@dataclass(frozen=True)
class Request:
    """One [NSP] that Gen has just written."""

    example: Example
    query: Tensor  # (D,) Gen's query there
    written: tuple[Segment, ...]  # the output before it
    number: int  # retrievals before it


class Retriever(Protocol):
    """Where passages come from."""

    corpus: Corpus

    @property
    def origin(self) -> dict[str, Any]:
        """What decides its results besides the corpus, JSON values."""
        ...

    def retrieve(self, requests: Sequence[Request], k: int) -> list[Found]:
        """For each of the requests that came at the same step at most k passages, at least one."""
        ...

    def rank(self, examples: Sequence[Example], k: int) -> list[Ranking] | None:
        """The k best passages for each entry of `asked`, example by example; None if nothing is searched."""
        ...


class IndexRetriever:
    """The index of a model, searched with that model's queries.

    Args:
        model: whose teacher-forced queries `rank` searches; Gen of the writing model makes those of `retrieve`.
        index: the index that `model` built.
        corpus: the passages of the index, if there is a `Corpus` of them already.
    """

    def __init__(self, model: CoSupervisionModel, index: NonparametricIndex, corpus: Corpus | None = None):
        self.corpus = corpus or Corpus.indexed(index)
        self.origin = {"index": index.origin.fingerprint}
        self._model, self._index = model, index
        self._first: dict[tuple[str, str], Tensor] = {}  # by prompt, the query where the output begins

    def retrieve(self, requests: Sequence[Request], k: int) -> list[Found]:
        queries = self._queries(requests)
        for request, query in zip(requests, queries, strict=True):
            if not (request.number or request.written):
                self._first[_prompt(request.example)] = query.float().cpu()
        return [*self._index.retrieve_all(queries, k)]

    def rank(self, examples: Sequence[Example], k: int) -> list[Ranking]:
        # An output that retrieves nothing asks where it begins, as Gen may have done while it wrote: no need to read
        # that prompt again.
        known = {
            i: self._first[_prompt(e)] for i, e in enumerate(examples) if not e.cited and _prompt(e) in self._first
        }
        unread = [example for i, example in enumerate(examples) if i not in known]
        queries, origins = embed_queries(self._model, unread, self.corpus.by_id)
        read: dict[int, list[Tensor]] = {}
        for query, (number, _) in zip(queries, origins, strict=True):
            read.setdefault(number, []).append(query)
        rest = iter(range(len(unread)))
        ordered = [
            query
            for i, example in enumerate(examples)
            for query in ([known[i]] * bool(example.gold) if i in known else read.get(next(rest), []))
        ]
        # The texts of k passages for each question may not fit into memory, their ids do.
        parts = torch.stack(ordered).split(_RANKED_AT_ONCE) if ordered else ()
        return [ids(found) for part in parts for found in self._index.retrieve_all(part, k)]

    def _queries(self, requests: Sequence[Request]) -> Tensor:
        return torch.stack([request.query for request in requests])


class PairRetriever(IndexRetriever):
    """A second checkpoint retrieves: its Gen reads what the writer has written so far and makes the query itself."""

    def _queries(self, requests: Sequence[Request]) -> Tensor:
        template = self._model.template
        sequences = []
        for request in requests:
            so_far = request.example.model_copy(update={"output": list(request.written), "gold": []})
            sequences.append([*template.gen_sequence(so_far, self.corpus.by_id).input_ids[:-1], template.nsp])
        return embed_asking(self._model, sequences)


class GoldRetriever:
    """Hands over an example's gold passages in order, the last of them again when Gen asks for more."""

    def __init__(self, corpus: Corpus | Sequence[Passage]):
        self.corpus = Corpus.of(corpus)
        self.origin = {"given": "gold"}

    def check(self, examples: Sequence[Example]) -> None:
        """Refuses an example without a gold passage in the corpus.

        Raises:
            ValueError: naming it.
        """
        for example in examples:
            self._gold(example, 0)

    def retrieve(self, requests: Sequence[Request], k: int) -> list[Found]:
        return [[(self._gold(request.example, request.number), 1.0)] for request in requests]

    def rank(self, examples: Sequence[Example], k: int) -> None:
        return None

    def _gold(self, example: Example, number: int) -> Passage:
        found = self.corpus.found(example.gold)
        if not found:
            raise ValueError(
                f"example {example.id!r} has no gold passage in the corpus, which --system gold hands over: leave it "
                "out, or add gold ids"
            )
        return self.corpus.by_id[found[min(number, len(found) - 1)]]


class RandomRetriever:
    """Hands over passages drawn by the seed, the question and the number of the retrieval."""

    def __init__(self, corpus: Corpus | Sequence[Passage], seed: int = 0):
        self.corpus = Corpus.of(corpus)
        self.origin = {"given": "random", "seed": seed}
        self._seed = seed

    def retrieve(self, requests: Sequence[Request], k: int) -> list[Found]:
        return [self._draw(request.example, request.number, k) for request in requests]

    def rank(self, examples: Sequence[Example], k: int) -> list[Ranking]:
        return [ids(self._draw(example, number, k)) for example in examples for number, _ in enumerate(asked(example))]

    def _draw(self, example: Example, number: int, k: int) -> Found:
        draw = random.Random(f"{self._seed} {example.dataset} {example.id} {number}")
        rows = draw.sample(range(len(self.corpus)), min(k, len(self.corpus)))
        # Scores that fall keep the order drawn: equal ones would put every gold passage last.
        return [(self.corpus.passages[row], 1 / place) for place, row in enumerate(rows, 1)]


def _prompt(example: Example) -> tuple[str, str]:
    return example.question, example.instruction


def ids(found: Found) -> Ranking:
    """What was found, without the texts."""
    return [(passage.id, score) for passage, score in found]
