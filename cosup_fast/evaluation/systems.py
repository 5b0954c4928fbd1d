"""The systems under test: one writer, Gen with its decoder, and one retriever that hands it passages.

    co-supervised   Gen's own queries search the index that its Embseq made
    closed-book     nothing is retrieved
    gold            the gold passages are handed over, in order
    dense:NAME      a sentence-transformers model searches with the question and what is written so far
    pair:RUN        another checkpoint retrieves: its Gen reads the same text and makes the query, its Embseq the index
    random          passages drawn by a seed

All write with the same prompts and decoding, many questions at once, so that only what is retrieved differs. With a
Gen trained on NTP alone, `dense` and `pair` are the single-supervision baselines of Lee et al. 2024, arXiv 2403.09024,
section 4.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from cosup_fast.data.records import Example, Passage, Segment
from cosup_fast.evaluation.metrics import is_gold
from cosup_fast.evaluation.ranks import asked
from cosup_fast.generation import Answer, Asked, GenerationConfig, Generator
from cosup_fast.generation import Request as Question
from cosup_fast.generation.request import Found
from cosup_fast.index import SequenceIndex, embed_queries
from cosup_fast.index.embed import embed_asking
from cosup_fast.index.shards import Passages

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

    @property
    def passages(self) -> Mapping[str, Passage]:
        """All that it can give, by id."""
        ...

    @property
    def origin(self) -> dict[str, Any]:
        """What decides its results, JSON values."""
        ...

    def retrieve(self, requests: Sequence[Request], k: int) -> list[Found]:
        """For each of the requests that came at the same step at most k passages, at least one."""
        ...

    def rank(self, examples: Sequence[Example], k: int, *, progress: bool) -> list[Ranking] | None:
        """The k best passages for each entry of `asked`, example by example; None if nothing is searched."""
        ...


@dataclass(frozen=True)
class System:
    """What is evaluated.

    Args:
        name: as `--system` takes it.
        model: Gen, and for `co-supervised` the Embseq that made the index.
        retriever: None retrieves nothing.
    """

    name: str
    model: CoSupervisionModel
    retriever: Retriever | None = None
    sources: dict[str, str] = field(default_factory=dict)  # where its parts come from, for the report

    @property
    def passages(self) -> Mapping[str, Passage]:
        """All that can be retrieved, by id."""
        return {} if self.retriever is None else self.retriever.passages

    def settings(self, config: GenerationConfig) -> dict[str, Any]:
        """What decides the answers, JSON values."""
        return {
            "system": self.name.partition(":")[0],
            "checkpoint": self.model.fingerprint(),
            "retriever": None if self.retriever is None else self.retriever.origin,
            "generation": self._decoding(config).model_dump(mode="json"),
        }

    def answer(
        self,
        examples: Sequence[Example],
        config: GenerationConfig,
        on_answer: Callable[[int, Answer], None],
        *,
        batch: int = 16,
    ) -> None:
        """Writes the answers; this is the one place of the evaluation that knows the decoder.

        Args:
            examples: the questions.
            config: how to write.
            on_answer: called with the row of an example and its answer as soon as it is complete, in any order.
            batch: questions answered at once.

        Raises:
            ValueError: questions that could not be answered, after all others were; or what `Decoder` refuses.
        """
        failed: dict[int, str] = {}

        def ended(row: int, answer: Answer) -> None:
            if answer.error is None:
                on_answer(row, answer)
            else:
                failed[row] = answer.error

        generator = Generator(self.model, _Searches(self.retriever), self._decoding(config), max_batch=batch)
        generator.generate_all((_Question(e.question, e.instruction, example=e) for e in examples), on_answer=ended)
        if failed:
            first = min(failed)
            raise ValueError(
                f"{len(failed)} of {len(examples)} questions could not be answered, first {examples[first].id!r}: "
                f"{failed[first]} (the other answers are kept; leave these questions out, or mend what is wrong)"
            )

    def _decoding(self, config: GenerationConfig) -> GenerationConfig:
        return config if self.retriever else config.model_copy(update={"max_retrievals": 0, "ret_first": False})


@dataclass(frozen=True)
class _Question(Question):
    example: Example | None = None


class _Searches:
    """What the decoder asks, put to a retriever."""

    def __init__(self, retriever: Retriever | None):
        self._retriever = retriever

    def search_all(self, asked: Sequence[Asked], k: int) -> Sequence[Found]:
        assert self._retriever is not None, "a closed-book system retrieves nothing"
        requests = []
        for one in asked:
            assert isinstance(one.request, _Question)
            assert one.request.example is not None
            # Not validated: Gen may have written nothing on a passage.
            written = tuple(Segment.model_construct(text=s.text, passage=s.passage) for s in one.segments)
            requests.append(Request(one.request.example, one.query, written, one.retrievals))
        return self._retriever.retrieve(requests, k)


class IndexRetriever:
    """The index of a model, searched with that model's queries.

    Args:
        model: whose teacher-forced queries `rank` searches; Gen of the writing model makes those of `retrieve`.
        index: the index that `model` built.
    """

    def __init__(self, model: CoSupervisionModel, index: SequenceIndex):
        self.passages = index.by_id
        self.origin = {"index": index.origin.fingerprint, **_corpus(index.passages)}
        self._model, self._index = model, index

    def retrieve(self, requests: Sequence[Request], k: int) -> list[Found]:
        return [*self._index.retrieve_all(torch.stack([request.query for request in requests]), k)]

    def rank(self, examples: Sequence[Example], k: int, *, progress: bool) -> list[Ranking]:
        queries, _ = embed_queries(self._model, examples, self.passages, progress=progress)
        # The texts of k passages for each question may not fit into memory, their ids do.
        parts = queries.split(_RANKED_AT_ONCE) if len(queries) else ()
        return [_ids(found) for part in parts for found in self._index.retrieve_all(part, k)]


class PairRetriever(IndexRetriever):
    """A second checkpoint retrieves: its Gen reads what the writer has written so far and makes the query itself."""

    def retrieve(self, requests: Sequence[Request], k: int) -> list[Found]:
        template = self._model.template
        sequences = []
        for request in requests:
            so_far = request.example.model_copy(update={"output": list(request.written), "gold": []})
            sequences.append([*template.gen_sequence(so_far, self.passages).input_ids[:-1], template.nsp])
        return [*self._index.retrieve_all(embed_asking(self._model, sequences), k)]


class DenseRetriever:
    """A sentence-transformers model, searched exactly by the inner product of its normalised embeddings.

    The query is the question and the text that Gen has written so far; passages are embedded in the text that Gen is
    given. Weights are read from safetensors alone and no code of a model is run.

    Args:
        name: a prepared model (`minilm`), a folder or a Hugging Face name.
        passages: the corpus.
        passage_template: `TextConfig.passage`.
        device: where it runs.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: the model cannot be loaded.
        ImportError: sentence-transformers is not installed.
    """

    def __init__(
        self,
        name: str,
        passages: Sequence[Passage],
        passage_template: str,
        *,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ):
        self.passages = {passage.id: passage for passage in passages}
        self.origin = {"encoder": name, **_corpus(passages)}
        self._rows = list(passages)
        self._encoder = _sentence_encoder(name, device)
        self._template, self._progress = passage_template, progress

    @cached_property
    def _embeddings(self) -> Tensor:
        """Of the corpus; made when first searched, after all that can be checked has been."""
        texts = [self._template.format(title=p.title, text=p.text) for p in self._rows]
        return self._embed(texts, self._progress)

    def retrieve(self, requests: Sequence[Request], k: int) -> list[Found]:
        return self._search([_so_far(request.example, request.written) for request in requests], k)

    def rank(self, examples: Sequence[Example], k: int, *, progress: bool) -> list[Ranking]:
        texts = [_so_far(example, before) for example in examples for before, _ in asked(example)]
        return [_ids(found) for found in self._search(texts, k)] if texts else []

    def _search(self, texts: list[str], k: int) -> list[Found]:
        queries = self._embed(texts, False)
        found: list[Found] = []
        chunk = max(1, (1 << 26) // len(self._rows))
        for start in range(0, len(texts), chunk):
            scores = queries[start : start + chunk] @ self._embeddings.T
            best = scores.topk(min(k, len(self._rows)), dim=1)
            for values, rows in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                found.append([(self._rows[row], value) for row, value in zip(rows, values, strict=True)])
        return found

    def _embed(self, texts: list[str], progress: bool) -> Tensor:
        embeddings = self._encoder.encode(
            texts, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=progress
        )
        return embeddings.float().cpu()


class GoldRetriever:
    """Hands over an example's gold passages in order, the last of them again when Gen asks for more."""

    def __init__(self, passages: Sequence[Passage]):
        self.passages = {passage.id: passage for passage in passages}
        self.origin = {"given": "gold", **_corpus(passages)}

    def check(self, examples: Sequence[Example]) -> None:
        """Refuses an example without a gold passage in the corpus.

        Raises:
            ValueError: naming it.
        """
        for example in examples:
            self._gold(example, 0)

    def retrieve(self, requests: Sequence[Request], k: int) -> list[Found]:
        return [[(self._gold(request.example, request.number), 1.0)] for request in requests]

    def rank(self, examples: Sequence[Example], k: int, *, progress: bool) -> None:
        return None

    def _gold(self, example: Example, number: int) -> Passage:
        found = [self.passages[name] for name in example.gold if name in self.passages]
        pages = set(example.gold) - {passage.id for passage in found}
        if pages:  # the first paragraph of each page
            paragraphs = {page: p for p in reversed([*self.passages.values()]) if (page := is_gold(p.id, pages))}
            found += [paragraphs[page] for page in example.gold if page in paragraphs]
        if not found:
            raise ValueError(
                f"example {example.id!r} has no gold passage in the corpus, which --system gold hands over: leave it "
                "out, or add gold ids"
            )
        return found[min(number, len(found) - 1)]


class RandomRetriever:
    """Hands over passages drawn by the seed, the question and the number of the retrieval."""

    def __init__(self, passages: Sequence[Passage], seed: int = 0):
        self.passages = {passage.id: passage for passage in passages}
        self.origin = {"given": "random", "seed": seed, **_corpus(passages)}
        self._rows, self._seed = list(passages), seed

    def retrieve(self, requests: Sequence[Request], k: int) -> list[Found]:
        return [self._draw(request.example, request.number, k) for request in requests]

    def rank(self, examples: Sequence[Example], k: int, *, progress: bool) -> list[Ranking]:
        return [_ids(self._draw(example, number, k)) for example in examples for number, _ in enumerate(asked(example))]

    def _draw(self, example: Example, number: int, k: int) -> Found:
        draw = random.Random(f"{self._seed} {example.dataset} {example.id} {number}")
        return [(passage, 0.0) for passage in draw.sample(self._rows, min(k, len(self._rows)))]


def _corpus(passages: Sequence[Passage]) -> dict[str, Any]:
    """The size and a digest of a corpus."""
    rows = passages if isinstance(passages, Passages) else Passages([passages])
    return {"passages": len(rows), "corpus": rows.digest()}


def _ids(found: Found) -> Ranking:
    return [(passage.id, score) for passage, score in found]


def _so_far(example: Example, written: Sequence[Segment]) -> str:
    return " ".join([example.question, *filter(None, (segment.text.strip() for segment in written))])


def _sentence_encoder(name: str, device: torch.device | str) -> Any:
    from cosup_fast.data.sources import resolve_model
    from cosup_fast.environment import no_downloaded_kernels

    try:
        with no_downloaded_kernels():
            from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError("--system dense needs sentence-transformers: pip install 'cosup-fast[eval]'") from error
    source = resolve_model(name)
    try:
        return SentenceTransformer(
            source, device=str(device), trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"dense retriever {name!r} cannot be loaded: {error}") from error
