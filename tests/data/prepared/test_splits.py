"""Splits: the committed table obeys the rules, and a planted leak is caught."""

import pytest

from cosup_fast.data.prepared.splits import (
    HELD_OUT_DATASETS,
    HELD_OUT_TOPICS,
    SPLITS,
    TABLE,
    assign,
    check_splits,
    read_table,
)
from cosup_fast.data.records import DataError, Example, Passage, Segment

CORPUS = {f"p{i}" for i in range(6)}


def example(id, passage, question=None, gold=()):
    segment = Segment(text="x", passage=passage)
    return Example(id=id, question=question or f"question {id}", output=[segment], gold=list(gold))


def clean():
    return {
        "train": [example("a", "p0"), example("b", "p1")],
        "dev": [example("c", "p2")],
        "test-in": [example("d", "p3")],
        "test-out": [example("e", "p3"), example("f", "p4")],
    }


def test_clean_splits_pass():
    check_splits(clean(), CORPUS)


@pytest.mark.parametrize(
    ("split", "leak", "message"),
    [
        ("dev", example("x", "p0"), "dev: example 'x': .*found 'p0', which is gold for 'a' of train"),
        ("test-in", example("x", "p1"), "test-in: example 'x': .*found 'p1', which is gold for 'b' of train"),
        ("test-out", example("x", "p2"), "test-out: example 'x': .*found 'p2', which is gold for 'c' of dev"),
        ("test-out", example("x", "p5", gold=["p4", "p0"]), "found 'p0', which is gold for 'a' of train"),
        ("test-out", example("x", "p0", gold=["p4"]), "found 'p0', which is gold for 'a' of train"),
        ("test-in", example("x", "p5", "Question: A!"), "found that of 'a' of train: 'Question: A!'"),
        ("test-out", example("x", "p5", "question d"), "found that of 'd' of test-in"),
        ("train", example("x", "p9"), "train: example 'x': expected gold passages of the corpus, found 'p9'"),
    ],
    ids=[
        "train-dev",
        "train-test",
        "dev-test",
        "second gold",
        "cited beside gold",
        "question",
        "question between tests",
        "unknown",
    ],
)
def test_a_planted_leak_is_caught(split, leak, message):
    splits = clean()
    splits[split].append(leak)
    with pytest.raises(DataError, match=message):
        check_splits(splits, CORPUS)


def test_what_training_cites_beside_its_gold_is_trained_on():
    splits = clean()
    splits["train"].append(example("x", "p5", gold=["p0"]))
    splits["test-in"].append(example("y", "p5"))
    with pytest.raises(DataError, match="found 'p5', which is gold for 'x' of train"):
        check_splits(splits, CORPUS)


def test_pages_of_held_out_topics_and_data_sets_are_tested_only():
    passages = [Passage(id=f"p{i}", title="t", text="x", topic="History") for i in range(200)]
    passages.append(Passage(id="art", title="t", text="x", topic="Arts"))
    gold = [("nq", str(i), f"p{i}") for i in range(200)] + [("squad", "0", "p0"), ("cloze", "0", "art")]
    assigned = {(item.dataset, item.page): item.split for item in assign(gold, passages)}
    assert assigned["squad", "p0"] == "test-out"
    assert assigned["nq", "p0"] == "test-in"
    assert assigned["cloze", "art"] == "test-out"
    assert {split for (dataset, _), split in assigned.items() if dataset == "nq"} == {"train", "dev", "test-in"}


def test_the_committed_table_obeys_the_rules():
    items = read_table()
    assert items == sorted(set(items))
    assert len({(item.dataset, item.source) for item in items if item.dataset != "cloze"}) == sum(
        item.dataset != "cloze" for item in items
    )
    roles = {"train": set(), "dev": set(), "test-in": set(), "test-out": set()}
    for item in items:
        roles[item.split].add(item.page)
        assert item.dataset not in HELD_OUT_DATASETS or item.split == "test-out"
    assert not roles["train"] & (roles["dev"] | roles["test-in"] | roles["test-out"])
    assert not roles["dev"] & (roles["test-in"] | roles["test-out"])
    assert all(len(roles[split]) > 400 for split in SPLITS)
    assert TABLE.stat().st_size < 2**20
    assert len(HELD_OUT_TOPICS) in (2, 3)
