"""What every conversion shares: reading row by row, and a folder that appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, TextIO, TypeVar

from pydantic import BaseModel
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from cosup_fast.data.convert.rows import Row
from cosup_fast.data.records import DataError, Passage, field_names, to_line, validate
from cosup_fast.files import FolderKind, replace_folder, sha256
from cosup_fast.terminal import SafeConsole

CONVERTED = FolderKind("converted data", "converted.json", frozenset({"form", "sources", "counts", "files"}))
PASSAGES = "passages.jsonl"
T = TypeVar("T")


def read(
    source: str | Path,
    rows: Iterable[Row],
    convert: Callable[[str, int, dict[str, Any]], T],
    counts: Counter[str],
    what: str,
    *,
    skip: bool,
    bar: bool,
) -> Iterator[tuple[str, T]]:
    """What `convert` makes of each row, and where it stood; malformed rows stop it, or are shown and counted."""
    console, path = SafeConsole(stderr=True), Path(source)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not bar) as progress:
        task = progress.add_task(path.name, total=path.stat().st_size if path.is_file() else None)
        for row in rows:
            try:
                if isinstance(row.record, DataError):
                    raise row.record
                converted = convert(row.where, row.number, row.record)
            except DataError as error:
                if not skip:
                    raise
                console.print(f"left out: {error}", markup=False, highlight=False, soft_wrap=True)
                counts["malformed"] += 1
                continue
            counts[what] += 1
            progress.update(task, completed=row.done)
            yield row.where, converted


class Output:
    """JSONL files in a folder that takes its place at the end, with a note of what it was made of."""

    def __init__(self, folder: str | Path):
        self._target = folder
        self._files: dict[str, TextIO] = {}
        self._contents: dict[int, int] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._folder = stack.enter_context(replace_folder(self._target, CONVERTED))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def write(self, name: str, record: BaseModel) -> None:
        """Appends a record to a file."""
        if name not in self._files:
            file = (self._folder / name).open("w", encoding="utf-8", newline="\n")
            self._files[name] = self._open.enter_context(file)
        self._files[name].write(to_line(record))

    def check_passages(self, where: str, passages: Iterable[Passage]) -> None:
        """Compares passages with each other and with those that were added.

        Raises:
            DataError: two texts have the same id.
        """
        these: dict[int, int] = {}
        for passage in passages:
            key, content = _key(passage)
            if not these.setdefault(key, content) == self._contents.get(key, content) == content:
                raise DataError(
                    f"{where}: expected one text for each passage id, found a second one for {passage.id!r}"
                )

    def add_passages(self, passages: Iterable[Passage]) -> None:
        """Writes passages, which have been checked, but for those that are there already."""
        for passage in passages:
            key, content = _key(passage)
            if key not in self._contents:
                self._contents[key] = content
                self.write(PASSAGES, passage)

    @property
    def passages(self) -> int:
        """How many `add_passages` has written."""
        return len(self._contents)

    def finish(self, form: str, sources: Sequence[str | Path], counts: Counter[str]) -> None:
        """Writes the note. Sources on a hub have no checksum there: their name stands for them."""
        made_of = {Path(s).name: sha256(Path(s)) if Path(s).is_file() else str(s) for s in sources}
        for file in self._files.values():
            file.flush()
        files = {name: sha256(self._folder / name) for name in sorted(self._files)}
        note = {"form": form, "sources": made_of, "counts": dict(counts), "files": files}
        (self._folder / CONVERTED.marker).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")


def check_names(form: str, names: Iterable[str]) -> None:
    """Refuses files of examples that would overwrite one another, or the passages.

    Raises:
        DataError: naming the file.
    """
    written = Counter([PASSAGES, CONVERTED.marker, *names])
    if repeated := [name for name, count in written.items() if count > 1]:
        raise DataError(f"{form}: {repeated[0]!r} would be the name of several files that are written: rename one")


def named_by_content(where: str, prefix: str, title: str, text: str) -> Passage:
    """A passage that comes without an id: the same text is always the same passage."""
    digest = hashlib.sha256(f"{title}\n{text}".encode(errors="surrogatepass")).hexdigest()
    return validate(where, Passage, {"id": f"{prefix}:{digest[:16]}", "title": title, "text": text})


def string(where: str, record: dict[str, Any], key: str, default: str | None, field: str = "") -> str:
    """A string of a record; None as `default` makes it required."""
    value = record.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise DataError(f"{where}: {field or key}: expected a string, found {value!r:.60}")
    return value


def text(where: str, record: dict[str, Any], key: str, field: str = "") -> str:
    """Text that has to be there; where its field is missing, those that exist are named."""
    if key not in record:
        raise DataError(f"{where}: {field or key}: expected a value, found only {field_names(record)}")
    found = string(where, record, key, None, field)
    if not found.strip():
        raise DataError(f"{where}: {field or key}: expected some text, found {found!r}")
    return found


def identifier(where: str, record: dict[str, Any], key: str, field: str = "") -> str:
    """An id that may be written as a number; "" where there is none."""
    value = record.get(key)
    if value is None:
        return ""
    if not isinstance(value, str | int) or isinstance(value, bool) or not str(value).strip():
        raise DataError(f"{where}: {field or key}: expected an id, found {value!r:.60}")
    return str(value)


def whole(where: str, record: dict[str, Any], key: str, default: int, field: str) -> int:
    """A whole number of a record."""
    value = record.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"{where}: {field}.{key}: expected a whole number, found {value!r:.60}")
    return value


def objects(where: str, record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """A list of objects of a record; empty where there is none."""
    found = record.get(key)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise DataError(f"{where}: {key}: expected a list of objects, found {found!r:.60}")
    return found


def _key(passage: Passage) -> tuple[int, int]:
    """Hashes of its id and of its content."""
    return _hash(passage.id), _hash(f"{passage.title}\n{passage.text}")


def _hash(value: str) -> int:
    """64 bits, so that millions of passages are remembered in little memory."""
    return int.from_bytes(hashlib.blake2b(value.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
