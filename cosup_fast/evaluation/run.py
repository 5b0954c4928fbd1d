"""One evaluation: answer, rank, judge and score, each question kept on disk as soon as it is done.

1. The system answers; answers go to `answers.jsonl` one by one, and a rerun resumes after the last of them.
2. Every question's gold passages are ranked, teacher-forced.
3. The judge reads the grounded segments, the fluency model the texts (`verdicts.jsonl`, `fluency.jsonl`).
4. Everything is scored and summed up in a `Report`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cosup_fast.data.answers import answer_patterns
from cosup_fast.data.records import Example, Passage
from cosup_fast.evaluation.fluency import FluencyModel
from cosup_fast.evaluation.html import write_html
from cosup_fast.evaluation.inputs import TestSet
from cosup_fast.evaluation.judge import Judge, LexicalJudge, Verdict
from cosup_fast.evaluation.metrics import require
from cosup_fast.evaluation.progress import OnProgress, bars, silent
from cosup_fast.evaluation.report import QuestionRecord, Report
from cosup_fast.evaluation.retrievers import GoldRetriever, Retriever
from cosup_fast.evaluation.scoring import DEPTH, Ranked, chances, rank_scores, score, titles
from cosup_fast.evaluation.suites import check_metrics, suite_of
from cosup_fast.evaluation.systems import System
from cosup_fast.files import Journal
from cosup_fast.generation import Answer, GenerationConfig

ANSWERS, VERDICTS, FLUENCY = "answers.jsonl", "verdicts.jsonl", "fluency.jsonl"
AT_ONCE = 16  # questions that a judge or a fluency model is given at a time
RANKED_AT_ONCE = 256

T = TypeVar("T")
LEXICAL = LexicalJudge()


@dataclass(frozen=True)
class Question:
    """A question of the evaluation: its test set, and what the system searches for it."""

    example: Example
    test: TestSet
    retriever: Retriever | None

    @property
    def key(self) -> str:
        """Unique in the evaluation."""
        return f"{self.example.dataset}/{self.example.id}" if self.example.dataset else self.example.id

    @property
    def domain(self) -> str:
        return self.test.domain_of(self.example)

    @property
    def group(self) -> tuple[str, str]:
        """The data set and the domain that it is counted in."""
        return self.example.dataset, self.domain


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
    progress: bool | OnProgress = True,
) -> Report:
    """Answers every question and scores retrieval, correctness, grounding and fluency.

    Args:
        system: what is evaluated.
        tests: test sets, or plain examples; (data set, id) is unique among all of them.
        config: how to write.
        judge: of grounding; None leaves it out.
        fluency: the model that perplexity is measured with; None leaves it out.
        metrics: metrics of correctness to report besides those of each data set's suite.
        folder: where finished work is kept and the report written; a rerun with the same settings resumes there.
        batch: questions answered at once.
        progress: show progress bars on stderr, or call this with each stage's name, questions done and questions.

    Raises:
        ValueError: no example, one twice, a prompt longer than Gen's positions, an answer pattern that does not
            compile, an unknown metric, a folder that holds work of other settings, or what the system refuses.
        ImportError: a package of the `eval` extra is not installed.
    """
    for module, package in (("scipy.stats", "scipy"), ("ir_measures", "ir-measures"), ("rouge_score", "rouge-score")):
        require(module, package)  # what is missing should not be found out after an hour of generation
    check_metrics(metrics)
    config = config or GenerationConfig()
    sets = _test_sets(tests)
    questions = [
        Question(example, test, system.retriever_of(test.corpus)) for test in sets for example in test.examples
    ]
    _check(system, questions)
    groups: dict[tuple[str, str], list[Example]] = {}
    for question in questions:
        groups.setdefault(question.group, []).append(question.example)
    suites = {group: suite_of(group[0], members, metrics) for group, members in groups.items()}

    path = Path(folder) if folder is not None else None
    identity = system.settings(config)
    with ExitStack() as stack:
        show = progress if callable(progress) else stack.enter_context(bars()) if progress else silent
        answers = _answers(system, questions, config, path and path / ANSWERS, identity, batch, show)
        ranked = _ranked(questions, show)
        evidence = [_evidence(question, answer) for question, answer in zip(questions, answers, strict=True)]
        verdicts = _judged(judge, questions, answers, evidence, path and path / VERDICTS, show)
        nats = _fluent(fluency, questions, answers, path and path / FLUENCY, show)
    records = []
    for question, ranks, answer, passages, judged, nats_per_token in zip(
        questions, ranked, answers, evidence, verdicts, nats, strict=True
    ):
        example, corpus = question.example, system.corpus_of(question.test.corpus)
        facts = titles(example, answer, corpus)
        searched = {} if question.retriever is None else question.retriever.corpus.by_id
        records.append(
            QuestionRecord(
                key=question.key,
                domain=question.domain,
                corpus=corpus.name if corpus else "",
                example=example,
                ranks=tuple(entry.rank for entry in ranks),
                chance=chances(example, corpus) if ranks else {},
                titles=facts,
                answer=answer,
                evidence=passages,
                verdicts=tuple(judged),
                scores=score(example, answer, suites[question.group], searched, ranks, judged, nats_per_token, facts),
            )
        )
    settings = {
        "system": system.name,
        "sources": system.sources,
        **{name: value for name, value in identity.items() if name != "system"},
        "judge": judge.name if judge else None,
        "fluency": fluency.name if fluency else None,
        "tests": [_described(system, test) for test in sets],
        "versions": _versions(),
    }
    report = Report.of(settings, records, suites)
    if path is not None:
        report.save(path)
        write_html(report, path)
    return report


def _test_sets(tests: Sequence[TestSet] | Sequence[Example]) -> list[TestSet]:
    plain = TestSet("examples", [test for test in tests if isinstance(test, Example)])
    return [test for test in (plain, *(t for t in tests if isinstance(t, TestSet))) if test.examples]


def _described(system: System, test: TestSet) -> dict[str, Any]:
    corpus = system.corpus_of(test.corpus)
    about = {"source": test.source, "domain": test.domain, "questions": len(test.examples)}
    return about | ({} if corpus is None else {"searched": {"name": corpus.name, **corpus.identity}})


def _check(system: System, questions: Sequence[Question]) -> None:
    """Everything that would stop the work half-way and can be known before."""
    if not questions:
        raise ValueError("evaluation needs at least one example, got none")
    template = system.model.template
    seen: set[str] = set()
    for question in questions:
        example, key = question.example, question.key
        if key in seen:
            raise ValueError(f"example {key!r} occurs more than once: ids must be unique in a data set")
        seen.add(key)
        answer_patterns(example)
        length = len(template.prompt(example.question, example.instruction))
        if length >= template.max_length:
            raise ValueError(
                f"example {key!r}: its prompt has {length} tokens, which leaves no room among the "
                f"{template.max_length} positions of Gen: shorten the question or the instruction, or leave it out"
            )
    for question in questions:
        if isinstance(question.retriever, GoldRetriever):
            question.retriever.check([question.example])


def _answers(
    system: System,
    questions: Sequence[Question],
    config: GenerationConfig,
    path: Path | None,
    identity: dict[str, Any],
    batch: int,
    show: OnProgress,
) -> list[Answer]:
    # A question is known by its text and its corpus, too: an id may be another one's in another file.
    names = [f"{question.key} {_digest(_asked(question))}" for question in questions]
    with Journal(path, identity) as journal:
        open_ = [i for i, name in enumerate(names) if name not in journal.done]
        done = len(names) - len(open_)
        show("Answering", done, len(names))

        def keep(row: int, answer: Answer) -> None:
            nonlocal done
            journal.add(names[open_[row]], answer.model_dump(mode="json"))
            done += 1
            show("Answering", done, len(names))

        if open_:
            asked = [questions[i] for i in open_]
            corpora = [question.test.corpus for question in asked]
            system.answer([q.example for q in asked], config, keep, corpora=corpora, batch=batch)
        return [_answer(journal, name, question) for name, question in zip(names, questions, strict=True)]


def _answer(journal: Journal, name: str, question: Question) -> Answer:
    """What a journal holds of a question.

    Raises:
        ValueError: it is not an answer, or names a passage that is not in the corpus.
    """
    try:
        answer = Answer.model_validate(journal.done[name])
        known = {} if question.retriever is None else question.retriever.corpus.by_id
        for retrieval in answer.retrievals:
            if not retrieval.candidates or (known and retrieval.best.passage not in known):
                raise ValueError("it was given a passage that is not in the corpus")
    except ValueError as error:
        where = "the answer" if journal.path is None else f"{journal.path}: the answer"
        reason = str(error).split("\n")[0]
        raise ValueError(f"{where} to {question.key!r} cannot be used ({reason}): --overwrite starts over") from None
    return answer


def _asked(question: Question) -> list[Any]:
    example = question.example
    corpus = [question.retriever.corpus.digest] if question.test.corpus and question.retriever else []
    return [example.question, example.instruction, example.gold, *corpus]


def _ranked(questions: Sequence[Question], show: OnProgress) -> list[tuple[Ranked, ...]]:
    ranked: list[tuple[Ranked, ...]] = [() for _ in questions]
    by_retriever: dict[int, list[int]] = {}
    for row, question in enumerate(questions):
        if question.retriever is not None:
            by_retriever.setdefault(id(question.retriever), []).append(row)
    done, total = 0, sum(map(len, by_retriever.values()))
    for rows in by_retriever.values():
        for start in range(0, len(rows), RANKED_AT_ONCE):
            part = rows[start : start + RANKED_AT_ONCE]
            retriever, examples = questions[part[0]].retriever, [questions[row].example for row in part]
            assert retriever is not None
            lists = retriever.rank(examples, DEPTH)
            if lists is None:
                break
            for row, entry in zip(part, rank_scores(examples, lists), strict=True):
                ranked[row] = entry
            done += len(part)
            show("Ranking", done, total)
    return ranked


def _judged(
    judge: Judge | None,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    evidence: Sequence[dict[str, Passage]],
    path: Path | None,
    show: OnProgress,
) -> list[list[Verdict]]:
    if judge is None:
        return [[] for _ in answers]
    claims = [
        [(passages[s.passage], s.text) for s in answer.segments if s.passage is not None]
        for answer, passages in zip(answers, evidence, strict=True)
    ]
    nothing = Verdict(entailed=False, score=0.0, why="nothing is said")

    def judged(rows: Sequence[int]) -> Iterator[list[dict[str, Any]]]:
        spoken = [pair for i in rows for pair in claims[i] if pair[1].strip()]
        found = iter(judge.judge(spoken) if spoken else [])
        for i in rows:
            yield [(next(found) if text.strip() else nothing).model_dump() for _, text in claims[i]]

    names = [
        f"{question.key} {_digest([[p.model_dump(), text] for p, text in claim])}"
        for question, claim in zip(questions, claims, strict=True)
    ]
    done = _in_chunks("Judging", names, judged, path, {"judge": judge.name}, show)
    try:
        return [[Verdict.model_validate(verdict) for verdict in verdicts] for verdicts in done]
    except (ValueError, TypeError):
        raise ValueError(f"{path} holds something else than verdicts: remove it, and all is judged again") from None


def _fluent(
    model: FluencyModel | None,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    path: Path | None,
    show: OnProgress,
) -> list[float | None]:
    if model is None:
        return [None for _ in answers]
    texts = [answer.text.strip() for answer in answers]
    names = [f"{question.key} {_digest(text)}" for question, text in zip(questions, texts, strict=True)]
    nats = _in_chunks(
        "Fluency", names, lambda rows: iter(model.nats_per_token([texts[i] for i in rows])), path,
        {"model": model.name}, show,
    )  # fmt: skip
    if not all(value is None or isinstance(value, float) for value in nats):
        raise ValueError(f"{path} holds something else than nats per token: remove it, and all is measured again")
    return nats


def _in_chunks(
    stage: str,
    names: Sequence[str],
    work: Callable[[Sequence[int]], Iterator[T]],
    path: Path | None,
    settings: dict[str, Any],
    show: OnProgress,
) -> list[T]:
    """The work on each row, from the journal where it is done already."""
    with Journal(path, settings, restart=True) as journal:
        open_ = [i for i, name in enumerate(names) if name not in journal.done]
        done = len(names) - len(open_)
        for start in range(0, len(open_), AT_ONCE):
            rows = open_[start : start + AT_ONCE]
            for i, value in zip(rows, work(rows), strict=True):
                journal.add(names[i], value)
            done += len(rows)
            show(stage, done, len(names))
        return [journal.done[name] for name in names]


def _evidence(question: Question, answer: Answer) -> dict[str, Passage]:
    if question.retriever is None:
        return {}
    passages = question.retriever.corpus.by_id
    return {name: passages[name] for name in dict.fromkeys(found.best.passage for found in answer.retrievals)}


def _digest(value: Any) -> str:
    """A short name for any JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _versions() -> dict[str, str]:
    import torch
    import transformers

    from cosup_fast import __version__

    return {"cosup-fast": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
