"""What is measured: every metric of one question, defined once, from what a system retrieved and wrote.

Each function takes plain text or ids and gives a number between 0 and 1. `scoring` applies them to a question,
`suites` says which of them a data set reports. Metrics that bear the name of a published one follow its script: text is
compared in the normal form of SQuAD (`normalize`), which KILT and ALCE use, too. Where a script would count an empty
output as right, it is wrong here. `contains_answer`, ours, compares whole words of any script (`data.answers`).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from typing import Any

from cosup_fast.data.answers import ARTICLES, all_answers, answer_patterns, contains_answer, matches
from cosup_fast.data.records import Example

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
    """SQuAD's normal form (Rajpurkar et al. 2016): lower case, no punctuation, no articles, single spaces.

    Beyond ASCII, letters are first brought to NFKC, and all of Unicode's punctuation is dropped.
    """
    return " ".join(word for word in _bare(text).split() if word not in ARTICLES)


def exact_match(text: str, answers: Collection[str]) -> float:
    """1 if the text is one of the answers in normal form (Rajpurkar et al. 2016; Petroni et al. 2021, KILT).

    An answer that normalisation empties ("A", "The The", "++") is compared with its articles, or as it is.
    """
    return float(any(_same(text, answer) for answer in answers))


def token_f1(text: str, answer: str) -> float:
    """F1 of the bags of normalised words of a text and of an answer (Rajpurkar et al. 2016), 0 without a common word.

    An answer that normalisation empties has 1 or 0, as `exact_match` says.
    """
    ours, theirs = Counter(normalize(text).split()), Counter(normalize(answer).split())
    if not theirs:
        return float(_same(text, answer))
    common = (ours & theirs).total()
    return 2 * common / (ours.total() + theirs.total()) if common else 0.0


def best_f1(text: str, answers: Collection[str]) -> float:
    """The largest `token_f1` among the answers; of a whole text, the unigram F1 of Wizard of Wikipedia in KILT."""
    return max(token_f1(text, answer) for answer in answers)


def containment(text: str, answers: Collection[str]) -> bool:
    """Whether an answer is a substring of the text, both normalised: ALCE's `exact_presence`, the rule of string EM.

    "art" is found in "party", as their script has it; `contains_answer` wants whole words. An answer that
    normalisation empties, which theirs finds everywhere, is looked for as `contains_answer` does.
    """
    normal = normalize(text)
    return any(
        wanted in normal if (wanted := normalize(answer)) else contains_answer(text, [answer]) for answer in answers
    )


def string_em(text: str, answer_sets: Collection[Collection[str]]) -> float:
    """Share of the short-answer sets of which one is contained (Stelmakh et al. 2022, ASQA; Gao et al. 2023, ALCE)."""
    return sum(containment(text, answers) for answers in answer_sets) / len(answer_sets)


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


def is_answer(text: str, example: Example) -> bool:
    """Whether a text is, as a whole, one of the gold answers of the example or matches one of its patterns."""
    if example.answer_type == "regex":
        return any(matches(pattern, text.strip(), whole=True) for pattern in answer_patterns(example))
    return bool(exact_match(text, all_answers(example)))


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
    "rprec": "",
}
"""Metrics of a ranked list, with their names in `ir-measures`, which has no R-precision as KILT defines it."""


def ranking_scores(
    rankings: Sequence[tuple[Sequence[str], Collection[str]]],
    gold_sets: Sequence[Collection[Collection[str]]] | None = None,
) -> list[dict[str, float]]:
    """The metrics of `RANKING` for ranked lists of passage ids, best first, and the gold ids of each, by `ir-measures`.

    Only the first paragraph of a gold page counts.

    Args:
        rankings: lists and gold ids.
        gold_sets: for each list the sets of gold ids any of which is enough, for `rprec`; by default all are one set.

    Raises:
        ImportError: ir-measures is not installed.
    """
    ir_measures = require("ir_measures", "ir-measures")
    measures = {ir_measures.parse_measure(name): ours for ours, name in RANKING.items() if name}
    qrels, run = {}, {}
    scores = []
    for number, (passages, gold) in enumerate(rankings):
        units = list(dict.fromkeys(is_gold(passage, gold) or passage for passage in passages))
        qrels[str(number)] = dict.fromkeys(gold, 1)
        run[str(number)] = {unit: -float(rank) for rank, unit in enumerate(units)}
        sets = [gold] if gold_sets is None else gold_sets[number]
        scores.append({**dict.fromkeys(RANKING, 0.0), "rprec": r_precision(units, sets)})
    for metric in ir_measures.iter_calc(list(measures), qrels, run):
        scores[int(metric.query_id)][measures[metric.measure]] = float(metric.value)
    return scores


def r_precision(ranked: Sequence[str], gold_sets: Collection[Collection[str]]) -> float:
    """KILT's R-precision (Petroni et al. 2021): the best, over sets of gold ids, of their share among the first R.

    R is the size of the set. [1, 9] against [{1}, {2}] is 1, [2, 1] against [{1}, {2, 3}] is 1/2.
    """
    return max(
        (len(set(ranked[: len(gold)]) & set(gold)) / len(gold) for gold in map(set, gold_sets) if gold), default=0.0
    )


def _bare(text: str) -> str:
    letters = unicodedata.normalize("NFKC", text).lower()
    return "".join(c for c in letters if c not in string.punctuation and not unicodedata.category(c).startswith("P"))


def _same(text: str, answer: str) -> bool:
    """Whether two texts are equal in the furthest form of `normalize` that leaves something of the answer."""
    for form in (normalize, lambda x: " ".join(_bare(x).split()), lambda x: x.strip().lower()):
        if wanted := form(answer):
            return form(text) == wanted
    return False


class _Words:
    """The tokenizer of ROUGE-L."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


@cache
def _rouge_scorer() -> Any:
    return require("rouge_score.rouge_scorer", "rouge-score").RougeScorer(["rougeL"], tokenizer=_Words())
