"""A study's YAML: the cells that follow from it, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosup_fast.study import StudyError, load_study

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_cells_stand_in_the_order_in_which_they_are_made(study):
    assert [*study.cells] == ["ntp-seed0", "nsp-seed0", "both-seed0", "pair-seed0", "ntp-seed1", "both-seed1"]
    assert study.cells["ntp-seed1"].run.nsp.weight == 0
    assert study.cells["ntp-seed1"].run.training.seed == 1
    assert study.cells["both-seed0"].run.nsp.weight == 1
    assert [part.name for part in study.cells["pair-seed0"].parts] == ["ntp-seed0", "nsp-seed0"]


def test_what_decides_nothing_is_no_part_of_a_cells_identity(write_study, study):
    before = study.cells["ntp-seed0"].identity
    base = {**study.base, "training": {**study.base["training"], "log_every": 7, "device": "cpu"}}
    assert load_study(write_study(base=base)).cells["ntp-seed0"].identity == before
    base["training"]["lr"] = 0.5
    assert load_study(write_study(base=base)).cells["ntp-seed0"].identity != before


def test_averages_are_for_the_report_alone(write_study, study):
    named = load_study(write_study(averages={"few": ["cities"]}))
    assert named.averages == {"few": ("cities",)}
    assert {name: cell.identity for name, cell in named.cells.items()} == {
        name: cell.identity for name, cell in study.cells.items()
    }


def test_sections_and_dotted_names_say_the_same(write_study):
    for change in ({"nsp.weight": 0.3}, {"nsp": {"weight": 0.3}}):
        study = load_study(write_study(conditions={"one": {"change": change, "systems": ["gold"]}}))
        assert study.cells["one-seed0"].run.nsp.weight == 0.3


ONE = {"systems": ["gold"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [0, 1, 0]}, "seeds: seed 0 is named twice"),
        ({"seeds": []}, r"seeds=\[\]: name at least one seed"),
        ({"conditions": {"one": {**ONE, "seeds": [3, 3]}}}, r"conditions\.one\.seeds: seed 3 is named twice"),
        ({"conditions": {}}, "conditions: a study needs at least one"),
        ({"conditions": {"One": ONE}}, "conditions: 'One' names files"),
        ({"conditions": {"one": {}}}, r"systems=\[\]: name at least one system"),
        ({"conditions": {"one": {"systems": ["gold", "gold"]}}}, "systems: 'gold' is named twice"),
        ({"conditions": {"one": {"systems": ["glod"]}}}, "'glod' is unknown, did you mean 'gold'"),
        (
            {"conditions": {"one": {**ONE, "probes": ["atention"]}}},
            "probes.0: Input should be 'attention' or 'spaces', found 'atention'",
        ),
        ({"conditions": {"one": {**ONE, "change": {"nsp.wait": 1}}}}, "condition 'one': unknown field 'nsp.wait'"),
        ({"conditions": {"one": {**ONE, "change": {"training.lr": -1}}}}, "condition 'one': training.lr"),
        ({"conditions": {"one": {**ONE, "seeds": [1000]}}}, "1000 is tuning.seed"),
        (
            {"conditions": {"one": {**ONE, "tune": [{"training.lr": 1}]}, "two": {**ONE, "tune": [{}, {}]}}},
            "equal effort, so as many trials each, found one 1, two 2",
        ),
        (
            {"conditions": {"one": ONE, "both": {"pair": {"writer": "one", "retriever": "tow"}}}},
            r"conditions\.both\.pair: 'tow' is not a condition that is trained",
        ),
        (
            {"conditions": {"one": ONE, "both": {"pair": {"writer": "one", "retriever": "one"}, "seeds": [4]}}},
            "conditions.both: 'one', which it is made of, has no seed 4",
        ),
        (
            {"conditions": {"one": ONE, "both": {"pair": {"writer": "one", "retriever": "one"}, **ONE}}},
            "a pair trains nothing and is one system",
        ),
        ({"main": "ntp/gold/"}, "arm 'ntp/gold/' is not in this study, did you mean 'ntp/gold'"),
        ({"sets": []}, "is evaluated and sets=\\[\\] has nothing to ask"),
        ({"set": []}, "set: Extra inputs are not permitted"),
        ({"averages": {"few": ["citys"]}}, r"averages\.few: 'citys' is none of cities, dates, did you mean 'cities'"),
        ({"averages": {"few": ["cities", "cities"]}}, r"averages\.few: 'cities' is named twice"),
        ({"averages": {"few": []}}, r"averages\.few=\[\]: name at least one set"),
        ({"averages": {"dates": ["cities"]}}, r"averages\.dates: the report has another row of that name"),
        ({"averages": {"in-domain": ["cities"]}}, r"averages\.in-domain: the report has another row of that name"),
    ],
)
def test_what_cannot_be_is_refused(changes, message, write_study):
    with pytest.raises(StudyError, match=message):
        load_study(write_study(**changes))


def test_a_condition_named_twice_is_refused(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(
        "output: x\nconditions:\n  one: {systems: [gold]}\n  two: {systems: [gold]}\n  one: {systems: [gold]}\n"
    )
    with pytest.raises(StudyError, match=r"(?s)the key 'one' occurs twice, first in line 3.*line 5"):
        load_study(path)
    with pytest.raises(StudyError, match="no such study"):
        load_study(tmp_path / "none.yaml")
    path.write_text("- 1\n")
    with pytest.raises(StudyError, match="expected a mapping"):
        load_study(path)


@pytest.mark.parametrize("name", ["study", "study-checks"])
def test_the_studies_that_come_with_the_project_are_whole(name):
    study = load_study(EXAMPLES / f"{name}.yaml")
    assert all(cell.identity for cell in study.cells.values())
    steps = {cell.run.training.steps * cell.run.training.batch_size for cell in study.cells.values() if cell.trains}
    assert all(examples in (160 * 16, 40 * 16, 400 * 16, 640 * 16) for examples in steps)


def test_the_pilot_is_a_study_of_equal_trials():
    *trials, _ = load_study(EXAMPLES / "study-pilot.yaml").cells.values()
    assert {cell.run.training.steps * cell.run.training.batch_size for cell in trials} == {24 * 32}
    assert all(cell.run.training.eval_every == cell.run.training.steps for cell in trials)
