"""`cosup-fast train` under torchrun: the run of one process, continued, stopped, and refused."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cosup_fast.config import load_config
from cosup_fast.config.training import TrainingConfig
from cosup_fast.data.records import Segment, write_jsonl
from cosup_fast.training.checkpoint import checkpoints, verify
from cosup_fast.training.ranks import training_ranks
from cosup_fast.training.run import run_training
from tests.training.runs import last_saved, records, steps_of


@pytest.fixture
def arguments(tmp_path, passages, examples, llama_folder):
    """A function that gives the arguments of a tiny run."""
    many = [
        e.model_copy(update={"id": f"{e.id}-{i}", "question": f"{e.question} {i}"}) for i in range(4) for e in examples
    ]
    for name, written in (("passages", passages), ("train", many), ("dev", examples)):
        write_jsonl(tmp_path / f"{name}.jsonl", written)

    def make(output: str, **changes) -> list[str]:
        fields = {
            "output": str(tmp_path / output),
            "model.gen": llama_folder,
            "data.corpus": str(tmp_path / "passages.jsonl"),
            "data.train": [str(tmp_path / "train.jsonl")],
            "data.dev": [str(tmp_path / "dev.jsonl")],
            "data.allow_leaks": True,
            "training.batch_size": 6,
            "training.tokens_per_micro_batch": 400,
            "training.steps": 4,
            "training.eval_every": 2,
            "training.checkpoint_every": 2,
            "training.diagnose_every": 3,
            "training.lr": 1e-3,
            "training.device": "cpu",
        }
        fields |= {name.replace("__", "."): value for name, value in changes.items()}
        return [f"{name}={json.dumps(value)}" for name, value in fields.items()]

    return make


def start(ranks: int, arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        [*command, "-m", "cosup_fast", "train", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )  # fmt: skip


def torchrun(ranks: int, arguments: list[str]) -> tuple[int, str, str]:
    """Exit status, standard output, and standard error on one line."""
    process = start(ranks, arguments)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, " ".join(err.split())


def test_two_ranks_are_one_process(arguments, tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    status, out, err = torchrun(2, arguments("two"))
    assert status == 0, err
    assert out.count("checkpoint:") == 1
    assert err.count("held out after step 2") == 1
    run_training(load_config(None, arguments("one")))
    aside = dict.fromkeys(("kind", "tokens_per_second", "peak_memory_gib", "mfu"), 0)
    for kind in ("step", "held-out", "diagnosis"):
        for ours, expected in zip(records(two, kind), records(one, kind), strict=True):
            assert ours | aside == pytest.approx(expected | aside, rel=1e-3, abs=1e-6)
    ours = last_saved(two)
    for name, x in last_saved(one).items():
        if name.startswith(("gen/", "embseq/")):
            assert (ours[name] - x).abs().max() <= 1e-5, name


def wait_for(output: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while len(steps_of(output)) < steps:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def workers(process: subprocess.Popen) -> dict[int, int]:
    """Process ids by rank."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
        found |= {int(v.removeprefix("RANK=")): int(pid) for v in variables if v.startswith("RANK=")}
    return found


@pytest.mark.slow
def test_a_rank_that_stops_answering_is_named_in_time(arguments, tmp_path):
    process = start(3, arguments("run", training__steps=100000, training__rank_timeout=8, training__eval_every=None))
    wait_for(tmp_path / "run", 3)
    stopped = workers(process)[2]
    os.kill(stopped, signal.SIGSTOP)
    try:
        _, err = process.communicate(timeout=90)
    finally:
        with contextlib.suppress(ProcessLookupError):  # torchrun has killed it
            os.kill(stopped, signal.SIGCONT)
    assert process.returncode != 0
    err = " ".join(err.split())
    assert "rank 2 did not come within 8 s" in err or "rank 2 stopped answering" in err
    assert "last checkpoint:" in err
    assert 'Traceback (most recent call last): File "/work' not in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_once_and_end_all(number, arguments, tmp_path):
    process = start(2, arguments("run", training__steps=100000, training__eval_every=None))
    wait_for(tmp_path / "run", 3)
    process.send_signal(number)
    _, err = process.communicate(timeout=90)
    err = " ".join(err.split())
    assert err.count("interrupted: stopped after step") == 1
    saved = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert saved.name == f"step-{steps_of(tmp_path / 'run')[-1]:06d}"


@pytest.mark.slow
def test_a_wild_step_is_refused_by_all_and_saved_once(arguments, tmp_path, examples):
    plain = [examples[0].model_copy(update={"id": f"plain{i}"}) for i in range(24)]
    noise = "".join(chr(0x4E00 + 37 * i % 5000) for i in range(60))
    planted = examples[0].model_copy(update={"id": "planted", "output": [Segment(text=noise, passage="paris")]})
    write_jsonl(tmp_path / "train.jsonl", [*plain, planted])
    fields = {"batch_size": 2, "steps": 60, "lr": 3e-3, "warmup": 0.0, "spike_window": 8, "spike_factor": 10.0,
              "balance_lengths": False, "seed": 3, "eval_every": None, "checkpoint_every": None}  # fmt: skip
    status, _, err = torchrun(2, arguments("run", **{f"training__{name}": x for name, x in fields.items()}))
    assert status != 0
    assert "the highest NTP loss alone has planted" in err
    refused = json.loads((tmp_path / "run" / "refused-step.json").read_text())
    assert "planted" in refused["ntp_of_examples"]
    (saved,) = checkpoints(tmp_path / "run" / "checkpoints")
    assert saved.name == f"step-{refused['step'] - 1:06d}"
    verify(saved)


ALONE = {"optimizer_in_backward": True, "clip": None, "spike_factor": None, "diagnose_every": None}


def test_what_every_rank_refuses_is_said_once(arguments):
    status, _, err = torchrun(2, arguments("run", training__lr=-1.0))
    assert status != 0
    assert err.count("training.lr: Input should be greater than 0, found -1.0") == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 3}, r"training\.batch_size=3 leaves some of the 4 ranks .*nproc-per-node"),
        ({"sharding": "none"}, r"training\.sharding=none is a run of one process, and .*nproc-per-node started 4"),
        (ALONE, r"training\.optimizer_in_backward=true is a run of one process, and .*nproc-per-node started 4"),
    ],
)
def test_what_ranks_cannot_do_is_refused_before_anything_is_loaded(fields, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=message), training_ranks(TrainingConfig(**fields)):
        pass
