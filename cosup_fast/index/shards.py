"""A shard: some passages with their embeddings, in memory or in a folder whose files are mapped into memory.

    shard-00000/
      passages.jsonl   the passages, one a line
      rows.npy         for each passage: where its line begins, a hash of its id
      vectors.npy      the sequence embeddings, (M, D) fp32
      shard.json       how many there are, size and SHA-256 of the files; written last

Nothing here is a pickle, and none of it is read before it is needed. While an index is built, Embseq's
tokens stand beside them.

Shapes: M passages, D Gen's width.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Self, overload

import numpy as np

from cosup_fast.data.records import Passage, parse, to_line
from cosup_fast.files import read_object, replace_file, sha256, sync

PASSAGES, ROWS, VECTORS, RECORD = "passages.jsonl", "rows.npy", "vectors.npy", "shard.json"
ROW = np.dtype([("start", "<i8"), ("id", "<u8")])


@dataclass(frozen=True)
class Shard:
    """Passages and their embeddings, row by row; `folder` is None for one in memory."""

    passages: Sequence[Passage]
    ids: np.ndarray  # (M,) uint64, `hash_ids` of the passages
    vectors: np.ndarray  # (M, D) fp32
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, passages: Sequence[Passage], vectors: np.ndarray) -> Self:
        """A shard in memory."""
        return cls(list(passages), hash_ids(passage.id for passage in passages), vectors)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """A shard on disk, mapped into memory; `check_files` comes first."""
        try:
            rows = load_array(folder / ROWS)
            passages = PassageFile(folder / PASSAGES, rows["start"])
            return cls(passages, rows["id"], load_array(folder / VECTORS), folder)
        except (ValueError, TypeError, IndexError, SyntaxError, OSError) as error:
            raise ValueError(f"{folder} is damaged ({error}): build the index again") from None

    def kept(self, keep: np.ndarray) -> Self:
        """The rows of a shard in memory where `keep` (M,) holds."""
        return type(self)(
            [self.passages[row] for row in np.flatnonzero(keep).tolist()], self.ids[keep], self.vectors[keep]
        )


class _ByRow(Sequence[Passage]):
    """Passages that are made when a row is asked for."""

    @abstractmethod
    def _passage(self, row: int) -> Passage: ...

    @overload
    def __getitem__(self, index: int) -> Passage: ...
    @overload
    def __getitem__(self, index: slice) -> list[Passage]: ...
    def __getitem__(self, index: int | slice) -> Passage | list[Passage]:
        if isinstance(index, slice):
            return [self._passage(row) for row in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} passages")
        return self._passage(index % len(self))


class PassageFile(_ByRow):
    """The passages of a JSONL file, each read when it is asked for."""

    def __init__(self, path: Path, starts: np.ndarray):
        self._path = path
        self._starts = starts
        with open(path, "rb") as file:
            self.text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._starts)

    def line(self, row: int) -> bytes:
        """The line of a row, its end included."""
        stop = int(self._starts[row + 1]) if row + 1 < len(self) else len(self.text)
        return self.text[int(self._starts[row]) : stop]

    def _passage(self, row: int) -> Passage:
        return parse(f"{self._path}:{row + 1}", self.line(row), Passage)


class Passages(_ByRow):
    """The passages of several files as one sequence."""

    def __init__(self, parts: Sequence[Sequence[Passage]]):
        self._parts = parts
        self._starts = list(accumulate(map(len, parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def digest(self) -> str:
        """SHA-256 of the passages in their order, a JSON line each."""
        digest = hashlib.sha256()
        for part in self._parts:
            for text in (part.text,) if isinstance(part, PassageFile) else (to_line(p).encode() for p in part):
                digest.update(text)
        return digest.hexdigest()

    def _passage(self, row: int) -> Passage:
        part = bisect_right(self._starts, row) - 1
        return self._parts[part][row - self._starts[part]]


class PassagesById(Mapping[str, Passage]):
    """Passages by id, for 16 bytes each in memory: an id is looked up by its hash and compared with the passage's.

    Args:
        passages: ids unique.
        hashes: `hash_ids` of them, (M,) in pieces.
    """

    def __init__(self, passages: Sequence[Passage], hashes: Sequence[np.ndarray]):
        self._passages = passages
        self._hashes = hashes

    def __getitem__(self, name: str) -> Passage:
        return self._passages[self.rows([name])[name]]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(self.rows([name]))

    def __iter__(self) -> Iterator[str]:
        return (passage.id for passage in self._passages)

    def __len__(self) -> int:
        return len(self._passages)

    def rows(self, ids: Iterable[str]) -> dict[str, int]:
        """The row of each id that is there."""
        wanted = list(dict.fromkeys(ids))
        hashes, order = self._sorted
        keys = hash_ids(wanted)
        first, last = (np.searchsorted(hashes, keys, side=side).tolist() for side in ("left", "right"))
        found: dict[str, int] = {}
        for name, start, stop in zip(wanted, first, last, strict=True):
            for row in order[start:stop].tolist():  # one, but for a collision
                if self._passages[row].id == name:
                    found[name] = row
        return found

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        hashes = np.concatenate(self._hashes)
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order


def hash_ids(ids: Iterable[str]) -> np.ndarray:
    """64 bits of each id, (M,) uint64: equal ids have equal hashes, and what is equal here is compared in full."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, dtype="<u8")


def repeated(passages: Sequence[Passage], hashes: np.ndarray) -> tuple[int, int] | None:
    """Two rows of the same id, the earlier one first; None when every id is there once."""
    order = np.argsort(hashes, kind="stable")
    for place in np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]).tolist():
        run = order[hashes[order] == hashes[order[place]]].tolist()
        first: dict[str, int] = {}
        for row in run:
            if (name := passages[row].id) in first:
                return first[name], row
            first[name] = row
    return None


def check_unique(passages: Sequence[Passage], hashes: np.ndarray) -> None:
    """Refuses passages of which two have the same id."""
    if pair := repeated(passages, hashes):
        raise ValueError(f"passage id {passages[pair[0]].id!r} occurs more than once in the corpus: ids must be unique")


def save_array(path: Path, values: np.ndarray) -> None:
    """Writes an `.npy` file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "wb") as file:
        np.save(file, values, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_array(path: Path) -> np.ndarray:
    """An `.npy` file mapped into memory, in which nothing is ever changed."""
    return np.load(path, mmap_mode="c", allow_pickle=False)  # copy on write: torch takes no read-only array


def write_passages(folder: Path, lines: Iterable[bytes], ids: np.ndarray) -> None:
    """Writes `passages.jsonl` and `rows.npy` into a new folder."""
    rows = np.empty(len(ids), ROW)
    rows["id"] = ids
    place = 0
    with open(folder / PASSAGES, "wb") as file:
        for row, line in enumerate(lines):
            rows["start"][row] = place
            place += file.write(line)
    sync(folder / PASSAGES)
    save_array(folder / ROWS, rows)


def write_record(folder: Path, name: str, files: Sequence[str]) -> None:
    """Writes size and SHA-256 of files, which makes them count."""
    described = {f: {"bytes": (folder / f).stat().st_size, "sha256": sha256(folder / f)} for f in files}
    with replace_file(folder / name) as file:
        file.write(json.dumps({"files": described}, indent=1) + "\n")
    sync(folder)


def check_files(folder: Path, name: str, *, contents: bool) -> None:
    """Compares files with the sizes in their record and, if `contents`, with the checksums.

    Raises:
        ValueError: a file or the record itself is missing, damaged or changed.
    """
    try:
        files = read_object(folder / name, ["files"])["files"]
        described = [(file, entry["bytes"], entry["sha256"]) for file, entry in files.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / name} cannot be read ({error}): build the index again") from None
    for file, size, digest in described:
        path = folder / file
        if not path.is_file():
            raise ValueError(f"{folder} is incomplete, {file} is missing: build the index again")
        if path.stat().st_size != size or (contents and sha256(path) != digest):
            raise ValueError(f"{path} is damaged or was changed, it is not what {name} says: build the index again")
