"""The test sets of a study: questions with their corpora, read once for all cells of a process."""

from __future__ import annotations

import random

from cosup_fast.data.records import DataError
from cosup_fast.data.sources import load_corpus, load_examples
from cosup_fast.evaluation import Corpus, TestSet
from cosup_fast.study.config import Study, StudyError


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
        if one.limit is not None and one.limit < len(examples):
            examples = random.Random(0).sample(examples, one.limit)
        # A question is counted in its set, whatever collection it came from.
        tests.append(TestSet(one.name, examples, one.domain, one.corpus))
    return tests, list(corpora.values())
