"""`cosup-fast evaluate` and `compare`: score a system, and compare two of its reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field

from cosup_fast.cli.common import Checkpoint, Writing, err, generation_config, interruptible, load_model, out, say
from cosup_fast.cli.options import with_options
from cosup_fast.data.strict import Strict
from cosup_fast.evaluation.kinds import forms


class EvaluateOptions(Strict):
    """What is evaluated, on what, and how."""

    examples: list[str] = Field(
        default=[], description="a JSONL file of examples or of KILT, or a prepared set; repeat it for several"
    )
    system: str = Field(default="co-supervised", description=f"what answers: {forms()}")
    index: str | None = Field(
        default=None,
        description="the index, a folder or milvus:URI#COLLECTION; default: index/ beside what retrieves",
    )
    corpus: str | None = Field(
        default=None, description="passages to search or hand over; default: those of the index, or the run's"
    )
    output: Path | None = Field(
        default=None, description="folder to keep it in; default: evaluation/SYSTEM beside the checkpoint"
    )
    judge: str = Field(
        default="lexical",
        description="what judges grounding: lexical, likelihood, none, or an NLI model (folder or Hugging Face name)",
    )
    fluency: str = Field(
        default="base", description="model for perplexity: base (what the run's Gen began as), none, or a name"
    )
    metric: list[str] = Field(default=[], description="report this metric for every data set, too")
    in_domain: list[str] = Field(default=[], description="a data set or source that training has seen")
    out_of_domain: list[str] = Field(default=[], description="a data set or source that training has not seen")
    limit: int | None = Field(default=None, ge=1, description="use only so many examples, drawn by the seed")
    batch: int = Field(default=16, ge=1, description="questions answered at once")
    seed: int = Field(default=0, description="seed of --limit and of random passages")
    allow_missing_gold: bool = Field(
        default=False, description="count gold passages that the corpus lacks as never found"
    )
    overwrite: bool = Field(default=False, description="start over where the output holds answers")
    device: str = Field(default="auto", description="auto, cpu or cuda")
    allow_stale: bool = Field(default=False, description="use an index that another checkpoint made")


@with_options
def evaluate(checkpoint: Checkpoint, options: EvaluateOptions, writing: Writing) -> None:
    """Score retrieval, correctness, grounding and fluency, each with its 95% bootstrap interval.

    Every answer is kept as soon as it is there: the same command resumes where it was stopped. The folder then holds
    report.json (everything) and report.html (to read).
    """
    from cosup_fast import evaluation
    from cosup_fast.cli import systems as command
    from cosup_fast.environment import choose_device
    from cosup_fast.evaluation.suites import check_metrics

    check_metrics(options.metric)
    _check_retrieves(options, writing)
    folder = command.output_folder(options.output, checkpoint, options.system)
    config = generation_config(checkpoint, **writing.given)
    where = choose_device(options.device, "--device")
    opened = command.open_system(
        options.system,
        checkpoint,
        lambda path: load_model(path, options.device),
        index=options.index,
        corpus=options.corpus,
        seed=options.seed,
        allow_stale=options.allow_stale,
        device=where,
    )
    tests = evaluation.load_test_sets(
        options.examples or ["questions/test-in", "questions/test-out"],
        opened.passages,
        in_domain=options.in_domain,
        out_of_domain=options.out_of_domain,
        limit=options.limit,
        seed=options.seed,
        allow_missing_gold=options.allow_missing_gold,
    )
    judge = evaluation.load_judge(options.judge, device=where)
    perplexed = command.fluency_model(options.fluency, checkpoint)
    if options.overwrite:
        command.clear(folder)
    with interruptible("what is answered is kept; the same command resumes there"):
        report = evaluation.evaluate(
            opened,
            tests,
            config,
            judge=judge,
            fluency=evaluation.FluencyModel(perplexed, device=where) if perplexed else None,
            metrics=options.metric,
            folder=folder,
            batch=options.batch,
        )
    out.print(report.table())
    say(f"report: {folder / 'report.html'}")


def _check_retrieves(options: EvaluateOptions, writing: Writing) -> None:
    """Refuses options of retrieval where nothing is retrieved."""
    if options.system != "closed-book":
        return
    given = dict(options) | dict(writing)
    for name in ("ret_first", "max_retrievals", "ctx_truncate", "allow_stale", "allow_missing_gold"):
        if given[name]:
            raise ValueError(
                f"--{name.replace('_', '-')} is about passages, and --system closed-book is given none: leave it out"
            )


def compare(
    before: Annotated[Path, typer.Argument(help="report.json of the baseline, or its folder", show_default=False)],
    after: Annotated[Path, typer.Argument(help="report.json of the other run, or its folder", show_default=False)],
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
