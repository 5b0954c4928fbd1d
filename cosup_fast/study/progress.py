"""How far a cell is and the seconds that it has taken, in a small file beside its work that `--status` reads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cosup_fast.data.strict import Strict
from cosup_fast.files import read_object, replace_file

FILE = "progress.json"
_EVERY = 2.0  # seconds between writes


class _Progress(Strict):
    """What the file holds."""

    stage: str
    done: int
    total: int
    done_before: int
    elapsed: float
    updated: float
    seconds: dict[str, float]
    commits: list[str]


class Progress:
    """Written by the process that holds the cell's lock.

    Args:
        folder: the cell's work.
        commit: of the code that works on it now; kept with the earlier ones.
    """

    def __init__(self, folder: Path, commit: str):
        self.path = folder / FILE
        before = read_progress(folder)
        self.seconds: dict[str, float] = before.get("seconds", {})
        self.commits: list[str] = list(dict.fromkeys([*before.get("commits", []), commit]))
        self._stage, self._done, self._total = "", 0, 0
        self._began = self._booked = self._written = time.monotonic()
        self._done_before = 0

    @contextmanager
    def stage(self, name: str, total: int = 0) -> Iterator[None]:
        """A part of the work whose seconds are counted."""
        self._stage, self._done, self._total, self._done_before = name, 0, total, -1
        self._began = self._booked = time.monotonic()
        self._write()
        try:
            yield
        finally:
            self._write()

    def __call__(self, done: int, total: int) -> None:
        """Notes how much of the stage is done; the first call says what an earlier process did."""
        if self._done_before < 0:
            self._done_before = done
        self._done, self._total = done, total
        if time.monotonic() - self._written > _EVERY:
            self._write()

    def _write(self) -> None:
        now = time.monotonic()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._booked
        self._booked = self._written = now
        with replace_file(self.path) as file:
            state = _Progress(
                stage=self._stage,
                done=self._done,
                total=self._total,
                done_before=max(0, self._done_before),
                elapsed=now - self._began,
                updated=time.time(),
                seconds=self.seconds,
                commits=self.commits,
            )
            file.write(state.model_dump_json())


def read_progress(folder: Path) -> dict[str, Any]:
    """What a cell's file says; nothing where it is missing or was not written by a cell."""
    try:
        return _Progress.model_validate(read_object(folder / FILE)).model_dump()
    except ValueError:
        return {}


def time_left(progress: dict[str, Any]) -> float | None:
    """Seconds to the end of the stage at the pace of this process, or None while that is not known."""
    if not progress:
        return None
    done = progress["done"] - progress["done_before"]
    if done <= 0 or not progress["total"]:
        return None
    return progress["elapsed"] / done * (progress["total"] - progress["done"])
