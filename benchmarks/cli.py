"""The command line: python -m benchmarks, or cosup-fast bench."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import batch_memory, host, machine, report, run, train_step, versions
from benchmarks import gate as gates
from benchmarks.cases import DTYPES, LOSSES, Case, parse_shape
from benchmarks.gpu.command import gpu
from benchmarks.providers import Provider, chosen
from cosup_fast.cli.common import message_of
from cosup_fast.cli.options import with_options
from cosup_fast.kernels.softmax_xent.chunk_torch import multiplies_bf16

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Time, count and weigh the losses beside other libraries.",
    epilog="Start with [bold]list[/], then [bold]time --shape 512x512x256[/].",
)
out, err = Console(), Console(stderr=True)

Loss = Annotated[list[str] | None, typer.Option(help=f"{', '.join(LOSSES)}; repeat for several; default: all")]
Names = Annotated[
    list[str] | None, typer.Option("--provider", help="a name of `list`, or how several begin; repeat for several")
]
Shape = Annotated[
    list[str] | None, typer.Option(help="NxMxD; repeat for several; default: the shapes of the committed table")
]
Dtype = Annotated[list[str] | None, typer.Option(help=f"{', '.join(DTYPES)}; repeat for several")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
Output = Annotated[
    Path | None, typer.Option(help="folder to write; default: benchmarks/results/<hardware>-<date>/<command>")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")]
Threads = Annotated[int | None, typer.Option(min=1, help="threads of torch; default: as torch chooses")]


def main(arguments: list[str] | None = None, name: str = "python -m benchmarks") -> None:
    """Runs the command line; user errors become a message on standard error and exit status 1, Ctrl-C 130."""
    try:
        app(arguments, prog_name=name)
    except (ValueError, OSError) as error:
        err.print("[red]error:[/] ", end="")
        err.print(message_of(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


def cases(losses: list[str] | None, shapes: list[str] | None, dtypes: list[str], device: str) -> list[Case]:
    """Of the suite, or of every chosen loss at the shapes given, where that loss has such a shape."""
    if losses and (unknown := [loss for loss in losses if loss not in LOSSES]):
        raise ValueError(f"loss is {unknown[0]!r}; choose from {', '.join(LOSSES)}")
    if shapes:
        sizes = [parse_shape(shape) for shape in shapes]
        pairs = [(loss, size) for loss in losses or LOSSES for size in sizes]
    else:
        pairs = [(loss, parse_shape(shape)) for loss, shape in run.SUITE if not losses or loss in losses]
    found, wrong = [], []
    for loss, size in pairs:
        for dtype in dtypes:
            try:
                found.append(Case(loss, *size, dtype, device))
            except ValueError as error:
                wrong.append(error)
    if wrong and (losses or not found):
        raise wrong[0]
    return found


def _dtypes(device: str) -> list[str]:
    """Those that are multiplied with instructions of their own: bf16 by torch's fallback takes minutes a product."""
    if torch.device(device).type != "cpu" or multiplies_bf16():
        return ["fp32", "bf16"]
    err.print("bf16 is left out: this CPU has no instructions for it; name --dtype bf16 to measure it all the same")
    return ["fp32"]


def _device(name: str) -> str:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {name!r}; choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', and no CUDA device is visible; pass --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _begin(output: Path | None, name: str, overwrite: bool, device: str = "cpu") -> tuple[Path, str]:
    """The folder to write, refused before anything is measured for it; the command, and how busy the machine is."""
    folder = output or report.ROOT / machine.folder(device) / name
    report.writable(folder, overwrite)
    program = "cosup-fast" if sys.argv[1:2] == ["bench"] else "python -m benchmarks"
    return folder, f"{program} {shlex.join(sys.argv[1:])}\n\nLoad of the machine before (1 minute): {machine.load()}"


def _publish(folder: Path, text: str, files: dict[str, str] | None = None, *, overwrite: bool) -> None:
    """Prints a report, and writes it with the tables that belong to it."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)
    report.write(folder, {"README.md": text, **(files or {})}, overwrite)
    err.print(f"written: {folder}", soft_wrap=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _session(
    question: str,
    what: list[Case],
    providers: list[Provider],
    output: Path | None,
    overwrite: bool,
    measure: Callable[[Case, run.Say], list[run.Row]],
    describe: Callable[[list[run.Row], str], str],
    draw: Callable[[list[run.Row]], dict[str, bytes]] = lambda rows: {},
) -> None:
    """Measures every case, prints its table, and writes the folder at the end."""
    what = [case for case in what if any(case.loss in one.losses for one in providers)]
    if not what:
        raise ValueError(f"none of {', '.join(one.name for one in providers)} has such a loss; see `list`")
    folder, command = _begin(output, question, overwrite, what[0].device)
    rows: list[run.Row] = []
    with err.status("starting") as status:
        for i, case in enumerate(what):

            def say(text: str, i: int = i) -> None:
                text = f"[{i + 1}/{len(what)}] {text}"
                status.update(text.replace("[", r"\["))
                if not err.is_terminal:
                    _say(text)

            new = measure(case, say)
            rows += new
            out.print(describe(new, command).split("## ", 1)[1], markup=False, highlight=False, soft_wrap=True)
    files: dict[str, str | bytes] = {"README.md": describe(rows, command) + "\n"}
    files[f"{question}.csv"] = report.csv_text([row.record() for row in rows])
    if binaries := run.binary_records(rows):
        files["binaries.csv"] = report.csv_text(binaries)
    report.write(folder, files | draw(rows), overwrite)
    err.print(f"written: {folder}", soft_wrap=True)
    if not any(row.status == "ok" for row in rows):
        raise ValueError("no provider could run; the reasons are in the table")


@app.command(
    "time",
    epilog="Examples: python -m benchmarks time --shape 512x512x256 --rounds 5 | python -m benchmarks time "
    "--loss info-nce --shape 8192x8192x1024 --dtype bf16 --provider ours --provider dense --seconds 60",
)
def time_command(
    loss: Loss = None,
    provider: Names = None,
    shape: Shape = None,
    dtype: Dtype = None,
    rounds: Annotated[int, typer.Option(min=1, help="at most so many")] = 7,
    seconds: Annotated[float, typer.Option(min=0, help="for the rounds of a case; at least 3 rounds are run")] = 120,
    device: Device = "auto",
    threads: Threads = None,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """How fast? Forward and backward in interleaved rounds, beside bare matrix products and a memory copy."""
    if threads:
        torch.set_num_threads(threads)
    providers = chosen(provider)
    _session(
        "time",
        cases(loss, shape, dtype or _dtypes(_device(device)), _device(device)),
        providers,
        output,
        overwrite,
        lambda case, say: run.time_case(case, providers, rounds=rounds, seconds=seconds, say=say),
        run.timing_report,
        lambda rows: run.plots(rows, "time"),
    )


@app.command(
    "count",
    epilog="Example: python -m benchmarks count --shape 512x512x512 --dtype bf16 --provider inf_cl --provider ours",
)
def count_command(
    loss: Loss = None,
    provider: Names = None,
    shape: Shape = None,
    dtype: Dtype = None,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """What does it cost exactly? Products by precision, bytes, atomics, locks; Triton kernels in the interpreter."""
    providers = chosen(provider)
    _session(
        "count",
        cases(loss, shape or ["512x512x512"], dtype or ["bf16"], "cpu"),
        providers,
        output,
        overwrite,
        lambda case, say: run.count_case(case, providers, say),
        run.count_report,
    )


@app.command("memory", epilog="Example: python -m benchmarks memory --loss info-nce --shape 8192x8192x1024")
def memory_command(
    loss: Loss = None,
    provider: Names = None,
    shape: Shape = None,
    dtype: Dtype = None,
    device: Device = "auto",
    threads: Threads = None,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """How much memory? The peak beside inputs and gradients, each provider in a process of its own."""
    if threads:
        torch.set_num_threads(threads)
    providers = chosen(provider)
    _session(
        "memory",
        cases(loss, shape, dtype or _dtypes(_device(device)), _device(device)),
        providers,
        output,
        overwrite,
        lambda case, say: run.memory_case(case, providers, say),
        run.memory_report,
        lambda rows: run.plots(rows, "memory"),
    )


app.command("gpu", epilog="Examples: python -m benchmarks gpu --minutes 12 | python -m benchmarks gpu --rehearse")(gpu)


@app.command("host", epilog="Example: python -m benchmarks host --rounds 31")
def host_command(
    rounds: Annotated[int, typer.Option(min=1, help="most rounds of each loss")] = 31,
    seconds: Annotated[float, typer.Option(min=0, help="time for each loss")] = 60.0,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """How much does a tiny loss cost on the CPU, forward and backward, beside dense PyTorch?"""
    folder, command = _begin(output, "host", overwrite)
    text = host.describe(host.every(rounds, seconds), command) + f"\n\n{machine.line()}\n"
    _publish(folder, text, overwrite=overwrite)


@app.command("gate", epilog="Example: python -m benchmarks gate --update")
def gate_command(update: Annotated[bool, typer.Option("--update", help="Write down what is found.")] = False) -> None:
    """Have our exact figures changed? Compares them with benchmarks/exact.json."""
    found = gates.measure()
    versions, wanted = gates.load() if gates.PATH.exists() else ({}, {})
    changes = gates.differences(found, wanted)
    for change in changes:
        out.print(change, markup=False, highlight=False, soft_wrap=True)
    if update:
        gates.update(found)
        out.print(f"{gates.PATH.name}: {len(found)} entries, {len(changes)} changes")
    elif changes:
        raise ValueError(
            f"{len(changes)} figures differ from {gates.PATH.name} "
            f"({', '.join(f'{name} {number}' for name, number in versions.items())}); "
            "if that is meant: python -m benchmarks gate --update"
        )
    else:
        out.print(f"{len(found)} entries, none changed")


@app.command(
    "train-step",
    epilog="Examples: python -m benchmarks train-step --variant recipe --variant ours | python -m benchmarks "
    "train-step --layers 2 --batch-size 4 --measure products --measure time",
)
@with_options
def train_step_command(
    variant: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(train_step.STEP)}; the first is compared with; default: all")
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache", help="Instead: one batch of --factor micro-batches against plain accumulation.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    measure: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(train_step.MEASURES)}; repeat for several; default: all")
    ] = None,
    *,
    setting: train_step.Setting,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """How much faster is a training step than the published recipe's, and what do more negatives cost?"""
    names = train_step.CACHE if cache else variant or train_step.STEP
    if unknown := [name for name in names if name not in (*train_step.STEP, *train_step.CACHE)]:
        raise ValueError(f"variant is {unknown[0]!r}; choose from {', '.join(train_step.STEP)}")
    if wrong := [what for what in measure or [] if what not in train_step.MEASURES]:
        raise ValueError(f"measure is {wrong[0]!r}; choose from {', '.join(train_step.MEASURES)}")
    folder, command = _begin(output, "grad-cache" if cache else "train-step", overwrite)
    rows = train_step.measure(setting, names, rounds, measure or train_step.MEASURES, say=_say)
    text = (train_step.cache_report if cache else train_step.step_report)(rows, setting, command)
    _publish(folder, text, {"rounds.csv": report.csv_text(train_step.records(rows))}, overwrite=overwrite)


@app.command("versions", epilog="Example: python -m benchmarks versions ../cosup-fast-0.1 --rounds 5")
@with_options
def versions_command(
    other: Annotated[Path, typer.Argument(help="a checkout of the other version", exists=True, file_okay=False)],
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    *,
    setting: versions.Setting,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """How much faster is a training step than another version's, by the same losses?"""
    folder, command = _begin(output, "versions", overwrite)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(f"    {text}")
        _say(text)

    found = versions.measure(setting, [other.resolve(), machine.ROOT], rounds, say)
    text = versions.versions_report(found, setting, "\n".join(said), command)
    _publish(folder, text, overwrite=overwrite)


@app.command(
    "batch-memory",
    epilog="Examples: python -m benchmarks batch-memory --size 256 --size 4096 --limit-gib 12 | python -m benchmarks "
    "batch-memory --size 16 --size 256 --layers 2 --passage-tokens 64",
)
@with_options
def batch_memory_command(
    size: Annotated[list[int], typer.Option(min=1, help="examples of a step; repeat the option for several")],
    limit_gib: Annotated[float | None, typer.Option(help="exit status 1 where a peak is above it")] = None,
    *,
    setting: batch_memory.Setting,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """How much memory does a training step take whose negatives are a large batch's?"""
    folder, command = _begin(output, "batch-memory", overwrite)
    rows = batch_memory.measure(setting, size, say=_say)
    text = batch_memory.page(rows, setting, command)
    _publish(folder, text, {"sizes.csv": report.csv_text([asdict(row) for row in rows])}, overwrite=overwrite)
    if limit_gib is not None and (most := max(row.peak_bytes for row in rows)) > limit_gib * 2**30:
        raise ValueError(f"the peak is {report.size(most)}, above --limit-gib {limit_gib:g}")


@app.command("list", epilog="Example: python -m benchmarks list --shape 512x512x256 --dtype bf16")
def list_command(provider: Names = None, shape: Shape = None, dtype: Dtype = None, device: Device = "auto") -> None:
    """Who computes what, and who cannot run here and why."""
    out.print(machine.line(_device(device)), highlight=False, soft_wrap=True)
    what = cases(None, shape or ["512x512x512"], dtype or ["fp32"], _device(device))
    table = Table("provider", "what", "version", "losses", "state")
    for one in chosen(provider):
        reasons = {one.reason(case) for case in what if case.loss in one.losses}
        state = "[green]runs[/]" if None in reasons else "[yellow]" + "; ".join(sorted(filter(None, reasons))) + "[/]"
        table.add_row(one.name, one.what, one.version, ", ".join(one.losses), state)
    out.print(table)
