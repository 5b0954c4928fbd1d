"""The table of systems: how each is named, what Gen is given, what that needs, and how its retriever is opened.

Error text, the help of `cosup-fast evaluate` and the table in docs/evaluation.md come from here. Retrievers are
imported when they are opened, so that help answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from cosup_fast.data.records import nearest

if TYPE_CHECKING:
    from cosup_fast.evaluation.corpus import Corpus
    from cosup_fast.evaluation.retrievers import Retriever
    from cosup_fast.index import NonparametricIndex
    from cosup_fast.model import CoSupervisionModel


class Bench(Protocol):
    """What retrievers are opened with, a `Workbench`."""

    model: CoSupervisionModel
    seed: int
    progress: bool

    def searcher(self, run: str) -> CoSupervisionModel: ...
    def index(self, run: str, corpus: Corpus) -> NonparametricIndex: ...


def _own(bench: Bench, _: str, corpus: Corpus) -> Retriever:
    from cosup_fast.evaluation.retrievers import IndexRetriever

    return IndexRetriever(bench.model, bench.index("", corpus), corpus)


def _gold(bench: Bench, _: str, corpus: Corpus) -> Retriever:
    from cosup_fast.evaluation.retrievers import GoldRetriever

    return GoldRetriever(corpus)


def _random(bench: Bench, _: str, corpus: Corpus) -> Retriever:
    from cosup_fast.evaluation.retrievers import RandomRetriever

    return RandomRetriever(corpus, bench.seed)


def _bm25(bench: Bench, _: str, corpus: Corpus) -> Retriever:
    from cosup_fast.evaluation.text_retrievers import BM25Retriever

    return BM25Retriever(corpus)


def _dense(bench: Bench, name: str, corpus: Corpus) -> Retriever:
    from cosup_fast.evaluation.text_retrievers import DenseRetriever

    template = bench.model.template.config.passage
    return DenseRetriever(name, corpus, template, device=bench.model.device, progress=bench.progress)


def _pair(bench: Bench, run: str, corpus: Corpus) -> Retriever:
    from cosup_fast.evaluation.retrievers import PairRetriever

    return PairRetriever(bench.searcher(run), bench.index(run, corpus), corpus)


@dataclass(frozen=True)
class Kind:
    """A row of the table of systems.

    Args:
        name: what `--system` calls it.
        retrieves: what Gen is given, for help and docs.
        reads: what has to be there besides the checkpoint.
        open: makes its retriever, given a workbench, what follows the colon, and a corpus; None: nothing is retrieved.
        argument: what follows the colon, if anything does.
        default: that argument when it is left out; without a default it is required.
    """

    name: str
    retrieves: str
    reads: Literal["index", "corpus", ""]
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
        Kind("co-supervised", "what Gen's own queries find in the index of its Embseq", "index", _own),
        Kind("closed-book", "nothing", "", None),
        Kind("gold", "the gold passages, in order", "corpus", _gold),
        Kind("random", "passages drawn by `--seed`", "corpus", _random),
        Kind("bm25", "what BM25 (bm25s) finds with the question and the text written so far", "corpus", _bm25),
        Kind(
            "dense",
            "what a sentence-transformers model finds with the question and the text written so far; `dense:minilm` "
            "is prepared by `cosup-fast data prepare minilm`",
            "corpus",
            _dense,
            argument="NAME",
            default="minilm",
        ),
        Kind(
            "pair",
            "what another run finds: its Gen reads the same text and makes the query, its Embseq made the index",
            "index",
            _pair,
            argument="RUN",
        ),
        Kind("untrained", "what the run's model finds before training, which writes, too", "corpus", _own),
    )
}
"""Every system, by what its name begins with."""

_READS = {"index": "its index, or `--corpus`", "corpus": "`--corpus`", "": ""}


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


def table() -> str:
    """The table of docs/evaluation.md."""
    rows = [f"| `{kind.form}` | {kind.retrieves} | {_READS[kind.reads]} |" for kind in SYSTEMS.values()]
    return "\n".join(["| `--system` | Gen is given | reads |", "|---|---|---|", *rows])
