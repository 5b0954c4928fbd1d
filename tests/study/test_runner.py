"""Running a study: kills at any moment, refusals, pruning, several processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from cosup_fast.files import locked, read_object
from cosup_fast.study import StudyError, load_study, read_cell, run_study, runner
from cosup_fast.study.runner import check_begun
from cosup_fast.study.status import state_of

# Imports once, then runs the study in forks: five are killed where they happen to be, the last one ends by itself.
KILLED_AGAIN_AND_AGAIN = """
import os, random, signal, sys, time
from cosup_fast.study import load_study, run_study
import cosup_fast.model, faiss, torch.utils.tensorboard

random.seed(int(sys.argv[2]))
for kill in (*range(5), None):
    pid = os.fork()
    if pid == 0:
        failed = run_study(load_study(sys.argv[1]))
        print(*failed, sep="\\n", end="", flush=True)
        os._exit(len(failed))
    if kill is None:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    else:
        time.sleep(random.uniform(0.3, 3))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
"""


def _run(study, **options):
    console = Console(file=StringIO(), width=300)
    failed = run_study(study, console=console, **options)
    return failed, console.file.getvalue()


def _figures(cell):
    """A cell's result without its folder's name and what differs from run to run; its numbers with a point, apart."""
    result = json.loads(cell.result.read_text().replace(str(cell.study.results.parent.parent), ""))
    for name in ("seconds", "identity", "machine", "crc32"):
        del result[name]
    numbers = []
    return json.loads(json.dumps(result), parse_float=lambda text: numbers.append(float(text))), numbers


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_study):
    """A study whose cells are all finished, and what was printed; tests leave it as it is."""
    study = load_study(make_study(tmp_path_factory.mktemp("finished")))
    failed, printed = _run(study)
    assert failed == []
    return study, printed


def test_every_cell_has_one_small_file_and_its_checkpoints_are_gone(finished):
    study, printed = finished
    assert [*study.cells] == ["ntp-seed0", "nsp-seed0", "both-seed0", "pair-seed0", "ntp-seed1", "both-seed1"]
    assert sorted(path.name for path in study.results.iterdir()) == sorted(f"{name}.json" for name in study.cells)
    for cell in study.cells.values():
        result = read_cell(cell)
        assert result is not None
        assert state_of(cell) == "finished"
        assert cell.result.stat().st_size < 20_000
        assert not (cell.work / "run" / "checkpoints").exists()
        assert result.sets["cities"].ids == ["cities/e1", "cities/e2"]
        assert {*result.systems} == ({"pair"} if cell.parts else {*cell.settings.systems})
        assert {*result.probes} == {*cell.settings.probes} - {"spaces"}
        assert result.curves["spaces"].get("step", []) == ([0, 2, 4] if "spaces" in cell.settings.probes else [])
    assert (study.work_folder / ".gitignore").read_text() == "*\n"
    assert _run(study)[1].strip() == "6 of 6 cells are finished"


def test_ranks_are_those_of_the_model_evaluated_as_a_system(write_study):
    study = load_study(write_study(conditions={"one": {"systems": ["co-supervised", "ranks"]}}, seeds=[3]))
    assert _run(study)[0] == []
    systems = read_cell(study.cell("one", 3)).systems
    for name in ("cities", "dates"):
        for metric, values in systems["ranks"][name].scores.items():
            assert systems["co-supervised"][name].scores[metric] == values


def test_killed_at_any_moment_a_study_ends_with_the_same_figures(finished, write_study):
    path = write_study()
    command = [sys.executable, "-c", KILLED_AGAIN_AND_AGAIN, path, "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0), done.stderr
    for name, cell in load_study(path).cells.items():
        result, numbers = _figures(cell)
        expected, expected_numbers = _figures(finished[0].cells[name])
        assert result == expected
        assert numbers == pytest.approx(expected_numbers, rel=1e-3)  # sums split among threads differ a little


def test_a_cell_made_with_another_configuration_is_refused_by_name(write_study, finished, tmp_path):
    study, _ = finished
    ours = load_study(write_study())
    ours.results.mkdir(parents=True)
    result = read_object(study.cells["ntp-seed0"].result)
    del result["crc32"]
    (ours.results / "ntp-seed0.json").write_text(json.dumps(result))
    with pytest.raises(StudyError, match=r"cell ntp-seed0: .*ntp-seed0\.json was made with run\.data\.corpus="):
        run_study(ours)
    (ours.results / "ntp-seed0.json").write_text('{"format": "something')
    with pytest.raises(StudyError, match=r"ntp-seed0\.json is not a result of a cell .* remove it"):
        run_study(ours)


def test_a_field_that_a_later_version_adds_leaves_finished_cells_valid(finished):
    cell = finished[0].cells["ntp-seed0"]
    path = cell.result
    text = path.read_text()
    result = json.loads(text)
    del result["crc32"], result["identity"]["run"]["training"]["clip"], result["identity"]["evaluation"]["passages"]
    try:
        path.write_text(json.dumps(result))
        assert read_cell(cell) is not None
        del result["identity"]["run"]["training"]["lr"]  # which this study changes
        path.write_text(json.dumps(result))
        with pytest.raises(StudyError, match=r"was made with run\.training\.lr="):
            read_cell(cell)
    finally:
        path.write_text(text)


def test_a_missing_test_set_is_refused_before_anything_is_trained(write_study, tmp_path, monkeypatch):
    monkeypatch.setenv("COSUP_HOME", str(tmp_path / "home"))
    sets = [{"name": "nq", "examples": "questions/test-in", "corpus": "wiki-leads", "domain": "in-domain"}]
    study = load_study(write_study(sets=sets))
    with pytest.raises(StudyError, match=r"set 'nq': .*cosup-fast data prepare wiki-leads"):
        run_study(study)
    assert not study.work_folder.exists()


def test_a_failed_cell_does_not_stop_the_others_and_one_at_work_elsewhere_is_left_alone(write_study):
    conditions = {
        "broken": {"change": {"training.spike_factor": None, "training.lr": 1e30}, "systems": ["gold"]},
        "busy": {"systems": ["gold"]},
        "fine": {"train": False, "systems": ["gold"]},
    }
    study = load_study(write_study(conditions=conditions, seeds=[0]))
    busy = study.cell("busy", 0)
    busy.work.mkdir(parents=True)
    with locked(busy.work):
        assert state_of(busy) == "running"
        failed, printed = _run(study)
    assert len(failed) == 1
    assert failed[0].startswith("broken-seed0: step ")
    assert "busy-seed0: another process works on it" in printed
    assert [state_of(study.cell(name, 0)) for name in conditions] == ["stopped", "waiting", "finished"]
    assert read_cell(study.cell("fine", 0)).steps == 0


def test_only_makes_what_it_names_and_a_pair_trains_what_it_lacks(write_study, monkeypatch):
    study = load_study(write_study())
    with pytest.raises(StudyError, match="--only 'boht-seed0' matches no cell, did you mean 'both-seed0'"):
        run_study(study, only="boht-seed0")
    failed, _ = _run(study, only="ntp-seed0")
    assert failed == []
    assert [name for name, cell in study.cells.items() if cell.result.is_file()] == ["ntp-seed0"]
    folder = study.cells["ntp-seed0"].work / "run" / "checkpoints"
    assert folder.is_dir()  # the pair reads it
    with monkeypatch.context() as patch:
        patch.setattr(runner, "make_cell", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            _run(study, only="pair-*")
    shutil.rmtree(folder)
    before_the_lock = []

    def noticed(work, *, wait=True):
        if wait:
            before_the_lock.append((work / "run" / "metrics.jsonl").is_file())
        return locked(work, wait=wait)

    monkeypatch.setattr(runner, "locked", noticed)
    failed, printed = _run(study, only="pair-*")
    assert failed == []
    assert before_the_lock == [True, True]  # another process may be training there: nothing is removed yet
    assert "pair-seed0: the checkpoint of ntp-seed0 is gone, so it is trained again" in printed
    assert not folder.exists()
    assert (study.cells["nsp-seed0"].work / "run" / "checkpoints").is_dir()  # its own cell is not finished


def test_trials_train_for_tuning_steps_and_are_not_evaluated(write_study):
    tune = [{"training.lr": 1e-3}, {"training.lr": 1e-2, "training.steps": 1}]
    study = load_study(
        write_study(conditions={"one": {"systems": ["gold"], "tune": tune}}, seeds=[0], tuning={"steps": 2})
    )
    assert _run(study, only="tune-*")[0] == []
    results = [read_cell(study.cells[f"tune-one-{i}"]) for i in (0, 1)]
    assert [result.steps for result in results] == [2, 1]
    assert [result.changed for result in results] == tune
    assert all(not result.systems and result.curves["held-out"]["ntp"] for result in results)


def test_an_embseq_of_random_weights_is_made_once_and_is_the_same_for_every_cell(write_study, llama_folder):
    conditions = {"random": {"random_embseq": True, "systems": ["ranks"]}}
    study = load_study(write_study(conditions=conditions))
    cell = study.cell("random", 0)
    assert cell.identity["run"]["model"]["embseq"] == f"random weights of {llama_folder}"
    assert _run(study)[0] == []
    (folder,) = (study.work_folder / "models").iterdir()
    made = load_file(folder / "model.safetensors")
    theirs = load_file(Path(llama_folder) / "model.safetensors")
    assert made.keys() == theirs.keys()
    assert not any(torch.equal(made[name], theirs[name]) for name in made if "norm" not in name)
    held_out = [read_cell(study.cell("random", seed)).curves["held-out"]["nsp"][0] for seed in (0, 1)]
    assert held_out[0] == held_out[1]


def test_a_cell_begun_with_other_settings_is_not_resumed_with_new_ones(write_study):
    conditions = {"one": {"systems": ["gold"], "change": {"training.lr": 1e-3}}}
    cell = load_study(write_study(conditions=conditions, seeds=[0])).cell("one", 0)
    cell.work.mkdir(parents=True)
    check_begun(cell)
    check_begun(cell)
    conditions["one"]["change"] = {"training.lr": 1e-2}
    failed, _ = _run(load_study(write_study(conditions=conditions, seeds=[0])))
    assert failed == [
        "one-seed0: cell one-seed0 was begun with training.lr=0.001, the study now says 0.01: restore it, or remove "
        f"{cell.work} to begin again"
    ]


def test_a_model_may_write_in_half_precision(write_study):
    conditions = {"one": {"train": False, "systems": ["co-supervised", "ranks", "gold"], "probes": ["attention"]}}
    study = load_study(write_study(conditions=conditions, seeds=[0], evaluation={"dtype": "bfloat16"}))
    assert _run(study)[0] == []
    result = read_cell(study.cell("one", 0))
    assert result.systems["ranks"]["cities"].scores["recall@20"] == "11"  # a pool of 11 passages
    assert result.identity["evaluation"]["dtype"] == "bfloat16"
