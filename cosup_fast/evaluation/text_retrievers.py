"""Retrievers that search with text: BM25, and sentence-transformers models. They know nothing of Gen.

The query is the question and what Gen has written so far.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosup_fast.data.answers import normal_words
from cosup_fast.data.records import Example, Passage, Segment
from cosup_fast.data.template import passage_text
from cosup_fast.evaluation.corpus import Corpus
from cosup_fast.evaluation.judge import stemmer
from cosup_fast.evaluation.metrics import require
from cosup_fast.evaluation.ranks import asked
from cosup_fast.evaluation.retrievers import Ranking, Request
from cosup_fast.evaluation.scoring import DEPTH
from cosup_fast.generation.request import Found
from cosup_fast.model.folder import weights_digest

K1, B = 1.2, 0.75
"""Of BM25: how fast repetitions of a word saturate, and how much long passages are discounted."""

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
"""Ends of the names of files that are pickles, or may be."""

REMEMBERED = 1 << 12
"""Texts whose passages are kept, some 10 kB each: an evaluation asks for them again, a server must not grow."""

_SCORES_AT_ONCE = 1 << 26


class TextRetriever(ABC):
    """Ranks a corpus by scores of texts; a text that was searched for lately is not searched for again."""

    def __init__(self, corpus: Corpus | Sequence[Passage]):
        self.corpus = Corpus.of(corpus)
        self._found: dict[str, list[tuple[int, float]]] = {}

    @property
    @abstractmethod
    def origin(self) -> dict[str, Any]:
        """What decides its results besides the corpus, JSON values."""

    @abstractmethod
    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """The score of every passage for every text, (len(texts), M) fp32."""

    def retrieve(self, requests: Sequence[Request], k: int) -> list[Found]:
        texts = [_so_far(request.example, request.written) for request in requests]
        found = self._search(texts, max(k, DEPTH))  # `rank` will want so many of the first query
        return [[(self.corpus.passages[row], score) for row, score in one[:k]] for one in found]

    def rank(self, examples: Sequence[Example], k: int) -> list[Ranking]:
        texts = [_so_far(example, before) for example in examples for before, _ in asked(example)]
        return [[(self.corpus.passages[row].id, score) for row, score in one] for one in self._search(texts, k)]

    def _search(self, texts: Sequence[str], k: int) -> list[list[tuple[int, float]]]:
        """For each text the k best rows with their scores; of equal scores the earlier row."""
        k = min(k, len(self.corpus))
        found = {text: self._found[text][:k] for text in texts if len(self._found.get(text, ())) >= k}
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        if len(self._found) + len(missing) > REMEMBERED:
            self._found.clear()
        chunk = max(1, _SCORES_AT_ONCE // len(self.corpus))
        for start in range(0, len(missing), chunk):
            part = missing[start : start + chunk]
            for text, scores in zip(part, self.scores(part), strict=True):
                found[text] = self._found[text] = _best(scores, k)
        return [found[text] for text in texts]


class BM25Retriever(TextRetriever):
    """BM25 by bm25s, over the stemmed words of title and text (Robertson and Zaragoza 2009; Lucene's variant).

        score(q, d) = sum over words w of q:  idf(w) tf / (tf + k1 (1 - b + b |d| / mean |d|))
        idf(w) = log(1 + (M - df + 1/2) / (df + 1/2))

    Words are those of `data.answers`, Porter-stemmed; none is left out as too common, which idf sees to.

    Raises:
        ImportError: bm25s or nltk is not installed.
    """

    def __init__(self, corpus: Corpus | Sequence[Passage]):
        super().__init__(corpus)
        require("bm25s", "bm25s")
        require("nltk.stem.porter", "nltk")

    @property
    def origin(self) -> dict[str, Any]:
        return {"bm25": {"k1": K1, "b": B, "stemmer": "porter"}}

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        scores = np.zeros((len(texts), len(self.corpus)), np.float32)
        for row, text in zip(scores, texts, strict=True):
            if words := [word for word in stems(text) if word in self._index.vocab_dict]:
                row[:] = self._index.get_scores(words)
        return scores

    @cached_property
    def _index(self) -> Any:
        index = require("bm25s", "bm25s").BM25(method="lucene", k1=K1, b=B)
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets DEBUG when it is imported
        words = [stems(f"{passage.title} {passage.text}") for passage in self.corpus.passages]
        index.index(words, show_progress=False)
        return index


class DenseRetriever(TextRetriever):
    """A sentence-transformers model, searched exactly with its own similarity.

    Questions go through `encode_query` and passages through `encode_document`, so that a model with two sides, or with
    a prompt for each, is used as it was trained. Passages are embedded in the text that Gen is given. Weights are read
    from safetensors alone and no code of a model is run.

    Args:
        name: a prepared model (`minilm`), a folder or a Hugging Face name.
        corpus: what is searched.
        passage_template: `TextConfig.passage`.
        device: where it runs.
        progress: show a progress bar on stderr while the corpus is embedded.

    Raises:
        ValueError: the model cannot be loaded.
        ImportError: sentence-transformers is not installed.
    """

    def __init__(
        self,
        name: str,
        corpus: Corpus | Sequence[Passage],
        passage_template: str,
        *,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ):
        super().__init__(corpus)
        self._name, self._template, self._progress, self._device = name, passage_template, progress, str(device)
        self._encoder = sentence_encoder(name, self._device)
        # Normalised embeddings turn cosines into inner products, which a model trained for those must not lose.
        self._cosine = self._encoder.similarity_fn_name in (None, "cosine")

    @property
    def origin(self) -> dict[str, Any]:
        return {"encoder": self._name, "weights": encoder_digest(self._name, self._device)}

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        queries = self._embed(self._encoder.encode_query, texts, False)
        if self._cosine or self._encoder.similarity_fn_name == "dot":
            return (queries @ self._embeddings.T).numpy()
        return self._encoder.similarity(queries, self._embeddings).numpy()

    @cached_property
    def _embeddings(self) -> Tensor:
        """Of the corpus; made when first searched, after all that can be checked has been."""
        texts = [passage_text(self._template, p.title, p.text) for p in self.corpus.passages]
        return self._embed(self._encoder.encode_document, texts, self._progress)

    def _embed(self, encode: Any, texts: Sequence[str], progress: bool) -> Tensor:
        embeddings = encode(
            list(texts), convert_to_tensor=True, normalize_embeddings=self._cosine, show_progress_bar=progress
        )
        return embeddings.float().cpu()


@cache
def sentence_encoder(name: str, device: str) -> Any:
    """A `SentenceTransformer`, loaded once.

    Raises:
        ValueError: it cannot be loaded, is not complete, or has weights in pickles or modules of its own.
        ImportError: sentence-transformers is not installed.
    """
    from huggingface_hub import snapshot_download

    from cosup_fast.data.sources import resolve_model
    from cosup_fast.environment import no_downloaded_kernels
    from cosup_fast.model.pretrained import complete_models

    try:
        with no_downloaded_kernels():
            from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError("--system dense needs sentence-transformers: pip install 'cosup-fast[eval]'") from error
    source = resolve_model(name)
    try:
        if not Path(source).is_dir():
            source = snapshot_download(source, ignore_patterns=[f"*{suffix}" for suffix in PICKLES])
    except (OSError, ValueError) as error:
        raise ValueError(f"dense retriever {name!r} cannot be fetched: {error}") from error
    _check_no_pickles(Path(source), name)
    _check_no_code(Path(source), name)
    try:
        with complete_models(name):
            return SentenceTransformer(
                source, device=device, trust_remote_code=False, model_kwargs={"use_safetensors": True}
            )
    except (OSError, ValueError) as error:
        raise ValueError(f"dense retriever {name!r} cannot be loaded: {error}") from error


def _check_no_pickles(folder: Path, name: str) -> None:
    """Refuses a model of which any module has its weights in a pickle alone, which sentence-transformers would load.

    Raises:
        ValueError: naming the file.
    """
    from cosup_fast.model.pretrained import check_weight_files

    for index in sorted(folder.rglob("*.safetensors.index.json")):
        check_weight_files(index.parent, str(index.parent))
    beside = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
    for path in sorted(folder.rglob("*")):
        if path.suffix in PICKLES and not any((path.parent / one).is_file() for one in beside):
            raise ValueError(
                f"dense retriever {name!r} has weights only in {path}, a pickle, which may run code and is never "
                "read: load and save it once with sentence-transformers, which writes safetensors"
            )


def _check_no_code(folder: Path, name: str) -> None:
    """Refuses a model with modules of its own, whose code some releases of sentence-transformers run from a folder.

    Raises:
        ValueError: naming the module.
    """
    for path in sorted(folder.rglob("*.json")):
        try:
            found = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            continue  # where it matters, it cannot be loaded
        listed = [one.get("type") for one in found if isinstance(one, dict)] if isinstance(found, list) else []
        routed = found.get("types") if isinstance(found, dict) else None
        for kind in (*listed, *(routed.values() if isinstance(routed, dict) else ())):
            if isinstance(kind, str) and "." in kind and not kind.startswith("sentence_transformers."):
                raise ValueError(
                    f"dense retriever {name!r} has the module {kind!r} ({path}), Python code that does not belong to "
                    "sentence-transformers and is never run: use a model made of its modules"
                )


@cache
def encoder_digest(name: str, device: str) -> str:
    """A digest of the weights of a `sentence_encoder`."""
    return weights_digest(sentence_encoder(name, device))


def _so_far(example: Example, written: Sequence[Segment]) -> str:
    return " ".join([example.question, *filter(None, (segment.text.strip() for segment in written))])


def _best(scores: np.ndarray, k: int) -> list[tuple[int, float]]:
    kth = np.partition(scores, -k)[-k]
    rows = np.flatnonzero(scores >= kth)  # with all that tie for the last place
    rows = rows[np.argsort(-scores[rows], kind="stable")][:k]
    return [(row, float(scores[row])) for row in rows.tolist()]


def stems(text: str) -> list[str]:
    """The stems of a text's words, what BM25 counts."""
    return [_stem(word) for word in normal_words(text)]


@cache
def _stem(word: str) -> str:
    return stemmer().stem(word)
