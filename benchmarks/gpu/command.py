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
from benchmarks.gpu.session import Result, Session, Setting
from benchmarks.gpu.tasks import TASKS
from cosup_fast.files import replace_file


def gpu(
    minutes: Annotated[
        float, typer.Option(min=0.1, help="for all of it; what does not fit is left to the next run")
    ] = 12,
    task: Annotated[
        list[str] | None, typer.Option(help="only those whose names begin so; repeat the option for several")
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
    known = {one.name for one in TASKS}
    if unknown := [name for name in task or [] if not any(one.startswith(name) for one in known)]:
        raise ValueError(f"task is {unknown[0]!r}; choose from {', '.join(one.name for one in TASKS)}")
    setting = Setting("cpu" if rehearse else "cuda", rehearse)
    if output is None:
        output = Path(tempfile.mkdtemp(prefix="rehearsal-")) if rehearse else report.ROOT / machine.folder("cuda")
    tasks = [one for one in TASKS if not task or any(one.name.startswith(name) for name in task)]
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
