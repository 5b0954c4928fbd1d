"""`MilvusIndex`: the passages and their embeddings in a collection of Milvus, on another machine or on many.

1. A build makes the same shards as that of a folder (`build.py`), by one process or many, in a hidden folder beside
   the run. Rank 0 then sends them, shard by shard, to a collection of another name, which takes the index's name once
   it is whole: until then an earlier index is searched. Sending resumes after the last shard that was sent whole.
2. Milvus proposes candidates; their scores are computed again from the stored embeddings (`search.py`). On a FLAT
   index scores and order are therefore those of the other exact searchers.
3. Additions and deletions take effect row by row, not all at once. A process that opens the index after an addition was
   interrupted does not find the rows of that addition; the same command completes it.

Shapes: N queries, M passages, D Gen's width.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from cosup_fast.data.corpus import Corpus, open_corpus
from cosup_fast.data.passages import ByRow
from cosup_fast.data.records import DataError, Passage
from cosup_fast.index import search as nearest
from cosup_fast.index.build import Build, Options
from cosup_fast.index.collection import (
    AT_ONCE,
    LONGEST,
    MOST_CANDIDATES,
    Collection,
    Place,
    StoreError,
    StoreStamp,
    check_index_type,
    passage_of,
)
from cosup_fast.index.nonparametric import NonparametricIndex, check_deletion, check_made_by
from cosup_fast.index.origin import Origin
from cosup_fast.index.shards import Shard

if TYPE_CHECKING:
    from cosup_fast.model import CoSupervisionModel

REMEMBERED = 1 << 14
NUMBERS_AT_ONCE = 1 << 20
"""Of the embeddings in one answer of the client, which holds each as a Python number."""


class MilvusIndex(NonparametricIndex):
    """An index in Milvus; `build`, `load` and `open` make one."""

    def __init__(self, collection: Collection):
        self._collection = collection
        self.name = str(collection.place)
        self._take(collection.stamp())

    @classmethod
    def build(
        cls,
        model: CoSupervisionModel,
        corpus: str | Path | Sequence[Passage],
        name: str,
        work: Path,
        *,
        factory: str | None = None,
        parameters: str = "",
        options: Options | None = None,
    ) -> int:
        """Embeds a corpus into a collection, and returns the number of its passages.

        All ranks of `torch.distributed` that make the call share the embedding; rank 0 alone speaks to Milvus.

        Args:
            model: embeds the passages.
            corpus: passages, or what `open_corpus` takes.
            name: `milvus:URI#COLLECTION`; an earlier index there is replaced once the new one is whole.
            work: a folder that all ranks see, under which the shards are kept until they are sent.
            factory: a Milvus index type such as HNSW; FLAT, which is exact, unless given.
            parameters: of its search, such as `ef=64`.
            options: how to embed.

        Raises:
            ValueError: a model without an Embseq, what `Build` and `open_corpus` refuse, an unknown index type, or a
                passage with more than 65,535 bytes in one field.
            StoreError: Milvus does not answer, or the collection holds something else.
            ImportError: pymilvus is not installed.
        """
        model.require_embseq("an index cannot be built")
        place, kind, searching = Place.parse(name), check_index_type(factory or "FLAT"), _parameters(parameters)
        if searching and kind == "FLAT":
            raise ValueError(f"parameters={parameters!r}: an exact search has none, give a factory, too")
        options = options or Options()
        source, origin = _Limited(open_corpus(corpus)), Origin.of(model)
        hidden, context = _hidden(work, place, "building"), f"{place} {kind} {parameters}"
        with Build(hidden, model, source, origin, options, context=context) as build:
            with build.together(silent=True):
                if build.leads:
                    _check_free(place)  # before the work
            names = build.run()
            with build.together(silent=True):
                if build.leads:
                    stamp = StoreStamp(
                        rows=len(source),
                        dim=model.width,
                        precision=options.precision,
                        origin=origin,
                        index=kind,
                        parameters=searching,
                        state="building",
                        source=build.digest,
                    )
                    _install(place, stamp, build, names)
                    build.discard()
        return len(source)

    @classmethod
    def load(cls, name: str, model: CoSupervisionModel, *, allow_stale: bool = False) -> Self:
        """Opens an index, for the model that made it.

        Args:
            name: `milvus:URI#COLLECTION`.
            model: the checkpoint whose queries will be searched.
            allow_stale: take an index of other weights or of another template; its width must still be the model's.

        Raises:
            ValueError: a model without an Embseq, or an index that `model` did not make.
            StoreError: Milvus does not answer, there is no such index, or its collection was changed.
            ImportError: pymilvus is not installed.
        """
        model.require_embseq("no index can be searched")
        index = cls.open(name)
        check_made_by(model, index.name, index.dim, index.origin, allow_stale=allow_stale)
        return index

    @classmethod
    def open(cls, name: str) -> Self:
        """Opens an index whatever made it, to look at it or to delete from it; see `load`."""
        place = Place.parse(name)
        collection = None if place.missing else Collection(place)
        if collection is None or not collection.exists():
            raise StoreError(
                f"{place.uri} has no collection {place.collection!r}: make it with `cosup-fast index build --store`, "
                "or name another with #COLLECTION"
            )
        return cls(collection)

    @classmethod
    def exists(cls, name: str) -> bool:
        """Whether Milvus has a collection of this name."""
        place = Place.parse(name)
        if place.missing:
            return False
        with closing(Collection(place)) as collection:
            return collection.exists()

    def close(self) -> None:
        """Ends the connection to Milvus; a later look-up makes a new one."""
        self._collection.close()

    def _take(self, stamp: StoreStamp) -> None:
        if stamp.state == "building":
            raise StoreError(f"{self.name} is being built: wait for it, or continue it with the same command")
        self._collection.load()
        self.stamp, self.origin, self.precision = stamp, stamp.origin, stamp.precision
        self._count = self._collection.count(stamp.rows)
        self._present_rows: np.ndarray | None = None
        self.near: dict[int, np.ndarray] = {}  # embeddings of the last candidates, by stored row
        self._remembered: dict[int, Passage] = {}  # by stored row
        self.passages = _Rows(self)
        self.by_id = _ById(self)

    @property
    def dim(self) -> int:
        return self.stamp.dim

    @property
    def collection(self) -> Collection:
        """Where it is stored."""
        return self._collection

    @property
    def count(self) -> int:
        """M, when it was opened or last changed here."""
        return self._count

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        near = self.near
        stored = self.stored(rows)
        if lost := list(dict.fromkeys(row for row in stored.tolist() if row not in near)):
            found = self._collection.fetch(lost, vectors=True)
            near = near | {row: np.asarray(one["vector"], np.float32) for row, one in zip(lost, found, strict=True)}
        return np.stack([near[row] for row in stored.tolist()]) if len(stored) else np.empty((0, self.dim), np.float32)

    def blocks(self) -> Iterator[Tensor]:
        for start in range(0, self._count, AT_ONCE):
            yield torch.from_numpy(self.vectors(np.arange(start, min(start + AT_ONCE, self._count))))

    def candidates(self) -> tuple[nearest.Propose, bool]:
        # Between searches, so that what one has found stays until it is read.
        if len(self._remembered) > REMEMBERED:
            self._remembered.clear()
        return self._propose, self.stamp.index == "FLAT"

    def stored(self, rows: np.ndarray) -> np.ndarray:
        """The rows in Milvus of rows (n,), which have no gaps."""
        return rows if self._count == self.stamp.rows else self._present[rows]

    def passage(self, row: int) -> Passage:
        """The passage of a row."""
        (stored,) = self.stored(np.array([row])).tolist()
        if (known := self._remembered.get(stored)) is not None:
            return known
        if len(self._remembered) > REMEMBERED:
            self._remembered.clear()
        (entity,) = self._collection.fetch([stored], vectors=False)
        found = self._remembered[stored] = passage_of(entity)
        return found

    def _append(
        self, model: CoSupervisionModel, source: Corpus, origin: Origin, options: Options, work: Path | None
    ) -> None:
        if work is None:
            raise ValueError("work=None: name a folder for the shards of the new passages until they are sent")
        rows, source = self.stamp.rows, _Limited(source)
        hidden = _hidden(work, self._collection.place, "adding")
        with Build(hidden, model, source, origin, options, known=self._known, context=self.name) as build:
            with build.together(silent=True):
                if build.leads:
                    self._check_unchanged()
            names = build.run()
            with build.together(silent=True):
                if build.leads:
                    self._check_unchanged()
                    adding = {"state": "adding", "source": build.digest}
                    if (self.stamp.state, self.stamp.source) != ("adding", build.digest):
                        self._collection.delete_from(rows)  # of another addition that was stopped
                        self._collection.write_sent(0)
                        self._collection.write_stamp(self.stamp.model_copy(update=adding))
                    _send(self._collection, build, names, rows)
                    whole = {"state": "whole", "rows": rows + len(source), "generation": self.stamp.generation + 1}
                    self._collection.write_stamp(self.stamp.model_copy(update=adding | whole))
                    build.discard()
        self._take(self._collection.stamp())

    def delete(self, ids: Iterable[str]) -> None:
        wanted = list(dict.fromkeys(ids))
        self._check_unchanged()
        check_deletion(wanted, self._known(wanted), self._count)
        if wanted:
            self._collection.delete(wanted)
            self._collection.write_stamp(self.stamp.model_copy(update={"generation": self.stamp.generation + 1}))
            self._take(self._collection.stamp())

    def describe(self) -> dict[str, str]:
        stamp = self.stamp
        unfinished = {"unfinished": "an addition: the same command continues it"} if stamp.state == "adding" else {}
        return {
            "collection": self.name,
            "changes since it was built": str(stamp.generation),
            "index": f"{stamp.index} {json.dumps(stamp.parameters) if stamp.parameters else ''}".strip(),
            **super().describe(),
            **unfinished,
        }

    @property
    def _present(self) -> np.ndarray:
        """The stored row of each row, (M,) int64."""
        if self._present_rows is None:
            self._present_rows = self._collection.present(self.stamp.rows)
        return self._present_rows

    def _propose(self, queries: Tensor, count: int) -> np.ndarray:
        self.near = {}  # a search asks for the embeddings of what was proposed before it proposes more
        if count > MOST_CANDIDATES:
            raise ValueError(
                f"{self.name} returns at most {MOST_CANDIDATES:,} candidates for a query, {count:,} are needed: ask "
                "for fewer passages"
            )
        rows = np.full((len(queries), count), -1)
        asked = queries.cpu().numpy()
        at_once = max(1, NUMBERS_AT_ONCE // (count * self.dim))
        for start in range(0, len(asked), at_once):
            for number, hits in enumerate(self._hits(asked[start : start + at_once], count)):
                self.near |= {hit["row"]: np.asarray(hit["vector"], np.float32) for hit in hits}
                self._remembered |= {hit["row"]: passage_of(hit) for hit in hits}
                stored = np.array([hit["row"] for hit in hits], np.int64)
                if self._count != self.stamp.rows:
                    stored = np.searchsorted(self._present, stored)
                rows[start + number, : len(hits)] = stored
        return rows

    def _hits(self, queries: np.ndarray, count: int) -> list[list[dict[str, Any]]]:
        """The best rows, without those of an addition that is not finished or came after this index was opened."""
        search, rows = self._collection.search, self.stamp.rows
        if self.stamp.state == "whole":
            found = search(queries, count, self.stamp.parameters)
            if all(hit["row"] < rows for hits in found for hit in hits):
                return found
        return search(queries, count, self.stamp.parameters, below=rows)

    def _known(self, ids: Iterable[str]) -> dict[str, int]:
        return self._collection.rows(ids, self.stamp.rows)

    def _check_unchanged(self) -> None:
        if self._collection.stamp() != self.stamp:
            raise StoreError(f"{self.name} was changed by another process meanwhile: open it again")


class _Rows(ByRow[Passage]):
    """The passages of an index in the order of its rows."""

    def __init__(self, index: MilvusIndex):
        self._index = index

    def __len__(self) -> int:
        return self._index.count

    def at(self, row: int) -> Passage:
        return self._index.passage(row)

    def __iter__(self) -> Iterator[Passage]:
        for start in range(0, len(self), AT_ONCE):
            stored = self._index.stored(np.arange(start, min(start + AT_ONCE, len(self)))).tolist()
            yield from map(passage_of, self._index.collection.fetch(stored, vectors=False))


class _ById(Mapping[str, Passage]):
    """The passages of an index by id."""

    def __init__(self, index: MilvusIndex):
        self._index = index
        self._found: dict[str, Passage] = {}

    def __getitem__(self, name: str) -> Passage:
        if (known := self._found.get(name)) is not None:
            return known
        found = {passage.id: passage for passage in self._index.collection.passages([name], self._index.stamp.rows)}
        if len(self._found) >= REMEMBERED:
            self._found.clear()
        self._found |= found
        return found[name]

    def __iter__(self) -> Iterator[str]:
        return (passage.id for passage in self._index.passages)

    def __len__(self) -> int:
        return self._index.count


class _Limited:
    """A corpus of passages that Milvus can hold."""

    def __init__(self, corpus: Corpus):
        self.name, self.digest = corpus.name, corpus.digest
        self._corpus = corpus

    def __len__(self) -> int:
        return len(self._corpus)

    def where(self, row: int) -> str:
        return self._corpus.where(row)

    def read(self, start: int, stop: int) -> Iterator[Passage]:
        for row, passage in enumerate(self._corpus.read(start, stop), start):
            for field, text in passage.model_dump().items():
                if (size := len(text.encode())) > LONGEST:
                    raise DataError(
                        f"{self.where(row)}: {field}: expected at most {LONGEST:,} bytes, which is what Milvus holds, "
                        f"found {size:,}: divide the passage"
                    )
            yield passage


def _hidden(work: Path, place: Place, kind: str) -> Path:
    """The folder of the shards of an unfinished build or addition."""
    return work / f".{place.collection}.milvus.{kind}"


def _check_free(place: Place) -> None:
    """Refuses a place where something other than an index would be replaced; a damaged index may be."""
    with closing(Collection(place)) as old, closing(old.named(place.building)) as new:
        for collection in (old, new):
            if collection.exists():
                collection.check_ours()


def _install(place: Place, stamp: StoreStamp, build: Build, names: Sequence[str]) -> None:
    """Makes the collection at a place of the shards of a build, in one of another name until it is whole."""
    whole = stamp.model_copy(update={"state": "whole"})
    with closing(Collection(place)) as old, closing(old.named(place.building)) as new:
        if old.exists() and old.is_of(whole):
            old.load()
            if old.count(stamp.rows) == stamp.rows:
                return  # a process that was killed had done all but remove the shards
        if new.exists() and not new.is_of(stamp, whole):
            new.drop()
        if not new.exists():
            new.create(stamp)
        new.load()
        _send(new, build, names, 0)
        if (found := new.count(stamp.rows)) != stamp.rows:
            new.drop()
            raise StoreError(f"{new.place} holds {found} rows of {stamp.rows}: run the same command again")
        new.write_stamp(whole)
        new.take_name(place.collection)
        new.load()


def _send(collection: Collection, build: Build, names: Sequence[str], start: int) -> None:
    """Upserts the shards of a build, in order, as the rows from `start` on; those that were sent are not sent again."""
    sent = collection.sent()
    for number, name in enumerate(names, 1):
        shard = Shard.open(build.work / name)
        if number > sent:
            collection.upsert(shard.passages, shard.vectors, start)
            collection.write_sent(number)
        start += len(shard)


def _parameters(text: str) -> dict[str, Any]:
    """`ef=64,nprobe=8` as numbers by name.

    Raises:
        ValueError: it has another form.
    """
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            found[name.strip()] = int(value)
        except ValueError:
            raise ValueError(f"parameters={text!r}: expected NAME=NUMBER, divided by commas, as ef=64") from None
    return found
