"""Text of others that is shown: nothing in it reaches the terminal as a command."""

from __future__ import annotations

import io

import pytest
from rich.table import Table
from rich.text import Text

from cosup_fast.terminal import SafeConsole, visible

CLIPBOARD = "\x1b]52;c;ZXZpbA==\x07"


@pytest.mark.parametrize("text", [CLIPBOARD, "\x1b[2J", "\x9b31m", "a\rb", "a\x00b", "\u202egnp.exe", "\x7f"])
def test_control_characters_are_shown(text):
    console = SafeConsole(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=60, emoji=False)
    table = Table("title [bold]x[/]")
    table.add_row(text)
    table.add_row(Text(text, style="bold red"))
    console.print(table)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"[bold]{text}[/]")
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    control = next(c for c in text if not c.isprintable())
    if control == "\x1b":
        assert text[:3] not in printed
        assert "\x1b[1m" in printed  # rich's own styles are still sent
    else:
        assert control not in printed


def test_what_is_printable_stays_as_it_is():
    for text in ("naïve 囲碁 👩‍👧 é", "two\nlines\tand a tab"):
        assert visible(text) == text
