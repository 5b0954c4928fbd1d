"""Rows of the files that data come in: JSON lines, a JSON list, CSV, TSV, Parquet, or a data set on the hub.

No file is held in memory: rows are read one at a time, each with where it stands.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cosup_fast.data.hub import hub_rows, without_none
from cosup_fast.data.records import DataError, lines, parse_object

CHUNK = 1 << 20
LONGEST = 1 << 27  # bytes of one object in a JSON list


class Row(NamedTuple):
    """One record, or why there is none."""

    where: str  # "file:line"
    number: int  # from 1
    done: int  # bytes read so far, 0 where that is not known
    record: dict[str, Any] | DataError


def read_rows(source: str | Path) -> Iterator[Row]:
    """The rows of a file, whose name tells its form, or of `hf:owner/name[:split]`.

    Raises:
        DataError: there is no such file, or it cannot be read to its end.
    """
    if str(source).startswith("hf:"):
        place, rows = hub_rows(str(source))
        return (Row(f"{place}:row {i}", i, 0, without_none(row)) for i, row in enumerate(rows, 1))
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{path}: expected a file, found none")
    match path.suffix.lower():
        case ".csv":
            return _table(path, delimiter=",")
        case ".tsv":
            return _table(path, delimiter="\t", quoting=csv.QUOTE_NONE)
        case ".parquet":
            return _parquet(path)
    with path.open("rb") as file:
        listed = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
    return _list(path) if listed else _lines(path)


def _lines(path: Path) -> Iterator[Row]:
    for number, offset, line in lines(path):
        where = f"{path}:{number}"
        try:
            record: dict[str, Any] | DataError = parse_object(where, line)
        except DataError as error:
            record = error
        yield Row(where, number, offset + len(line), record)


def _table(path: Path, **form: Any) -> Iterator[Row]:
    csv.field_size_limit(CHUNK)
    reader = csv.reader(_decoded(path), strict=True, **form)
    names: list[str] = []
    number = 0
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{where}: expected a row of a table, found: {error}") from None
        if row is None:
            return
        if not names:
            names = row
            if repeated := [name for name, count in Counter(names).items() if count > 1]:
                raise DataError(f"{where}: expected columns of different names, found {repeated[0]!r} twice")
        elif row:
            number += 1
            record: dict[str, Any] | DataError = dict(zip(names, row))
            if len(row) != len(names):
                record = DataError(f"{where}: expected {len(names)} columns, found {len(row)}")
            yield Row(where, number, 0, record)


def _decoded(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                found = error.object[error.start]
                raise DataError(f"{path}:{number}: expected UTF-8, found byte 0x{found:02x}") from None


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}:row {number}", number, 0, without_none(record))
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: expected a Parquet file, found: {error}") from None


def _list(path: Path) -> Iterator[Row]:
    """The objects of one JSON list, which may be larger than memory; a syntax error ends it."""
    decoder, text = json.JSONDecoder(), _Window(path)
    text.expect("[")
    number = 0
    if text.skip_space() == "]":
        text.expect("]")
    else:
        while True:
            text.skip_space()
            where = f"{path}:{text.line}"
            record = text.take(decoder)
            number += 1
            if not isinstance(record, dict):
                record = DataError(f"{where}: expected a JSON object, found {record!r:.60}")
            yield Row(where, number, text.done, record)
            if text.skip_space() != ",":
                break
            text.expect(",")
        text.expect("]")
    if text.skip_space():
        raise DataError(f"{path}:{text.line}: expected nothing after the list, found {text.rest!r:.60}")


class _Window:
    """A stretch of a text file, moved along as it is read."""

    def __init__(self, path: Path):
        self._path, self._file = path, path.open("rb")
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._place, self._ended = "", 0, False
        self.line, self.done = 1, 0

    @property
    def rest(self) -> str:
        return self._text[self._place :]

    def skip_space(self) -> str:
        """Moves to the next character that is not white space and returns it; "" at the end."""
        while True:
            while self._place < len(self._text):
                if not self._text[self._place].isspace():
                    return self._text[self._place]
                self._move(self._place + 1)
            if not self._more(CHUNK):
                return ""

    def expect(self, character: str) -> None:
        """Moves past a character that has to come."""
        if (found := self.skip_space()) != character:
            raise DataError(f"{self._path}:{self.line}: expected {character!r} of a JSON list, found {found!r}")
        self._move(self._place + 1)

    def take(self, decoder: json.JSONDecoder) -> Any:
        """The JSON value here, after which the window continues."""
        size = CHUNK
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._place)
            except (json.JSONDecodeError, RecursionError) as error:
                if len(self._text) - self._place < LONGEST and self._more(size):
                    size *= 2
                    continue
                line = self.line
                if isinstance(error, json.JSONDecodeError):
                    line += self._text.count("\n", self._place, error.pos)
                raise DataError(f"{self._path}:{line}: expected a JSON object in a list, found: {error}") from None
            self._move(end)
            return value

    def _move(self, place: int) -> None:
        self.line += self._text.count("\n", self._place, place)
        self._place = place
        if place > CHUNK:
            self._text, self._place = self._text[place:], 0

    def _more(self, size: int) -> bool:
        if self._ended:
            return False
        found = self._file.read(size)
        self._ended = not found
        self.done += len(found)
        try:
            self._text += self._decode.decode(found, final=self._ended)
        except UnicodeDecodeError as error:
            line = self.line + self._text.count("\n", self._place) + error.object[: error.start].count(b"\n")
            raise DataError(
                f"{self._path}:{line}: expected UTF-8, found byte 0x{error.object[error.start]:02x}"
            ) from None
        if self._ended:
            self._file.close()
        return bool(found)
