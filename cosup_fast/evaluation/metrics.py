"""What is measured: every metric of one question, defined once, from what a system retrieved and wrote.

Each function takes plain text or ids and gives a number between 0 and 1. `scoring` applies them to a question,
`suites` says which of them a data set reports. All text is compared in the normal form of SQuAD (`normalize`), which
KILT uses too.
"""

from __future__ import annotations

import re
import string
import unicodedata
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from typing import Any

import regex

from cosup_fast.data.records import Example

PATTERN_SECONDS = 1.0
PATTERN_FLAGS = regex.IGNORECASE | regex.MULTILINE
ARTICLES = frozenset(("a", "an", "the"))
LABELS = {
    "SUPPORTS": ("supports", "supported", "true"),
    "REFUTES": ("refutes", "refuted", "false"),
    "NOT ENOUGH INFO": ("not enough info", "not enough information"),
}
"""FEVER's labels with the words, in normal form, that a text may use for them."""

_PARAGRAPH = re.compile(r"(kilt:[^:]+):\d+|(.+)#\d+(?:-\d+)?", re.DOTALL)


def require(module: str, package: str) -> Any:
    """A module of the `eval` extra.

    Raises:
        ImportError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"evaluation needs {package}: pip install 'cosup-fast[eval]'") from error


def normalize(text: str) -> str:
    """SQuAD's normal form (Rajpurkar et al. 2016): lower case, no punctuation, no articles, single spaces; of NFKC."""
    letters = unicodedata.normalize("NFKC", text).lower()
    letters = "".join(c for c in letters if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    return " ".join(word for word in letters.split() if word not in ARTICLES)


def exact_match(text: str, answers: Collection[str]) -> float:
    """1 if the text is one of the answers in normal form (Rajpurkar et al. 2016; Petroni et al. 2021, KILT)."""
    return float(any(normalize(text) == normalize(answer) for answer in answers))


def token_f1(text: str, answer: str) -> float:
    """F1 of the bags of normalised words of a text and of an answer (Rajpurkar et al. 2016); two empty ones agree."""
    ours, theirs = Counter(normalize(text).split()), Counter(normalize(answer).split())
    if not ours or not theirs:
        return float(ours == theirs)
    common = (ours & theirs).total()
    return 2 * common / (ours.total() + theirs.total())


def best_f1(text: str, answers: Collection[str]) -> float:
    """The largest `token_f1` among the answers; of a whole text, the unigram F1 of Wizard of Wikipedia in KILT."""
    return max(token_f1(text, answer) for answer in answers)


def contains_answer(text: str, answers: Collection[str]) -> bool:
    """Whether one of the answers stands in the text, both normalised, in whole words (as in Lee et al. 2024).

    An answer of which normalisation leaves nothing ("The The") is looked for as it is, in lower case.
    """
    words = f" {normalize(text)} "
    return any(
        f" {normal} " in words if (normal := normalize(answer)) else answer.lower().strip() in text.lower()
        for answer in answers
    )


def string_em(text: str, answer_sets: Collection[Collection[str]]) -> float:
    """Share of the short-answer sets of which an answer stands in the text (Stelmakh et al. 2022, ASQA; ALCE)."""
    return sum(contains_answer(text, answers) for answers in answer_sets) / len(answer_sets)


def named_label(text: str) -> str | None:
    """The FEVER label that a text names first, or None (Thorne et al. 2018; label accuracy in KILT)."""
    words = f" {normalize(text)} "
    places = [(words.find(f" {word} "), label) for label, names in LABELS.items() for word in names]
    return min(((place, label) for place, label in places if place >= 0), default=(0, None))[1]


def rouge_l(text: str, references: Collection[str]) -> float:
    """ROUGE-L F1 by the `rouge-score` package (Lin 2004), without stemming, against the reference that fits best.

    Words are runs of letters and digits of any script; for ASCII text that is the package's own tokenizer.

    Raises:
        ImportError: rouge-score is not installed.
    """
    scorer = _rouge_scorer()
    return max(scorer.score(reference, text)["rougeL"].fmeasure for reference in references)


def answer_patterns(example: Example) -> list[regex.Pattern[str]]:
    """The compiled patterns of an example with `answer_type="regex"` (CuratedTREC); none for another one.

    Raises:
        ValueError: a pattern does not compile.
    """
    if example.answer_type != "regex":
        return []
    patterns = []
    for answer in example.answers:
        try:
            patterns.append(_compiled(answer))
        except regex.error as error:
            raise ValueError(f"example {example.id!r}: the answer pattern {answer!r} is invalid: {error}") from None
    return patterns


def matches(pattern: regex.Pattern[str], text: str, *, whole: bool = False) -> bool:
    """Whether a pattern is found in a text, or is the whole of it; one that backtracks without end is no match."""
    match = pattern.fullmatch if whole else pattern.search
    try:
        return match(text, timeout=PATTERN_SECONDS) is not None
    except TimeoutError:
        warnings.warn(
            f"the answer pattern {pattern.pattern!r} took more than {PATTERN_SECONDS} s and counts as "
            "not found: nested repetitions like (a+)+ should be simplified",
            stacklevel=2,
        )
        return False


def has_answer(text: str, example: Example) -> bool:
    """Whether a gold answer of the example, string or pattern, or one of its short answers stands in the text."""
    if example.answer_type == "regex":
        return any(matches(pattern, text) for pattern in answer_patterns(example))
    return contains_answer(text, [*example.answers, *(a for answers in example.answer_sets for a in answers)])


def is_answer(text: str, example: Example) -> bool:
    """Whether a text is, as a whole, one of the gold answers of the example or matches one of its patterns."""
    if example.answer_type == "regex":
        return any(matches(pattern, text.strip(), whole=True) for pattern in answer_patterns(example))
    return bool(exact_match(text, [*example.answers, *(a for answers in example.answer_sets for a in answers)]))


def answer_spans(text: str, example: Example) -> list[tuple[int, int]]:
    """Where the gold answers stand in a text, as (start, end) in order and without overlap; for reports."""
    found: list[tuple[int, int]] = []
    if example.answer_type == "regex":
        for pattern in answer_patterns(example):
            try:
                found += [m.span() for m in pattern.finditer(text, timeout=PATTERN_SECONDS) if m.group()]
            except TimeoutError:
                continue  # `matches` has said so
    else:
        words = [(w, m.span()) for m in re.finditer(r"\S+", text) for w in normalize(m.group()).split()]
        for answer in [*example.answers, *(a for answers in example.answer_sets for a in answers)]:
            wanted = normalize(answer).split()
            if not wanted:
                place = text.lower().find(answer.lower().strip())
                found += [(place, place + len(answer.strip()))] if place >= 0 else []
                continue
            for i in range(len(words) - len(wanted) + 1):
                if [word for word, _ in words[i : i + len(wanted)]] == wanted:
                    found.append((words[i][1][0], words[i + len(wanted) - 1][1][1]))
    spans: list[tuple[int, int]] = []
    for start, end in sorted(found):
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return spans


def is_gold(passage: str, gold: Collection[str]) -> str | None:
    """The gold id that a passage satisfies: its own, or that of the page it is a paragraph of; None for neither.

    A passage `kilt:123:4` is a paragraph of page `kilt:123`, one `page#4` or `page#4-6` of `page`; KILT's provenance
    is by page.
    """
    if passage in gold:
        return passage
    return page if (page := page_of(passage)) in gold else None


def page_of(passage: str) -> str:
    """The page that a passage id names a paragraph of (`is_gold`); the id itself when it names none."""
    found = _PARAGRAPH.fullmatch(passage)
    return found[1] or found[2] if found else passage


def passage_scores(given: Iterable[str], gold: Collection[str]) -> dict[str, float]:
    """Precision, recall and F1 of the distinct passages that Gen was given, against the gold ids (Lee et al. 2024).

    Paragraphs of one gold page count once. A system that retrieved nothing has 0.
    """
    units = {is_gold(passage, gold) or passage for passage in given}
    right = len(units & set(gold))
    precision, recall = right / max(1, len(units)), right / len(set(gold))
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"passage_precision": precision, "passage_recall": recall, "passage_f1": f1}


RANKING = {
    "recall@1": "R@1",
    "recall@5": "R@5",
    "recall@20": "R@20",
    "mrr": "RR",
    "ndcg@10": "nDCG@10",
    "rprec": "Rprec",
}
"""Metrics of a ranked list, with their names in `ir-measures`."""


def ranking_scores(rankings: Sequence[tuple[Sequence[str], Collection[str]]]) -> list[dict[str, float]]:
    """The metrics of `RANKING` for ranked lists of passage ids, best first, and the gold ids of each, by `ir-measures`.

    Only the first paragraph of a gold page counts. `rprec` is KILT's R-precision: precision at the number of gold ids.

    Raises:
        ImportError: ir-measures is not installed.
    """
    ir_measures = require("ir_measures", "ir-measures")
    measures = {ir_measures.parse_measure(name): ours for ours, name in RANKING.items()}
    qrels, run = {}, {}
    for number, (passages, gold) in enumerate(rankings):
        units = dict.fromkeys(is_gold(passage, gold) or passage for passage in passages)
        qrels[str(number)] = dict.fromkeys(gold, 1)
        run[str(number)] = {unit: -float(rank) for rank, unit in enumerate(units)}
    scores = [dict.fromkeys(RANKING, 0.0) for _ in rankings]
    for metric in ir_measures.iter_calc(list(measures), qrels, run):
        scores[int(metric.query_id)][measures[metric.measure]] = float(metric.value)
    return scores


@cache
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern, PATTERN_FLAGS)


class _Words:
    """The tokenizer of ROUGE-L."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


@cache
def _rouge_scorer() -> Any:
    return require("rouge_score.rouge_scorer", "rouge-score").RougeScorer(["rougeL"], tokenizer=_Words())
