"""The command line, its folders, the machine line, memory, and `cosup-fast bench`."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import cosup_fast
from benchmarks import cli, machine, peak, report, run
from benchmarks.cases import Case
from benchmarks.providers import chosen
from cosup_fast.cli import bench

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(monkeypatch):
    """Runs the command line in this process; the exit status, 0 where it just returns."""

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
        try:
            cli.main(list(arguments))
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return call


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_time_writes_a_folder(command, small_copy, tmp_path, capsys):
    output = tmp_path / "new" / "results"
    arguments = ("time", "--shape", "32x32x16", "--shape", "64x64x16", "--loss", "info-nce", "--dtype", "fp32",
                 "--provider", "ours", "--provider", "dense", "--provider", "inf_cl", "--rounds", "2",
                 "--output", str(output))  # fmt: skip
    assert command(*arguments) == 0
    assert files(output) == ["README.md", "info-nce.png", "time.csv"]
    assert files(output.parent) == ["README.md", "info-nce.png", "results", "time.csv"], "nothing else is left"
    text = (output / "README.md").read_text()
    assert machine.line() in text
    assert f"    python -m benchmarks {' '.join(arguments)}" in text
    assert "## info-nce 32x32x16 fp32" in text
    with (output / "time.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["m"], row["provider"]) for row in rows if row["rounds"] == "2"} == {
        (m, name)
        for m in ("32", "64")
        for name in ("ours stored", "ours reference", "dense", "products", "memory copy")
    }
    assert all(row["reason"] for row in rows if row["provider"] == "inf_cl")
    assert (output / "info-nce.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert "inf_cl: skipped: " in printed.out
    assert "[1/2] info-nce 32x32x16 fp32: round 2 of 2" in printed.err
    # Once more: refused at once, and replaced if asked.
    before = (output / "time.csv").stat().st_mtime_ns
    assert command(*arguments) == 1
    assert "exists; pass --overwrite" in capsys.readouterr().err
    assert (output / "time.csv").stat().st_mtime_ns == before
    (output / "stale.csv").touch()
    assert command(*arguments, "--overwrite") == 0
    assert "stale.csv" not in files(output)


@pytest.mark.slow
def test_count_writes_a_folder(command, tmp_path):
    output = tmp_path / "count"
    assert command("count", "--shape", "48x48x32", "--provider", "ours", "--output", str(output)) == 0
    text = (output / "README.md").read_text()
    for loss in ("info-nce", "info-nce-cosine", "info-nce-symmetric", "linear-cross-entropy"):
        assert f"## {loss} 48x48x32 bf16" in text
    assert f"| ours reference | cosup-fast {cosup_fast.__version__} | 3.00 | 3.00 bf16 | 0 | 0 | 0 |" in text


def test_an_interrupted_run_leaves_nothing(command, tmp_path, monkeypatch):
    def interrupted(rows, what):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "plots", interrupted)
    output = tmp_path / "results"
    assert command("time", "--shape", "16x16x8", "--loss", "info-nce", "--provider", "dense", "--rounds", "1",
                   "--dtype", "fp32", "--output", str(output)) == 130  # fmt: skip
    assert files(tmp_path) == []


def test_a_folder_is_whole_or_absent(tmp_path):
    folder = tmp_path / "results"
    broken = {"README.md": "text", "table.csv": None}
    with pytest.raises(AttributeError):
        report.write(folder, broken)  # pyright: ignore
    assert files(tmp_path) == []
    report.write(folder, {"README.md": "first", "a.csv": "1"})
    with pytest.raises(AttributeError):
        report.write(folder, broken, overwrite=True)  # pyright: ignore
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"README.md": "first", "a.csv": "1"}
    with pytest.raises(ValueError, match="exists; pass --overwrite"):
        report.write(folder, {"README.md": "second"})
    report.write(folder, {"README.md": "second"}, overwrite=True)
    assert files(tmp_path) == ["README.md", "results"]
    assert (folder / "README.md").read_text() == "second"


def test_a_folder_of_code_is_never_replaced(tmp_path):
    for name in ("README.md", "module.py"):
        (tmp_path / name).write_text("years of work")
    with pytest.raises(ValueError, match=r"module\.py in it is not part of a report"):
        report.writable(tmp_path, overwrite=True)
    with pytest.raises(ValueError, match=r"module\.py in it is not part of a report"):
        report.write(tmp_path, {"README.md": "text"}, overwrite=True)
    assert (tmp_path / "module.py").read_text() == "years of work"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("time", "--shape", "8x8"), "write it as NxMxD"),
        (("time", "--loss", "hinge"), "choose from info-nce"),
        (("time", "--loss", "info-nce", "--shape", "8x4x4"), "M >= N"),
        (("time", "--provider", "theirs"), "choose from 'ours stored'"),
        (("count", "--dtype", "int8"), "choose from fp32"),
        (("memory", "--device", "tpu"), "choose auto, cpu or cuda"),
        *([] if torch.cuda.is_available() else [(("time", "--device", "cuda"), "no CUDA device is visible")]),
        (("time", "--shape", "8x8x8", "--provider", "info-nce-pytorch", "--loss", "info-nce"), "has such a loss"),
        (("time", "--shape", "8x12x8", "--provider", "info-nce-pytorch"), "no provider could run"),
    ],
    ids=lambda value: " ".join(value[1:3]) if isinstance(value, tuple) else "",
)
def test_what_is_wrong_with_an_argument_is_said(command, tmp_path, capsys, arguments, message):
    assert command(*arguments, "--output", str(tmp_path / "out")) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_loss_without_such_a_shape_is_left_out_unless_it_was_asked_for():
    found = {case.loss for case in cli.cases(None, ["8x16x4"], ["fp32"], "cpu")}
    assert found == {"info-nce", "info-nce-cosine", "linear-cross-entropy"}
    with pytest.raises(ValueError, match="needs M = N"):
        cli.cases(["info-nce-symmetric"], ["8x16x4"], ["fp32"], "cpu")


def test_the_suite_has_the_shapes_of_the_table():
    shapes = {case.shape for case in cli.cases(None, None, ["bf16"], "cpu")}
    assert {"4096x4096x4096", "8192x8192x1024", "2048x49152x576"} <= shapes


def test_gate_command(command, capsys, monkeypatch):
    from benchmarks import gate

    monkeypatch.setattr(gate, "measure", lambda: {"a": {"flops": 2}})
    monkeypatch.setattr(gate, "load", lambda: ({"torch": "2.13", "triton": "3.7"}, {"a": {"flops": 1}}))
    assert command("gate") == 1
    printed = capsys.readouterr()
    assert "a: flops is 2, was 1" in printed.out
    assert "python -m benchmarks gate --update" in " ".join(printed.err.split())


def test_help_has_examples(command, capsys):
    for name in ("time", "count", "memory", "gate", "list"):
        assert command(name, "--help") == 0
        assert "Example" in capsys.readouterr().out


def test_list_shows_reasons(command, capsys, monkeypatch):
    monkeypatch.setattr(cli, "out", cli.Console(width=240))
    assert command("list", "--provider", "memeff", "--provider", "ours stored") == 0
    printed = capsys.readouterr().out
    assert "runs" in printed
    assert ("memeff is not installed" in printed) or ("only counted" in printed)


def test_machine_line():
    text = machine.line()
    assert f"torch {version('torch')}" in text
    assert f"{os.cpu_count()} cores, {torch.get_num_threads()} threads" in text
    assert machine.today() in text
    assert shutil.which("git") is None or "commit unknown" not in text
    assert machine.folder().endswith(machine.today())
    assert machine.folder().replace("-", "").isalnum()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident sets are read from /proc")
def test_peak_memory_of_a_process_of_its_own():
    case = Case("info-nce", 2048, 2048, 16)
    scores = 2048 * 2048 * 4
    # Eager's reference holds scores, their masked copy, log-softmax, a masked copy of that, and gradients.
    assert 3 * scores < peak.measure(case, "ours reference") < 20 * scores


def test_a_process_that_fails_says_so(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="exit status 1"):
        peak.measure(Case("info-nce", 8, 8, 8), "dense")
    rows = run.memory_case(Case("info-nce", 8, 8, 8), chosen(["dense"]), lambda text: None)
    assert (rows[0].status, rows[0].reason) == ("failed", "exit status 1")


def test_bench_command_needs_a_clone(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match="runs from a clone"):
        bench.run_benchmarks(["list"])


def test_bench_command(capsys):
    with pytest.raises(SystemExit) as stop:
        bench.run_benchmarks(["gate", "--help"])
    assert not stop.value.code
    assert "cosup-fast bench gate" in capsys.readouterr().out


@pytest.mark.slow
def test_bench_command_runs_from_anywhere(tmp_path):
    code = "from cosup_fast.cli.bench import run_benchmarks; run_benchmarks(['gate', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cosup-fast bench gate" in done.stdout


@pytest.mark.slow
def test_module_runs_from_a_clone(tmp_path):
    shown = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    arguments = ["--shape", "32x32x16", "--loss", "info-nce", "--provider", "dense", "--output", str(tmp_path / "out")]
    for name in ("time", "count", "memory"):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks", name, *arguments, "--overwrite"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"{name}.csv" in files(tmp_path / "out")


@pytest.mark.slow
def test_speed_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks/speed.py", "-q", "--benchmark-disable", "-p", "no:cacheprovider"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15 passed" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_time_on_a_gpu(command, tmp_path):
    output = tmp_path / "out"
    assert command("time", "--device", "cuda", "--loss", "info-nce", "--shape", "1024x1024x512", "--dtype", "bf16",
                   "--rounds", "3", "--output", str(output)) == 0  # fmt: skip
    assert torch.cuda.get_device_name() in (output / "README.md").read_text()
