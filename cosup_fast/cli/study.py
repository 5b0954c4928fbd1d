"""`cosup-fast study`: run a study's cells, say how far they are, write the report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cosup_fast.cli.common import err, interruptible, out, say


def study(
    config: Annotated[Path, typer.Argument(help="a study: YAML with conditions, seeds and sets", show_default=False)],
    status: Annotated[bool, typer.Option("--status", help="Show the state of every cell, run nothing.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Report the finished cells, run nothing.")] = False,
    only: Annotated[
        str | None, typer.Option(help="run, or show with --status, the cells of these names: 'ntp-only-*,pair-seed0'")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="where results go instead of the study's output")] = None,
    allow_mixed_commits: Annotated[
        bool, typer.Option("--allow-mixed-commits", help="Report cells that different commits made in one table.")
    ] = False,
) -> None:
    """Train and evaluate conditions x seeds in cells that resume, and report what differs with its intervals."""
    from cosup_fast.study.config import load_study

    if status and report:
        raise ValueError("--status --report: give one of them")
    if report and only is not None:
        raise ValueError(f"--report --only {only}: a report covers every finished cell: leave out --only")
    loaded = load_study(config, output=output)
    if status:
        from cosup_fast.study.status import status_table

        out.print(status_table(loaded, only))
        return
    if report:
        from cosup_fast.study.render import write_report
        from cosup_fast.study.report import make_report

        made = make_report(loaded, allow_mixed_commits=allow_mixed_commits)
        out.print(made.table())
        for path in write_report(made, Path(loaded.output)):
            say(str(path))
        return
    from cosup_fast.study.runner import run_study

    with interruptible("stopped", then="; the same command resumes"):
        failed = run_study(loaded, only=only, console=err)
    if failed:
        raise ValueError("\n".join(failed))
