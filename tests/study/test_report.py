"""The report: figures by hand, what is missing, what is refused, and the three files."""

from __future__ import annotations

import json
import re

import pytest

from cosup_fast.study import StudyError, load_study
from cosup_fast.study.config import ALL
from cosup_fast.study.render import markdown, write_report
from cosup_fast.study.report import make_report
from cosup_fast.study.result import CellResult, SetFacts, SetScores

TITLES = {"cities": "01", "dates": "0"}
IDS = {"cities": ["cities/e1", "cities/e2"], "dates": ["dates/e3"]}
DOMAINS = {"cities": "in-domain", "dates": "out-of-domain"}


@pytest.fixture
def put(study):
    """A function that writes a cell's result: by system, its metrics with the values of cities and of dates."""

    def put(name, systems, *, commit="abc", titles=TITLES, probes=None, **fields):
        cell = study.cells[name]
        sets = {
            one: SetFacts(
                domain=DOMAINS[one], corpus="p", passages=11, ids=IDS[one], answer_is_title=TITLES[one],
                chance={"recall@1": 1 / 11, "recall@5": 5 / 11},
            )
            for one in IDS
        }  # fmt: skip
        scores = {
            system: {
                one: SetScores(
                    retrieval="answer_in_passage",
                    correctness="containment",
                    answer_is_retrieved_title=titles[one],
                    scores={metric: values[place] for metric, values in metrics.items() if values[place]},
                )
                for place, one in enumerate(IDS)
            }
            for system, metrics in systems.items()
        }
        curve = {"held-out": {"step": [0, 4], "ntp": [3.0, 1.0 + cell.seed], "recall_at_1": [0.0, 0.5]}}
        CellResult(
            name=name, condition=cell.condition, seed=cell.seed, trial=None, identity=cell.identity, changed={},
            commits=[commit], versions={}, machine="a machine", seconds={"training": 60.0}, steps=4, curves=curve,
            sets=sets, systems=scores, probes=probes or {}, **fields,
        ).save(cell.result)  # fmt: skip

    return put


@pytest.fixture
def filled(study, put):
    """The study with every cell but one of the second seed."""
    attention = {"questions": 3, "even": 0.5, "by_layer": {n: [0.25, 0.75] for n in ("passage", "answer", "prompt")}}
    put("ntp-seed0", {"gold": {"correctness": ("00", "1")}, "closed-book": {"correctness": ("00", "0")}})
    put("ntp-seed1", {"gold": {"correctness": ("10", "1")}, "closed-book": {"correctness": ("00", "0")}})
    put("nsp-seed0", {"ranks": {"recall@1": ("10", "0"), "recall@5": ("11", "0")}})
    put(
        "both-seed0",
        {
            "gold": {"correctness": ("11", "1"), "grounded": ([0.5, 1.0], "1")},
            "co-supervised": {"correctness": ("01", "0"), "recall@1": ("11", "1"), "recall@5": ("11", "1")},
        },
        probes={"attention": attention},
    )
    put("pair-seed0", {"pair": {"correctness": ("10", "0"), "recall@1": ("10", "0")}})
    return study


def _shown(interval):
    return round(interval.mean, 6), interval.seeds, interval.questions


def test_what_decides_is_the_paired_difference_over_the_runs_that_are_there(filled):
    report = make_report(filled)
    write, query = report.decisive
    assert report.missing == ["both-seed1"]
    # cities: 1 minus the mean 1/4 of two runs; dates: 1 - 1
    assert {scope: _shown(x) for scope, x in write.scopes.items()} == {
        ALL: ((0.75 + 0) / 2, 1, 3), "in-domain": (0.75, 1, 2), "out-of-domain": (0, 1, 1), "cities": (0.75, 1, 2),
        "dates": (0, 1, 1),
    }  # fmt: skip
    assert write.by_seed == {0: 0.5}
    assert _shown(query.scopes[ALL]) == (0.75, 1, 3)
    assert _shown(query.scopes["cities"]) == (0.5, 1, 2)


def test_every_arm_has_its_means_and_chance_stands_beside(filled):
    report = make_report(filled)
    arms = {arm.name: arm for arm in report.arms}
    assert arms["ntp/gold"].seeds == (0, 1)
    assert arms["ntp/gold"].figures["cities"]["correctness"].mean == 0.25
    assert arms["ntp/gold"].figures[ALL]["correctness"].mean == 0.625
    assert arms["both/gold"].figures["cities"]["grounded"].mean == 0.75
    assert "correctness" not in arms["nsp/ranks"].figures[ALL]
    assert report.chance[ALL] == {"recall@1": pytest.approx(1 / 11), "recall@5": pytest.approx(5 / 11)}
    gains = {(one.metric, one.before): one for one in report.gains}
    assert gains["recall@1", "pair/pair"].scopes[ALL].mean == 0.75
    assert gains["correctness", "ntp/closed-book"].scopes[ALL].mean == 0.25
    assert ("recall@1", "ntp/gold") not in gains
    assert {one.after for one in report.gains} == {"both/co-supervised"}


def test_correctness_apart_leaves_out_the_questions_whose_answer_is_the_title(filled):
    arm = next(arm for arm in make_report(filled).arms if arm.name == "both/co-supervised")
    assert arm.figures["cities"]["correctness"].mean == 0.5
    assert arm.figures["cities"]["beyond_gold_title"].mean == 0  # of the first question alone
    assert arm.figures["cities"]["beyond_gold_title"].questions == 1


def test_the_three_files_say_the_same_and_the_page_loads_nothing(filled, tmp_path):
    report = make_report(filled)
    paths = write_report(report, tmp_path / "out")
    text = {path.suffix: path.read_text() for path in paths}
    assert json.loads(text[".json"])["decisive"][0]["by_seed"] == {"0": 0.5}
    heads = re.findall(r"^## (.*)$", text[".md"], re.MULTILINE)
    assert heads[0] == "What decides"
    assert "Not finished: both-seed1." in text[".md"]
    assert "| write both/gold - ntp/gold | correct | +37.5 [" in text[".md"]
    assert "| both | 0 | 3 | 50.0 | 75.0 (layer 2) | 75.0 | 50.0 |" in text[".md"]
    page = text[".html"]
    assert [page.index(f">{head}<") for head in heads] == sorted(page.index(f">{head}<") for head in heads)
    assert page.count("<svg") == 3  # what decides, held-out curves, attention
    assert not re.findall(r"<script|<link|src=|href=\"http", page)


def test_averages_of_a_studys_own_have_tables_and_columns(filled):
    study = filled.model_copy(update={"averages": {"few": ("cities",)}})
    report = make_report(study)
    write, _ = report.decisive
    assert write.scopes["few"] == write.scopes["cities"]
    arm = next(arm for arm in report.arms if arm.name == "ntp/gold")
    assert arm.figures["few"] == arm.figures["cities"]
    assert report.chance["few"] == report.chance["cities"]
    text = markdown(report)
    assert "| all sets | in-domain | out-of-domain | few | seeds |" in text
    assert "## Every arm: few\n\nOver cities.\n\n| arm |" in text


def test_the_numbers_of_runs_of_both_sides_are_told(filled):
    report = make_report(filled)
    write, query = report.decisive
    assert (write.seeds, query.seeds) == ((1, 2), (1, 1))
    text = markdown(report)
    assert re.search(r"\| write both/gold - ntp/gold \| correct \|.*\| 1, 2 \| 3 \| 0: \+50\.0 \|", text)
    assert re.search(r"\| query .* \| 1 \| 3 \| 0: \+75\.0 \|", text)


def test_what_could_have_been_seen_stands_beside_what_decides(filled):
    report = make_report(filled)
    (query,) = (one for one in report.decisive if one.title == "query")
    whole = query.scopes[ALL]
    assert whole.error > 0
    text = markdown(report)
    row = f"| R@1 | 1 | {100 * whole.error:.1f} | {280.2 * whole.error:.1f} | 2 | 1 | 0 |"
    assert row in text  # dates alone are above 0: cities have one question of two where nothing differs
    held_out = text[text.index("## Held out") :]
    assert "| ntp | 2 | 4 | 1.500 | - | 50.0 | - | - |" in held_out


def test_a_label_is_not_asked_whether_its_passage_says_so(filled, put):
    cell = filled.cells["both-seed0"]
    result = CellResult.load(cell.result)
    dates = result.systems["gold"]["dates"].model_copy(update={"correctness": "label_accuracy"})
    systems = {**result.systems, "gold": {**result.systems["gold"], "dates": dates}}
    result.model_copy(update={"systems": systems}).save(cell.result)
    arm = next(arm for arm in make_report(filled).arms if arm.name == "both/gold")
    assert "grounded" not in arm.figures["dates"]
    assert arm.figures[ALL]["grounded"].mean == arm.figures["cities"]["grounded"].mean == 0.75
    assert arm.figures["dates"]["correctness"].mean == 1


def test_results_of_two_commits_are_refused_unless_allowed(filled, put):
    put("nsp-seed0", {"ranks": {"recall@1": ("10", "0")}}, commit="def")
    with pytest.raises(StudyError, match=r"several commits: .*def \(nsp-seed0\).*--allow-mixed-commits"):
        make_report(filled)
    assert make_report(filled, allow_mixed_commits=True).decisive


def test_a_study_without_a_result_or_with_other_questions_is_refused(study, put, write_study):
    with pytest.raises(StudyError, match="no cell of the study is finished"):
        make_report(study)
    put("ntp-seed0", {"gold": {"correctness": ("00", "1")}})
    put("ntp-seed1", {"gold": {"correctness": ("00", "1")}})
    result = json.loads(study.cells["ntp-seed1"].result.read_text())
    result["sets"]["cities"]["ids"] = ["cities/e1", "cities/other"]
    del result["crc32"]
    study.cells["ntp-seed1"].result.write_text(json.dumps(result))
    with pytest.raises(StudyError, match="cell ntp-seed1 was asked other questions of set 'cities'"):
        make_report(study)


def test_the_commands_show_and_report(filled, cosup, tmp_path):
    path = filled.results.parent.parent / "study.yaml"
    status, out, _ = cosup("study", path, "--status")
    assert status == 0
    assert re.search(r"both-seed1\s+│ waiting", out)
    assert "5 of 6 finished, about 60 s left" in out
    status, out, _ = cosup("study", path, "--status", "--only", "ntp-*")
    assert status == 0
    assert "ntp-seed0" in out
    assert "both-seed1" not in out
    assert "2 of 2 finished" in out
    status, out, _ = cosup("study", path, "--report")
    assert status == 0
    assert "+37.5 [" in out
    assert "not finished: both-seed1" in " ".join(out.split())
    assert (filled.results.parent / "report.html").is_file()
    status, _, err = cosup("study", path, "--report", "--output", tmp_path / "elsewhere")
    assert status == 1
    assert "no cell of the study is finished" in err
    status, _, err = cosup("study", path, "--report", "--only", "ntp-*")
    assert status == 1
    assert "a report covers every finished cell" in err
    status, _, err = cosup("study", path, "--report", "--status")
    assert status == 1
    assert "give one of them" in err


def test_status_shows_what_would_be_refused_and_a_selection_selects(filled, cosup):
    path = filled.results.parent.parent / "study.yaml"
    damaged, other = (filled.cells[name].result for name in ("ntp-seed0", "nsp-seed0"))
    damaged.write_bytes(damaged.read_bytes()[:-9])
    other.write_bytes(filled.cells["ntp-seed1"].result.read_bytes())
    status, out, _ = cosup("study", path, "--status")
    assert status == 0
    assert re.search(r"ntp-seed0\s+│ refused", out)
    assert re.search(r"nsp-seed0\s+│ refused", out)
    assert "3 of 6 finished" in out
    for only in ("", " , "):
        status, _, err = cosup("study", path, "--status", "--only", only)
        assert status == 1
        assert f"--only {only!r} names no cell" in err


def test_trials_are_listed_with_the_best_of_each_condition(write_study):
    tune = [{"training.lr": 0.1}, {"training.lr": 0.2}]
    study = load_study(
        write_study(
            conditions={
                "ntp": {"change": {"nsp.weight": 0, "training.lr": 0.1}, "systems": ["gold"], "tune": tune},
                "both": {"systems": ["gold"], "tune": tune},
            }
        )
    )
    for name, ntp, nsp in (("ntp-0", 2.0, None), ("ntp-1", 1.0, None), ("both-0", 2.0, 0.5), ("both-1", 1.0, 3.0)):
        cell = study.cells[f"tune-{name}"]
        CellResult(
            name=cell.name, condition=cell.condition, seed=cell.seed, trial=cell.trial, identity=cell.identity,
            changed=tune[cell.trial], commits=["abc"], versions={}, machine="", seconds={}, steps=4,
            curves={"held-out": {"step": [0, 4], "ntp": [9.0, ntp], "nsp": [None, nsp]}}, sets={}, systems={},
            probes={},
        ).save(cell.result)  # fmt: skip
    ntp = study.cells["ntp-seed0"]
    CellResult(
        name=ntp.name, condition="ntp", seed=0, trial=None, identity=ntp.identity, changed={}, commits=["def"],
        versions={}, machine="", seconds={}, steps=4, curves={}, sets={}, systems={}, probes={},
    ).save(ntp.result)  # fmt: skip
    # Trials have a table of their own, and may be of another commit than the cells.
    report = make_report(study)
    found = [(row.condition, row.changed["training.lr"], row.loss, row.best) for row in report.trials]
    assert found == [
        ("ntp", 0.1, 2.0, False), ("ntp", 0.2, 1.0, True), ("both", 0.1, 2.5, True), ("both", 0.2, 4.0, False),
    ]  # fmt: skip
    assert [row.used for row in report.trials] == [True, False, False, False]
    text = markdown(report)
    assert "| ntp | training.lr=0.1 | 2.000 | 2.000 | - | - | - | used |" in text
    assert "| ntp | training.lr=0.2 | 1.000 | 1.000 | - | - | - | best |" in text
