"""The systems under test: one writer, Gen with its decoder, and one retriever that hands it passages.

All write with the same prompts and decoding, many questions at once, so that only what is retrieved differs. `SYSTEMS`
lists them. With a Gen trained on NTP alone, `dense` and `pair` are the single-supervision baselines of Lee et al. 2024,
arXiv 2403.09024, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from cosup_fast.data.records import Example, Passage, Segment, nearest
from cosup_fast.evaluation.corpus import Corpus
from cosup_fast.evaluation.retrievers import (
    GoldRetriever,
    IndexRetriever,
    PairRetriever,
    RandomRetriever,
    Request,
    Retriever,
)
from cosup_fast.evaluation.text_retrievers import BM25Retriever
from cosup_fast.generation import Answer, Asked, GenerationConfig, Generator
from cosup_fast.generation import Request as Question
from cosup_fast.generation.request import Found

if TYPE_CHECKING:
    from cosup_fast.index import SequenceIndex
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
        searches = {name: _Searches(self.retriever_of(name)) for name in dict.fromkeys(names)}
        generator = Generator(self.model, _Searches(None), self._decoding(config), max_batch=batch)
        generator.generate_all(
            (
                _Question(e.question, e.instruction, index=searches[name], example=e)
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


class Bench(Protocol):
    """What a retriever is opened from, a `Workbench`; the run `""` is that of the model which writes."""

    model: CoSupervisionModel
    seed: int

    def searcher(self, run: str) -> CoSupervisionModel: ...
    def index(self, run: str, corpus: Corpus) -> SequenceIndex: ...
    def dense(self, name: str, corpus: Corpus) -> Retriever: ...


@dataclass(frozen=True)
class Kind:
    """A row of the table of systems.

    Args:
        name: what `--system` calls it.
        retrieves: what Gen is given, for help and docs.
        reads: what has to be there besides the checkpoint.
        open: makes its retriever over a corpus, given a workbench and what follows the colon.
        argument: what follows the colon, if anything does.
        default: that argument when it is left out; without a default it is required.
    """

    name: str
    retrieves: str
    reads: str  # "index", "corpus" or ""
    open: Callable[[Bench, str, Corpus], Retriever] | None
    argument: str = ""
    default: str = ""

    @property
    def form(self) -> str:
        """How it is written: `dense:NAME`."""
        return f"{self.name}:{self.argument}" if self.argument else self.name


SYSTEMS = {
    kind.name: kind
    for kind in (
        Kind(
            "co-supervised",
            "what Gen's own queries find in the index of its Embseq",
            "index",
            lambda bench, _, corpus: IndexRetriever(bench.model, bench.index("", corpus), corpus),
        ),
        Kind("closed-book", "nothing", "", None),
        Kind("gold", "the gold passages, in order", "corpus", lambda bench, _, corpus: GoldRetriever(corpus)),
        Kind(
            "random",
            "passages drawn by `--seed`",
            "corpus",
            lambda bench, _, corpus: RandomRetriever(corpus, bench.seed),
        ),
        Kind(
            "bm25",
            "what BM25 (bm25s) finds with the question and the text written so far",
            "corpus",
            lambda bench, _, corpus: BM25Retriever(corpus),
        ),
        Kind(
            "dense",
            "what a sentence-transformers model finds with the question and the text written so far; `dense:minilm` "
            "is prepared by `cosup-fast data prepare minilm`",
            "corpus",
            lambda bench, name, corpus: bench.dense(name, corpus),
            argument="NAME",
            default="minilm",
        ),
        Kind(
            "pair",
            "what another run finds: its Gen reads the same text and makes the query, its Embseq made the index",
            "index",
            lambda bench, run, corpus: PairRetriever(bench.searcher(run), bench.index(run, corpus), corpus),
            argument="RUN",
        ),
        Kind(
            "untrained",
            "what the run's model finds before training, which writes, too",
            "corpus",
            lambda bench, _, corpus: IndexRetriever(bench.model, bench.index("", corpus), corpus),
        ),
    )
}
"""Every system, by what its name begins with. Error text, help and the table in docs/evaluation.md come from here."""


def forms() -> str:
    """All systems as they are written, for help and errors."""
    names = [kind.form for kind in SYSTEMS.values()]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def split_name(name: str) -> tuple[Kind, str]:
    """The kind of a system and what follows its colon: `dense` gives that of `dense:NAME` and `minilm`.

    Raises:
        ValueError: there is no such kind, its argument is missing, or it takes none.
    """
    first, _, argument = name.partition(":")
    if first not in SYSTEMS:
        raise ValueError(f"--system {name!r} is unknown{nearest(first, SYSTEMS)}: expected {forms()}")
    kind = SYSTEMS[first]
    argument = argument or kind.default
    if kind.argument and not argument:
        raise ValueError(f"--system {name!r} needs its {kind.argument}: write {kind.form}")
    if argument and not kind.argument:
        raise ValueError(f"--system {name!r}: {kind.name} takes nothing after a colon")
    return kind, argument
