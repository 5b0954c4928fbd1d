"""Consoles that show other people's text: control characters in it are made visible, never sent to the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.segment import Segment

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
