"""Runs that are killed, with SIGKILL and at any moment, go on as if nothing had happened: the same bits."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cosup_fast.config import load_config
from cosup_fast.training.callbacks import Callback
from cosup_fast.training.checkpoint import checkpoints
from tests.training.runs import last_saved, records

STEPS = 14


def train(overrides: list[str], rank: int, ranks: int, port: int, callbacks: Any = ()) -> None:
    """One process of a run, started or continued."""
    torch.set_num_threads(1)
    if ranks > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}})
    from rich.console import Console

    from cosup_fast.training.run import run_training

    config = load_config(None, overrides)
    try:
        run_training(config, resume=True, callbacks=callbacks, console=Console(quiet=True))
    except Exception as error:
        Path(f"{config.output}.error-{rank}").write_text(f"{type(error).__name__}: {error}")
        raise


@pytest.fixture(scope="module")
def start():
    """A function that starts the processes of a run; they are forked from a server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "cosup_fast.training.run"])

    def start(overrides, ranks, callbacks=()):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        made = [context.Process(target=train, args=(overrides, rank, ranks, port, callbacks)) for rank in range(ranks)]
        for process in made:
            process.start()
        return made

    return start


@pytest.fixture
def overrides(data_folder, llama_folder, gpt2_folder, tmp_path):
    """A run with dropout, a projection, a learnt temperature and steps of several packs."""

    def make(output, **fields):
        settings = {
            "output": tmp_path / output,
            "model.gen": llama_folder, "model.embseq": gpt2_folder, "nsp.learnable_temperature": "true",
            "data.corpus": data_folder / "passages.jsonl", "data.train": [str(data_folder / "examples.jsonl")],
            "data.dev": [], "training.steps": STEPS, "training.batch_size": 3, "training.micro_batch_size": 2,
            "training.lr": 1e-2, "training.checkpoint_every": 1, "training.eval_every": "null",
            "training.diagnose_every": "null", "training.spike_factor": "null", "training.device": "cpu",
            "training.rank_timeout": 60, **fields,
        }  # fmt: skip
        return [f"{name}={json.dumps(x) if isinstance(x, list) else x}" for name, x in settings.items()]

    return make


def losses(output: Path) -> list[tuple]:
    fields = ("step", "loss", "ntp", "nsp", "gen_grad_norm", "embseq_grad_norm", "lr")
    return [tuple(record[name] for name in fields) for record in records(output)]


def finished(processes, seconds: float) -> bool:
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    return all(process.exitcode == 0 for process in processes)


def kill(processes, output: Path, *, saving: bool, dice: random.Random) -> None:
    """SIGKILL for all of them: while a checkpoint is being written, or at any moment of a run under way."""
    before = (output / "metrics.jsonl").stat().st_size if (output / "metrics.jsonl").is_file() else 0
    end = time.monotonic() + 90
    while time.monotonic() < end and any(p.is_alive() for p in processes):
        new = any(output.glob("checkpoints/.step-*.new"))
        under_way = (output / "metrics.jsonl").is_file() and (output / "metrics.jsonl").stat().st_size != before
        if under_way and (new or not saving):
            break
        time.sleep(2e-4)
    time.sleep(dice.random() * (0.01 if saving else 0.15))
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()


def check(start, overrides, tmp_path, *, kills: int, ranks: int, steps: int = STEPS, **fields) -> None:
    fields["training.steps"] = steps
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert finished(start(overrides("whole", **fields), ranks), 300)
    dice = random.Random(kills)
    for i in range(kills):
        processes = start(overrides("killed", **fields), ranks)
        kill(processes, killed, saving=i % 2 == 0, dice=dice)
        if len(losses(killed)) == steps:
            break
    assert i + 1 == kills, f"the run ended before it was killed {kills} times: {i + 1}"
    assert finished(start(overrides("killed", **fields), ranks), 300)
    assert losses(killed) == losses(whole)
    ours, expected = last_saved(killed), last_saved(whole)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert not list(killed.glob("checkpoints/.*"))


def test_a_killed_run_goes_on_with_the_same_bits(start, overrides, tmp_path):
    check(start, overrides, tmp_path, kills=2, ranks=1)


LORA = {"model.gen_lora.rank": 4, "model.gen_lora.dropout": 0.1}


@pytest.mark.parametrize(
    ("sharding", "adapters"),
    [
        pytest.param("fsdp", {}, id="shards"),
        pytest.param("fsdp", LORA, id="shards, LoRA", marks=pytest.mark.slow),
        pytest.param("ddp", {}, id="whole weights", marks=pytest.mark.slow),
    ],
)
def test_killed_ranks_resume_with_the_same_bits(sharding, adapters, start, overrides, tmp_path):
    check(start, overrides, tmp_path, kills=2, ranks=2, **{"training.sharding": sharding, **adapters})


@pytest.mark.parametrize(
    ("sharding", "loss"),
    [
        ("fsdp", signal.SIGKILL),
        pytest.param("ddp", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("fsdp", signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_lost_is_named_and_the_others_end(sharding, loss, start, overrides, tmp_path):
    output = tmp_path / "lost"
    fields = {"training.sharding": sharding, "training.steps": 3000, "training.rank_timeout": 10}
    processes = start(overrides("lost", **fields), 2)
    end = time.monotonic() + 90
    while not list(output.glob("checkpoints/step-*")) and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(processes[1].pid, loss)
    processes[0].join(90)
    processes[1].kill()
    assert processes[0].exitcode == 1
    said = (tmp_path / "lost.error-0").read_text()
    assert said.startswith("PeerError: ")
    assert "rank 1 stopped answering" in said or "rank 1 did not come within 10 s" in said
    assert "last checkpoint: " in said


def test_weights_that_one_rank_alone_reads_are_refused_by_all(start, overrides, tmp_path, llama_folder):
    damaged = tmp_path / "damaged"
    shutil.copytree(llama_folder, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    processes = start(overrides("run", **{"model.gen": damaged, "training.sharding": "fsdp"}), 2)
    for process in processes:
        process.join(120)
    said = [(tmp_path / f"run.error-{rank}").read_text() for rank in (0, 1)]
    assert said[0].startswith(f"ValueError: the weights of {str(damaged)!r} cannot be read")
    assert said[1].startswith(f"ReportedError: rank 0: the weights of {str(damaged)!r} cannot be read")


def test_what_was_altered_or_is_of_another_model_is_refused(start, overrides, tmp_path, llama_folder, mistral_folder):
    """Of a checkpoint that two ranks wrote, each its shards."""
    short = {"training.steps": 2, "model.embseq": "null", "training.sharding": "fsdp"}
    assert finished(start(overrides("run", **short), 2), 300)
    folder = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    longer = overrides("run", **{**short, "training.steps": 3})

    def refused() -> str:
        (process,) = start(longer, 1)
        process.join(120)
        assert process.exitcode == 1
        return (tmp_path / "run.error-0").read_text()

    states = folder / "optimizer" / "rank-00001.safetensors"
    weights = folder / "gen" / "model-00002-of-00002.safetensors"
    for shard in (states, weights):
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-100])
        assert f"{shard} has {len(whole) - 100} bytes, its manifest says {len(whole)}" in refused()
        shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert f"{shard} was altered" in refused()
        shard.unlink()
        assert f"{shard} is missing" in refused()
        shard.write_bytes(whole)
    saved = tmp_path / "run" / "config.yaml"
    saved.write_text(saved.read_text().replace(llama_folder, mistral_folder))
    longer = [text.replace(llama_folder, mistral_folder) for text in longer]
    said = refused()
    assert "is of another architecture than model.gen" in said
    assert "model_type is llama there and mistral here" in said


class Refuses(Callback):
    def check(self, config, batches, ranks, device):
        raise ValueError(f"{len(batches)} steps of {ranks} ranks do not fit")


def test_what_rank_0_is_told_before_the_run_ends_all_ranks(start, overrides, tmp_path):
    processes = start(overrides("refused"), 2, [Refuses()])
    assert not finished(processes, 60)
    assert [process.exitcode for process in processes] == [1, 1]
    said = [(tmp_path / f"refused.error-{rank}").read_text() for rank in (0, 1)]
    assert said == [f"{who}2 steps of 2 ranks do not fit" for who in ("ValueError: ", "ReportedError: rank 0: ")]
    assert not (tmp_path / "refused").exists()


def test_ranks_that_share_out_a_frozen_model_save_it_as_it_was(start, overrides, tmp_path, llama_folder):
    fields = {"model.embseq": "null", "model.freeze_embseq": "true", "training.sharding": "fsdp", "training.steps": 2}
    assert finished(start(overrides("frozen", **fields), 2), 300)
    saved = {n.rpartition("/")[2]: x for n, x in last_saved(tmp_path / "frozen").items() if n.startswith("embseq/")}
    given = load_file(Path(llama_folder) / "model.safetensors")
    assert saved
    assert all(torch.equal(x, given[f"model.{name}"]) for name, x in saved.items())


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_thirty_kills(start, overrides, tmp_path, ranks):
    sharding = {"training.sharding": "fsdp"} if ranks > 1 else {}
    check(start, overrides, tmp_path, kills=30, ranks=ranks, steps=150, **sharding)


@pytest.mark.parametrize("sharding", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_run_resumes_with_another_number_of_ranks(sharding, start, overrides, tmp_path):
    """Two ranks, then one, then two again: but for rounding, the run of one process."""
    # Without dropout, whose masks are a rank's own.
    same = {"model.embseq": "null", "training.sharding": sharding, "training.lr": 1e-3}
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    assert finished(start(overrides("whole", **same), 1), 300)
    for steps, ranks in ((5, 2), (9, 1), (STEPS, 2)):
        assert finished(start(overrides("moved", **same, **{"training.steps": steps}), ranks), 300)
    ours, expected = losses(moved), losses(whole)
    assert [row[0] for row in ours] == list(range(1, STEPS + 1))
    for one, other in zip(ours, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    said = (moved / "warnings.log").read_text()
    assert "continuing with 1 ranks what 2 began: weights and optimizer states are the same" in said
    assert "continuing with 2 ranks what 1 began" in said


def test_ranks_with_bf16_products_and_8_bit_states_are_nearly_one_process(start, overrides, tmp_path, data_folder):
    """The settings of the large presets, with held-out figures, on two ranks that share out the weights."""
    plain = {
        "model.embseq": "null", "data.dev": [str(data_folder / "examples.jsonl")], "data.allow_leaks": "true",
        "training.eval_every": 2, "training.steps": 6, "training.lr": 1e-3,
    }  # fmt: skip
    large = {
        "training.sharding": "fsdp", "training.precision": "bfloat16", "training.optimizer": "adamw-8bit",
        "training.activation_checkpointing": "full",
    }  # fmt: skip
    assert finished(start(overrides("plain", **plain), 1), 300)
    assert finished(start(overrides("large", **plain, **large), 2), 300)
    for one, other in zip(losses(tmp_path / "large"), losses(tmp_path / "plain"), strict=True):
        assert one[2] == pytest.approx(
            other[2], rel=0.05
        )  # NSP's temperature makes bf16 of unit vectors 20 times as much
    ours, expected = (records(tmp_path / name, "held-out") for name in ("large", "plain"))
    assert [one["step"] for one in ours] == [0, 2, 4, 6]
    assert [one["ntp"] for one in ours] == pytest.approx([one["ntp"] for one in expected], rel=0.05)
