"""`cosup-fast evaluate` and `compare`: score a system, and compare two of its reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cosup_fast.cli.common import Checkpoint, Device, Stale, err, generation_config, interruptible, load_model, out, say


def evaluate(
    checkpoint: Checkpoint,
    examples: Annotated[
        list[str] | None,
        typer.Option(help="a JSONL file of examples or of KILT, or a prepared set; repeat it", show_default=False),
    ] = None,
    system: Annotated[
        str,
        typer.Option(help="co-supervised, closed-book, gold, random, bm25, dense:NAME, pair:RUN or untrained"),
    ] = "co-supervised",
    index: Annotated[Path | None, typer.Option(help="the index; default: index/ beside what retrieves")] = None,
    corpus: Annotated[
        str | None, typer.Option(help="passages to search or hand over; default: those of the index, or the run's")
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again where the output holds answers.")] = False,
    device: Device = "auto",
    allow_stale: Stale = False,
) -> None:
    """Score retrieval, correctness, grounding and fluency, each with its 95% bootstrap interval.

    Every answer is kept as soon as it is there: the same command resumes where it stopped. The folder then holds
    report.json (everything) and report.html (to read).
    """
    from cosup_fast import evaluation
    from cosup_fast.cli import systems as command
    from cosup_fast.environment import choose_device
    from cosup_fast.evaluation.suites import check_metrics

    check_metrics(metric or [])
    folder = command.output_folder(output, checkpoint, system)
    config = generation_config(
        checkpoint,
        max_new_tokens=max_new_tokens,
        max_retrievals=max_retrievals,
        ret_first=ret_first,
        ctx_truncate=ctx_truncate,
    )
    opened = command.open_system(
        system,
        checkpoint,
        lambda path: load_model(path, device),
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
    with interruptible("what is answered is kept; the same command resumes from there"):
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
    say(f"report: {folder / 'report.html'}")


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
    say(f"{compared.questions} questions in both, {compared.left_out} in one only")
    for name in compared.differs:
        err.print(f"[yellow]note:[/] the two runs differ in their {name} settings too", highlight=False)
