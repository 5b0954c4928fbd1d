"""The questions and passages of a study."""

from __future__ import annotations

import pytest

from cosup_fast.study import StudyError, load_study, run_study
from cosup_fast.study.sets import load_sets


def test_fewer_questions_and_passages_are_the_same_each_time_and_keep_what_is_gold(write_study):
    whole, (corpus,) = load_sets(load_study(write_study()))
    for most in (1, 5, 8, len(corpus), 100):
        smaller, (fewer,) = load_sets(load_study(write_study(evaluation={"passages": most})))
        gold = {name for test in smaller for example in test.examples for name in example.gold}
        assert smaller == whole
        assert len(fewer) == min(max(most, len(gold)), len(corpus))
        assert gold <= fewer.by_id.keys()
        ids = [passage.id for passage in corpus.passages]
        assert [passage.id for passage in fewer.passages] == [name for name in ids if name in fewer.by_id]
        assert fewer.digest == load_sets(load_study(write_study(evaluation={"passages": most})))[1][0].digest
    one, (fewer,) = load_sets(load_study(write_study(evaluation={"questions": 1, "passages": 1})))
    assert [len(test.examples) for test in one] == [1, 1]
    assert {test.examples[0].id for test in one} <= {example.id for test in whole for example in test.examples}
    assert set(fewer.by_id) == {name for test in one for example in test.examples for name in example.gold}


def test_a_question_of_two_sets_is_refused_before_anything_is_trained(write_study):
    study = load_study(write_study())
    again = study.sets[0].model_copy(update={"name": "again"})
    study = study.model_copy(update={"sets": (*study.sets, again)})
    with pytest.raises(StudyError, match="question 'e1' of data set 'cities' is in 'cities' and in 'again': remove it"):
        run_study(study)
    assert not study.work_folder.exists()
