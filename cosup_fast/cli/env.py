"""`cosup-fast env`: versions, devices, and which optional parts are usable."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from cosup_fast.cli.common import out
from cosup_fast.terminal import word_table


def env(
    imports: Annotated[
        bool, typer.Option("--imports", help="Import every package, to find broken ones; takes a while.")
    ] = False,
) -> None:
    """Show versions, devices, and which optional parts are usable and why not."""
    from cosup_fast.environment import describe

    table = word_table("part", "state", "note")
    for part in describe(imports=imports):
        table.add_row(part.name, "[green]ok[/]" if part.usable else "[yellow]no[/]", escape(part.note))
    out.print(table)
