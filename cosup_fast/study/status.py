"""How far a study is: a row for each cell, and the time that is left at the pace so far."""

from __future__ import annotations

import time
from statistics import fmean

from cosup_fast.files import locked, read_object
from cosup_fast.study.config import Cell, Study, StudyError, select
from cosup_fast.study.progress import read_progress, time_left
from cosup_fast.study.result import read_cell
from cosup_fast.terminal import FigureTable


def status_table(study: Study, only: str | None = None) -> FigureTable:
    """The cells that `only` selects, each with its state, seconds, progress and the time left of its present stage."""
    cells = select(study, only)
    states = {cell.name: state_of(cell) for cell in cells}
    finished, left = sum(state == "finished" for state in states.values()), time_left_of(study, only)
    caption = f"{finished} of {len(cells)} finished" + (f", about {duration(left)} left" if left else "")
    table = FigureTable("cell", "state", "time", "progress", "left", names=2, caption=caption)
    for cell in cells:
        progress = read_progress(cell.work)
        state = states[cell.name]
        spent = sum(progress.get("seconds", {}).values())
        stage, left = "", None
        if state == "finished":
            spent = _seconds(cell) or spent
        elif progress:
            if state == "running":
                spent += time.time() - progress["updated"]
            of = f" {progress['done']}/{progress['total']}" if progress["total"] else ""
            stage, left = f"{progress['stage']}{of}", time_left(progress) if state == "running" else None
        table.add_row(cell.name, state, duration(spent) if spent else "", stage, duration(left) if left else "")
    return table


def state_of(cell: Cell) -> str:
    """`finished`, `running` in some process on this machine, `stopped` on the way, or `waiting`.

    `refused` is a cell whose file is damaged or was made with another configuration: running or reporting says why.
    """
    try:
        if read_cell(cell) is not None:
            return "finished"
    except StudyError:
        return "refused"
    if not cell.work.is_dir():
        return "waiting"
    try:
        with locked(cell.work, wait=False):
            return "stopped" if read_progress(cell.work) else "waiting"
    except BlockingIOError:
        return "running"


def time_left_of(study: Study, only: str | None = None) -> float | None:
    """Seconds that the unfinished cells will take if they are like the finished ones, best those of their condition."""
    taken: dict[tuple[str, bool], list[float]] = {}
    cells = select(study, only)
    for cell in study.cells.values():
        if seconds := _seconds(cell):
            taken.setdefault((cell.condition, cell.trial is None), []).append(seconds)
    left = 0.0
    for cell in cells:
        if cell.result.is_file():
            continue
        kind = cell.trial is None
        like = taken.get((cell.condition, kind)) or [s for (_, of), row in taken.items() if of is kind for s in row]
        if not like:
            return None
        left += max(0.0, fmean(like) - sum(read_progress(cell.work).get("seconds", {}).values()))
    return left


def duration(seconds: float) -> str:
    """For people: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _seconds(cell: Cell) -> float | None:
    try:
        return sum(read_object(cell.result, ["seconds"])["seconds"].values())
    except (ValueError, TypeError, AttributeError):
        return None
