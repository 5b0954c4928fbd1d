"""The whole mission in a few minutes without a GPU: train, index, retrieve, generate, before against after.

The questions that are scored are real ones whose passages were never trained on. Everything lands in one folder;
run again, the demo continues where it stopped.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cosup_fast.cli.answers import print_answer
from cosup_fast.config import RunConfig, load_config
from cosup_fast.data.prepared.prepare import prepare
from cosup_fast.data.records import Example, Passage
from cosup_fast.data.sources import load_corpus, load_examples
from cosup_fast.evaluation import (
    IndexRetriever,
    QuestionRecord,
    Report,
    System,
    evaluate,
    paired_gain,
    retrieval_ranks,
)
from cosup_fast.files import replace_file
from cosup_fast.index import SequenceIndex
from cosup_fast.model import CoSupervisionModel
from cosup_fast.training.checkpoint import chosen_checkpoint
from cosup_fast.training.run import run_training

QUESTIONS, ANSWERED, POOL = 400, 64, 800
Ranks = dict[str, int]  # by question id, passages ahead of the gold one
SHOWN = {"recall@1": "R@1", "recall@5": "R@5", "containment": "answer in the output", "grounded": "grounded"}


def run_demo(output: Path, console: Console, overrides: Sequence[str] = ()) -> None:
    """Runs the demo into `output` and prints before, after, the paired gains and three answers."""
    started = time.monotonic()
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file: name a folder")
    with resources.as_file(resources.files("cosup_fast.cli") / "demo.yaml") as path:
        config = load_config(path, [*overrides, f"output={json.dumps(str(output / 'run'))}"])

    console.rule("1/4  real weights, real text")
    for name in ("smollm2-135m", "wiki-leads", "questions"):
        console.print(f"{name}: {prepare(name)}", soft_wrap=True, highlight=False, markup=False)
    questions, pool = held_out_questions(config)
    console.print(
        f"{len(questions)} held-out questions; {len(pool)} passages to search, the gold ones never trained on"
    )

    console.rule("2/4  before training")
    before, ranks_before = _scored(output / "before", lambda: _untrained(config), questions, pool, config, console)

    console.rule("3/4  co-supervised training")
    if not (output / "after" / "report.json").is_file():
        run_training(config, resume=True, console=console)
    trained = chosen_checkpoint(Path(config.output))

    console.rule("4/4  after training")
    after, ranks_after = _scored(
        output / "after", lambda: CoSupervisionModel.load(trained), questions, pool, config, console
    )

    console.print(comparison(before, after, ranks_before, ranks_after))
    for record in _telling(after):
        print_answer(console, record.example.question, record.answer)
        console.print(f"  [dim]expected[/] {escape(' / '.join(record.example.answers[:3]))}", highlight=False)
    console.print(
        f"curves: {config.output}/curves.png   everything: {output}", soft_wrap=True, highlight=False, markup=False
    )
    console.print(f"done in {(time.monotonic() - started) / 60:.1f} minutes")


def held_out_questions(config: RunConfig) -> tuple[list[Example], list[Passage]]:
    """Real questions of both test splits that have an answer to check, and a pool that holds their passages."""
    draw = random.Random(config.training.seed)
    corpus = load_corpus(config.data.corpus)
    known = {passage.id for passage in corpus}
    examples = [e for split in ("questions/test-in", "questions/test-out") for e in load_examples(split, known)]
    examples = draw.sample([e for e in examples if e.answers], QUESTIONS)
    gold = {passage for example in examples for passage in example.gold}
    others = draw.sample([passage for passage in corpus if passage.id not in gold], POOL - len(gold))
    return examples, [passage for passage in corpus if passage.id in gold] + others


def comparison(before: Report, after: Report, ranks_before: Ranks, ranks_after: Ranks) -> Table:
    """Each metric before and after, in percent, with the paired 95% interval of its gain.

    Retrieval is measured on all questions, what Gen writes on those it answered.
    """
    columns = ("", "questions", "before", "after", "gain, paired 95% interval")
    table = Table(*columns, title="on held-out questions, percent")
    for metric, title in SHOWN.items():
        if metric.startswith("recall@"):
            k = int(metric.removeprefix("recall@"))
            pair = [{name: float(rank < k) for name, rank in ranks.items()} for ranks in (ranks_before, ranks_after)]
        else:
            pair = [before.values(metric), after.values(metric)]
        means = [sum(values.values()) / len(values) for values in pair]
        gain = paired_gain(*pair)
        table.add_row(
            title,
            str(gain.count),
            *(f"{100 * mean:.1f}" for mean in means),
            f"{100 * gain.mean:+.1f}  [{100 * (gain.low or 0):+.1f}, {100 * (gain.high or 0):+.1f}]",
        )
    return table


def _untrained(config: RunConfig) -> CoSupervisionModel:
    torch.manual_seed(config.training.seed)
    return CoSupervisionModel.from_pretrained(config.model, config.text, config.nsp)


def _scored(
    folder: Path,
    make_model: Callable[[], CoSupervisionModel],
    questions: Sequence[Example],
    pool: Sequence[Passage],
    config: RunConfig,
    console: Console,
) -> tuple[Report, Ranks]:
    """The report in `folder` and the rank of each question's passage, made now unless they are there."""
    ranked = folder.with_suffix(".ranks.json")
    if (folder / "report.json").is_file() and ranked.is_file():
        report, ranks = Report.load(folder), json.loads(ranked.read_text())
    else:
        model = make_model()
        index = SequenceIndex.build(model, pool)
        ranks = {e.id: r for e, r in zip(questions, retrieval_ranks(model, questions, index), strict=True)}
        system = System("co-supervised", model, IndexRetriever(model, index))
        report = evaluate(system, questions[:ANSWERED], config.generation, folder=folder)
        with replace_file(ranked) as file:
            json.dump(ranks, file)
    recall = sum(rank == 0 for rank in ranks.values()) / len(ranks)
    console.print(f"R@1 {recall:.1%}, answer in the output {report.overall['containment'].mean:.1%}", highlight=False)
    return report, ranks


def _telling(report: Report) -> list[QuestionRecord]:
    """Three answers to look at: the first with the right passage and answer, and the next ones as they come."""
    right = [r for r in report.questions if r.scores.get("containment") == 1 and r.scores.get("recall@1") == 1]
    rest = [r for r in report.questions if r not in right[:2]]
    return [*right[:2], *rest][:3]
