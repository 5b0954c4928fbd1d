"""What a cell's file holds: values of questions, curves, and how two configurations differ."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosup_fast.files.fields import differences
from cosup_fast.study import StudyError
from cosup_fast.study.result import CellResult, SetFacts, SetScores, curves, pack, unpack


@given(st.lists(st.none() | st.floats(0, 1)))
def test_values_come_back_rounded_to_four_digits(values):
    assert unpack(pack(values)) == pytest.approx([None if x is None else round(x, 4) for x in values])


def test_shares_of_one_question_are_a_sign_each():
    assert pack([1.0, 0.0, None, 1]) == "10-1"
    assert pack([1.0, 0.5]) == [1.0, 0.5]


def test_fields_that_differ_are_named():
    then = {"run": {"lr": 0.1, "steps": 5}, "systems": ["gold"], "old": 1}
    assert differences(then, then) == {}
    assert differences(then, {**then, "run": {"lr": 0.2, "steps": 5}}) == {"run.lr": [0.1, 0.2]}
    assert differences(then, {"run": then["run"], "systems": ["gold"]}) == {"old": [1, None]}
    assert list(differences(then, {**then, "systems": ["gold", "bm25"]})) == ["systems"]


def test_curves_are_columns_and_steps_are_means_of_spans():
    records = [
        {"kind": "held-out", "step": 0, "ntp": 3.0, "nsp": None},
        *({"kind": "step", "step": i + 1, "ntp": float(i), "nsp": None, "lr": 0.1} for i in range(5)),
        {"kind": "held-out", "step": 5, "ntp": 1.0, "nsp": None},
    ]
    found = curves(records, points=3)
    assert found["held-out"] == {"step": [0, 5], "ntp": [3.0, 1.0], "nsp": [None, None]}
    assert found["step"]["step"] == [2, 4, 5]
    assert found["step"]["ntp"] == [0.5, 2.5, 4.0]
    assert found["step"]["nsp"] == [None, None, None]
    assert found["diagnosis"] == {}


def test_no_changed_byte_of_a_cell_is_used(tmp_path):
    facts = SetFacts(domain="", corpus="p", passages=9, ids=["a", "b"], answer_is_title="01", chance={"recall@1": 0.1})
    scores = SetScores(
        retrieval="recall@1", correctness="f1", answer_is_retrieved_title="-1", scores={"f1": [0.1234, None]}
    )
    result = CellResult(
        name="é", condition="both", seed=0, trial=None, identity={"run": {"lr": 1e-3}}, changed={}, commits=["abc"],
        versions={"torch": "2"}, machine="", seconds={"training": 1.5}, steps=4, curves={"step": {"ntp": [3.0, 1.25]}},
        sets={"nq": facts}, systems={"gold": {"nq": scores}}, probes={"attention": {"even": 0.5}},
    )  # fmt: skip
    path = tmp_path / "cell.json"
    result.save(path)
    assert CellResult.load(path) == result
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(StudyError, match=r"cell.json is not a result of a cell that can be read"):
            CellResult.load(path)


def test_a_cell_without_a_checksum_is_read(tmp_path):
    path = tmp_path / "cell.json"
    result = CellResult(
        name="a", condition="a", seed=0, trial=None, identity={}, changed={}, commits=[], versions={}, machine="",
        seconds={}, steps=0, curves={}, sets={}, systems={}, probes={},
    )  # fmt: skip
    path.write_text(result.model_dump_json())
    assert CellResult.load(path) == result
