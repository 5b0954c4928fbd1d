"""Tables at any width: a figure is whole, wherever it is, and so is every word."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import pytest
from rich.console import Console

from cosup_fast.terminal import FigureTable, word_table
from cosup_fast.training.diagnostics import Diagnosis
from cosup_fast.training.log import diagnosis_table

PACKAGE = Path(__file__).parents[2] / "cosup_fast"


def printed(table, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [30, 40, 80, 200])
def test_figures_are_whole_at_any_width(width):
    figures = ("+0.2345 [-0.1, +0.5]", "150,123", "4.3-1.2")
    table = FigureTable("a name", "points, 95% interval", "perplexity", "range", title="a title", caption="a caption")
    table.add_row("a name that is rather long [bold]", *figures)
    text = printed(table, width)
    assert all(figure in text for figure in (*figures, "[bold]"))
    assert max(map(len, text.split("\n"))) <= width
    for word in ("title", "caption", "perplexity", "points, 95% interval"):
        assert word in text


@pytest.mark.parametrize("width", [40, 80])
def test_a_diagnosis_is_whole(width):
    found = Diagnosis(12345, 1.23456, 0.00123, -0.998, 1.5, -3.25, -2.75)
    text = printed(diagnosis_table(found, None), width)
    assert all(figure in text for figure in ("12345", "1.23", "0.00123", "-0.998", "1.5", "-3.25", "-2.75"))


def test_words_wrap_and_none_is_lost():
    table = word_table("part", "note")
    table.add_row("checkpoint", "0123456789abcdef" * 8)
    text = "".join(c for c in printed(table, 40) if c.isalnum())
    assert "0123456789abcdef" * 8 in text.replace("checkpoint", "")


def test_no_table_is_made_that_could_cut():
    """Commands make their tables by `cosup_fast.terminal`."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "terminal.py" or "testing" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            made = isinstance(node, ast.Call) and ast.unparse(node.func) == "Table"
            assert not made, f"{path}:{getattr(node, 'lineno', 0)}: use FigureTable or word_table"
