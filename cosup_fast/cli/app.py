"""The `cosup-fast` command: the table of its commands, and what becomes of their errors.

Each command is a function in a file of its own; heavy packages are imported inside it, so that `--help` answers at
once.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

import cosup_fast
from cosup_fast.cli.bench import bench
from cosup_fast.cli.common import err, examples, hush, leads, message_of, out
from cosup_fast.cli.data import data_app
from cosup_fast.cli.env import env
from cosup_fast.cli.evaluate import compare, evaluate
from cosup_fast.cli.export import export
from cosup_fast.cli.generate import generate
from cosup_fast.cli.index import index_app
from cosup_fast.cli.mine import mine
from cosup_fast.cli.plan import plan
from cosup_fast.cli.serve import serve
from cosup_fast.cli.study import study
from cosup_fast.cli.train import train
from cosup_fast.signals import terminable

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Semiparametric token-sequence co-supervision: train a generator and a sequence encoder together, "
    "index passages, and generate with retrieval.",
    epilog="Start with [bold]cosup-fast demo[/] (ten minutes, no GPU), or [bold]cosup-fast data prepare starter[/].",
)
DEBUG = {"on": bool(os.environ.get("COSUP_DEBUG"))}


def _version(asked: bool) -> None:
    if asked:
        out.print(f"cosup-fast {cosup_fast.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Print the trace of an error instead of one line.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    DEBUG["on"] |= debug


app.add_typer(data_app, name="data")
app.add_typer(index_app, name="index")


def demo(
    output: Annotated[Path, typer.Option(help="folder for everything it makes; run again, it continues there")] = Path(
        "runs/demo"
    ),
) -> None:
    """Train, index, retrieve and generate on real text, beside baselines, in about ten minutes without a GPU."""
    from cosup_fast.cli.demo import run_demo

    run_demo(output, out)


COMMANDS: dict[Callable[..., None], list[str]] = {
    plan: [
        "plan --preset llama2-7b-8x80g",
        "plan run.yaml --gpus 8 --gpu-memory 80",
        "plan model.gen=llama2-7b training.sharding=fsdp --gpus 4 --gpu-memory 48 --nsp-batch 1024 --json",
    ],
    train: [
        "train run.yaml --resume",
        "torchrun --nproc-per-node 8 -m cosup_fast train run.yaml",
        "train training.lr=1e-4 nsp.weight=0.1 model.gen_layers=6 output=runs/six-layers",
    ],
    generate: [
        "generate runs/cosup 'Who wrote Hamlet?' 'What is the capital of Peru?'",
        "generate runs/cosup --file questions.jsonl --output answers.jsonl --batch 32",
        "generate runs/cosup 'Who wrote Hamlet?' --temperature 0.7 --top-p 0.9 --stop '\\n\\n' --json",
    ],
    serve: [
        "serve runs/cosup",
        "serve runs/cosup --system bm25 --system dense:minilm --port 9000",
        "serve runs/cosup --host 0.0.0.0 --api-key SECRET --passage-url 'https://en.wikipedia.org/wiki/{title}'",
    ],
    evaluate: [
        "evaluate runs/cosup --examples questions/test-in --limit 100",
        "evaluate runs/ntp --system dense:minilm",
        "evaluate runs/ntp --system pair:runs/nsp --examples nq-dev-kilt.jsonl --out-of-domain nq",
    ],
    compare: ["compare runs/ntp/evaluation/dense-minilm runs/cosup/evaluation/co-supervised"],
    study: [
        "study examples/study.yaml",
        "study examples/study.yaml --only 'ntp-only-*'",
        "study examples/study.yaml --status",
        "study examples/study.yaml --report",
    ],
    export: ["export runs/cosup out/retriever", "export runs/cosup out/gen --what gen --license apache-2.0"],
    mine: [
        "mine runs/cosup --examples questions/train --output mined.jsonl",
        "mine runs/cosup --corpus my-passages.jsonl --examples my-examples.jsonl --per-example 2 --max-score 0.95 "
        "--output mined.jsonl; then: cosup-fast train 'data.train=[mined.jsonl]' output=runs/harder",
    ],
    demo: ["demo --output runs/demo"],
    env: ["env", "env --imports"],
}
for command, shown in COMMANDS.items():
    app.command(epilog=examples(*shown))(command)
app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    epilog=examples("bench time --shape 512x512x256"),
)(bench)


def run() -> None:
    """Runs the command line; user errors become a message on standard error and exit status 1.

    Ctrl-C and SIGTERM end any command with status 130.
    """
    hush()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an encoding that lacks a character ends no finished work
            stream.reconfigure(errors="backslashreplace")
    try:
        with terminable():
            app()
    except KeyboardInterrupt:  # before a command begins, or after it ended
        sys.exit(130)
    except Exception as error:
        if DEBUG["on"]:
            raise
        if _said_elsewhere(error):
            sys.exit(1)
        err.print("[red]error:[/] " if leads() else f"[red]error on rank {os.environ['RANK']}:[/] ", end="")
        err.print(_line(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


def _line(error: Exception) -> str:
    """An error's message for the user."""
    from cosup_fast.distributed.peers import PeerError

    if isinstance(error, ValueError | ImportError | PeerError):
        return message_of(error)
    if isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}" if error.filename is not None and error.strerror else str(error)
        full = error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
        return f"{what}: free some space, or write to another disk" if full else what
    text = str(error).strip().split("\n")[0]
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return (
            f"out of memory ({text or 'no more to be had'}): lower training.tokens_per_micro_batch or --batch, or use "
            "fewer layers; `cosup-fast plan` says what a run takes"
        )
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f", in {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace is not None else ""
    return (
        f"unexpected {type(error).__name__}: {text}{where}. Either a file is damaged in a way that is not recognised, "
        "or this is a bug: `cosup-fast --debug ...` prints the trace"
    )


def _said_elsewhere(error: Exception) -> bool:
    """Whether another rank on this machine prints that too."""
    from cosup_fast.config import ConfigError
    from cosup_fast.data.records import DataError
    from cosup_fast.distributed.peers import ReportedError

    return os.environ.get("LOCAL_RANK", "0") != "0" and isinstance(error, ConfigError | DataError | ReportedError)
