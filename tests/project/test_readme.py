"""What the README shows runs: its Python, and every command it names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from cosup_fast.cli.app import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str, page: str = README) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    return [text for name, text in fences if name == language]


def test_the_python_blocks_run_one_after_the_other():
    blocks = _blocks("python")
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert float(names["out"].loss.detach()) > 0


@pytest.mark.parametrize(("page", "least"), [("README.md", 5), ("docs/negatives.md", 2), ("docs/single-node.md", 2)])
def test_every_command_is_understood(page, least):
    """Each line is parsed by the command line itself, down to its options, without being run."""
    blocks = _blocks("", (ROOT / page).read_text(encoding="utf-8"))
    lines = [line.split("#")[0] for block in blocks for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("cosup-fast ")]
    assert len(commands) >= least
    root = typer.main.get_command(app)
    for words in commands:
        command, context = root, typer.Context(root, info_name="cosup-fast")
        while hasattr(command, "commands"):
            assert words[0] in command.commands, words
            command = command.commands[words[0]]
            context = typer.Context(command, info_name=words[0], parent=context)
            words = words[1:]
        command.parse_args(context, list(words))


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)", README))))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()
