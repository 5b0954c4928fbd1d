"""One cell of a study: train, evaluate as every system, look closer. Each part resumes after a kill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console

from cosup_fast.config import RunConfig
from cosup_fast.data.records import Example
from cosup_fast.environment import choose_device
from cosup_fast.evaluation import (
    Corpus,
    Judge,
    QuestionRecord,
    Report,
    System,
    TestSet,
    Workbench,
    evaluate,
    load_judge,
)
from cosup_fast.evaluation.progress import OnProgress
from cosup_fast.evaluation.scoring import DEPTH, chances, rank_scores, titles
from cosup_fast.generation import Answer
from cosup_fast.study.attention import attention_by_layer
from cosup_fast.study.config import RANKS, Cell
from cosup_fast.study.handed import HANDED, followed
from cosup_fast.study.progress import Progress
from cosup_fast.study.provenance import machine, versions
from cosup_fast.study.random_weights import random_weights
from cosup_fast.study.result import CellResult, SetFacts, SetScores, curves, pack
from cosup_fast.study.spaces import SPACES_FILE, SpaceLog
from cosup_fast.training.callbacks import Callback
from cosup_fast.training.checkpoint import chosen_checkpoint, verify
from cosup_fast.training.initial import new_model
from cosup_fast.training.log import read_metrics
from cosup_fast.training.metrics import Metrics, StepMetrics
from cosup_fast.training.run import run_training

if TYPE_CHECKING:
    from cosup_fast.model import CoSupervisionModel

KEPT = ("recall@1", "recall@5", "recall@20", "retrieval", "correctness", "grounded")
"""The metrics that a result keeps of every question."""


@dataclass(frozen=True)
class Questions:
    """The test sets of a study, which every cell is asked."""

    tests: Sequence[TestSet]
    corpora: Sequence[Corpus]

    def corpus_of(self, test: TestSet) -> Corpus:
        """What the questions of a set search."""
        return next(corpus for corpus in self.corpora if corpus.name == test.corpus)


def make_cell(cell: Cell, questions: Questions, progress: Progress, console: Console) -> CellResult:
    """Does what is left of a cell; the caller holds the lock of its work and writes what is returned."""
    made: dict[str, Any] = {"systems": {}, "probes": {}}
    if cell.trains:
        train(cell, progress, console)
    if cell.trial is None:
        made = _looked_at(cell, questions, progress, console)
    records = read_metrics(cell.work / "run" / "metrics.jsonl") if cell.trains else []
    records += read_metrics(cell.work / SPACES_FILE)
    return CellResult(
        name=cell.name,
        condition=cell.condition,
        seed=cell.seed,
        trial=cell.trial,
        identity=cell.identity,
        changed=cell.settings.tune[cell.trial] if cell.trial is not None else {},
        commits=progress.commits,
        versions=versions(),
        machine=machine(str(choose_device((cell.parts[0] if cell.parts else cell).run.training.device))),
        seconds={name: round(seconds, 1) for name, seconds in progress.seconds.items()},
        steps=max((record["step"] for record in records if record["kind"] == "step"), default=0),
        curves=curves(records),
        sets={} if cell.trial is not None else {test.source: _facts(test, questions) for test in questions.tests},
        **made,
    )


def train(cell: Cell, progress: Progress, console: Console) -> Path:
    """The run of a cell, resumed or left as it is when it has ended; returns the checkpoint that is evaluated."""
    output = Path(cell.run.output)
    if cell.settings.random_embseq:
        name, folder = cell.random_embseq
        random_weights(name, folder, layers=cell.run.model.embseq_layers)
    callbacks: list[Callback] = [_Steps(progress)]
    if "spaces" in cell.settings.probes:
        callbacks.append(SpaceLog(cell.work / SPACES_FILE, cell.run))
    with progress.stage("training"):
        run_training(cell.run, resume=True, console=console, callbacks=callbacks)
    return chosen_checkpoint(output)


def _looked_at(cell: Cell, questions: Questions, progress: Progress, console: Console) -> dict[str, Any]:
    """What the cell's systems and probes say of its model."""
    bench = _bench(cell)
    judge = load_judge(cell.study.evaluation.judge, device=bench.model.device)
    systems = {}
    for name in ("pair",) if cell.parts else cell.settings.systems:
        console.print(f"{cell.name}: {name}", markup=False)
        with progress.stage(name):
            systems[name] = _system(name, cell, bench, questions, judge, _of_stages(progress))
    probes = {}
    if "attention" in cell.settings.probes:
        console.print(f"{cell.name}: attention", markup=False)
        with progress.stage("attention"):
            corpora = {corpus.name: corpus for corpus in questions.corpora}
            probes["attention"] = attention_by_layer(bench.model, questions.tests, corpora)
    return {"systems": systems, "probes": probes}


def _system(
    name: str, cell: Cell, bench: Workbench, questions: Questions, judge: Judge | None, show: OnProgress
) -> dict[str, SetScores]:
    """What the cell's model gets as one system, by set."""
    if name == RANKS:
        return _ranked(bench.system("co-supervised", questions.corpora), questions)
    config = (cell.parts[0] if cell.parts else cell).run.generation
    folder, batch = cell.work / "evaluation" / name.replace(":", "-"), cell.study.evaluation.batch
    if name in HANDED:
        corpora = {corpus.name: corpus for corpus in questions.corpora}
        found = followed(name, bench, questions.tests, corpora, config, folder=folder, batch=batch, progress=show)
        return {
            test.source: _of_questions(test, found[test.source]) for test in questions.tests if test.source in found
        }
    system = bench.system("pair:retriever" if name == "pair" else name, questions.corpora)
    report = evaluate(system, questions.tests, config, judge=judge, folder=folder, batch=batch, progress=show)
    return _scores(report, questions)


def _bench(cell: Cell) -> Workbench:
    """The cell's model, ready to write; for a pair the writer's, with the retriever's beside it."""
    if not cell.parts:
        return Workbench(_model(cell), seed=cell.seed, progress=False)
    writer, retriever = cell.parts
    bench = Workbench(_model(writer), seed=cell.seed, progress=False)
    bench.add_searcher("retriever", _model(retriever))
    return bench


def _model(cell: Cell) -> CoSupervisionModel:
    from cosup_fast.model import CoSupervisionModel

    run = cell.run
    device = choose_device(run.training.device)
    if cell.settings.train:
        checkpoint = chosen_checkpoint(Path(run.output))
        verify(checkpoint)
        model = CoSupervisionModel.load(checkpoint, device=device, attention=run.model.attention)
    else:
        model = new_model(run, device)
    return model.to(getattr(torch, cell.study.evaluation.dtype)).eval()


def _ranked(system: System, questions: Questions) -> dict[str, SetScores]:
    """Teacher-forced ranks alone."""
    found = {}
    for test in questions.tests:
        retriever = system.retriever_of(test.corpus)
        assert retriever is not None
        lists = retriever.rank(test.examples, DEPTH)
        assert lists is not None
        ranked = rank_scores(test.examples, lists)
        keys = [_key(example) for example in test.examples]
        columns = {
            name: {
                key: float(np.mean([one.scores[name] for one in row]))
                for key, row in zip(keys, ranked, strict=True)
                if row
            }
            for name in KEPT
            if name.startswith("recall@")
        }
        found[test.source] = _of_questions(test, columns)
    return found


def _of_questions(test: TestSet, columns: Mapping[str, Mapping[str, float]]) -> SetScores:
    """Metrics by question, none of which stands for retrieval or correctness."""
    keys = [_key(example) for example in test.examples]
    scores = {name: pack([column.get(key) for key in keys]) for name, column in columns.items()}
    return SetScores(retrieval="", correctness="", answer_is_retrieved_title=pack([None] * len(keys)), scores=scores)


def _scores(report: Report, questions: Questions) -> dict[str, SetScores]:
    """A report's questions, set by set, in the order in which they were asked."""
    suites = {(part.dataset, part.domain): part for part in report.datasets}
    records = iter(report.questions)
    found = {}
    for test in questions.tests:
        rows = [next(records) for _ in test.examples]
        of_set = [suites[row.example.dataset, row.domain] for row in rows]
        found[test.source] = SetScores(
            retrieval="/".join(dict.fromkeys(suite.retrieval for suite in of_set)),
            correctness="/".join(dict.fromkeys(suite.correctness for suite in of_set)),
            answer_is_retrieved_title=pack([_flag(row.titles.answer_is_retrieved) for row in rows]),
            scores={name: column for name in KEPT if (column := _column(rows, name)) is not None},
        )
    return found


def _column(rows: Sequence[QuestionRecord], metric: str) -> Any:
    values = [row.scores.get(metric) for row in rows]
    return None if all(value is None for value in values) else pack(values)


def _facts(test: TestSet, questions: Questions) -> SetFacts:
    corpus = questions.corpus_of(test)
    nothing = Answer.model_construct(text="", segments=(), retrievals=())
    chance = [chances(example, corpus) for example in test.examples]
    names = dict.fromkeys(name for one in chance for name in one)
    return SetFacts(
        domain=str(test.domain),
        corpus=corpus.name,
        passages=len(corpus),
        ids=[_key(example) for example in test.examples],
        answer_is_title=pack([_flag(titles(e, nothing, corpus).answer_is_gold) for e in test.examples]),
        chance={name: float(np.mean([one[name] for one in chance if name in one])) for name in names},
    )


def _key(example: Example) -> str:
    return f"{example.dataset}/{example.id}" if example.dataset else example.id


def _flag(value: bool | None) -> float | None:
    return None if value is None else float(value)


def _of_stages(progress: Progress) -> OnProgress:
    """The evaluation's stages as one: answering, which takes nearly all of the time, is what is counted."""

    def on_progress(stage: str, done: int, total: int) -> None:
        if stage == "Answering":
            progress(done, total)

    return on_progress


class _Steps(Callback):
    """Tells a cell's progress how many steps its run has taken."""

    def __init__(self, progress: Progress):
        self._progress, self._total = progress, 0

    def start(self, config: RunConfig, step: int, total: int) -> None:
        self._total = total
        self._progress(step, total)

    def metrics(self, metrics: Metrics) -> None:
        if isinstance(metrics, StepMetrics):
            self._progress(metrics.step, self._total)
