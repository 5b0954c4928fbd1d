"""Passages that stay in their files: one is read when its row or its id is asked for."""

from __future__ import annotations

import hashlib
import mmap
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TypeVar, overload

import numpy as np

from cosup_fast.data.records import Passage, parse, to_line

T = TypeVar("T")


class ByRow(Sequence[T]):
    """Values that are made when their row is asked for."""

    @abstractmethod
    def at(self, row: int) -> T:
        """The value of a row, from 0 to below the length."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self.at(row) for row in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} passages")
        return self.at(index % len(self))


class PassageFile(ByRow[Passage]):
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

    def at(self, row: int) -> Passage:
        return parse(f"{self._path}:{row + 1}", self.line(row), Passage)


class Passages(ByRow[Passage]):
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

    def at(self, row: int) -> Passage:
        part = bisect_right(self._starts, row) - 1
        return self._parts[part][row - self._starts[part]]


class PassagesById(Mapping[str, Passage]):
    """Passages by id, for 16 bytes each in memory: an id is looked up by its hash and compared with the passage's.

    Args:
        passages: ids unique.
        hashes: `hash_ids` of them, (M,) in pieces.
    """

    def __init__(self, passages: Sequence[Passage], hashes: Sequence[np.ndarray]):
        self.passages = passages
        self._hashes = hashes

    def __getitem__(self, name: str) -> Passage:
        return self.passages[self.rows([name])[name]]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(self.rows([name]))

    def __iter__(self) -> Iterator[str]:
        return (passage.id for passage in self.passages)

    def __len__(self) -> int:
        return len(self.passages)

    def rows(self, ids: Iterable[str]) -> dict[str, int]:
        """The row of each id that is there."""
        wanted = list(dict.fromkeys(ids))
        hashes, order = self._sorted
        keys = hash_ids(wanted)
        first, last = (np.searchsorted(hashes, keys, side=side).tolist() for side in ("left", "right"))
        found: dict[str, int] = {}
        for name, start, stop in zip(wanted, first, last, strict=True):
            for row in order[start:stop].tolist():  # one, but for a collision
                if self.passages[row].id == name:
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
