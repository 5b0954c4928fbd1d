"""From answers and verdicts to scores: what counts, what does not, and what has no score."""

import pytest

from cosup_fast.data.records import Example
from cosup_fast.evaluation.judge import Verdict
from cosup_fast.evaluation.scoring import Ranked, correctness_scores, rank_scores, retrieval_scores, score
from cosup_fast.evaluation.suites import METRICS, SUITES, check_metrics, suite_of

YES, NO = Verdict(entailed=True, score=1), Verdict(entailed=False, score=0)


def test_score_of_a_grounded_answer(examples, corpus, answer_of):
    answer = answer_of(
        ("It is ", None), ("Paris", "paris"), ("or", None), ("Berlin", "rome"), retrieved=("rome", "paris")
    )
    ranked = (
        Ranked(rank=2, scores={"recall@1": 0, "recall@5": 1, "recall@20": 1, "mrr": 0.5, "ndcg@10": 1, "rprec": 0}),
    )
    scores = score(examples[0], answer, suite_of("nq"), corpus, ranked, [YES, NO], 2.0)
    assert scores == pytest.approx(
        {
            "recall@1": 0, "recall@5": 1, "recall@20": 1, "mrr": 0.5, "ndcg@10": 1, "rprec": 0,
            "passage_precision": 0.5, "passage_recall": 1, "passage_f1": 2 / 3, "answer_in_passage": 0.5,
            "containment": 1, "contains_words": 1, "exact_match": 1, "f1": 1, "grounded": 0.5,
            "perplexity": 7.38905609893,
            "retrievals": 2, "retrieval": 0.5, "correctness": 1,
        }
    )  # fmt: skip


def test_inserted_passages_are_no_part_of_the_answer(examples, answer_of):
    scores = correctness_scores(examples[0], answer_of(("no idea", "paris"), retrieved=("paris",)))
    assert set(scores.values()) == {0.0}


def test_only_the_best_candidate_is_retrieved(examples, corpus, answer_of):
    scores = retrieval_scores(examples[3], answer_of(retrieved=("nile",)), (), corpus)
    assert scores["passage_recall"] == 0  # go came second


def test_what_is_not_retrieved_counts_as_not_found_unless_nothing_can_be(examples, corpus, answer_of):
    silent = answer_of(("Paris", None))
    assert set(retrieval_scores(examples[0], silent, (), corpus).values()) == {0.0}
    assert retrieval_scores(examples[0], silent, (), {}) == {}


def test_without_grounded_segments_the_whole_text_counts(examples, answer_of):
    scores = correctness_scores(examples[1], answer_of(("777", None), ("km.", None)))
    assert (scores["containment"], scores["exact_match"], scores["f1"]) == (1, 1, 1)


def test_only_examples_with_answers_count_for_correctness(examples, corpus, answer_of):
    scores = score(examples[3], answer_of(("囲碁", "go"), retrieved=("go",)), suite_of(""), corpus, (), [YES])
    assert set(scores) == {"passage_precision", "passage_recall", "passage_f1", "grounded", "retrieval", "retrievals"}


def test_patterns_have_no_f1(examples, answer_of):
    def verdicts(text):
        scores = correctness_scores(examples[2], answer_of((text, "rome")))
        assert set(scores) == {"containment", "contains_words", "exact_match"}
        return scores["containment"], scores["exact_match"]

    assert verdicts(" 753 BC ") == (1, 1)
    assert verdicts("in 753  b.c., they say") == (1, 0)
    assert verdicts("735 BC") == (0, 0)


def test_labels(answer_of, corpus):
    claim = Example(
        id="f", dataset="fever", question="Rome is in Italy.", output=[], answers=["SUPPORTS"], gold=["rome"]
    )
    scores = score(claim, answer_of(("SUPPORTS", "rome"), retrieved=("rome",)), suite_of("FEVER"), corpus)
    assert (scores["label_accuracy"], scores["correctness"], scores["retrieval"]) == (1, 1, 1)
    assert "answer_in_passage" not in scores  # no passage writes SUPPORTS
    assert correctness_scores(claim, answer_of(("It refutes it", None)))["label_accuracy"] == 0
    assert correctness_scores(claim, answer_of(("who knows", None)))["label_accuracy"] == 0


def test_short_answer_sets(answer_of):
    example = Example(
        id="a",
        dataset="asqa",
        question="When?",
        output=[],
        answers=["In 1998 and 1999."],
        answer_sets=[["1998"], ["1999"]],
    )
    scores = score(example, answer_of(("In 1998", None)), suite_of("asqa"), {})
    assert (scores["string_em"], scores["correctness"]) == (0.5, 0.5)
    assert scores["rouge_l"] == pytest.approx(2 * 2 / 6)
    assert (
        score(example.model_copy(update={"dataset": "mine"}), answer_of(), suite_of("mine", [example]), {})[
            "correctness"
        ]
        == 0
    )


def test_every_suite_names_metrics_that_exist(examples):
    for suite in SUITES.values():
        assert (
            {suite.retrieval, suite.correctness, *suite.more} <= set(suite.metrics) == set(suite.metrics) & set(METRICS)
        )
    assert suite_of("Natural-Questions") == suite_of("nq")
    assert suite_of("ALCE_ELI5").correctness == suite_of("alce-eli5").correctness == "rouge_l"
    assert suite_of("unheard of", examples).correctness == "containment"
    assert "rouge_l" in suite_of("nq", (), ["rouge_l"]).metrics
    check_metrics(METRICS)
    with pytest.raises(ValueError, match="metric 'rouge-l' is unknown, did you mean 'rouge_l'"):
        check_metrics(["rouge-l"])


def test_ranked_lists_of_an_example_with_two_queries(examples):
    def found(*names, scores=None):
        return list(zip(names, scores or range(0, -len(names), -1)))

    lists = [
        found("rome", "paris"),
        found("seine", "paris"),
        found("paris"),
        found("nile"),
        found("go"),
        found("nile", "go"),
    ]
    one, two, three, four = rank_scores(examples, lists)
    assert [entry.rank for entry in one] == [2]
    assert [entry.rank for entry in two] == [2, None]  # the second asks for the Seine, not for Paris
    assert [entry.rank for entry in three] == [None]
    assert [entry.rank for entry in four] == [1, 2]
    (tied,) = rank_scores(examples[:1], [found("paris", "rome", "nile", scores=[1.0, 1.0, 0.5])])
    assert tied[0].rank == 2
