"""From what happened to a question to its scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from cosup_fast.data.answers import answer_patterns, contains_answer, holds_answer, matches
from cosup_fast.data.records import Example, Passage
from cosup_fast.data.strict import Strict
from cosup_fast.evaluation.corpus import Corpus
from cosup_fast.evaluation.judge import Verdict
from cosup_fast.evaluation.metrics import (
    LABELS,
    RANKING,
    best_f1,
    containment,
    exact_match,
    is_answer,
    is_gold,
    named_label,
    normalize,
    passage_scores,
    ranking_scores,
    rouge_l,
    string_em,
)
from cosup_fast.evaluation.ranks import asked
from cosup_fast.evaluation.suites import Suite
from cosup_fast.generation import Answer

DEPTH = 100
"""How far down a ranked list gold passages are looked for."""


class Ranked(Strict):
    """The ranked list of one teacher-forced [NSP] against its gold passages."""

    rank: int | None  # of the first gold passage, from 1; None when it is not among the first `DEPTH`
    scores: dict[str, float]


class Titles(Strict):
    """How a question's answer and the titles of passages go together; None where that is not known.

    A model that always writes the title of what it retrieved is right where the answer is that title, and nowhere else.
    """

    answer_is_gold: bool | None = None  # a gold answer is the title of a gold passage
    answer_is_retrieved: bool | None = None  # a gold answer is the title of a passage that Gen was given
    wrote_retrieved: bool | None = None  # what Gen wrote is the title of a passage that it was given


def titles(example: Example, answer: Answer, corpus: Corpus | None) -> Titles:
    """Whether gold answers and what was written are titles; of a label neither is asked."""
    if corpus is None or has_label(example):
        return Titles()
    gold = [corpus.by_id[name].title for name in corpus.found(example.gold)]
    given = [found.best.title for found in answer.retrievals]
    written = normalize(answer.text)
    known = bool(example.answers or example.answer_sets)
    return Titles(
        answer_is_gold=any(is_answer(title, example) for title in gold) if known and gold else None,
        answer_is_retrieved=any(is_answer(title, example) for title in given) if known and given else None,
        wrote_retrieved=any(normalize(title) == written for title in given) if written and given else None,
    )


def chances(example: Example, corpus: Corpus | None) -> dict[str, float]:
    """What each recall of an example's ranked lists would be by chance; nothing where nothing is searched."""
    lists = [] if corpus is None else [gold for _, gold in asked(example)]
    if corpus is None or not lists:
        return {}
    depths = {name: int(name.removeprefix("recall@")) for name in RANKING if name.startswith("recall@")}
    return {name: float(np.mean([corpus.chance(gold, k) for gold in lists])) for name, k in depths.items()}


def rank_scores(examples: Sequence[Example], lists: Sequence[Sequence[tuple[str, float]]]) -> list[tuple[Ranked, ...]]:
    """The ranked lists of each example, from those of all entries of `asked`.

    Among equal scores the gold passage counts as last: a model that embeds all passages alike finds nothing.
    """
    gold = [ids for example in examples for _, ids in asked(example)]
    sets = [
        example.gold_sets if example.gold_sets and not example.cited else [ids]
        for example in examples
        for _, ids in asked(example)
    ]
    assert len(gold) == len(lists)
    ordered = [
        ([name for name, _ in sorted(found, key=lambda hit: (-hit[1], bool(is_gold(hit[0], ids))))], ids)
        for found, ids in zip(lists, gold, strict=True)
    ]
    entries = iter(
        Ranked(rank=round(1 / scores["mrr"]) if scores["mrr"] else None, scores=scores)
        for scores in ranking_scores(ordered, sets)
    )
    return [tuple(next(entries) for _ in asked(example)) for example in examples]


def retrieval_scores(
    example: Example, answer: Answer, ranked: Sequence[Ranked], passages: Mapping[str, Passage]
) -> dict[str, float]:
    """What was found: means over the example's ranked lists, and the passages that Gen was given while it wrote.

    Metrics by id need gold ids, `answer_in_passage` gold answers. A system that could retrieve and did not has 0; one
    that cannot, with no `passages`, has none of these.
    """
    scores = {name: float(np.mean([entry.scores[name] for entry in ranked])) for name in RANKING if ranked}
    if not passages:
        return scores
    given = [found.best.passage for found in answer.retrievals]
    if example.gold:
        scores |= passage_scores(given, example.gold)
    if (example.answers or example.answer_sets) and not has_label(example):
        held = [holds_answer(f"{passages[name].title}\n{passages[name].text}", example) for name in given]
        scores["answer_in_passage"] = float(np.mean(held or [0]))
    return scores


def correctness_scores(example: Example, answer: Answer) -> dict[str, float]:
    """What was written, inserted passages apart, against the gold answers; nothing where there are none.

    Short forms (`exact_match`, `f1`) judge the first grounded segment, or the whole text where nothing is grounded; a
    pattern has no F1.
    """
    text = answer.text
    first = next((segment.text for segment in answer.segments if segment.passage is not None), text)
    scores: dict[str, float] = {}
    if example.answer_sets:
        scores["string_em"] = string_em(text, example.answer_sets)
    if not example.answers:
        return scores
    if example.answer_type == "regex":
        patterns = answer_patterns(example)
        scores["containment"] = scores["contains_words"] = float(any(matches(pattern, text) for pattern in patterns))
        scores["exact_match"] = float(any(matches(pattern, first.strip(), whole=True) for pattern in patterns))
        return scores
    scores["containment"] = float(containment(text, example.answers))
    scores["contains_words"] = float(contains_answer(text, example.answers))
    scores["exact_match"] = exact_match(first, example.answers)
    scores["f1"] = best_f1(first, example.answers)
    scores["unigram_f1"] = best_f1(text, example.answers)
    scores["rouge_l"] = rouge_l(text, example.answers)
    if has_label(example):
        scores["label_accuracy"] = float(named_label(text) in example.answers)
    return scores


def score(
    example: Example,
    answer: Answer,
    suite: Suite,
    passages: Mapping[str, Passage],
    ranked: Sequence[Ranked] = (),
    verdicts: Sequence[Verdict] = (),
    nats_per_token: float | None = None,
    titled: Titles | None = None,
) -> dict[str, float]:
    """The metrics of a suite that are defined for a question, and `retrieval` and `correctness` that stand for them.

    `grounded` is the share of the grounded segments whose passage entails them; `beyond_titles` is `correctness` where
    no gold answer is the title of a gold passage.
    """
    scores = retrieval_scores(example, answer, ranked, passages) | correctness_scores(example, answer)
    if passages:
        scores["retrievals"] = float(len(answer.retrievals))
    if suite.correctness in scores and titled is not None and titled.answer_is_gold is False:
        scores["beyond_titles"] = scores[suite.correctness]
    if verdicts:
        scores["grounded"] = float(np.mean([verdict.entailed for verdict in verdicts]))
    if nats_per_token is not None:
        scores["perplexity"] = math.exp(min(nats_per_token, 700))
    kept = {name: scores[name] for name in suite.metrics if name in scores}
    for title, metric in (("retrieval", suite.retrieval), ("correctness", suite.correctness)):
        if metric in scores:
            kept[title] = scores[metric]
    return kept


def has_label(example: Example) -> bool:
    """Whether an example's gold answer is a label."""
    return any(answer in LABELS for answer in example.answers)
