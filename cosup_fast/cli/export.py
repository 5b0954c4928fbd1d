"""`cosup-fast export`: write a checkpoint for sentence-transformers or transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cosup_fast.cli.common import Checkpoint, load_model, say


def export(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Argument(help="folder to write", show_default=False)],
    what: Annotated[
        str,
        typer.Option(help="retriever (both sides, for sentence-transformers), query or embseq (one of them), or gen"),
    ] = "retriever",
    licence: Annotated[
        str | None, typer.Option("--license", help="the model's licence, for its card, such as apache-2.0")
    ] = None,
    name: Annotated[str | None, typer.Option(help="title of the model card; default: the run's folder")] = None,
    repo: Annotated[
        str | None,
        typer.Option("--push", metavar="OWNER/NAME", help="also upload it to this repository of the hub"),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository private, if it is new.")] = False,
) -> None:
    """Write a checkpoint for sentence-transformers (MTEB, BEIR) or transformers, with a model card."""
    from cosup_fast.export.card import RunFacts
    from cosup_fast.export.hub import check_push, push
    from cosup_fast.export.sentence_transformers import EXPORT
    from cosup_fast.export.sentence_transformers import export as write
    from cosup_fast.files import check_replaceable

    if private and repo is None:
        raise ValueError("--private makes a repository private: name one with --push OWNER/NAME")
    if repo is not None:
        check_push(repo)
    check_replaceable(output, EXPORT)
    facts = RunFacts.of(checkpoint, name=name, licence=licence)
    write(load_model(checkpoint, "cpu"), output, what, facts)  # type: ignore[arg-type]  # it says which there are
    say(f"{what}: {output}")
    if repo is not None:
        say(f"pushed: {push(output, repo, private=private)}")
