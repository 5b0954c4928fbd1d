"""A run of `python -m benchmarks gpu`: budget, crashes, resumption; and all of its tasks, rehearsed."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from benchmarks import cli
from benchmarks.gpu import session
from benchmarks.gpu.page import page
from benchmarks.gpu.session import Session, Setting, Task
from benchmarks.gpu.tasks import TASKS, outcomes

ROOT = Path(__file__).resolve().parents[2]
CPU = Setting("cpu", rehearse=True)


@pytest.fixture(scope="module")
def bad():
    """A module that worker processes can import too."""
    sys.path.insert(0, str(Path(__file__).parent))
    import gpu_tasks  # pyright: ignore[reportMissingImports]

    yield gpu_tasks
    sys.path.remove(str(Path(__file__).parent))


class InThisProcess:
    """A worker without a process, where none has to crash."""

    def __init__(self, setting):
        self.setting = setting

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def run(self, task, limit):
        return session.perform(task, self.setting, limit)[0]


def task(name, run, seconds=60.0, least=1.0):
    return Task(name, name, run, seconds, least)


def test_a_crash_a_hang_and_an_error_are_results_and_the_next_task_runs(bad, tmp_path):
    tasks = [
        task("first", partial(bad.number, 1)),
        task("fails", bad.fails),
        task("second", partial(bad.number, 2)),
        task("dies", bad.dies),
        task("absent", bad.absent),
        task("sleeps", bad.sleeps, seconds=1.0),
        task("third", partial(bad.number, 3)),
    ]
    kept = []
    measured = Session(tmp_path / "out", CPU, 600, kept.append)
    assert measured.run(tasks) == []
    results = {one.name: measured.result(one) for one in tasks}
    assert list(results.values()) == kept
    assert {name: result.status for name, result in results.items()} == {
        "first": "ok", "fails": "failed", "second": "ok", "dies": "failed", "absent": "absent", "sleeps": "failed",
        "third": "ok",
    }  # fmt: skip
    processes = [results[name].found["process"] for name in ("first", "second", "third")]
    assert processes[0] == processes[1] != processes[2]  # an error leaves the worker alive, a crash does not
    assert results["fails"].reason == "ArithmeticError: no good"
    assert "gpu_tasks.py" in results["fails"].trace
    assert results["dies"].reason == "the worker died with exit status -9"
    assert results["absent"].reason == "needs a package: pip install it"
    assert results["sleeps"].reason == "stopped after 1 s"
    assert "torch" in results["third"].machine
    text = page(tasks, results, "    command", [])
    assert "| dies | dies |" in text
    assert "- value: 3" in text


def test_a_run_resumes_where_one_stopped(bad, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "Worker", InThisProcess)
    now = [0.0]
    tasks = [
        task("one", partial(bad.number, 1)),
        task("large", partial(bad.number, 2), least=50),
        task("fails", bad.fails),
    ]
    assert Session(tmp_path, CPU, 30, clock=lambda: now[0]).run(tasks) == [
        "large"
    ]  # there was no time for it, and for the smaller one behind it
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(before) == {"one.json", "fails.json"}
    assert Session(tmp_path, CPU, 600).run(tasks) == []
    assert (tmp_path / "one.json").read_text() == before["one.json"]
    assert (tmp_path / "fails.json").read_text() == before["fails.json"]
    corrected = [*tasks[:2], task("fails", partial(bad.number, 4))]
    assert Session(tmp_path, CPU, 600).run(corrected, retry=True) == []
    assert json.loads((tmp_path / "fails.json").read_text())["found"]["value"] == 4
    assert (tmp_path / "one.json").read_text() == before["one.json"]
    assert not list(tmp_path.glob(".*"))


def test_a_damaged_result_is_named(bad, tmp_path):
    (tmp_path / "one.json").write_text("{")
    with pytest.raises(ValueError, match=r"one.json is not a result .*: remove it"):
        Session(tmp_path, CPU, 600).run([task("one", partial(bad.number, 1))])


def test_what_pytest_said_is_read_also_when_it_was_stopped():
    log = (
        "tests/gpu/test_a.py::test_x[a b-c] PASSED [ 50%]\ntests/gpu/test_a.py::test_y FAILED [100%]\n"
        "tests/gpu/test_a.py::test_z SKIPPED (needs two) [100%]\n"
        "FAILED tests/gpu/test_a.py::test_y - ValueError: wrong\n"
    )
    found = outcomes(log, finished=False)
    assert (found["passed"], found["failed"], found["skipped"], found["finished"]) == (1, 1, 1, False)
    assert found["failures"] == {"tests/gpu/test_a.py::test_y": "ValueError: wrong"}
    with pytest.raises(RuntimeError, match="pytest ran nothing: no such file"):
        outcomes("no such file", finished=True)


def test_names_are_files_and_unique():
    names = [one.name for one in TASKS]
    assert len(set(names)) == len(names)
    assert all(name.replace("-", "").isalnum() for name in names)


def test_without_a_gpu_it_says_what_can_be_tried(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    for arguments, message in (
        (["--minutes", "1"], "no CUDA device is visible; pass --rehearse"),
        (["--rehearse", "--task", "lossy"], "task is 'lossy'; choose from limits, tests"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["gpu", *arguments])
        assert message in capsys.readouterr().err


def rehearse(output: Path, *arguments: str) -> dict[str, dict]:
    """The results of a rehearsal, none of which failed."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "gpu", "--rehearse", "--output", str(output), *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = {path.stem: json.loads(path.read_text()) for path in output.glob("*.json")}
    assert {name: (one["reason"], one["trace"]) for name, one in results.items() if one["status"] == "failed"} == {}
    return results


@pytest.mark.slow
def test_a_rehearsal_of_one_task_of_each_kind(tmp_path):
    names = ["limits", "loss-info-nce-8192x8192x1024-bf16", "step-llama2-7b", "generation-batch-1"]
    results = rehearse(tmp_path / "out", "--minutes", "8", *(word for name in names for word in ("--task", name)))
    assert set(names) == set(results)
    rows = {row["provider"]: row for row in results[names[1]]["found"]["rows"]}
    for name in ("ours stored", "ours fused", "ours rows", "ours recomputed", "dense"):
        assert rows[name]["status"] == "ok", rows[name]
    found = results["step-llama2-7b"]["found"]
    assert found["plan"]["peak_bytes"] > 0
    assert found["tokens/s"] > 0
    assert results["generation-batch-1"]["found"]["generated"] == 12


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_rehearsal_of_every_task(tmp_path):
    results = rehearse(tmp_path / "out", "--minutes", "25")
    assert set(results) == {one.name for one in TASKS}
    assert [name for name, one in results.items() if one["status"] == "absent"] == ["tiles"]
    assert results["tests"]["found"]["failures"] == {}
    assert results["tests"]["found"]["passed"] >= 10
    assert "not yet" not in (tmp_path / "out" / "README.md").read_text()
