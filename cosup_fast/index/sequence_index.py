"""`SequenceIndex`: passages and their embeddings, to be searched, added to, deleted from, and kept in a folder.

An index in memory is one shard. One in a folder is what the folder's `index.json` names:

    index.json               the stamp; it is replaced last, and everything that it does not name is removed
    shard-00000/ ...         see `shards.py`; the rows of the index go through the shards in order
    approximate-0.faiss      the approximate FAISS index, if there is one; its ids are rows

Shapes: N queries, M passages, D Gen's width.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from rich.filesize import decimal
from torch import Tensor

from cosup_fast.data.corpus import Corpus, open_corpus
from cosup_fast.data.passages import Passages, PassagesById, check_unique, hash_ids
from cosup_fast.data.records import Passage
from cosup_fast.files import check_replaceable, install_folder, replace_folder, sha256
from cosup_fast.index import search as nearest
from cosup_fast.index.build import Build, Options, check_finite
from cosup_fast.index.changes import Change, check_index, make_approximate, with_approximate, write_shard
from cosup_fast.index.embed import Precision, embed_passages
from cosup_fast.index.nonparametric import NonparametricIndex, check_deletion, check_made_by
from cosup_fast.index.origin import INDEX, STAMP, Origin, Stamp
from cosup_fast.index.search import Engine
from cosup_fast.index.shards import RECORD, Shard

if TYPE_CHECKING:
    from cosup_fast.model import CoSupervisionModel


class SequenceIndex(NonparametricIndex):
    """The sequence embeddings of a corpus next to its passages; `build` and `load` make one.

    Args:
        passages: the corpus, ids unique.
        embeddings: (M, D), a row for each passage.
        origin: what made the embeddings, `Origin.of(model)`.
        engine: how to search; see `load`.
        device: where torch searches.

    Raises:
        ValueError: no passage, an id twice, embeddings of another shape or not finite.
        ImportError: the engine needs faiss, which is not installed.
    """

    folder: Path | None
    passages: Passages
    by_id: PassagesById

    def __init__(
        self,
        passages: Sequence[Passage],
        embeddings: Tensor,
        origin: Origin,
        *,
        engine: Engine = "auto",
        device: torch.device | str = "cpu",
    ):
        if not passages:
            raise ValueError("an index needs at least one passage, got an empty corpus")
        if embeddings.ndim != 2 or len(embeddings) != len(passages):
            raise ValueError(f"embeddings must be ({len(passages)}, width), got shape {tuple(embeddings.shape)}")
        self.origin = origin
        self.folder, self.name = None, "the index"
        self.precision: Precision = "float32"
        self._engine: Engine = engine
        self._device = device
        self.approximate: Any = None
        shard = Shard.of(passages, _array(embeddings).copy())
        check_unique(shard.passages, shard.ids)
        check_finite(shard.vectors, passages)
        self._set_shards([shard])

    @classmethod
    def build(
        cls,
        model: CoSupervisionModel,
        corpus: str | Path | Sequence[Passage],
        folder: str | Path | None = None,
        *,
        factory: str | None = None,
        parameters: str = "",
        options: Options | None = None,
        engine: Engine = "auto",
        device: torch.device | str = "cpu",
        progress: bool = True,
    ) -> Self:
        """Embeds and indexes a corpus, in memory or, with `folder`, straight into files.

        With a folder the corpus may be larger than memory, a build that was killed is continued by the same call, and
        all ranks of `torch.distributed` that make the call share the work.

        Args:
            model: embeds the passages.
            corpus: passages, or what `open_corpus` takes.
            folder: where the index will live; an earlier index there is replaced once the new one is whole.
            factory: also make an approximate index of this kind, a FAISS factory string such as `IVF1024,PQ32`.
            parameters: of its search, such as `nprobe=32`.
            options: how to embed.
            engine: how to search; see `load`.
            device: where torch searches.
            progress: show progress bars on stderr.

        Raises:
            ValueError: a model without an Embseq, an empty corpus, an id twice, a line that is not a passage, a passage
                that is too long, a folder that holds something else or an unfinished build of something else, or an
                unknown factory.
            ImportError: faiss is needed and not installed.
        """
        model.require_embseq("an index cannot be built")
        if not isinstance(corpus, str | Path) and not corpus:
            raise ValueError("an index needs at least one passage, got an empty corpus")
        options = options or Options(progress=progress)
        source = open_corpus(corpus)
        if factory is not None:
            if folder is None:
                raise ValueError(f"factory={factory!r}: an approximate index lives in a folder, name one")
            nearest.set_parameters(nearest.make_approximate(factory, model.width, len(source)), parameters)
        elif parameters:
            raise ValueError(f"parameters={parameters!r} are those of an approximate index: give a factory, too")
        # Fails here, before the work, where a package is missing.
        nearest.choose_engine(engine, device, approximate=factory is not None)
        if folder is None:
            passages = list(source.read(0, len(source)))
            check_unique(passages, hash_ids(passage.id for passage in passages))
            index = cls(passages, _embed(model, passages, options), Origin.of(model), engine=engine, device=device)
            index.precision = options.precision
            return index
        folder = check_replaceable(folder, INDEX)
        folder.parent.mkdir(parents=True, exist_ok=True)
        origin = Origin.of(model)
        with Build(folder.with_name(f".{folder.name}.building"), model, source, origin, options) as build:
            names = build.run()
            with build.together(silent=True):
                if build.leads:
                    stamp = Stamp(
                        generation=0,
                        count=len(source),
                        dim=model.width,
                        precision=options.precision,
                        origin=origin,
                        shards={name: sha256(build.work / name / RECORD) for name in names},
                    )
                    if factory is not None:
                        shards = [Shard.open(build.work / name) for name in names]
                        made = make_approximate(factory, parameters, model.width, shards)
                        stamp = with_approximate(stamp, build.work, made, factory, parameters)
                    stamp.write(build.work)
                    install_folder(build.work, folder, INDEX)
        return cls._open(folder, Stamp.read(folder), engine, device)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: CoSupervisionModel,
        *,
        allow_stale: bool = False,
        engine: Engine = "auto",
        device: torch.device | str = "cpu",
        verify: bool = True,
    ) -> Self:
        """Opens an index in a folder, for the model that made it. Its files are mapped into memory, not read.

        Args:
            folder: the index.
            model: the checkpoint whose queries will be searched.
            allow_stale: take an index of other weights or of another template; its width must still be the model's.
            engine: `faiss` or `torch`, which are exact, or `approximate`, the FAISS index of `build`'s factory. `auto`
                is the approximate one where there is one; else torch on a GPU, faiss on the CPU, and torch where faiss
                is not installed.
            device: where torch searches.
            verify: compare all files with their checksums, which reads them once; sizes are compared always.

        Raises:
            ValueError: a model without an Embseq, no index, a damaged one, one of another format version, one that
                `model` did not make, or one without what `engine` needs.
            ImportError: the engine needs faiss, which is not installed.
        """
        model.require_embseq("no index can be searched")
        folder = Path(folder)
        stamp = Stamp.read(folder)
        check_made_by(model, str(folder), stamp.dim, stamp.origin, allow_stale=allow_stale)
        return cls.open(folder, engine=engine, device=device, verify=verify)

    @classmethod
    def open(
        cls, folder: str | Path, *, engine: Engine = "auto", device: torch.device | str = "cpu", verify: bool = True
    ) -> Self:
        """Opens an index whatever made it, to look at it or to delete from it; see `load`."""
        folder = Path(folder)
        stamp = Stamp.read(folder)
        check_index(folder, stamp, contents=verify)
        return cls._open(folder, stamp, engine, device)

    @classmethod
    def _open(cls, folder: Path, stamp: Stamp, engine: Engine, device: torch.device | str) -> Self:
        index = cls.__new__(cls)
        index.origin, index.folder, index.precision = stamp.origin, folder.resolve(), stamp.precision
        index.name = str(index.folder)
        index._engine = engine
        index._device = device
        index._take(stamp)
        return index

    def _take(self, stamp: Stamp) -> None:
        """Makes this the index that a stamp of its folder describes."""
        assert self.folder is not None
        shards = [Shard.open(self.folder / name) for name in stamp.shards]
        found = sum(map(len, shards))
        if found != stamp.count or any(shard.vectors.shape != (len(shard), stamp.dim) for shard in shards):
            widths = sorted({shard.vectors.shape[1] for shard in shards})
            raise ValueError(
                f"{self.folder} is inconsistent: {STAMP} says {stamp.count} vectors of width {stamp.dim}, there are "
                f"{found} of {widths}: build the index again"
            )
        self._stamp = stamp
        self.approximate = None
        if stamp.approximate is not None and self._engine in ("auto", "approximate"):
            path = self.folder / stamp.approximate.file
            self.approximate = nearest.read_approximate(path, stamp.dim, stamp.count)
            try:
                nearest.set_parameters(self.approximate, stamp.approximate.parameters)
            except ValueError as error:
                raise ValueError(f"{self.folder / STAMP}: {error}") from None
        self._set_shards(shards)

    def _set_shards(self, shards: Sequence[Shard]) -> None:
        self._shards = list(shards)
        self.passages = Passages([shard.passages for shard in self._shards])
        self.by_id = PassagesById(self.passages, [shard.ids for shard in self._shards])
        self._starts = np.cumsum([0, *map(len, self._shards)])
        self._propose: nearest.Propose | None = None
        if self.approximate is None:
            nearest.choose_engine(self._engine, self._device, approximate=False)

    @property
    def dim(self) -> int:
        return self._shards[0].vectors.shape[1]

    def blocks(self) -> Iterator[Tensor]:
        for shard in self._shards:
            yield torch.from_numpy(shard.vectors)

    def candidates(self) -> tuple[nearest.Propose, bool]:
        if self._propose is None:
            if self.approximate is not None:
                self._propose = nearest.Approximate(self.approximate)
            else:
                engine = nearest.choose_engine(self._engine, self._device, approximate=False)
                self._propose = nearest.exact([shard.vectors for shard in self._shards], engine, self._device)
        return self._propose, self.approximate is None

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        found = np.empty((len(rows), self.dim), np.float32)
        of = np.searchsorted(self._starts, rows, side="right") - 1
        for shard in np.unique(of).tolist():
            here = of == shard
            found[here] = self._shards[shard].vectors[rows[here] - self._starts[shard]]
        return found

    def _append(
        self, model: CoSupervisionModel, source: Corpus, origin: Origin, options: Options, work: Path | None
    ) -> None:
        if self.folder is None:
            passages = list(source.read(0, len(source)))
            both = [*self.passages, *passages]
            check_unique(both, hash_ids(passage.id for passage in both))
            vectors = _array(_embed(model, passages, options))
            check_finite(vectors, passages)
            self._set_shards([Shard.of(both, np.concatenate([self._shards[0].vectors, vectors]))])
            return
        beside = self.folder.with_name(f".{self.folder.name}.adding")
        known, context = self.by_id.rows, str(self.folder)
        with Build(beside, model, source, origin, options, known=known, context=context) as build:
            names = build.run()
            with build.together(silent=True):
                if build.leads:
                    with Change(self.folder, self._stamp) as change:
                        change.add(build.work / name for name in names)
                    build.discard()
        self._take(Stamp.read(self.folder))

    def delete(self, ids: Iterable[str]) -> None:
        """Removes passages; in a folder the shards that hold them are rewritten, and all of it counts at once.

        An approximate index is filled again with what is left, without being trained again.

        Raises:
            ValueError: an id is not there, or no passage would be left; the index is then as it was.
        """
        wanted = list(dict.fromkeys(ids))
        found = self.by_id.rows(wanted)
        check_deletion(wanted, found, len(self))
        if not found:
            return
        gone = np.zeros(len(self), dtype=bool)
        gone[list(found.values())] = True
        keep = [~gone[start:stop] for start, stop in zip(self._starts[:-1], self._starts[1:], strict=True)]
        if self.folder is None:
            self._set_shards([self._shards[0].kept(keep[0])])
            return
        with Change(self.folder, self._stamp) as change:
            shards = []
            for name, shard, kept in zip(self._stamp.shards, self._shards, keep, strict=True):
                if kept.all():
                    shards.append(name)
                elif kept.any():
                    shards.append(change.write([(shard, kept)]))
            change.commit(shards)
        self._take(Stamp.read(self.folder))

    def describe(self) -> dict[str, str]:
        made = super().describe()
        if self.folder is None:
            return made
        stamp, approximate = self._stamp, self._stamp.approximate
        size = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        return {
            "folder": str(self.folder),
            "shards": f"{len(stamp.shards)}, {decimal(size)} in all",
            "changes since it was built": str(stamp.generation),
            "approximate": f"{approximate.factory} {approximate.parameters}" if approximate else "none",
        } | made

    def save(self, folder: str | Path) -> None:
        """Writes a copy of the index; the folder appears whole or not at all, and replaces an earlier index.

        Raises:
            ValueError: the folder holds something that is not an index, or is where this index lives.
        """
        folder = Path(folder)
        if self.folder is not None and folder.resolve() == self.folder:
            raise ValueError(f"{folder} is where this index lives already: add and delete change it there")
        with replace_folder(folder, INDEX) as new:
            if self.folder is not None:
                for name in self._stamp.shards:
                    shutil.copytree(self.folder / name, new / name)
                if self._stamp.approximate is not None:
                    shutil.copy(self.folder / self._stamp.approximate.file, new)
                self._stamp.write(new)
                return
            (shard,) = self._shards
            name = "shard-00000"
            write_shard(new / name, [(shard, None)])
            stamp = Stamp(
                generation=0,
                count=len(self),
                dim=self.dim,
                precision=self.precision,
                origin=self.origin,
                shards={name: sha256(new / name / RECORD)},
            )
            stamp.write(new)


def _embed(model: CoSupervisionModel, passages: Sequence[Passage], options: Options) -> Tensor:
    return embed_passages(
        model,
        passages,
        batch_tokens=options.batch_tokens,
        precision=options.precision,
        progress=options.progress,
    )


def _array(embeddings: Tensor) -> np.ndarray:
    return embeddings.detach().float().cpu().contiguous().numpy()
