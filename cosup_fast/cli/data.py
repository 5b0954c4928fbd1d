"""`cosup-fast data convert`: published training and evaluation files to ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from cosup_fast.cli.common import say

convert_app = typer.Typer(no_args_is_help=True, help="Convert published training and evaluation files (docs/data.md).")

Output = Annotated[Path, typer.Option(help="folder to write; it appears whole or not at all", show_default=False)]
Skip = Annotated[
    bool, typer.Option("--skip-malformed", help="Leave malformed lines out, with their numbers, instead of stopping.")
]


@convert_app.command("self-rag", epilog="Example: cosup-fast data convert self-rag train.jsonl --output data/self-rag")
def self_rag(
    source: Annotated[Path, typer.Argument(help="Self-RAG's training file, JSONL", show_default=False)],
    output: Output,
    skip_malformed: Skip = False,
) -> None:
    """Self-RAG's training file to passages.jsonl and train.jsonl: the examples that retrieve."""
    from cosup_fast.data.convert import convert_self_rag

    _report(output, convert_self_rag(source, output, skip_malformed=skip_malformed))


@convert_app.command(
    "kilt",
    epilog="Examples: cosup-fast data convert kilt nq-dev-kilt.jsonl fever-dev-kilt.jsonl --knowledge "
    "kilt_knowledgesource.json --output data/kilt | cosup-fast data convert kilt nq-dev-kilt.jsonl --output data/nq",
)
def kilt(
    output: Output,
    tasks: Annotated[list[Path] | None, typer.Argument(help="KILT's task files, JSONL", show_default=False)] = None,
    knowledge: Annotated[Path | None, typer.Option(help="KILT's knowledge source, for passages.jsonl")] = None,
    gold: Annotated[str, typer.Option(help="what counts: the paragraph of the provenance, or its page")] = "paragraph",
    skip_malformed: Skip = False,
) -> None:
    """KILT's tasks to questions with gold ids, and its knowledge source to passages, one a paragraph."""
    from cosup_fast.data.convert import convert_kilt

    counts = convert_kilt(
        tasks or [],
        output,
        knowledge=knowledge,
        gold=gold,  # type: ignore[arg-type]  # it says which there are
        skip_malformed=skip_malformed,
    )
    _report(output, counts)


def _report(output: Path, counts: Mapping[str, int]) -> None:
    say(f"{output}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
