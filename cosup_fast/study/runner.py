"""Makes the cells that are missing, one after the other; several processes may work on a study at once.

A cell belongs to the process that holds the lock of its work folder. Its result appears whole when all is done; until
then a kill at any moment costs what the run's last checkpoint and the last answers do not hold.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cosup_fast.files import locked, read_object, remove_unwritten, replace_file
from cosup_fast.files.fields import differences
from cosup_fast.study.cell import Questions, make_cell, train
from cosup_fast.study.config import Cell, Study, StudyError, select
from cosup_fast.study.progress import Progress
from cosup_fast.study.provenance import commit
from cosup_fast.study.result import completed, read_cell
from cosup_fast.study.sets import load_sets
from cosup_fast.study.status import duration, time_left_of
from cosup_fast.terminal import SafeConsole
from cosup_fast.training.checkpoint import checkpoints

BEGUN = "run.json"  # what a cell's run was begun with


def run_study(study: Study, *, only: str | None = None, console: Console | None = None) -> list[str]:
    """Makes every cell that has no result and that no other process works on.

    Args:
        study: what to make.
        only: make the cells whose names match a list of patterns, such as `ntp-only-*,pair-seed0`.
        console: where progress goes; standard error by default.

    Returns:
        The cells that failed, each with its error: the others are made all the same.

    Raises:
        StudyError: a finished cell disagrees with the study, a test set is missing, or no cell matches `only`.
        KeyboardInterrupt: Ctrl-C; the same study resumes from there.
    """
    console = console or SafeConsole(stderr=True)
    cells = select(study, only)
    missing = [cell for cell in cells if read_cell(cell) is None]
    console.print(f"{len(cells) - len(missing)} of {len(cells)} cells are finished", highlight=False)
    if not missing:
        return []
    questions = Questions(*load_sets(study)) if any(cell.trial is None for cell in missing) else Questions((), ())
    make_work(study)
    code, failed = commit(), []
    prune(study, console)
    for cell in missing:
        cell.work.mkdir(exist_ok=True)
        try:
            with locked(cell.work, wait=False):
                if read_cell(cell) is not None:  # another process has finished it meanwhile
                    continue
                console.rule(cell.name)
                started = time.monotonic()
                remove_unwritten(cell.work)
                check_begun(cell)
                progress = Progress(cell.work, code)
                _provide(cell, code, console)
                make_cell(cell, questions, progress, console).save(cell.result)
        except BlockingIOError:
            console.print(f"{cell.name}: another process works on it", markup=False)
            continue
        except (ValueError, OSError, RuntimeError) as error:
            failed.append(f"{cell.name}: {error}")
            console.print(f"{cell.name} failed: {error}", markup=False, style="red")
            continue
        finally:
            gc.collect()
        left = time_left_of(study, only)
        console.print(
            f"{cell.name}: finished in {duration(time.monotonic() - started)}"
            + (f", about {duration(left)} left" if left else ""),
            markup=False,
        )
        prune(study, console)
    return failed


def make_work(study: Study) -> None:
    """The folder of checkpoints and answers, which git leaves alone wherever it is."""
    study.work_folder.mkdir(parents=True, exist_ok=True)
    (study.work_folder / ".gitignore").write_text("*\n")


def prune(study: Study, console: Console) -> None:
    """Removes the checkpoints of finished cells that no unfinished cell reads."""
    needed = {part.name for cell in study.cells.values() if not cell.result.is_file() for part in cell.parts}
    for cell in study.cells.values():
        folder = cell.work / "run" / "checkpoints"
        if cell.name in needed or cell.settings.keep or not cell.result.is_file() or not folder.is_dir():
            continue
        try:
            with locked(cell.work, wait=False):
                shutil.rmtree(folder)
                console.print(f"{cell.name}: checkpoints removed", markup=False, style="dim")
        except BlockingIOError:
            pass


def check_begun(cell: Cell) -> None:
    """Refuses to resume a run that was begun with other settings: some of them it would adopt without a word.

    Raises:
        StudyError: naming the first field that differs.
    """
    path, now = cell.work / BEGUN, cell.identity.get("run")
    if now is None:  # a pair has no run of its own
        return
    if path.is_file():
        for field, (then, wanted) in differences(completed({"run": read_object(path)})["run"], now).items():
            raise StudyError(
                f"cell {cell.name} was begun with {field}={then}, the study now says {wanted}: restore it, or remove "
                f"{cell.work} to begin again"
            )
        return
    with replace_file(path) as file:
        json.dump(now, file)


def _provide(cell: Cell, code: str, console: Console) -> None:
    """The checkpoints that a pair is made of: those of its parts, trained again where they are gone."""
    for part in cell.parts:
        part.work.mkdir(exist_ok=True)
        with locked(part.work, wait=True):  # another process may be training it again
            run = Path(part.run.output)
            if part.result.is_file() and not checkpoints(run / "checkpoints"):
                console.print(
                    f"{cell.name}: the checkpoint of {part.name} is gone, so it is trained again, with the same result",
                    markup=False,
                )
                if run.exists():
                    shutil.rmtree(run)
            check_begun(part)
            train(part, Progress(part.work, code), console)


__all__: Sequence[str] = ("make_work", "prune", "run_study", "select")
