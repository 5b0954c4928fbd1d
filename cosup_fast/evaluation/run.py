"""One evaluation: rank, answer, judge and score, each question kept on disk as soon as it is done.

1. Every question's gold passages are ranked (teacher-forced), which takes one pass over the questions.
2. The system answers; answers go to `answers.jsonl` one by one, and a rerun goes on behind them.
3. The judge reads the grounded segments, the fluency model the texts (`verdicts.jsonl`, `fluency.jsonl`).
4. Everything is scored and summed up in a `Report`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cosup_fast.data.records import Example, Passage
from cosup_fast.evaluation.fluency import FluencyModel
from cosup_fast.evaluation.inputs import TestSet
from cosup_fast.evaluation.journal import Journal
from cosup_fast.evaluation.judge import Judge, LexicalJudge, Verdict
from cosup_fast.evaluation.metrics import answer_patterns, require
from cosup_fast.evaluation.report import QuestionRecord, Report
from cosup_fast.evaluation.scoring import DEPTH, Ranked, rank_scores, score
from cosup_fast.evaluation.suites import check_metrics, suite_of
from cosup_fast.evaluation.systems import GoldRetriever, System
from cosup_fast.generation import Answer, GenerationConfig
from cosup_fast.terminal import SafeConsole

ANSWERS, VERDICTS, FLUENCY = "answers.jsonl", "verdicts.jsonl", "fluency.jsonl"
AT_ONCE = 16  # questions that a judge or a fluency model is given at a time

T = TypeVar("T")
LEXICAL = LexicalJudge()


def evaluate(
    system: System,
    tests: Sequence[TestSet] | Sequence[Example],
    config: GenerationConfig | None = None,
    *,
    judge: Judge | None = LEXICAL,
    fluency: FluencyModel | None = None,
    metrics: Collection[str] = (),
    folder: str | Path | None = None,
    batch: int = 16,
    progress: bool = True,
) -> Report:
    """Answers every question and scores retrieval, correctness, grounding and fluency.

    Args:
        system: what is evaluated.
        tests: test sets, or plain examples; (data set, id) is unique among all of them.
        config: how to write.
        judge: of grounding; None leaves it out.
        fluency: the model that perplexity is measured with; None leaves it out.
        metrics: metrics of correctness to report besides those of each data set's suite.
        folder: where finished work is kept and the report written; a rerun with the same settings goes on there.
        batch: questions answered at once.
        progress: show progress bars on stderr.

    Raises:
        ValueError: no example, one twice, a prompt longer than Gen's positions, an answer pattern that does not
            compile, an unknown metric, a folder that holds work of other settings, or what the system refuses.
        ImportError: a package of the `eval` extra is not installed.
    """
    for module, package in (("scipy.stats", "scipy"), ("ir_measures", "ir-measures"), ("rouge_score", "rouge-score")):
        require(module, package)  # what is missing should not be found out after an hour of generation
    check_metrics(metrics)
    config = config or GenerationConfig()
    plain = TestSet("examples", [test for test in tests if isinstance(test, Example)])
    sets = [plain, *(test for test in tests if isinstance(test, TestSet))]
    questions = [(test, example) for test in sets for example in test.examples]
    examples = [example for _, example in questions]
    _check(system, examples)
    keys = [_key(example) for example in examples]
    groups: dict[tuple[str, str], list[Example]] = {}
    for test, example in questions:
        groups.setdefault((example.dataset, test.domain_of(example)), []).append(example)
    suites = {group: suite_of(group[0], members, metrics) for group, members in groups.items()}

    ranked = _ranked(system, examples, progress)
    path = Path(folder) if folder is not None else None
    identity = system.settings(config)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    columns = (*columns, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=SafeConsole(stderr=True), disable=not progress) as bar:
        answers = _answers(system, examples, keys, config, path and path / ANSWERS, identity, batch, bar)
        evidence = [_evidence(system, answer) for answer in answers]
        verdicts = _judged(judge, answers, evidence, keys, path and path / VERDICTS, bar)
        nats = _fluent(fluency, answers, keys, path and path / FLUENCY, bar)
    records = [
        QuestionRecord(
            key=key,
            domain=test.domain_of(example),
            example=example,
            ranks=tuple(entry.rank for entry in ranks),
            answer=answer,
            evidence=passages,
            verdicts=tuple(judged),
            scores=score(
                example,
                answer,
                suites[example.dataset, test.domain_of(example)],
                {} if system.retriever is None else system.passages,
                ranks,
                judged,
                nats_per_token,
            ),
        )
        for (test, example), key, ranks, answer, passages, judged, nats_per_token in zip(
            questions, keys, ranked, answers, evidence, verdicts, nats, strict=True
        )
    ]
    settings = {
        "system": system.name,
        "sources": system.sources,
        **{name: value for name, value in identity.items() if name != "system"},
        "judge": judge.name if judge else None,
        "fluency": fluency.name if fluency else None,
        "tests": [{"source": t.source, "domain": t.domain, "questions": len(t.examples)} for t in sets if t.examples],
        "versions": _versions(),
    }
    report = Report.of(settings, records, suites)
    if path is not None:
        report.save(path)
    return report


def _check(system: System, examples: Sequence[Example]) -> None:
    """Everything that would stop the work half-way and can be known before."""
    if not examples:
        raise ValueError("evaluation needs at least one example, got none")
    template = system.model.template
    seen: set[str] = set()
    for example in examples:
        if (key := _key(example)) in seen:
            raise ValueError(f"example {key!r} stands more than once: ids must be unique in a data set")
        seen.add(key)
        answer_patterns(example)
        length = len(template.prompt(example.question, example.instruction))
        if length >= template.max_length:
            raise ValueError(
                f"example {key!r}: its prompt has {length} tokens, which leaves no room among the "
                f"{template.max_length} positions of Gen: shorten the question or the instruction, or leave it out"
            )
    if isinstance(system.retriever, GoldRetriever):
        system.retriever.check(examples)


def _key(example: Example) -> str:
    return f"{example.dataset}/{example.id}" if example.dataset else example.id


def _ranked(system: System, examples: Sequence[Example], progress: bool) -> list[tuple[Ranked, ...]]:
    lists = None if system.retriever is None else system.retriever.rank(examples, DEPTH, progress=progress)
    return [() for _ in examples] if lists is None else rank_scores(examples, lists)


def _answers(
    system: System,
    examples: Sequence[Example],
    keys: Sequence[str],
    config: GenerationConfig,
    path: Path | None,
    identity: dict[str, Any],
    batch: int,
    bar: Progress,
) -> list[Answer]:
    # A question is known by its text too: an id may stand for another one in another file.
    names = [f"{key} {_digest(example)}" for key, example in zip(keys, examples, strict=True)]
    with Journal(path, identity) as journal:
        open_ = [i for i, name in enumerate(names) if name not in journal.done]
        task = bar.add_task("Answering", total=len(names), completed=len(names) - len(open_))

        def keep(row: int, answer: Answer) -> None:
            journal.add(names[open_[row]], answer.model_dump(mode="json"))
            bar.advance(task)

        system.answer([examples[i] for i in open_], config, keep, batch=batch)
        return [Answer.model_validate(journal.done[name]) for name in names]


def _judged(
    judge: Judge | None,
    answers: Sequence[Answer],
    evidence: Sequence[dict[str, Passage]],
    keys: Sequence[str],
    path: Path | None,
    bar: Progress,
) -> list[list[Verdict]]:
    if judge is None:
        return [[] for _ in answers]
    claims = [
        [(passages[s.passage], s.text) for s in answer.segments if s.passage is not None]
        for answer, passages in zip(answers, evidence, strict=True)
    ]
    silent = Verdict(entailed=False, score=0.0, why="nothing is said")

    def judged(rows: Sequence[int]) -> Iterator[list[dict[str, Any]]]:
        spoken = [pair for i in rows for pair in claims[i] if pair[1].strip()]
        found = iter(judge.judge(spoken) if spoken else [])
        for i in rows:
            yield [(next(found) if text.strip() else silent).model_dump() for _, text in claims[i]]

    names = [f"{key} {_digest([[p.model_dump(), text] for p, text in c])}" for key, c in zip(keys, claims, strict=True)]
    done = _in_chunks("Judging", names, judged, path, {"judge": judge.name}, bar)
    return [[Verdict.model_validate(verdict) for verdict in verdicts] for verdicts in done]


def _fluent(
    model: FluencyModel | None, answers: Sequence[Answer], keys: Sequence[str], path: Path | None, bar: Progress
) -> list[float | None]:
    if model is None:
        return [None for _ in answers]
    texts = [" ".join(segment.text.strip() for segment in answer.segments) for answer in answers]
    names = [f"{key} {_digest(text)}" for key, text in zip(keys, texts, strict=True)]
    return _in_chunks(
        "Fluency", names, lambda rows: iter(model.nats_per_token([texts[i] for i in rows])), path,
        {"model": model.name}, bar,
    )  # fmt: skip


def _in_chunks(
    title: str,
    names: Sequence[str],
    work: Callable[[Sequence[int]], Iterator[T]],
    path: Path | None,
    settings: dict[str, Any],
    bar: Progress,
) -> list[T]:
    """The work on each row, from the journal where it is done already."""
    with Journal(path, settings, restart=True) as journal:
        open_ = [i for i, name in enumerate(names) if name not in journal.done]
        task = bar.add_task(title, total=len(names), completed=len(names) - len(open_))
        for start in range(0, len(open_), AT_ONCE):
            rows = open_[start : start + AT_ONCE]
            for i, value in zip(rows, work(rows), strict=True):
                journal.add(names[i], value)
                bar.advance(task)
        return [journal.done[name] for name in names]


def _evidence(system: System, answer: Answer) -> dict[str, Passage]:
    given = dict.fromkeys(found.best.passage for found in answer.retrievals)
    return {name: system.passages[name] for name in given}


def _digest(value: Example | Any) -> str:
    """A short name for a question's text, or for any JSON value."""
    if isinstance(value, Example):
        value = [value.question, value.instruction, value.gold]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _versions() -> dict[str, str]:
    import torch
    import transformers

    from cosup_fast import __version__

    return {"cosup-fast": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
