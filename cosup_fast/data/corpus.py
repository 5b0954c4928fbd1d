"""Corpora that are read piece by piece, so that one larger than memory can be indexed.

A corpus knows how many passages it has and the digest of its content from one quick pass, and then reads any stretch of
rows, checked like every data file. `open_corpus` makes one of what names passages.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from cosup_fast.data.hub import hub_rows, without_none
from cosup_fast.data.records import DataError, Passage, lines, parse, validate
from cosup_fast.data.sources import find


class Corpus(Protocol):
    """Passages in order, of which no more are held than are being read."""

    name: str
    digest: str  # SHA-256 of the content

    def __len__(self) -> int: ...

    def where(self, row: int) -> str:
        """Where a row stands, for messages."""
        ...

    def read(self, start: int, stop: int) -> Iterator[Passage]:
        """The passages of the rows from `start` to before `stop`; a row that is not a passage is a `DataError`."""
        ...


def open_corpus(source: str | Path | Sequence[Passage]) -> Corpus:
    """The corpus that a source names: a JSONL file, a prepared set, `hf:owner/name[:split]`; or a list of passages.

    Raises:
        DataError: there is no such source, or it is empty.
    """
    if isinstance(source, str) and source.startswith("hf:"):
        corpus: Corpus = HubCorpus(source)
    elif isinstance(source, str | Path):
        corpus = FileCorpus(find(str(source), "corpus"))
    else:
        corpus = ListCorpus(source)
    if not len(corpus):
        raise DataError(f"{corpus.name}: expected at least one passage, found an empty corpus")
    return corpus


class ListCorpus:
    """Passages that are in memory already."""

    def __init__(self, passages: Sequence[Passage]):
        self.name = "the corpus"
        self._passages = passages
        digest = hashlib.sha256()
        for passage in passages:
            digest.update(passage.model_dump_json(exclude_defaults=True).encode() + b"\n")
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._passages)

    def where(self, row: int) -> str:
        return f"{self.name}, passage {row}"

    def read(self, start: int, stop: int) -> Iterator[Passage]:
        yield from islice(self._passages, start, stop)


class FileCorpus:
    """A JSONL file; where its lines begin (16 bytes a line) is all that is kept of it."""

    def __init__(self, path: Path):
        self.name = str(path)
        self._path = path
        self._numbers, self._offsets = array("q"), array("q")
        digest = hashlib.sha256()
        for number, offset, line in lines(path):
            self._numbers.append(number)
            self._offsets.append(offset)
            digest.update(line)
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._offsets)

    def where(self, row: int) -> str:
        return f"{self.name}:{self._numbers[row]}"

    def read(self, start: int, stop: int) -> Iterator[Passage]:
        if start >= stop:
            return
        with open(self._path, "rb") as file:
            file.seek(self._offsets[start])
            found = (line for line in file if line.strip())
            for row, line in zip(range(start, stop), found, strict=False):
                yield parse(self.where(row), line, Passage)


class HubCorpus:
    """A Hugging Face data set: Arrow files, memory-mapped by `datasets`."""

    def __init__(self, spec: str):
        self.name, self._rows = hub_rows(spec)
        self.digest = hashlib.sha256(str(self._rows._fingerprint).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, row: int) -> str:
        return f"{self.name}:row {row}"

    def read(self, start: int, stop: int) -> Iterator[Passage]:
        rows: Iterable[Any] = self._rows.select(range(start, stop))
        for row, record in enumerate(rows, start):
            yield validate(self.where(row), Passage, without_none(record))
