"""A journal: one JSON line for each finished piece of long work, flushed to disk as it comes, read again by a rerun.

The first line says what the work is of. Every line ends in the CRC-32 of what comes before it, so that a changed one is
refused and not used. A last line that a killed process left unfinished is dropped.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

from cosup_fast.files.checked import check_checksum, checked_line
from cosup_fast.files.fields import differences, short
from cosup_fast.files.whole import check_regular, fcntl, naming, sync

SYNC_SECONDS = 1.0
_BEGINNING = b'{"settings": '


class Journal:
    """The finished pieces in `path`, by key; in memory alone when that is None.

    Args:
        path: the file; made with its folder when it is not there.
        settings: what the work is of, JSON values.
        restart: start over when the file's settings differ, rather than refuse them.

    Raises:
        ValueError: the file holds work with other settings (the first that differs is named) or is not a journal, or
            another process is writing it; it is then left as it was.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], *, restart: bool = False):
        self.path = path
        self.done: dict[str, Any] = {}
        self._file: BinaryIO | None = None
        self._synced = 0.0
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        check_regular(path)
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        try:
            self._lock()
            whole = self._read(settings, restart)
            self._file.truncate(whole)
            self._file.seek(whole)
            if not whole:
                self._write(checked_line({"settings": settings}))
                sync(path.parent)
        except BaseException:
            with suppress(OSError):  # a full disk, which is known already
                self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None and self.path is not None:
            with naming(self.path), self._file:
                self._sync()

    def add(self, key: str, value: Any) -> None:
        """Keeps a finished piece: written before this returns, on disk within a second or when the journal closes."""
        self.done[key] = value
        self._write(checked_line({"key": key, "value": value}))

    def _write(self, line: bytes) -> None:
        if self._file is None or self.path is None:
            return
        with naming(self.path):
            self._file.write(line)
            self._file.flush()  # what the system has survives a kill; only a crash of the machine needs more
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self._sync()

    def _sync(self) -> None:
        assert self._file is not None
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def _lock(self) -> None:
        if fcntl is None or self._file is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self.path} is being written by another process: wait for it, or give another --output"
            ) from None

    def _read(self, settings: dict[str, Any], restart: bool) -> int:
        """Fills `done`; returns the length of what is whole, in bytes, 0 to start over."""
        assert self._file is not None
        *lines, last = self._file.read().split(b"\n")
        if not lines and not last.startswith(_BEGINNING[: len(last)]):
            raise ValueError(f"{self.path} is not a journal of this work: name another file, or remove this one")
        whole = 0
        for number, line in enumerate(lines, 1):
            try:
                entry = _entry(line)
                if number == 1:
                    theirs = entry["settings"]
                else:
                    self.done[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"{self.path}:{number} is damaged ({error}): remove the line, or the file to start over"
                ) from None
            changed = differences(theirs, json.loads(json.dumps(settings))) if number == 1 else {}
            if changed and restart:
                return 0
            for name, (before, now) in changed.items():
                raise ValueError(
                    f"{self.path} holds work with another {name} ({short(before)}, now {short(now)}): give another "
                    "--output, or --overwrite to start over"
                )
            whole += len(line) + 1
        return whole


def _entry(line: bytes) -> dict[str, Any]:
    """The entry in a line.

    Raises:
        ValueError: the line is not as it was written.
    """
    check_checksum(line)
    return json.loads(line)
