"""`python -m benchmarks gpu`."""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import machine, report
from benchmarks.gpu.page import page
from benchmarks.gpu.session import Result, Session, Setting, Task
from benchmarks.gpu.tasks import TASKS
from cosup_fast.files import replace_file


def gpu(
    minutes: Annotated[
        float, typer.Option(min=0.1, help="for all of it; what does not fit is left to the next run")
    ] = 12,
    task: Annotated[
        list[str] | None, typer.Option(help="only this one, or those that begin so; repeat the option for several")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run again what failed or was absent.")] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Shrink every size and run on the CPU, kernels in the interpreter.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="folder of the results; default: benchmarks/results/<gpu>-<date>")
    ] = None,
) -> None:
    """What is a GPU worth here? Tests, losses beside peers, training steps and generation, most valuable first.

    Each result is a file as soon as it is known; a failure is a result too. Run again with the same folder, it resumes.
    """
    if not rehearse and not torch.cuda.is_available():
        raise ValueError("no CUDA device is visible; pass --rehearse to try the command without one")
    tasks = _chosen(task)
    setting = Setting("cpu" if rehearse else "cuda", rehearse)
    if output is None:
        output = Path(tempfile.mkdtemp(prefix="rehearsal-")) if rehearse else report.ROOT / machine.folder("cuda")
    command = f"    python -m benchmarks {shlex.join(sys.argv[1:])}"
    if rehearse:
        command += "\n\nA rehearsal: sizes are tiny and times mean nothing."

    def write(waiting: list[str]) -> None:
        results = {one.name: result for one in TASKS if (result := session.result(one)) is not None}
        with replace_file(session.folder / "README.md") as file:
            file.write(page(TASKS, results, command, waiting))

    def kept(result: Result) -> None:
        print(f"{session.left:5.0f} s left  {result.task}: {result.status} {result.reason}".rstrip(), flush=True)
        write([])

    session = Session(output, setting, 60 * minutes, kept)
    waiting = session.run(tasks, retry=retry)
    write(waiting)
    print(f"written: {output}" + (f"; left for the next run: {', '.join(waiting)}" if waiting else ""))


def _chosen(names: list[str] | None) -> list[Task]:
    """All tasks, or those named; what is not a whole name may be the beginning of several."""
    known = [task.name for task in TASKS]
    wanted: set[str] = set()
    for name in names or known:
        found = [name] if name in known else [one for one in known if one.startswith(name)]
        if not found:
            raise ValueError(f"task is {name!r}; choose from {', '.join(known)}")
        wanted.update(found)
    return [task for task in TASKS if task.name in wanted]
