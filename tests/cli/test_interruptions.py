"""Commands that are stopped, killed or run out of disk, in real processes: what was finished stays, and resumes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cosup_fast.training.checkpoint import checkpoints
from cosup_fast.training.log import read_metrics


def _start(arguments, *options, limit=None, **changes):
    """A real process that trains."""

    def set_limit():
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing past the limit is then an error, as a full disk is
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, "-m", "cosup_fast", "train", *arguments(**changes), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=set_limit,  # noqa: PLW1509
        env={**os.environ, "COLUMNS": "200", "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"},
    )


def _finish(process):
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


def _wait_for_steps(folder, count, process):
    path = Path(folder) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while len(read_metrics(path)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _whole(folder):
    """Every checkpoint that is there loads."""
    from cosup_fast.model import CoSupervisionModel
    from cosup_fast.training.checkpoint import verify

    found = checkpoints(Path(folder) / "checkpoints")
    for path in found:
        verify(path)
        CoSupervisionModel.load(path)
    return found


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_saves_and_says_so(fields, arguments):
    process = _start(arguments, **{"training.steps": 100000})
    _wait_for_steps(fields["output"], 3, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    (checkpoint,) = _whole(fields["output"])
    assert "finishing this step, then saving; press Ctrl-C again to stop at once" in err
    assert "interrupted" in err
    assert checkpoint.name in err


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_killed_run_resumes_bit_for_bit(fields, tmp_path, arguments):
    """All in processes of one thread: sums are added in another order by two."""
    changes = {"training.steps": 40, "training.checkpoint_every": 2}
    _finish(_start(arguments, **changes, output=tmp_path / "whole"))
    expected = [(r["step"], r["loss"], r["gen_grad_norm"]) for r in read_metrics(tmp_path / "whole" / "metrics.jsonl")]
    for steps in (5, 12):  # kills, the second one of the run that was resumed
        process = _start(arguments, "--resume", **changes)
        _wait_for_steps(fields["output"], steps, process)
        process.kill()
        process.communicate()
        _whole(fields["output"])
    _finish(_start(arguments, "--resume", **changes))
    resumed = [
        (r["step"], r["loss"], r["gen_grad_norm"]) for r in read_metrics(Path(fields["output"]) / "metrics.jsonl")
    ]
    assert resumed == expected


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits")
def test_a_full_disk_while_saving_leaves_the_earlier_checkpoint(fields, cosup, arguments):
    assert cosup("train", *arguments())[0] == 0
    before = _whole(fields["output"])
    process = _start(arguments, "--resume", limit=20_000, **{"training.steps": 6})
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "was not written" in err
    assert "free some space" in err
    assert _whole(fields["output"]) == before
    assert not list((Path(fields["output"]) / "checkpoints").glob(".*"))
