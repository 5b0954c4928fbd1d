"""What many evaluations of one model share: the model itself, the models that search for it, and embedded corpora.

    bench = Workbench(model)
    for name in ("closed-book", "bm25", "gold", "co-supervised"):
        report = evaluate(bench.system(name, corpora), tests, config, folder=cell / name)

Nothing is loaded twice, and a corpus is embedded once for each model that searches it, when it is first searched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from cosup_fast.evaluation.corpus import Corpus
from cosup_fast.evaluation.kinds import split_name
from cosup_fast.evaluation.retrievers import Retriever
from cosup_fast.evaluation.systems import System
from cosup_fast.index import NonparametricIndex, SequenceIndex
from cosup_fast.index.embed import embed_passages
from cosup_fast.index.origin import Origin

if TYPE_CHECKING:
    from cosup_fast.model import CoSupervisionModel


class Workbench:
    """Makes systems that share what is expensive.

    Args:
        model: whose Gen writes in every system.
        load: loads the run that `pair:RUN` names.
        seed: of random passages.
        batch_tokens: most tokens of passages that are embedded together; see `embed_passages`.
        progress: show progress bars on stderr while corpora are embedded.
        fingerprint: of the checkpoint, where the model was cast to another dtype after loading.
    """

    def __init__(
        self,
        model: CoSupervisionModel,
        *,
        load: Callable[[Path], CoSupervisionModel] | None = None,
        seed: int = 0,
        batch_tokens: int | None = None,
        progress: bool = True,
        fingerprint: str | None = None,
    ):
        self.model = model
        self.seed = seed
        self.fingerprint = fingerprint or model.fingerprint()
        self._load = load
        self._batch_tokens = batch_tokens
        self.progress = progress
        self._origins: dict[str, Origin] = {}
        self._searchers: dict[str, CoSupervisionModel] = {}
        self._indexes: dict[tuple[str, str], NonparametricIndex] = {}
        self._retrievers: dict[tuple[str, str, str], Retriever] = {}

    def system(self, name: str, corpora: Corpus | Iterable[Corpus] = ()) -> System:
        """The system of that name.

        Args:
            name: as `--system` takes it, such as `dense:minilm`.
            corpora: one, or those of the test sets, which name theirs.

        Raises:
            ValueError: there is no such system, or its retriever cannot be opened.
        """
        kind, argument = split_name(name)
        named = {} if isinstance(corpora, Corpus) else {corpus.name: corpus for corpus in corpora}
        open_ = kind.open
        if open_ is None:
            return System(
                name,
                self.model,
                corpora=corpora if isinstance(corpora, Corpus) else named,
                fingerprint=self.fingerprint,
            )
        full = f"{kind.name}:{argument}" if argument else kind.name

        def retriever(corpus: Corpus) -> Retriever:
            key = full, corpus.name, corpus.digest
            if key not in self._retrievers:
                self._retrievers[key] = open_(self, argument, corpus)
            return self._retrievers[key]

        if isinstance(corpora, Corpus):
            return System(full, self.model, retriever(corpora), fingerprint=self.fingerprint)
        if not named:
            raise ValueError(f"system {name!r} retrieves: give it a corpus")
        made = {name: retriever(corpus) for name, corpus in named.items()}
        return System(full, self.model, made, fingerprint=self.fingerprint)

    def searcher(self, run: str) -> CoSupervisionModel:
        """The model of a run that searches for this one's Gen; the model itself for an empty name.

        Raises:
            ValueError: the workbench cannot load runs.
        """
        if not run:
            return self.model
        if run not in self._searchers:
            if self._load is None:
                raise ValueError(f"system 'pair:{run}': give the workbench a `load` that opens runs")
            self._searchers[run] = self._load(Path(run))
        return self._searchers[run]

    def add_searcher(self, run: str, model: CoSupervisionModel) -> None:
        """Gives a model that is already loaded, as the one that `pair:RUN` names."""
        self._searchers[run] = model

    def add_index(self, run: str, corpus: Corpus, index: NonparametricIndex) -> None:
        """Gives an index that already exists, as that of a run over a corpus; an empty name is the model itself."""
        self._indexes[run, corpus.digest] = index

    def index(self, run: str, corpus: Corpus) -> NonparametricIndex:
        """The corpus, embedded by the model of a run."""
        key = run, corpus.digest
        if key not in self._indexes:
            model = self.searcher(run)
            embeddings = embed_passages(model, corpus.passages, batch_tokens=self._batch_tokens, progress=self.progress)
            self._indexes[key] = SequenceIndex(corpus.passages, embeddings, self._origin(run), device=model.device)
        return self._indexes[key]

    def _origin(self, run: str) -> Origin:
        if run not in self._origins:
            self._origins[run] = Origin.of(self.searcher(run))  # which reads all weights: once is enough
        return self._origins[run]
