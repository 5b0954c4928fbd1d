"""Metrics of one question: against the definitions of their sources, and for any text."""

import math
import sys

import pytest
from rouge_score.rouge_scorer import RougeScorer

from cosup_fast.data.answers import contains_answer
from cosup_fast.evaluation import evaluate
from cosup_fast.evaluation.metrics import (
    RANKING,
    best_f1,
    containment,
    exact_match,
    is_gold,
    named_label,
    normalize,
    passage_scores,
    r_precision,
    ranking_scores,
    rouge_l,
    string_em,
    token_f1,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel\tTower!", "eiffel tower"),
        ("A man, a plan: an apple", "man plan apple"),
        ("U.S.A. father-in-law $5", "usa fatherinlaw 5"),
        ("theatre and another", "theatre and another"),
        ("CAFE\u0301 “quoted” – dash…", "café quoted dash"),
        ("ﬁne Ⅳ ①", "fine iv 1"),
        ("囲碁。👍", "囲碁👍"),
        ("The", ""),
        ("", ""),
    ],
)
def test_normalize(text, normal):
    assert normalize(text) == normal
    assert normalize(normal) == normal


def test_exact_match_and_f1():
    assert exact_match(" the Paris!", ["Rome", "paris"]) == 1
    assert exact_match("Paris, France", ["Rome", "paris"]) == 0
    assert token_f1("the Paris", "Paris!") == 1
    assert token_f1("Paris in France", "Paris") == pytest.approx(2 * (1 / 3) / (1 / 3 + 1))
    assert token_f1("a b b c", "b b d") == pytest.approx(2 * 2 / (3 + 3))  # "a" is an article
    assert token_f1("x", "y") == 0
    assert token_f1("", "y") == token_f1("x", "the") == 0
    assert token_f1("the", "an") == token_f1("", "the") == token_f1("", "") == 0
    assert token_f1("The", "the!") == 1
    assert best_f1("Paris in France", ["Rome", "Paris"]) == pytest.approx(0.5)


def test_string_em_is_the_share_of_readings_that_are_answered():
    text = "It was released in 1998 in Japan, and in the USA in 1999."
    assert string_em(text, [["1998"], ["1999", "99"], ["2000"]]) == pytest.approx(2 / 3)
    assert string_em("", [["1998"]]) == 0


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("SUPPORTS", "SUPPORTS"),
        ("This refutes the claim; nothing supports it.", "REFUTES"),
        ("The claim is true.", "SUPPORTS"),
        ("False.", "REFUTES"),
        ("There is not enough info to tell.", "NOT ENOUGH INFO"),
        ("unsupported", None),
        ("", None),
    ],
)
def test_the_label_named_first_counts(text, label):
    assert named_label(text) == label


def test_rouge_l_is_that_of_the_package_for_ascii_text():
    pairs = [("the cat sat on the mat", "a cat was on the mat"), ("x-y 5.3", "X y, 5 3!"), ("one", "two"), ("", "x")]
    package = RougeScorer(["rougeL"])
    for text, reference in pairs:
        assert rouge_l(text, [reference]) == pytest.approx(package.score(reference, text)["rougeL"].fmeasure)
    assert rouge_l("the cat sat on the mat", ["nothing", "a cat was on the mat"]) == pytest.approx(2 * 4 / 12)
    assert rouge_l("Père Noël", ["père noël"]) == 1  # the package's own tokenizer breaks these words


# KILT, ALCE and SQuAD as their scripts define them, by hand, except that an empty output is never right.
@pytest.mark.parametrize(
    ("text", "answers", "substring", "words", "exact", "f1"),
    [
        ("a party of artists", ["art"], 1, 0, 0, 0),
        ("in 1955", ["5"], 1, 0, 0, 0),
        ("New York City", ["york cit"], 1, 0, 0, 0.4),
        ("Paris", ["paris!"], 1, 1, 1, 1),
        ("the city of Paris", ["Paris"], 1, 1, 0, 0.5),
        ("A", ["A"], 1, 1, 1, 1),
        ("the", ["A"], 0, 0, 0, 0),
        ("", ["A"], 0, 0, 0, 0),
        ("", ["Paris"], 0, 0, 0, 0),
        ("The The", ["The The"], 1, 1, 1, 1),
        ("++", ["++"], 1, 1, 1, 1),
        ("", ["++"], 0, 0, 0, 0),
    ],
)
def test_published_rules_and_ours(text, answers, substring, words, exact, f1):
    assert containment(text, answers) == substring
    assert string_em(text, [answers, ["never"]]) == substring / 2
    assert contains_answer(text, answers) == words
    assert exact_match(text, answers) == exact
    assert best_f1(text, answers) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("ranked", "outputs", "expected"),
    [
        ("19", ["1", "2"], 1.0),
        ("21", ["1", "23"], 0.5),
        ("21", ["1", "2"], 1.0),
        ("12", ["12"], 1.0),
        ("31", ["12"], 0.5),
        ("", ["1"], 0.0),
        ("1", [], 0.0),
        ("1", ["12"], 0.5),
    ],
)
def test_r_precision_is_that_of_the_best_output(ranked, outputs, expected):
    assert r_precision(list(ranked), [list(output) for output in outputs]) == expected
    (scores,) = ranking_scores([(list(ranked), set("".join(outputs)) or {"x"})], [[list(o) for o in outputs]])
    assert scores["rprec"] == expected


def test_ranking_scores_by_hand():
    rankings = [(["a", "b", "c"], {"b", "x"}), (["a"], {"a"}), (["a", "b"], {"x"}), ([], {"a"})]
    first, right, wrong, empty = ranking_scores(rankings)
    assert first == pytest.approx(
        {"recall@1": 0, "recall@5": 0.5, "recall@20": 0.5, "mrr": 0.5, "rprec": 0.5,
         "ndcg@10": (1 / math.log2(3)) / (1 + 1 / math.log2(3))}
    )  # fmt: skip
    assert set(right.values()) == {1.0}
    assert set(wrong.values()) == set(empty.values()) == {0.0}
    assert list(wrong) == list(RANKING)


def test_paragraphs_count_for_their_page_once():
    assert is_gold("123#4", {"123"}) == "123"
    assert is_gold("123#4-6", {"123"}) == "123"
    assert is_gold("123#4", {"123#4", "123"}) == "123#4"
    assert is_gold("wiki:C#", {"wiki:C"}) is None
    assert is_gold("1234", {"123"}) is None
    assert is_gold("kilt:12:3", {"kilt:12"}) == "kilt:12"
    assert is_gold("wiki:12:3", {"wiki:12"}) is None
    (scores,) = ranking_scores([(["9#0", "7#2", "7#1", "8#0"], {"7", "8"})])
    assert (scores["mrr"], scores["rprec"], scores["recall@5"]) == (0.5, 0.5, 1)
    assert passage_scores(["7#1", "7#2", "9#0"], ["7", "8"]) == {
        "passage_precision": 0.5, "passage_recall": 0.5, "passage_f1": 0.5
    }  # fmt: skip


def test_passage_scores():
    assert passage_scores(["a", "a", "b", "c"], ["a", "x"]) == pytest.approx(
        {"passage_precision": 1 / 3, "passage_recall": 0.5, "passage_f1": 0.4}
    )
    assert set(passage_scores([], ["a"]).values()) == {0.0}
    assert set(passage_scores(["a"], ["a", "a"]).values()) == {1.0}


@pytest.mark.parametrize("module", ["scipy.stats", "ir_measures", "rouge_score"])
def test_a_missing_package_is_named_before_any_work(system, examples, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(system.retriever, "rank", None)  # the work
    with pytest.raises(ImportError, match=r"evaluation needs .*: pip install 'cosup-fast\[eval\]'"):
        evaluate(system, examples)
