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
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Self, overload

import numpy as np

from cosup_fast.data.records import Passage, parse
from cosup_fast.files import replace_file, sha256, sync

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
        rows = load_array(folder / ROWS)
        passages = PassageFile(folder / PASSAGES, rows["start"])
        return cls(passages, rows["id"], load_array(folder / VECTORS), folder)

    def kept(self, keep: np.ndarray) -> Self:
        """The rows of a shard in memory where `keep` (M,) holds."""
        return type(self)(
            [self.passages[row] for row in np.flatnonzero(keep).tolist()], self.ids[keep], self.vectors[keep]
        )


class PassageFile(Sequence[Passage]):
    """The passages of a JSONL file, each read when it is asked for."""

    def __init__(self, path: Path, starts: np.ndarray):
        self._path = path
        self._starts = starts
        with open(path, "rb") as file:
            self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._starts)

    def line(self, row: int) -> bytes:
        """The line of a row, its end included."""
        stop = int(self._starts[row + 1]) if row + 1 < len(self) else len(self._text)
        return self._text[int(self._starts[row]) : stop]

    @overload
    def __getitem__(self, index: int) -> Passage: ...
    @overload
    def __getitem__(self, index: slice) -> list[Passage]: ...
    def __getitem__(self, index: int | slice) -> Passage | list[Passage]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = _row(index, len(self))
        return parse(f"{self._path}:{row + 1}", self.line(row), Passage)


class Passages(Sequence[Passage]):
    """The passages of several shards as one sequence."""

    def __init__(self, shards: Sequence[Shard]):
        self._shards = shards
        self._starts = list(accumulate(map(len, shards), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Passage: ...
    @overload
    def __getitem__(self, index: slice) -> list[Passage]: ...
    def __getitem__(self, index: int | slice) -> Passage | list[Passage]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = _row(index, len(self))
        shard = bisect_right(self._starts, row) - 1
        return self._shards[shard].passages[row - self._starts[shard]]


def _row(index: int, count: int) -> int:
    if not -count <= index < count:
        raise IndexError(f"row {index} of {count} passages")
    return index % count


def hash_ids(ids: Iterable[str]) -> np.ndarray:
    """64 bits of each id, (M,) uint64: equal ids have equal hashes, and what is equal here is compared in full."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, dtype="<u8")


def find_ids(shards: Sequence[Shard], ids: Iterable[str]) -> dict[str, int]:
    """The row, counted over all shards, of each id that is there; `ids` are distinct."""
    wanted = list(ids)
    names: dict[int, list[str]] = {}
    for key, name in zip(hash_ids(wanted).tolist(), wanted, strict=True):
        names.setdefault(key, []).append(name)
    keys = np.array(list(names), dtype="<u8")
    found: dict[str, int] = {}
    start = 0
    for shard in shards:
        for row in np.flatnonzero(np.isin(shard.ids, keys)).tolist():
            if (name := shard.passages[row].id) in names[int(shard.ids[row])]:
                found[name] = start + row
        start += len(shard)
    return found


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
        files = json.loads((folder / name).read_text(encoding="utf-8"))["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / name} cannot be read ({error}): build the index again") from None
    for file, expected in files:
        path = folder / file
        if not path.is_file():
            raise ValueError(f"{folder} is incomplete, {file} is missing: build the index again")
        if path.stat().st_size != expected["bytes"] or (contents and sha256(path) != expected["sha256"]):
            raise ValueError(f"{path} is damaged or was changed, it is not what {name} says: build the index again")
