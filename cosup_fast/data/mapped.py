"""A JSONL corpus by id whose texts stay on disk, so that a rank's memory does not grow with the passages.

1. The file is read once, every line checked. Where lines begin and how ids are found go into an array; that of a large
   file is kept under `COSUP_HOME/corpora`, named by the file's path, size and modification time. One process of a
   machine makes it, the others wait, and later runs find it there.
2. The array is mapped into memory; the processes of a machine share its pages.
3. A passage is read from the file when it is asked for. The text itself is not mapped: touching a mapped page of a file
   that was cut short ends the process without a message, and touched pages count as memory of the process.

The array holds 64-bit words:

    digest   (4,)   SHA-256 of the file
    starts   (M,)   where the line of each passage begins
    hashes   (M,)   `hash_ids`, sorted
    rows     (M,)   the row of each of these
    order    (M,)   the rows in the order of their ids

Shapes: M passages.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from filelock import FileLock

from cosup_fast.data.passages import ByRow, PassagesById, hash_ids
from cosup_fast.data.records import DataError, Passage, lines, parse
from cosup_fast.files import load_array, save_array, sha256

_DIGEST = 4
KEPT_FROM = 16 << 20
"""Bytes of a file whose array is kept; a smaller one is read again in a fraction of a second."""
_RECENT = 4096
"""Passages kept in memory: a step looks each of its own up several times."""


class MappedCorpus(PassagesById):
    """The passages of a JSONL file by id, in the order of the file.

    Args:
        path: the file.
        cache: folder of the array. Where it cannot be written a warning says so, and the array stays in memory.
        checksum: compare the file with the SHA-256 that it had when the array was made, which reads all of it.

    Raises:
        DataError: what `read_passages` refuses, with file and line; from any look-up, that the file has changed.
    """

    def __init__(self, path: Path, cache: Path, *, checksum: bool = False):
        state = _state(path)
        table = _table(path, state, cache, checksum)
        starts, hashes, rows, self.order = table[_DIGEST:].reshape(4, -1)
        super().__init__(_Lines(path, state, starts), [hashes])
        self._sorted = hashes, rows.view(np.int64)


class _Lines(ByRow[Passage]):
    """The passages of a file in a known state, whose lines begin at `starts` (M,)."""

    def __init__(self, path: Path, state: tuple[int, int], starts: np.ndarray):
        self._path, self._state, self._starts = path, state, starts
        self._recent = lru_cache(maxsize=_RECENT)(self._read)

    def __len__(self) -> int:
        return len(self._starts)

    def at(self, row: int) -> Passage:
        return self._recent(row)

    def _read(self, row: int) -> Passage:
        # Opened each time, which also notices another file in its place.
        try:
            with open(self._path, "rb") as file:
                if _state(file.fileno()) == self._state:
                    file.seek(int(self._starts[row]))
                    return parse(f"{self._path}, passage {row + 1}", file.readline(), Passage)
        except OSError as error:
            raise DataError(f"{self._path}: the corpus file is gone: {error.strerror}") from None
        raise DataError(
            f"{self._path}: expected the corpus as it was at the start, found it changed: restore the file, or start "
            "again"
        )


class _Ids(ByRow[str]):
    """The ids of passages in a given order of rows (M,)."""

    def __init__(self, passages: Sequence[Passage], order: np.ndarray):
        self._passages, self._order = passages, order

    def __len__(self) -> int:
        return len(self._order)

    def at(self, row: int) -> str:
        return self._passages[int(self._order[row])].id


def sorted_ids(corpus: Mapping[str, Passage]) -> Sequence[str]:
    """The ids of a corpus in order; those of a file are read as they are asked for."""
    return _Ids(corpus.passages, corpus.order) if isinstance(corpus, MappedCorpus) else sorted(corpus)


def _state(file: Path | int) -> tuple[int, int]:
    """Size and modification time (ns) of a file."""
    try:
        found = os.stat(file)
    except OSError as error:
        raise DataError(f"{file}: expected a JSONL file, found none: {error.strerror}") from None
    return found.st_size, found.st_mtime_ns


def _table(path: Path, state: tuple[int, int], cache: Path, checksum: bool) -> np.ndarray:
    """The array of a file: the one that is there, or a new one."""
    if state[0] < KEPT_FROM:
        return read_whole(path, state)
    key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    file = cache / f"{key}-{state[0]}-{state[1]}.npy"
    if (found := _kept(file, path, checksum)) is not None:
        return found
    made = None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{key}.lock"):
            if (found := _kept(file, path, checksum)) is not None:
                return found
            made = read_whole(path, state)
            for outdated in cache.glob(f"{key}-*.npy"):
                outdated.unlink()
            save_array(file, made)
            return load_array(file)
    except OSError as error:
        warnings.warn(
            f"{cache} cannot be written ({error.strerror}): every start reads all of {path} again, and 32 bytes a "
            "passage stay in memory; set COSUP_HOME to a folder that can be written",
            stacklevel=4,
        )
    return read_whole(path, state) if made is None else made


def _kept(file: Path, path: Path, checksum: bool) -> np.ndarray | None:
    """The array that an earlier start made of the corpus at `path`, if it is whole and, where asked, still right."""
    try:
        table = load_array(file)
    except (OSError, ValueError):
        return None
    if table.dtype != np.uint64 or table.ndim != 1 or len(table) <= _DIGEST or len(table) % 4:
        return None
    return None if checksum and not np.array_equal(table[:_DIGEST], _words(sha256(path))) else table


def read_whole(path: Path, state: tuple[int, int]) -> np.ndarray:
    """Reads and checks every line, and makes the array; the ids are in memory meanwhile."""
    ids: list[str] = []
    digest = hashlib.sha256()
    numbers, starts = array("q"), array("Q")
    broken: DataError | None = None
    try:
        for number, start, line in lines(path, digest.update):
            ids.append(parse(f"{path}:{number}", line, Passage).id)
            numbers.append(number)
            starts.append(start)
    except DataError as error:
        broken = error  # but an id twice, if it comes before
    order = sorted(range(len(ids)), key=ids.__getitem__)
    if twice := [(second, first) for first, second in pairwise(order) if ids[first] == ids[second]]:
        second, first = min(twice)
        raise DataError(
            f"{path}:{numbers[second]}: id: expected a new id, found {ids[second]!r} of line {numbers[first]} again"
        )
    if broken is not None:
        raise broken
    if not ids:
        raise DataError(f"{path}: expected at least one passage, found an empty file")
    hashes = hash_ids(ids)
    rows = np.argsort(hashes, kind="stable")
    table = np.concatenate(
        [_words(digest.hexdigest()), np.array(starts), hashes[rows], rows, order], dtype=np.uint64, casting="unsafe"
    )
    if _state(path) != state:
        raise DataError(f"{path}: expected a file that stays as it is, found it changed while it was read: start again")
    return table


def _words(digest: str) -> np.ndarray:
    """A SHA-256, (4,) uint64."""
    return np.frombuffer(bytes.fromhex(digest), dtype="<u8")
