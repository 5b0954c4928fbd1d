"""Changes of an index's folder, each of which counts at once or not at all.

New shards and approximate indexes are written under new names beside the old ones; replacing the stamp makes them
count, and what the stamp no longer names is removed. A killed change leaves files that the next one removes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np

from cosup_fast.data.passages import PassageFile
from cosup_fast.data.records import to_line
from cosup_fast.files import locked, remove_unwritten, save_array, sha256, sync
from cosup_fast.index import search as nearest
from cosup_fast.index.origin import STAMP, Approximate, Stamp
from cosup_fast.index.shards import (
    PASSAGES,
    RECORD,
    ROWS,
    VECTORS,
    Shard,
    check_files,
    write_passages,
    write_record,
)

Part = tuple[Shard, np.ndarray | None]
"""A shard and which of its rows are meant, (M,) bool; None means all."""

_TRAINING_SAMPLE = 200_000
# A shard this small is put together with the one before it, so that many additions do not make many shards.
SMALL = 4096


class Change:
    """One change of an index in a folder; no other process makes one meanwhile.

    Raises:
        ValueError: the folder no longer holds what `stamp` says.
    """

    def __init__(self, folder: Path, stamp: Stamp):
        self._folder, self._stamp = folder, stamp
        self._lock = locked(folder)

    def __enter__(self) -> Self:
        self._lock.__enter__()
        try:
            if Stamp.read(self._folder) != self._stamp:
                raise ValueError(f"{self._folder} was changed by another process meanwhile: load it again")
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        self._remove_unnamed(self._stamp)
        self._next = 1 + max(int(name.rpartition("-")[2]) for name in self._stamp.shards)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._lock.__exit__(kind, error, trace)

    def add(self, folders: Iterable[Path]) -> None:
        """Appends finished shards, which stay where they are, too."""
        names = list(self._stamp.shards)
        for folder in folders:
            name = self._new_name()
            (self._folder / name).mkdir()
            for file in (PASSAGES, ROWS, VECTORS, RECORD):
                link_file(folder / file, self._folder / name / file)
            sync(self._folder / name)
            names.append(name)
        place = len(self._stamp.shards)
        last, first = (Shard.open(self._folder / name) for name in names[place - 1 : place + 1])
        if len(last) + len(first) <= SMALL:
            names[place - 1 : place + 1] = [self.write([(last, None), (first, None)])]
        self.commit(names, appended=True)

    def write(self, parts: Sequence[Part]) -> str:
        """Writes rows as a new shard, and returns its name; shards of the index are verified before they are copied.

        Raises:
            ValueError: one of them is damaged: the copy would be given a checksum of the damage.
        """
        for shard, _ in parts:
            if shard.folder is not None and shard.folder.name in self._stamp.shards:
                check_shard(self._folder, shard.folder.name, self._stamp, contents=True)
        name = self._new_name()
        write_shard(self._folder / name, parts)
        return name

    def commit(self, names: Iterable[str], *, appended: bool = False) -> None:
        """Makes these shards the index; with `appended`, the rows that there were are the first ones still.

        Raises:
            ValueError: a file that an approximate index is made of is damaged: it would be given a checksum of the
                damage.
        """
        shards = {name: Shard.open(self._folder / name) for name in names}
        stamp = self._stamp.model_copy(
            update={
                "generation": self._stamp.generation + 1,
                "count": sum(map(len, shards.values())),
                "shards": {
                    name: self._stamp.shards.get(name) or sha256(self._folder / name / RECORD) for name in shards
                },
            }
        )
        if (kept := self._stamp.approximate) is not None:
            check_approximate(self._folder, self._stamp, contents=True)
            index = nearest.read_approximate(self._folder / kept.file, stamp.dim, self._stamp.count)
            if not appended:
                index.reset()
            start = 0
            for name, shard in shards.items():
                if (new := shard.vectors[max(0, index.ntotal - start) :]).size:
                    if name in self._stamp.shards:
                        check_shard(self._folder, name, self._stamp, contents=True)
                    index.add(np.ascontiguousarray(new))
                start += len(shard)
            stamp = with_approximate(stamp, self._folder, index, kept.factory, kept.parameters)
        sync(self._folder)
        stamp.write(self._folder)
        sync(self._folder)
        self._remove_unnamed(stamp)

    def _new_name(self) -> str:
        self._next += 1
        return f"shard-{self._next - 1:05d}"

    def _remove_unnamed(self, stamp: Stamp) -> None:
        named = {*stamp.shards, stamp.approximate.file if stamp.approximate else ""}
        for path in [*self._folder.glob("shard-*"), *self._folder.glob("approximate-*")]:
            if path.name not in named:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        remove_unwritten(self._folder)


def write_shard(folder: Path, parts: Sequence[Part]) -> None:
    """Writes rows of shards, one after the other, as one shard into a new folder."""
    chosen = [(shard, np.arange(len(shard)) if keep is None else np.flatnonzero(keep)) for shard, keep in parts]
    folder.mkdir()

    def line(shard: Shard, row: int) -> bytes:
        passages = shard.passages
        return passages.line(row) if isinstance(passages, PassageFile) else to_line(passages[row]).encode()

    write_passages(
        folder,
        (line(shard, row) for shard, rows in chosen for row in rows.tolist()),
        np.concatenate([shard.ids[rows] for shard, rows in chosen]),
    )
    save_array(folder / VECTORS, np.concatenate([shard.vectors[rows] for shard, rows in chosen]))
    write_record(folder, RECORD, (PASSAGES, ROWS, VECTORS))


def make_approximate(factory: str, parameters: str, width: int, shards: Sequence[Shard]) -> Any:
    """An approximate FAISS index of all rows, trained on a sample of them; what is refused see `search.py`."""
    index = nearest.make_approximate(factory, width)
    nearest.train_approximate(index, [shard.vectors for shard in shards], _TRAINING_SAMPLE)
    for shard in shards:
        index.add(shard.vectors)
    nearest.set_parameters(index, parameters)
    return index


def with_approximate(stamp: Stamp, folder: Path, index: Any, factory: str, parameters: str) -> Stamp:
    """Writes an approximate index, and returns the stamp with its name."""
    path = folder / f"approximate-{stamp.generation}.faiss"
    nearest.faiss_module().write_index(index, str(path))
    sync(path)
    described = Approximate(factory=factory, parameters=parameters, file=path.name, sha256=sha256(path))
    return stamp.model_copy(update={"approximate": described})


def check_index(folder: Path, stamp: Stamp, *, contents: bool) -> None:
    """Compares the files of an index with their sizes and, if `contents`, with their checksums.

    Raises:
        ValueError: a file is missing, damaged or changed.
    """

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        list(threads.map(lambda name: check_shard(folder, name, stamp, contents=contents), stamp.shards))
    check_approximate(folder, stamp, contents=contents)


def check_shard(folder: Path, name: str, stamp: Stamp, *, contents: bool) -> None:
    """`check_index` of one shard."""
    check_files(folder / name, RECORD, contents=contents)
    if sha256(folder / name / RECORD) != stamp.shards[name]:
        raise ValueError(f"{folder / name / RECORD} was changed, it is not what {STAMP} says: build the index again")


def check_approximate(folder: Path, stamp: Stamp, *, contents: bool) -> None:
    """`check_index` of the approximate index, if there is one."""
    if stamp.approximate is not None:
        path = folder / stamp.approximate.file
        if not path.is_file() or (contents and sha256(path) != stamp.approximate.sha256):
            raise ValueError(f"{path} is missing, damaged or changed: build the index again")


def link_file(source: Path, target: Path) -> None:
    """Links a file into another folder, or copies it."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy(source, target)
        sync(target)
