"""Offline evaluation: is the right passage found, is the answer right, and does it stand in the passage it cites?

1. Retrieval, teacher-forced: the rank of the gold passage for each [NSP] of an example (`retrieval_ranks`).
2. Generation: Gen answers with the index, and its text is compared with the gold answers.
3. Grounding, with no NLI model: a grounded segment stands in its passage if the passage contains its text, or all
   its content words, after normalisation.
4. Every metric is a mean over questions with a 95% bootstrap interval; questions for which it is undefined (no gold
   answer, no grounded segment) do not count.

Source: Lee et al. 2024, arXiv 2403.09024, section 4; normalisation and F1 as in SQuAD (Rajpurkar et al. 2016).
"""

from __future__ import annotations

import json
import string
import unicodedata
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import regex
import torch
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from cosup_fast.data.records import Example, Passage, write_jsonl
from cosup_fast.files import replace_folder
from cosup_fast.generation import Answer, GenerationConfig, Generator
from cosup_fast.index import SequenceIndex, embed_passages, embed_queries
from cosup_fast.modeling import CoSupervisionModel

METRICS = {
    "recall@1": "R@1",
    "recall@5": "R@5",
    "recall@20": "R@20",
    "mrr": "MRR",
    "retrieved_gold": "gold found",
    "answer": "answer",
    "exact_match": "EM",
    "f1": "F1",
    "grounded": "grounded",
}
"""Names and column titles of the metrics; each is a share between 0 and 1. `score` says what they are."""

PATTERN_SECONDS = 1.0
PATTERN_FLAGS = regex.IGNORECASE | regex.MULTILINE
ARTICLES = frozenset(("a", "an", "the"))
_FUNCTION_WORDS = """
about above after again against all also am and any are as at be because been before being below between both but by
can could did do does during each for from further had has have having he her here hers him his how i if in into is it
its itself just may me might more most must my no nor not of off on once only or other our out over own same shall she
should so some such than that their them then there these they this those through to too under until up very was we
were what when where which while who whom whose why will with would you your
"""
FUNCTION_WORDS = ARTICLES | frozenset(_FUNCTION_WORDS.split())


class Estimate(BaseModel):
    """A mean with its 95% bootstrap interval; no interval from fewer than two values."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: float
    low: float | None
    high: float | None
    count: int  # values that the mean is taken over


class QuestionRecord(BaseModel):
    """What happened to one question; a line of `predictions.jsonl`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    dataset: str
    question: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]
    ranks: tuple[int, ...]  # for each teacher-forced [NSP], passages ahead of the gold one
    answer: Answer
    scores: dict[str, float]  # the metrics that are defined for this question


class Report(BaseModel):
    """Metrics over all questions and for each data set, and the questions themselves."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: dict[str, Any]
    overall: dict[str, Estimate]
    datasets: dict[str, dict[str, Estimate]]  # empty when no example names its data set
    questions: tuple[QuestionRecord, ...]

    def values(self, metric: str) -> dict[str, float]:
        """A metric of each question for which it is defined, by question id; `paired_gain` compares two of these."""
        if metric not in METRICS:
            raise ValueError(f"metric={metric!r}: expected one of {', '.join(METRICS)}")
        return {record.id: record.scores[metric] for record in self.questions if metric in record.scores}

    def table(self) -> Table:
        """The metrics in percent with their intervals, a row for each data set."""
        table = Table(caption="percent, with 95% bootstrap intervals")
        table.add_column("data set")
        table.add_column("questions", justify="right")
        names = [name for name in METRICS if name in self.overall]
        for name in names:
            table.add_column(METRICS[name], justify="right")
        sizes = Counter(record.dataset for record in self.questions)
        for title, size, estimates in [
            *((name, sizes[name], estimates) for name, estimates in self.datasets.items()),
            ("all", len(self.questions), self.overall),
        ]:
            table.add_row(title, str(size), *(_cell(estimates.get(name)) for name in names))
        return table

    def save(self, folder: str | Path) -> None:
        """Writes `report.json` and `predictions.jsonl`; the folder appears whole, and replaces an earlier report.

        Raises:
            ValueError: the folder holds something that is no report.
        """
        with replace_folder(folder, "report.json") as temporary:
            write_jsonl(temporary / "predictions.jsonl", self.questions)
            summary = json.dumps(self.model_dump(exclude={"questions"}), indent=2, ensure_ascii=False)
            (temporary / "report.json").write_text(summary + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads a report that `save` wrote.

        Raises:
            ValueError: the folder holds no report, or a damaged one.
        """
        folder = Path(folder)
        try:
            summary = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
            return cls.model_validate({**summary, "questions": [json.loads(line) for line in lines]})
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} holds no report that can be read: {error}") from None


def retrieval_ranks(
    model: CoSupervisionModel,
    examples: Sequence[Example],
    index: SequenceIndex | Sequence[Passage],
    *,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> list[int]:
    """Ranks of gold passages, example by example: for each teacher-forced [NSP], how many passages are ahead.

    A query's gold passages are the one that its [NSP] asks for and those of `Example.gold` that no other [NSP] of the
    example asks for; the best of them counts. Ties count against it: a model that embeds all passages alike has
    the last rank.

    Args:
        model: Gen and Embseq.
        examples: an example that retrieves nothing and names no gold passage has no ranks.
        index: what to search, or the passages to embed first (which needs no faiss).
        batch_tokens: most tokens in one pack.
        progress: show progress bars on stderr.

    Raises:
        ValueError: a passage that an example asks for is not in the corpus, or an example is too long.
    """
    if isinstance(index, SequenceIndex):
        passages, embeddings = index.passages, index.embeddings
    else:
        passages, embeddings = index, embed_passages(model, index, batch_tokens=batch_tokens, progress=progress)
    ranks = _ranks(model, examples, passages, embeddings, batch_tokens, progress)
    return [rank for example_ranks in ranks for rank in example_ranks]


def evaluate(
    model: CoSupervisionModel,
    index: SequenceIndex,
    examples: Sequence[Example],
    config: GenerationConfig | None = None,
    *,
    progress: bool = True,
    limit: int | None = None,
) -> Report:
    """Answers every question and scores retrieval, correctness and grounding.

    Args:
        model: Gen and Embseq.
        index: the index that `model` built.
        examples: the questions, ids unique.
        config: how to write.
        progress: show progress bars on stderr.
        limit: only the first so many examples.

    Raises:
        ValueError: no example, an id twice, an answer pattern that does not compile, or what `retrieval_ranks` and
            `Generator.generate` refuse.
        ImportError: scipy is not installed.
    """
    _stats()  # what is missing should not be found out after an hour of generation
    examples, config = examples[:limit], config or GenerationConfig()
    if not examples:
        raise ValueError(f"evaluation needs at least one example, got none (limit={limit})")
    if repeated := [name for name, count in Counter(example.id for example in examples).items() if count > 1]:
        raise ValueError(f"example id {repeated[0]!r} stands more than once: ids must be unique")
    for example in examples:
        _patterns(example)
    ranks = _ranks(model, examples, index.passages, index.embeddings, progress=progress)
    generator = Generator(model, index, config)
    passages = {passage.id: passage for passage in index.passages}
    records = []
    bar = track(examples, "Answering", console=Console(stderr=True), transient=True, disable=not progress)
    for example, example_ranks in zip(bar, ranks, strict=True):
        answer = generator.generate(example.question, example.instruction)
        records.append(
            QuestionRecord(
                id=example.id,
                dataset=example.dataset,
                question=example.question,
                answers=tuple(example.answers),
                gold=tuple(example.gold),
                ranks=tuple(example_ranks),
                answer=answer,
                scores=score(example, answer, example_ranks, passages),
            )
        )
    datasets = sorted({record.dataset for record in records if record.dataset})
    return Report(
        settings={
            "generation": config.model_dump(),
            "index": {"passages": len(index), **index.origin.model_dump()},
        },
        overall=_estimates(records),
        datasets={name: _estimates([record for record in records if record.dataset == name]) for name in datasets},
        questions=tuple(records),
    )


def score(example: Example, answer: Answer, ranks: Sequence[int], passages: Mapping[str, Passage]) -> dict[str, float]:
    """The metrics that are defined for one question, each between 0 and 1.

    - recall@k: share of the example's [NSP] whose gold passage is among the first k; mrr: mean of 1 / (rank + 1).
    - retrieved_gold: Gen, writing on its own, retrieved a gold passage. Needs gold passages.
    - answer: a gold answer stands, in whole words, in the generated text (inserted passages are no part of it). Needs
      gold answers, like the next two.
    - exact_match, f1: the first grounded segment, or the whole text where nothing is grounded, against the gold
      answer that fits best; a pattern has no F1.
    - grounded: share of the grounded segments that stand in the passage they cite (`stands_in`).
    """
    scores: dict[str, float] = {}
    if ranks:
        scores |= {f"recall@{k}": float(np.mean([rank < k for rank in ranks])) for k in (1, 5, 20)}
        scores["mrr"] = float(np.mean([1 / (rank + 1) for rank in ranks]))
    if example.gold:
        scores["retrieved_gold"] = float(any(found.best.passage in example.gold for found in answer.retrievals))
    grounded = [segment for segment in answer.segments if segment.passage is not None]
    if example.answers:
        text = " ".join(segment.text for segment in answer.segments)
        first = grounded[0].text if grounded else text
        if example.answer_type == "regex":
            patterns = _patterns(example)
            scores["answer"] = float(any(_found(pattern.search, text) for pattern in patterns))
            scores["exact_match"] = float(any(_found(pattern.fullmatch, first.strip()) for pattern in patterns))
        else:
            scores["answer"] = float(contains_answer(text, example.answers))
            scores["exact_match"] = float(any(normalize(first) == normalize(answer) for answer in example.answers))
            scores["f1"] = max(token_f1(first, answer) for answer in example.answers)
    if grounded:
        scores["grounded"] = float(np.mean([stands_in(s.text, passages[s.passage]) for s in grounded if s.passage]))
    return scores


def normalize(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no English articles, single spaces (of NFKC text)."""
    letters = unicodedata.normalize("NFKC", text).lower()
    letters = "".join(c for c in letters if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    return " ".join(word for word in letters.split() if word not in ARTICLES)


def contains_answer(text: str, answers: Collection[str]) -> bool:
    """Whether one of the answers stands in the text, both normalised, in whole words.

    An answer of which normalisation leaves nothing ("The The") is looked for as it is, in lower case.
    """
    words = f" {normalize(text)} "
    return any(
        f" {normal} " in words if (normal := normalize(answer)) else answer.lower().strip() in text.lower()
        for answer in answers
    )


def token_f1(text: str, answer: str) -> float:
    """SQuAD's F1 of the normalised words of a text and of an answer; two empty ones agree."""
    ours, theirs = Counter(normalize(text).split()), Counter(normalize(answer).split())
    if not ours or not theirs:
        return float(ours == theirs)
    common = (ours & theirs).total()
    return 2 * common / (ours.total() + theirs.total())


def stands_in(text: str, passage: Passage) -> bool:
    """Whether a grounded text stands in a passage: its normal form does in whole words, or all its content words do.

    Content words are those that are no English function words; a text that has none does not stand in anything.
    """
    source = normalize(f"{passage.title} {passage.text}")
    content = set(normalize(text).split()) - FUNCTION_WORDS
    return bool(content) and (f" {normalize(text)} " in f" {source} " or content <= set(source.split()))


def bootstrap_mean(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """A mean with its 95% percentile bootstrap interval (2000 resamples; Efron 1979).

    Raises:
        ValueError: no value.
        ImportError: scipy is not installed.
    """
    sample = np.asarray(values, dtype=float)
    if sample.size == 0:
        raise ValueError("a mean needs at least one value, got none")
    mean = float(sample.mean())
    if sample.size == 1:
        return Estimate(mean=mean, low=None, high=None, count=1)
    if (sample == sample[0]).all():
        return Estimate(mean=mean, low=mean, high=mean, count=sample.size)
    interval = (
        _stats()
        .bootstrap(
            (sample,), np.mean, n_resamples=2000, batch=100, method="percentile", rng=np.random.default_rng(seed)
        )
        .confidence_interval
    )
    return Estimate(mean=mean, low=float(interval.low), high=float(interval.high), count=sample.size)


def paired_gain(before: Mapping[str, float], after: Mapping[str, float], *, seed: int = 0) -> Estimate:
    """The mean difference after - before over the questions of both, with its 95% paired bootstrap interval.

    Args:
        before: a metric by question id, as `Report.values` gives it.
        after: the same metric of another model.
        seed: of the resamples.

    Raises:
        ValueError: no question in common.
    """
    common = [name for name in before if name in after]
    if not common:
        raise ValueError(f"no question in common between {len(before)} before and {len(after)} after")
    return bootstrap_mean([after[name] - before[name] for name in common], seed=seed)


def _ranks(
    model: CoSupervisionModel,
    examples: Sequence[Example],
    passages: Sequence[Passage],
    embeddings: Tensor,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> list[list[int]]:
    """`retrieval_ranks`, apart for each example."""
    row_of = {passage.id: row for row, passage in enumerate(passages)}
    corpus = {passage.id: passage for passage in passages}
    queries, asked = embed_queries(model, examples, corpus, batch_tokens=batch_tokens, progress=progress)
    asked_by: dict[int, set[str]] = {}
    for number, passage in asked:
        asked_by.setdefault(number, set()).add(passage)
    ranks: list[list[int]] = [[] for _ in examples]
    chunk = max(1, (1 << 26) // max(1, len(passages)))  # a quarter of a GB of scores
    for start in range(0, len(asked), chunk):
        with torch.autocast(embeddings.device.type, enabled=False):  # scores rounded to bf16 tie by the dozen
            scores = queries[start : start + chunk] @ embeddings.T
        for row, (number, passage) in zip(scores, asked[start : start + chunk], strict=True):
            gold = {passage, *examples[number].gold} - (asked_by[number] - {passage})
            rows = [row_of[name] for name in gold if name in row_of]
            if not rows:
                raise ValueError(
                    f"example {examples[number].id!r}: none of its gold passages {sorted(gold)} is in the corpus"
                )
            best = row[rows].max()
            ranks[number].append(int((row >= best).sum() - (row[rows] >= best).sum()))
    return ranks


def _estimates(records: Sequence[QuestionRecord]) -> dict[str, Estimate]:
    return {
        name: bootstrap_mean(values)
        for name in METRICS
        if (values := [record.scores[name] for record in records if name in record.scores])
    }


def _patterns(example: Example) -> list[regex.Pattern[str]]:
    if example.answer_type != "regex":
        return []
    patterns = []
    for answer in example.answers:
        try:
            patterns.append(regex.compile(answer, PATTERN_FLAGS))
        except regex.error as error:
            raise ValueError(f"example {example.id!r}: the answer pattern {answer!r} is invalid: {error}") from None
    return patterns


def _found(match: Any, text: str) -> bool:
    """Whether a pattern matches; one that backtracks without end counts as no match."""
    try:
        return match(text, timeout=PATTERN_SECONDS) is not None
    except TimeoutError:
        warnings.warn(
            f"the answer pattern {match.__self__.pattern!r} took more than {PATTERN_SECONDS} s and counts as "
            "not found: nested repetitions like (a+)+ should be simplified",
            stacklevel=2,
        )
        return False


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    if estimate.low is None or estimate.high is None:
        return f"{100 * estimate.mean:.1f}"
    return f"{100 * estimate.mean:.1f}\n{100 * estimate.low:.0f}–{100 * estimate.high:.0f}"


def _stats() -> Any:
    try:
        import scipy.stats
    except ImportError as error:
        raise ImportError("evaluation needs scipy: pip install 'cosup-fast[eval]'") from error
    return scipy.stats
