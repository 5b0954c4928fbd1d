"""The test sets of a study: questions with their corpora, read once for all cells of a process."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import TypeVar

from cosup_fast.data.records import DataError, Example
from cosup_fast.data.sources import load_corpus, load_examples
from cosup_fast.evaluation import Corpus, TestSet
from cosup_fast.evaluation.metrics import is_gold
from cosup_fast.study.config import Study, StudyError

T = TypeVar("T")


def load_sets(study: Study) -> tuple[list[TestSet], list[Corpus]]:
    """The questions of every set, and the corpora that they search; sets that share a corpus share it here.

    Raises:
        StudyError: a set that is not prepared, naming the command that prepares it, or questions twice.
    """
    corpora: dict[str, Corpus] = {}
    tests = []
    for one in study.sets:
        try:
            if one.corpus not in corpora:
                corpora[one.corpus] = Corpus(load_corpus(one.corpus), one.corpus)
            examples = load_examples(one.examples, corpora[one.corpus].by_id.keys(), allow_no_retrieval=True)
        except DataError as error:
            raise StudyError(f"set {one.name!r}: {error}") from None
        # A question is counted in its set, whatever collection it came from.
        tests.append(TestSet(one.name, _sample(examples, study.evaluation.questions), one.domain, one.corpus))
    _check_keys(tests)
    if (most := study.evaluation.passages) is not None:
        for name, corpus in corpora.items():
            asked = [example for test in tests if test.corpus == name for example in test.examples]
            corpora[name] = _smaller(corpus, asked, most)
    return tests, list(corpora.values())


def _check_keys(tests: Iterable[TestSet]) -> None:
    """Refuses a question of two sets, before anything is trained for it."""
    sets: dict[tuple[str | None, str], str] = {}
    for test in tests:
        for example in test.examples:
            first = sets.setdefault((example.dataset, example.id), test.source)
            if first != test.source:
                raise StudyError(
                    f"sets: question {example.id!r} of data set {example.dataset!r} is in {first!r} and in "
                    f"{test.source!r}: remove it from one of them, or give its lines another `dataset`"
                )


def _sample(rows: Sequence[T], most: int | None) -> list[T]:
    """Up to so many rows, in their order; those of a smaller sample are among those of a larger one."""
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    return [rows[i] for i in sorted(order[:most])]


def _smaller(corpus: Corpus, examples: Iterable[Example], most: int) -> Corpus:
    """A corpus of up to so many passages that holds all that the examples count as found or are grounded on."""
    named = {name for example in examples for name in (*example.gold, *example.cited, *example.negatives)}
    needed = [i for i, passage in enumerate(corpus.passages) if is_gold(passage.id, named)]
    others = sorted(set(range(len(corpus))) - set(needed))
    kept = sorted([*needed, *_sample(others, max(0, most - len(needed)))])
    return Corpus([corpus.passages[i] for i in kept], corpus.name)
