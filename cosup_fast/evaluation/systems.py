"""The systems under test: one writer, Gen with its decoder, and one retriever that hands it passages.

All write with the same prompts and decoding, many questions at once, so that only what is retrieved differs. `kinds`
lists them. With a Gen trained on NTP alone, `dense` and `pair` are the single-supervision baselines of Lee et al. 2024,
arXiv 2403.09024, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cosup_fast.data.records import Example, Passage, Segment, nearest
from cosup_fast.evaluation.corpus import Corpus
from cosup_fast.evaluation.retrievers import (
    Request,
    Retriever,
)
from cosup_fast.generation import Answer, Asked, GenerationConfig, Generator
from cosup_fast.generation import Request as Question
from cosup_fast.generation.request import Found

if TYPE_CHECKING:
    from cosup_fast.model import CoSupervisionModel


@dataclass(frozen=True)
class System:
    """What is evaluated.

    Args:
        name: as `--system` takes it.
        model: Gen, and for `co-supervised` the Embseq that made the index.
        retriever: None retrieves nothing; a mapping has one for each corpus, by its name, and every question searches
            that of its test set.
        sources: where its parts come from, for the report.
        corpora: of a system that retrieves nothing, the corpora whose titles answers are compared with.
        fingerprint: of the checkpoint, where it is known already or the model was cast to another dtype since.
    """

    name: str
    model: CoSupervisionModel
    retriever: Retriever | Mapping[str, Retriever] | None = None
    sources: dict[str, str] = field(default_factory=dict)
    corpora: Corpus | Mapping[str, Corpus] | None = None
    fingerprint: str | None = None

    @property
    def passages(self) -> Mapping[str, Passage]:
        """All that can be retrieved, by id, of a system with one retriever."""
        if isinstance(self.retriever, Mapping):
            raise ValueError(f"system {self.name!r} has a corpus for each test set: {', '.join(self.retriever)}")
        return {} if self.retriever is None else self.retriever.corpus.by_id

    def retriever_of(self, corpus: str) -> Retriever | None:
        """The retriever of the questions whose test set names this corpus.

        Raises:
            ValueError: there are several, and none of that name.
        """
        if not isinstance(self.retriever, Mapping):
            return self.retriever
        if corpus not in self.retriever:
            raise ValueError(
                f"system {self.name!r} has no retriever for the corpus {corpus!r}{nearest(corpus, self.retriever)}: "
                f"it has {', '.join(self.retriever)}"
            )
        return self.retriever[corpus]

    def corpus_of(self, name: str) -> Corpus | None:
        """The corpus of the questions whose test set gives it this name, if there is one.

        Raises:
            ValueError: what `retriever_of` refuses.
        """
        if (retriever := self.retriever_of(name)) is not None:
            return retriever.corpus
        return self.corpora.get(name) if isinstance(self.corpora, Mapping) else self.corpora

    def settings(self, config: GenerationConfig) -> dict[str, Any]:
        """What decides the answers besides the questions and the corpora of a mapping, JSON values."""
        retriever: Any = self.retriever
        if isinstance(retriever, Mapping):
            origin = next(iter(retriever.values())).origin
        else:
            origin = None if retriever is None else {**retriever.origin, **retriever.corpus.identity}
        return {
            "system": self.name.partition(":")[0],
            "checkpoint": self.fingerprint or self.model.fingerprint(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "retriever": origin,
            "generation": self._decoding(config).model_dump(mode="json"),
        }

    def answer(
        self,
        examples: Sequence[Example],
        config: GenerationConfig,
        on_answer: Callable[[int, Answer], None],
        *,
        corpora: Sequence[str] | None = None,
        batch: int = 16,
    ) -> None:
        """Writes the answers; this is the one place of the evaluation that knows the decoder.

        Args:
            examples: the questions.
            config: how to write.
            on_answer: called with the row of an example and its answer as soon as it is complete, in any order.
            corpora: the name of the corpus that each example searches, where there are several.
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

        names = [""] * len(examples) if corpora is None else corpora
        searches = {name: Searches(self.retriever_of(name)) for name in dict.fromkeys(names)}
        generator = Generator(self.model, Searches(None), self._decoding(config), max_batch=batch)
        generator.generate_all(
            (
                ScoredQuestion(e.question, e.instruction, index=searches[name], example=e)
                for e, name in zip(examples, names, strict=True)
            ),
            on_answer=ended,
        )
        if failed:
            first = min(failed)
            raise ValueError(
                f"{len(failed)} of {len(examples)} questions could not be answered, first {examples[first].id!r}: "
                f"{failed[first]} (the other answers are kept; leave these questions out, or fix what is wrong)"
            )

    def _decoding(self, config: GenerationConfig) -> GenerationConfig:
        return config if self.retriever else config.model_copy(update={"max_retrievals": 0, "ret_first": False})


@dataclass(frozen=True)
class ScoredQuestion(Question):
    """A question to Gen that knows its example, which retrievers such as "gold" read."""

    example: Example | None = None


class Searches:
    """What the decoder asks, put to a retriever."""

    def __init__(self, retriever: Retriever | None):
        self._retriever = retriever

    def search_all(self, asked: Sequence[Asked], k: int) -> Sequence[Found]:
        assert self._retriever is not None, "a closed-book system retrieves nothing"
        requests = []
        for one in asked:
            assert isinstance(one.request, ScoredQuestion)
            assert one.request.example is not None
            # Not validated: Gen may have written nothing on a passage.
            written = tuple(Segment.model_construct(text=s.text, passage=s.passage) for s in one.segments)
            requests.append(Request(one.request.example, one.query, written, one.retrievals))
        return self._retriever.retrieve(requests, k)
