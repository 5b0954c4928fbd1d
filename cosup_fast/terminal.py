"""Consoles that show other people's text, control characters made visible, and tables that never cut a figure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_C1 = dict.fromkeys(range(0x80, 0xA0), "\N{SYMBOL FOR SUBSTITUTE FORM TWO}")
_BIDI = {code: f"<U+{code:04X}>" for code in (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}
_VISIBLE = {**_PICTURES, 0x7F: "\N{SYMBOL FOR DELETE}", **_C1, **_BIDI}
"""Escape, which starts the terminal's commands (titles, colours, the clipboard), among them; and marks that reorder."""


def visible(text: str) -> str:
    """A text whose control characters are pictures of themselves; line ends and tabs stay."""
    return text.translate(_VISIBLE)


class SafeConsole(Console):
    """A rich console on which every text that is printed passes through `visible`; styles are rich's own."""

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(visible(segment.text), segment.style)


def word_table(*headers: str, **options: Any) -> Table:
    """A table of words alone, which wrap where they have no room: nothing is cut."""
    table = Table(**options)
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


NAME_WIDTH = 16


class FigureTable(Table):
    """A table in which no figure is cut or broken: where its columns do not fit, each row becomes lines of its own.

    The columns in `names` may wrap; the others hold figures. Cells are plain text, lines of a cell go below each other.

    Args:
        names: how many columns, from the left, hold names.
        options: those of `rich.table.Table`.
    """

    def __init__(self, *headers: str, names: int = 1, **options: Any):
        super().__init__(**options)
        for number, header in enumerate(headers):
            figure = number >= names
            self.add_column(escape(header), justify="right" if figure else "left", no_wrap=figure, overflow="fold")

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(escape(cell) if isinstance(cell, str) else cell for cell in cells), **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._needed() <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        if self.title:
            yield Text(str(self.title), style="italic")
        for cells in zip(*(column.cells for column in self.columns), strict=True):
            first, *rest = (str(cell) for cell in cells)
            yield Text.from_markup(" ".join(first.split("\n")), style="bold")
            for column, cell in zip(self.columns[1:], rest, strict=True):
                if cell.strip():
                    title = Text.from_markup(f"  {column.header}  ", style="dim")
                    value = Text.from_markup("  ".join(cell.split("\n")))
                    if title.cell_len + value.cell_len <= options.max_width:
                        yield title.append_text(value)
                    else:  # wrapped at its spaces, an interval would be torn apart
                        yield title
                        yield from (Text.from_markup(f"    {line}") for line in cell.split("\n"))
        if self.caption:
            yield Text(str(self.caption), style="italic")

    def _needed(self) -> int:
        """The width at which every figure has its place, and a name at least `NAME_WIDTH` columns of it."""
        needed = 3 * len(self.columns) + 1
        for column in self.columns:
            lines = [line for cell in (column.header, *column.cells) for line in str(cell).split("\n")]
            width = max(Text.from_markup(line).cell_len for line in lines)
            needed += width if column.no_wrap else min(width, NAME_WIDTH)
        return needed
