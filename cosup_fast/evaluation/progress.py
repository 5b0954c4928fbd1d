"""How far an evaluation is: a callback that it calls, and the progress bars of a terminal as one such callback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

OnProgress = Callable[[str, int, int], None]
"""Called with the name of a stage, how many questions are done, and of how many."""


def silent(stage: str, done: int, total: int) -> None:
    """Shows nothing."""


@contextmanager
def bars() -> Iterator[OnProgress]:
    """A progress bar on stderr for each stage."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed
    from rich.progress import TimeRemainingColumn as Remaining

    from cosup_fast.terminal import SafeConsole

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Elapsed(), Remaining())
    rows: dict[str, TaskID] = {}
    with Progress(*columns, console=SafeConsole(stderr=True)) as shown:

        def on_progress(stage: str, done: int, total: int) -> None:
            if stage not in rows:
                rows[stage] = shown.add_task(stage, total=total, completed=done)
            shown.update(rows[stage], completed=done, total=total)

        yield on_progress
