"""The whole mission in a few minutes without a GPU: train, index, retrieve, generate, beside honest baselines.

The same trained Gen answers the same held-out questions closed-book, with random passages, with those of a pretrained
retriever, with the gold ones, and with its own. Last, adapters that were trained for longer answer some of them.
Everything lands in one folder; run again, the demo resumes there.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from cosup_fast.cli.answers import print_answer
from cosup_fast.config import RunConfig, load_config
from cosup_fast.data.prepared.prepare import prepare
from cosup_fast.data.records import Example, Passage, write_jsonl
from cosup_fast.data.sources import load_corpus, load_examples
from cosup_fast.evaluation import Corpus, QuestionRecord, Report, Workbench, evaluate, paired_gain
from cosup_fast.evaluation.retrievers import Retriever
from cosup_fast.evaluation.scoring import rank_scores
from cosup_fast.files import read_checked, write_checked
from cosup_fast.generation import Answer, Generator
from cosup_fast.index import SequenceIndex
from cosup_fast.model import CoSupervisionModel
from cosup_fast.terminal import FigureTable
from cosup_fast.training.checkpoint import chosen_checkpoint
from cosup_fast.training.initial import new_model
from cosup_fast.training.run import run_training

QUESTIONS, ANSWERED, POOL = 400, 128, 800
WRITTEN = {"questions": 646, "spans": 400, "chains": 400}
"""Training examples with their output, by prepared set."""
PAIRS = {"questions": 1292, "spans": 1500, "cloze": 1500}
"""Those that are only asked for their passage; more than a set has are asked twice."""
OURS, CLOSED_BOOK = "co-supervised", "closed-book"
SYSTEMS = {
    CLOSED_BOOK: "no passage",
    "random": "random passages",
    "dense:minilm": "passages of MiniLM",
    "gold": "gold passages",
    OURS: "its own passages",
}
"""What the trained Gen is given, by the name of the system."""
LONGER = "cosup-smollm2"
"""A prepared checkpoint of the same two models."""

Values = Mapping[str, float]
"""A metric by question."""


def run_demo(output: Path, console: Console, overrides: Sequence[str] = ()) -> None:
    """Runs the demo into `output` and prints the table of the systems and three answers."""
    started = time.monotonic()
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file: name a folder")
    train = output / "train.jsonl"
    with resources.as_file(resources.files("cosup_fast.cli") / "demo.yaml") as path:
        places = {"data.train": [str(train)], "output": str(output / "run")}
        config = load_config(path, [f"{name}={json.dumps(place)}" for name, place in places.items()] + [*overrides])

    console.rule("1/5  real weights, real text")
    for name in ("smollm2-135m", "minilm", "wiki-leads", "questions", "spans", "cloze", "chains", LONGER):
        console.print(f"{name}: {prepare(name)}", soft_wrap=True, highlight=False, markup=False)
    if not train.exists():
        train.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(train, training_examples())
    questions, corpus = held_out_questions(config)
    console.print(
        f"{len(questions)} held-out questions; {len(corpus)} passages to search, the gold ones never trained on"
    )

    console.rule("2/5  co-supervised training")
    before = _ranked(output, "before training", lambda: Workbench(new_model(config).eval()), OURS, questions, corpus)
    if not (output / "evaluation").is_dir():  # else its minutes are over, and answers of this checkpoint were begun
        run_training(config, resume=True, console=console)
    checkpoint = chosen_checkpoint(Path(config.output))

    console.rule("3/5  the same Gen with other passages")
    bench = _bench(checkpoint, config)
    reports, recalls = {}, {"before training": before}
    for name in SYSTEMS:
        if name in ("dense:minilm", OURS):
            recalls[name] = _ranked(output, name, lambda: bench, name, questions, corpus)
        reports[name] = evaluate(
            bench.system(name, corpus),
            questions[:ANSWERED],
            config.generation,
            folder=output / "evaluation" / name.replace(":", "-"),
        )
    console.print(comparison(reports, recalls, corpus))
    console.print(gains(reports), highlight=False, markup=False, soft_wrap=True)

    console.rule("4/5  what it writes")
    shown = _telling(reports[OURS])
    for record in shown:
        _print(console, record.example, record.answer)
    _show_two_retrievals(console, bench, config, corpus)
    # Of the weights as they are saved, with which it is going to be opened.
    index = Workbench(CoSupervisionModel.load(checkpoint).eval()).index("", corpus)
    assert isinstance(index, SequenceIndex)  # the bench made it
    index.save(Path(config.output) / "index")

    console.rule("5/5  trained for longer")
    longer = _bench(Path(LONGER), config)
    recall = _percent(_ranked(output, LONGER, lambda: longer, OURS, questions, corpus))
    console.print(
        f"{LONGER}, the same models with more steps: R@1 {recall[0]}, R@5 {recall[1]} of the same {len(questions)} "
        "questions",
        soft_wrap=True,
        highlight=False,
    )
    answers = Generator(longer.model, longer.index("", corpus), config.generation)
    for record in shown:
        _print(console, record.example, answers.generate(record.example.question, record.example.instruction))
    _show_two_retrievals(console, longer, config, corpus)
    console.print(
        f"ask it about all of the leads: cosup-fast index build {LONGER} && cosup-fast serve {LONGER}",
        soft_wrap=True,
        highlight=False,
    )

    console.print(
        f"curves: {config.output}/curves.png   everything: {output}   ask it: cosup-fast serve {config.output}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    console.print(f"done in {(time.monotonic() - started) / 60:.1f} minutes")


def training_examples() -> list[Example]:
    """What the minutes of the demo are spent on: few examples with their output, many pairs of question and passage.

    A pair trains retrieval alone: Gen reads the question and no passage, and both models half as many tokens. To read
    and to copy is learned from some hundred examples, to find takes thousands.
    """
    draw = random.Random(0)
    passages = {passage.id for passage in load_corpus("wiki-leads")}
    sets = {name: load_examples(f"{name}/train", passages) for name in ("questions", "spans", "cloze", "chains")}
    examples = [example for name, count in WRITTEN.items() for example in draw.sample(sets[name], count)]
    for name, count in PAIRS.items():
        examples += [
            example.model_copy(update={"id": f"{example.id}-pair-{n}", "output": []})
            for n, example in enumerate(draw.sample(sets[name] * 2, count))
        ]
    return examples


def held_out_questions(config: RunConfig) -> tuple[list[Example], Corpus]:
    """Real questions of both test splits that have an answer to check, and a pool that holds their passages."""
    draw = random.Random(config.training.seed)
    corpus = load_corpus(config.data.corpus)
    known = {passage.id for passage in corpus}
    examples = [e for split in ("questions/test-in", "questions/test-out") for e in load_examples(split, known)]
    examples = draw.sample([e for e in examples if e.answers], QUESTIONS)
    gold = {passage for example in examples for passage in example.gold}
    others = draw.sample([passage for passage in corpus if passage.id not in gold], POOL - len(gold))
    return examples, Corpus([passage for passage in corpus if passage.id in gold] + others, "pool")


def comparison(
    reports: Mapping[str, Report], recalls: Mapping[str, Mapping[str, Values]], corpus: Corpus
) -> FigureTable:
    """Recall, correctness and grounding of each system, in percent.

    Recall is that of all questions, the rest of those that were answered. What is grounded rests on the passage that
    was given, right or wrong: beside random passages it says how readily Gen copies.
    """
    count = len(next(iter(reports.values())).questions)
    asked = len(next(iter(recalls.values()))["recall@1"])
    columns = ("Gen writes with", f"R@1 of {asked}", "R@5", f"correct of {count}", "not a title", "grounded")
    table = FigureTable(*columns, title="on held-out questions, percent")
    table.add_row("(chance)", *(f"{100 * k / len(corpus):.1f}" for k in (1, 5)), "", "", "")
    table.add_row("(before training)", *_percent(recalls["before training"]), "", "", "")
    for name, title in SYSTEMS.items():
        report = reports[name]
        correct = report.values("correctness")
        grounded = report.values("grounded") if name != CLOSED_BOOK else {}
        table.add_row(
            title,
            *(_percent(recalls[name]) if name in recalls else ("", "")),
            _mean(correct),
            _mean(_apart_from_titles(report, correct)),
            _mean(grounded),
        )
    return table


def gains(reports: Mapping[str, Report]) -> str:
    """What its own passages add to an answer, paired question by question."""
    values = {name: report.values("correctness") for name, report in reports.items()}
    lines = []
    for name in (CLOSED_BOOK, "random", "dense:minilm"):
        gain = paired_gain(values[name], values[OURS])
        interval = f"[{100 * (gain.low or 0):+.1f}, {100 * (gain.high or 0):+.1f}]"
        lines.append(f"correct, {SYSTEMS[OURS]} - {SYSTEMS[name]}: {100 * gain.mean:+.1f}, 95% interval {interval}")
    return "\n".join(lines)


def _apart_from_titles(report: Report, values: Values) -> Values:
    """Of the questions whose answer is not the title of their passage, which copying the title cannot answer."""
    return {r.key: values[r.key] for r in report.questions if r.key in values and r.titles.answer_is_gold is False}


def _mean(values: Values) -> str:
    return f"{100 * fmean(values.values()):.1f}" if values else ""


def _percent(recalls: Mapping[str, Values]) -> tuple[str, str]:
    return _mean(recalls["recall@1"]), _mean(recalls["recall@5"])


def _ranked(
    output: Path, title: str, bench: Any, name: str, questions: Sequence[Example], corpus: Corpus
) -> dict[str, Values]:
    """Recall at 1 and 5 of every question, made now unless it is kept in `output`."""
    path = output / "ranks" / f"{title.replace(':', '-').replace(' ', '-')}.json"
    if path.is_file():
        try:
            return read_checked(path, ["recall@1", "recall@5"])
        except ValueError as error:
            raise ValueError(f"{error}: remove it, and it is made again") from None
    retriever: Retriever = bench().system(name, corpus).retriever_of(corpus.name)
    lists = retriever.rank(questions, 5)
    assert lists is not None
    ranked = rank_scores(questions, lists)
    found: dict[str, Values] = {
        metric: {e.id: fmean(one.scores[metric] for one in row) for e, row in zip(questions, ranked, strict=True)}
        for metric in ("recall@1", "recall@5")
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checked(path, json.dumps(found))
    return found


def _bench(checkpoint: Path, config: RunConfig) -> Workbench:
    """The models of a checkpoint, in bf16 where training multiplied in it: that is twice as fast."""
    model = CoSupervisionModel.load(checkpoint).eval()
    return Workbench(model.to(torch.bfloat16) if config.training.precision == "bfloat16" else model)


def _print(console: Console, example: Example, answer: Answer) -> None:
    print_answer(console, example.question, answer)
    console.print(f"  [dim]expected[/] {escape(' / '.join(example.answers[:3]))}", highlight=False)


def _telling(report: Report) -> list[QuestionRecord]:
    """Two answers to look at: one with the right passage and an answer that is not its title, one that is wrong."""
    right = [r for r in report.questions if r.scores.get("correctness") == 1 and r.scores.get("recall@1") == 1]
    read = [r for r in right if r.titles.answer_is_gold is False] or right
    wrong = [r for r in report.questions if r.scores.get("correctness") == 0]
    return [*read[:1], *wrong[:1]] or list(report.questions[:2])


def _show_two_retrievals(console: Console, bench: Workbench, config: RunConfig, corpus: Corpus) -> None:
    """A question of two parts about passages of the pool, none of them trained on."""
    first, second = _pair(corpus.passages, config.training.seed)
    writing = config.generation.model_copy(update={"max_retrievals": 2, "max_new_tokens": 96, "ret_first": False})
    index = bench.index("", corpus)
    question = f"Compare {first.title} and {second.title}."
    print_answer(console, question, Generator(bench.model, index, writing).generate(question))


def _pair(passages: Sequence[Passage], seed: int) -> tuple[Passage, Passage]:
    first, second = random.Random(seed).sample([p for p in passages[: POOL // 4] if "(" not in p.title], 2)
    return first, second
