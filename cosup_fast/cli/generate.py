"""`cosup-fast generate`: answer questions, retrieving passages where the model asks for them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field, field_validator

from cosup_fast.cli.common import (
    Checkpoint,
    Device,
    IndexName,
    Stale,
    Writing,
    err,
    generation_config,
    interruptible,
    load_model,
    no_passages,
    out,
)
from cosup_fast.cli.options import with_options


class Sampled(Writing):
    """How Gen writes, and how it chooses among tokens."""

    candidates: int | None = Field(default=None, description="passages listed for each retrieval")
    temperature: float | None = Field(default=None, description="0 is greedy")
    top_p: float | None = Field(default=None, description="sample from the likeliest tokens of this probability")
    seed: int | None = Field(default=None, description="random seed of sampling")
    stop: list[str] = Field(default=[], description="end an answer where this text appears; \\n is a line's end")

    @field_validator("stop")
    @classmethod
    def _line_ends(cls, stop: list[str]) -> list[str]:
        return [text.replace("\\n", "\n") for text in stop]


@with_options
def generate(
    checkpoint: Checkpoint,
    questions: Annotated[list[str] | None, typer.Argument(help="one or more questions", show_default=False)] = None,
    file: Annotated[
        list[str] | None,
        typer.Option(
            help="more questions: *.jsonl with a question (instruction, id) a line, or plain lines; - is stdin"
        ),
    ] = None,
    index: IndexName = None,
    output: Annotated[Path | None, typer.Option(help="a JSONL file for the answers, with every retrieval")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line, with every retrieval")] = False,
    batch: Annotated[int, typer.Option(min=1, help="questions answered at once")] = 16,
    *,
    writing: Sampled,
    device: Device = "auto",
    allow_stale: Stale = False,
) -> None:
    """Generate answers that retrieve passages where the model asks for them.

    Many questions are answered together; on a terminal their text appears as it is written. What is not given here is
    as in the `generation` section of the run's configuration.
    """
    from cosup_fast.cli.answers import answer_questions, read_questions
    from cosup_fast.files import check_regular, held
    from cosup_fast.generation import Generator
    from cosup_fast.index.stores import load_index

    asked = read_questions(questions or [], file or [])
    config = generation_config(checkpoint, index=index, **writing.given)
    if writing.top_p is not None and config.temperature == 0:
        raise ValueError(f"--top-p {writing.top_p} samples, and --temperature 0 does not: give a temperature above 0")
    if output is not None:
        check_regular(output)
        if output.resolve() in [Path(name).resolve() for name in file or () if name != "-"]:
            raise ValueError(f"--output {output} is one of --file, whose questions would be lost: name another file")
    with held(output, "generate") if output is not None else nullcontext():
        model = load_model(checkpoint, device)
        folder = index or checkpoint / "index"
        searched = load_index(folder, model, allow_stale=allow_stale) if config.max_retrievals else no_passages
        generator = Generator(model, searched, config, max_batch=min(batch, len(asked)))
        with interruptible():
            failed = answer_questions(generator, asked, out=out, err=err, as_json=as_json, output=output)
    if output is not None:
        err.print(f"answers: {output} ({len(asked)} questions)", markup=False, highlight=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)
