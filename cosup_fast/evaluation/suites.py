"""Which metrics a data set reports, and which two of them stand for its retrieval and its correctness.

The table follows Lee et al. 2024, arXiv 2403.09024, section 4, for the eight data sets of KILT and the two of ALCE.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from cosup_fast.data.records import Example, nearest
from cosup_fast.evaluation.metrics import LABELS, RANKING


@dataclass(frozen=True)
class Metric:
    """How a metric is shown."""

    title: str
    what: str
    unit: Literal["share", "count", "geometric"] = "share"
    """A share is shown in percent; `geometric` is a positive number with a geometric mean."""


METRICS = {
    "recall@1": Metric("R@1", "share of the gold passages that are ranked first"),
    "recall@5": Metric("R@5", "share of the gold passages among the first 5"),
    "recall@20": Metric("R@20", "share of the gold passages among the first 20"),
    "mrr": Metric("MRR", "1 / rank of the first gold passage, 0 beyond rank 100"),
    "ndcg@10": Metric("nDCG@10", "discounted gain of the gold passages among the first 10"),
    "rprec": Metric("R-prec", "share of gold passages among the first R, R being their number; KILT's best output"),
    "passage_precision": Metric("P (ids)", "share of the passages given to Gen that are gold"),
    "passage_recall": Metric("R (ids)", "share of the gold passages that were given to Gen"),
    "passage_f1": Metric("F1 (ids)", "harmonic mean of these two"),
    "answer_in_passage": Metric("answer in passage", "share of the passages given to Gen that hold a gold answer"),
    "containment": Metric("contains", "a gold answer is a substring of what Gen wrote, as in ALCE's script"),
    "contains_words": Metric("contains words", "a gold answer is in what Gen wrote, in whole words"),
    "exact_match": Metric("EM", "the first grounded segment is a gold answer"),
    "f1": Metric("F1", "words of the first grounded segment against the best gold answer"),
    "label_accuracy": Metric("label", "the label that Gen names first is the gold one"),
    "unigram_f1": Metric("unigram F1", "words of all that Gen wrote against the best reference"),
    "rouge_l": Metric("ROUGE-L", "longest common subsequence with the best reference"),
    "string_em": Metric("string EM", "share of the short-answer sets of which one is a substring of what Gen wrote"),
    "beyond_titles": Metric(
        "beyond titles", "correctness on questions of which no gold answer is the title of a gold passage"
    ),
    "grounded": Metric("grounded", "share of the grounded segments that the cited passage entails, by the judge"),
    "perplexity": Metric("perplexity", "of what Gen wrote under the fluency model; lower is better", "geometric"),
    "retrievals": Metric("retrievals", "passages given to Gen in an answer", "count"),
}
"""All metrics in the order of columns."""

SUMMARY = {"retrieval": "retrieval", "correctness": "correctness", "grounded": "grounded"}
"""What averages over data sets are taken of: each data set's own retrieval and correctness metric, and grounding."""

_COMMON = (
    *RANKING, "passage_precision", "passage_recall", "passage_f1", "answer_in_passage", "beyond_titles", "grounded",
    "perplexity", "retrievals",
)  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """The metrics of a data set.

    Args:
        retrieval: the metric that stands for retrieval.
        correctness: the metric that stands for correctness.
        more: further metrics of correctness.
    """

    retrieval: str
    correctness: str
    more: tuple[str, ...] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """All that is reported, in the order of `METRICS`."""
        return tuple(name for name in METRICS if name in {*_COMMON, self.correctness, *self.more})


_SHORT_ANSWER = Suite("answer_in_passage", "containment", ("contains_words", "exact_match", "f1"))
_SHORT_ANSWER_BY_ID = Suite("passage_f1", "containment", ("contains_words", "exact_match", "f1"))
_LABEL = Suite("passage_f1", "label_accuracy")
SUITES = {
    "nq": _SHORT_ANSWER,
    "triviaqa": _SHORT_ANSWER,
    "zsre": _SHORT_ANSWER,
    "trex": _SHORT_ANSWER,
    "squad": _SHORT_ANSWER,
    "webquestions": _SHORT_ANSWER,
    "curatedtrec": Suite("answer_in_passage", "containment", ("contains_words", "exact_match")),
    "hotpotqa": _SHORT_ANSWER_BY_ID,
    "fever": _LABEL,
    "vitaminc": _LABEL,
    "claims": _LABEL,
    "wow": Suite("passage_f1", "unigram_f1", ("rouge_l",)),
    "eli5": Suite("passage_f1", "rouge_l", ("unigram_f1",)),
    "alce_eli5": Suite("passage_f1", "rouge_l", ("unigram_f1",)),
    "asqa": Suite("passage_f1", "string_em", ("rouge_l",)),
}
"""By data set; names are matched without case, hyphens and underscores."""

_ALIASES = {
    "naturalquestions": "nq", "nqopen": "nq", "tqa": "triviaqa", "trivia": "triviaqa", "structuredzeroshot": "zsre",
    "hotpot": "hotpotqa", "wizard": "wow", "wizardofwikipedia": "wow", "webq": "webquestions", "wq": "webquestions",
    "trec": "curatedtrec", "curated": "curatedtrec",
}  # fmt: skip


def suite_of(dataset: str, examples: Sequence[Example] = (), metrics: Collection[str] | None = None) -> Suite:
    """The suite of a data set; one that the table does not know is judged by what its examples have.

    Args:
        dataset: its name.
        examples: its questions: sets of short answers ask for string EM, labels for their accuracy, other answers
            for containment.
        metrics: correctness metrics to report in any case.
    """
    name = re.sub(r"[\W_]", "", dataset.lower())
    known = {re.sub(r"_", "", key): suite for key, suite in SUITES.items()}
    suite = known.get(_ALIASES.get(name, name))
    if suite is None:
        if any(example.answer_sets for example in examples):
            suite = Suite("passage_f1", "string_em", ("rouge_l",))
        elif examples and all(set(example.answers) & LABELS.keys() for example in examples):
            suite = _LABEL
        else:
            suite = _SHORT_ANSWER_BY_ID
    return Suite(suite.retrieval, suite.correctness, (*suite.more, *(metrics or ())))


def check_metrics(names: Collection[str]) -> None:
    """Refuses a metric that does not exist.

    Raises:
        ValueError: naming it and the nearest one.
    """
    for name in names:
        if name not in METRICS:
            raise ValueError(
                f"metric {name!r} is unknown{nearest(name, METRICS)}: expected one of {', '.join(METRICS)}"
            )
