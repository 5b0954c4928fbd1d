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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from cosup_fast.data.passages import PassageFile, hash_ids
from cosup_fast.data.records import Passage
from cosup_fast.files import check_manifest, described, load_array, save_array, sync, write_manifest

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
    """Writes the manifest of files, which makes them count."""
    write_manifest(folder / name, {file: described(folder / file) for file in files})
    sync(folder)


def check_files(folder: Path, name: str, *, contents: bool) -> None:
    """Compares files with the manifest of a shard; see `check_manifest`."""
    try:
        check_manifest(folder / name, contents=contents)
    except ValueError as error:
        raise ValueError(f"{error}: build the index again") from None
