"""The nonparametric index: every passage as one vector of Embseq, searched exactly by inner product.

1. `embed_passages` turns a corpus into sequence embeddings, `embed_queries` teacher-forced [NSP] tokens into queries.
2. `SequenceIndex` holds the embeddings in a FAISS `IndexFlatIP` next to their passages.
3. A saved index is stamped with the weights and the template that made it, and with checksums of its files, so that
   the queries of one checkpoint are never searched among the embeddings of another.

The text that is embedded is the text that Gen is given after a retrieval, title included. Source: Lee et al. 2024,
arXiv 2403.09024, section 3.

Shapes: N queries, M passages, D Gen's width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.progress import track
from torch import Tensor

from cosup_fast.data.packing import Pack
from cosup_fast.data.records import Example, Passage, read_passages, write_jsonl
from cosup_fast.data.template import TextConfig
from cosup_fast.files import replace_folder, sha256

if TYPE_CHECKING:
    from cosup_fast.modeling import CoSupervisionModel

FORMAT_VERSION = 1
VECTORS, PASSAGES, STAMP = "vectors.faiss", "passages.jsonl", "index.json"


class Origin(BaseModel):
    """What decides the embeddings of an index."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: TextConfig
    similarity: str
    fingerprint: str

    @classmethod
    def of(cls, model: CoSupervisionModel) -> Self:
        """The template, the similarity and the fingerprint of a model; the latter reads all its weights."""
        return cls(text=model.template.config, similarity=model.nsp.similarity, fingerprint=model.fingerprint())

    def difference(self, model: Origin) -> str:
        """How an index's origin differs from a model's, the cause first; nothing when they agree."""
        for name in TextConfig.model_fields:
            theirs, ours = getattr(self.text, name), getattr(model.text, name)
            if theirs != ours:
                return f"text.{name} is {theirs!r}, the model's is {ours!r}"
        if self.similarity != model.similarity:
            return f"similarity is {self.similarity!r}, the model's is {model.similarity!r}"
        if self.fingerprint != model.fingerprint:
            return f"fingerprint is {self.fingerprint[:12]}, the model's is {model.fingerprint[:12]}: other weights"
        return ""


class _Stamp(BaseModel):
    """The `index.json` of a saved index."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    count: int
    dim: int
    origin: Origin
    sha256: dict[str, str]


def embed_passages(
    model: CoSupervisionModel, passages: Sequence[Passage], *, batch_tokens: int = 4096, progress: bool = False
) -> Tensor:
    """Sequence embeddings of passages, (M, D) fp32 on the CPU; each depends on its own passage alone.

    Args:
        model: runs in evaluation mode without gradients, and has its modes back afterwards.
        passages: the passages, in the order of the rows.
        batch_tokens: most tokens in one pack; a longer passage is a pack of its own.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: `batch_tokens` below 1, or a passage that is too long for `Template.sequence`.
    """
    sequences = [model.template.sequence(passage) for passage in passages]
    embeddings = torch.empty(len(sequences), model.width)
    with evaluation_mode(model):
        for rows in _packs(sequences, batch_tokens, "Embedding passages", progress):
            pack = Pack.of([sequences[row] for row in rows]).to(model.device)
            embeddings[rows] = model.embed(pack).float().cpu()
    return embeddings


def embed_queries(
    model: CoSupervisionModel,
    examples: Sequence[Example],
    corpus: dict[str, Passage],
    *,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> tuple[Tensor, list[tuple[int, str]]]:
    """Queries of teacher-forced examples: Gen's hidden state at every [NSP], (N, D) fp32 on the CPU.

    An example whose output retrieves nothing but that names gold passages asks once, where its output begins.

    Returns:
        The queries, and for each of them (row of its example, id of the passage it asks for).

    Raises:
        ValueError: `batch_tokens` below 1, or what `Template.gen_sequence` refuses.
    """
    template = model.template
    sequences: list[list[int]] = []
    rows_of: list[list[int]] = []
    asked: list[tuple[int, str]] = []
    for number, example in enumerate(examples):
        sequence = template.gen_sequence(example, corpus)
        ids, rows, wanted = sequence.input_ids, sequence.query_rows, sequence.query_passages
        if not rows and example.gold:
            ids = [*template.prompt(example.question, example.instruction), template.nsp]
            rows, wanted = [len(ids) - 1], example.gold[:1]
        if rows:
            sequences.append(ids[: rows[-1] + 1])
            rows_of.append(list(range(len(asked), len(asked) + len(rows))))
            asked.extend((number, passage) for passage in wanted)
    queries = torch.empty(len(asked), model.width)
    with evaluation_mode(model):
        for members in _packs(sequences, batch_tokens, "Embedding queries", progress):
            pack = Pack.of([sequences[member] for member in members]).to(model.device)
            rows = (pack.input_ids == template.nsp).nonzero()[:, 0]
            asking = [row for member in members for row in rows_of[member]]
            queries[asking] = model.query_embeddings(pack, rows).float().cpu()
    return queries, asked


class SequenceIndex:
    """Exact inner-product search over the sequence embeddings of a corpus; `build` and `load` make one.

    Args:
        passages: the corpus, ids unique.
        embeddings: (M, D), a row for each passage.
        origin: what made the embeddings, `Origin.of(model)`.

    Raises:
        ValueError: no passage, an id twice, embeddings of another shape or not finite.
        ImportError: faiss is not installed.
    """

    def __init__(self, passages: Sequence[Passage], embeddings: Tensor, origin: Origin):
        if not passages:
            raise ValueError("an index needs at least one passage, got an empty corpus")
        if embeddings.ndim != 2:
            raise ValueError(f"embeddings must be (passages, width), got shape {tuple(embeddings.shape)}")
        _check_ids(passages)
        self.origin = origin
        self.passages: list[Passage] = []
        self._vectors = _faiss().IndexFlatIP(embeddings.shape[1])
        self._append(passages, embeddings)

    @classmethod
    def build(cls, model: CoSupervisionModel, passages: Sequence[Passage], *, progress: bool = True) -> Self:
        """Embeds and indexes a corpus.

        Raises:
            ValueError: an empty corpus, an id twice, or a passage that is too long.
            ImportError: faiss is not installed.
        """
        _faiss()  # what is missing should not be found out after an hour of embedding
        _check_ids(passages)
        return cls(passages, embed_passages(model, passages, progress=progress), Origin.of(model))

    def __len__(self) -> int:
        return len(self.passages)

    @property
    def embeddings(self) -> Tensor:
        """A copy of the sequence embeddings, (M, D) fp32."""
        return torch.from_numpy(self._vectors.reconstruct_n(0, len(self)))

    def add(self, model: CoSupervisionModel, passages: Sequence[Passage], *, progress: bool = True) -> None:
        """Embeds and appends passages.

        Raises:
            ValueError: another model than the one that made the index, an id that is there already, or a passage
                that is too long; the index is then left as it was.
        """
        if difference := self.origin.difference(Origin.of(model)):
            raise ValueError(f"these passages would not match the index, whose {difference}: build a new index")
        _check_ids([*self.passages, *passages])
        self._append(passages, embed_passages(model, passages, progress=progress))

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The passages with the largest inner products, best first.

        Args:
            queries: (N, D).
            k: how many; all passages when there are fewer.

        Returns:
            Scores (N, min(k, M)) fp32 and rows of `passages` (N, min(k, M)) int64.

        Raises:
            ValueError: `k` below 1, queries of another width, or queries that are not finite.
        """
        if k < 1:
            raise ValueError(f"k={k}: ask for at least one passage")
        if queries.ndim != 2 or queries.shape[1] != self._vectors.d:
            raise ValueError(f"queries must be (N, {self._vectors.d}), got shape {tuple(queries.shape)}")
        if not queries.isfinite().all():
            raise ValueError("queries must be finite: the weights are damaged, or training diverged")
        found = self._vectors.search(queries.detach().float().cpu().contiguous().numpy(), min(k, len(self)))
        scores, rows = map(torch.from_numpy, found)
        return scores, rows

    def retrieve(self, query: Tensor, k: int) -> list[tuple[Passage, float]]:
        """The k best passages for one query (D,) with their scores, best first; `search` says what is refused."""
        scores, rows = self.search(query[None], k)
        return [(self.passages[row], score) for row, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True)]

    def save(self, folder: str | Path) -> None:
        """Writes the index; the folder appears whole or not at all, and replaces an earlier index.

        Raises:
            ValueError: the folder holds something that is no index.
        """
        with replace_folder(folder, STAMP) as temporary:
            _faiss().write_index(self._vectors, str(temporary / VECTORS))
            write_jsonl(temporary / PASSAGES, self.passages)
            stamp = _Stamp(
                format_version=FORMAT_VERSION,
                count=len(self),
                dim=self._vectors.d,
                origin=self.origin,
                sha256={name: sha256(temporary / name) for name in (VECTORS, PASSAGES)},
            )
            (temporary / STAMP).write_text(stamp.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, model: CoSupervisionModel, *, allow_stale: bool = False) -> Self:
        """Reads an index that `save` wrote, for the model that made it.

        Args:
            folder: the index.
            model: the checkpoint whose queries will be searched.
            allow_stale: take an index of other weights or of another template; its width must still be the model's.

        Raises:
            ValueError: no index, a damaged one, one of another format version, or one that `model` did not make.
            ImportError: faiss is not installed.
        """
        folder = Path(folder)
        stamp = _read_stamp(folder)
        for name in (VECTORS, PASSAGES):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} is incomplete, {name} is missing: build the index again")
            if sha256(folder / name) != stamp.sha256.get(name):
                raise ValueError(
                    f"{folder / name} is damaged or was changed, its checksum is not the one in {STAMP}: "
                    "build the index again"
                )
        if stamp.dim != model.width:
            raise ValueError(
                f"{folder} has vectors of width {stamp.dim}, this model has {model.width}: build a new index"
            )
        if not allow_stale and (difference := stamp.origin.difference(Origin.of(model))):
            raise ValueError(
                f"{folder} was not built by this model: its {difference}. Build it again with this checkpoint, load "
                "the checkpoint that built it, or pass allow_stale=True to search it all the same"
            )
        vectors = _faiss().read_index(str(folder / VECTORS))
        passages = read_passages(folder / PASSAGES)
        if (vectors.d, vectors.ntotal, len(passages)) != (stamp.dim, stamp.count, stamp.count):
            raise ValueError(
                f"{folder} is inconsistent: {STAMP} says {stamp.count} vectors of width {stamp.dim}, there are "
                f"{vectors.ntotal} of {vectors.d} for {len(passages)} passages: build the index again"
            )
        return cls(passages, torch.from_numpy(vectors.reconstruct_n(0, stamp.count)), stamp.origin)

    def _append(self, passages: Sequence[Passage], embeddings: Tensor) -> None:
        if embeddings.shape != (len(passages), self._vectors.d):
            raise ValueError(
                f"embeddings must be ({len(passages)}, {self._vectors.d}), got shape {tuple(embeddings.shape)}"
            )
        if not embeddings.isfinite().all():
            row = int((~embeddings.isfinite()).any(dim=1).nonzero()[0, 0])
            raise ValueError(
                f"the embedding of passage {passages[row].id!r} is not finite: the weights are damaged, or training "
                "diverged"
            )
        self._vectors.add(embeddings.detach().float().cpu().contiguous().numpy())
        self.passages.extend(passages)


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; every module has its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("the index needs faiss: pip install 'cosup-fast[index]'") from error
    return faiss


def _packs(sequences: list[list[int]], batch_tokens: int, title: str, progress: bool) -> Iterator[list[int]]:
    """Rows of `sequences` in packs of at most `batch_tokens` tokens, longest first, so that memory runs out at once."""
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens={batch_tokens}: a pack needs at least one token")
    packs: list[list[int]] = []
    room = 0
    for row in sorted(range(len(sequences)), key=lambda row: -len(sequences[row])):
        length = len(sequences[row])
        if not packs or length > room:
            packs.append([])
            room = batch_tokens
        packs[-1].append(row)
        room -= length
    yield from track(packs, title, console=Console(stderr=True), transient=True, disable=not progress)


def _check_ids(passages: Sequence[Passage]) -> None:
    seen: set[str] = set()
    for passage in passages:
        if passage.id in seen:
            raise ValueError(f"passage id {passage.id!r} stands more than once in the corpus: ids must be unique")
        seen.add(passage.id)


def _read_stamp(folder: Path) -> _Stamp:
    path = folder / STAMP
    if not path.is_file():
        raise ValueError(f"{folder} is no index, it has no {STAMP}: expected a folder that `cosup-fast index` wrote")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if (version := data["format_version"]) != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format_version {version!r}, this release reads {FORMAT_VERSION}: build the index again"
            )
        return _Stamp.model_validate(data)
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, build the index again: {error}") from None
