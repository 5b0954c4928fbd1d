"""What goes wrong while a run is under way: two at once, SIGTERM, steps that are refused, settings that change."""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from cosup_fast.config import ConfigError
from cosup_fast.model import CoSupervisionModel
from cosup_fast.training.checkpoint import CheckpointError, checkpoints, verify
from cosup_fast.training.metrics import Skipped, StepMetrics, as_record
from cosup_fast.training.optimizers import LocalOptimizer
from cosup_fast.training.run import run_training
from cosup_fast.training.trainer import TrainingError
from tests.training.runs import during, records, train


def test_a_second_run_on_an_output_is_refused_and_changes_nothing(configure, monkeypatch):
    config, other = configure(training__checkpoint_every=1), configure(training__lr=1e-3)
    said = []

    def files():
        """All but the checkpoints, which the first run may be writing at this moment."""
        folder = Path(config.output)
        found = [path for path in folder.rglob("*") if path.is_file()]
        return {path: path.read_bytes() for path in found if folder / "checkpoints" not in path.parents}

    def second():
        before = files()
        with pytest.raises(ValueError, match=r"run is being written by process \d+ on .*: wait for that training"):
            run_training(other, resume=True, console=Console(quiet=True))
        assert files() == before
        said.append(True)

    during(monkeypatch, 2, second)
    train(config)
    assert said == [True]
    assert [r["lr"] for r in records(config.output, "step")] == [1e-2] * 4
    train(configure(training__steps=5), resume=True)  # free again


@pytest.mark.parametrize("times", [1, 2])
def test_sigterm_saves_as_the_first_ctrl_c(times, configure, monkeypatch):
    """A second SIGTERM, as torchrun sends it after a Ctrl-C, does not lose the step."""
    before = signal.getsignal(signal.SIGTERM)
    during(monkeypatch, 2, lambda: [signal.raise_signal(signal.SIGTERM) for _ in range(times)])
    config = configure()
    with pytest.raises(KeyboardInterrupt) as interrupt:
        train(config)
    saved = Path(config.output) / "checkpoints" / "step-000003"
    assert str(interrupt.value) == f"stopped after step 3; saved {saved}"
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_ends_a_command_with_what_is_done(cosup, monkeypatch, tmp_path, model, data_folder):
    """Every command, by the way of `index build`."""
    from cosup_fast.index import build

    model.save(tmp_path / "checkpoint")
    embed = build.embed_sequences
    monkeypatch.setattr(
        build, "embed_sequences", lambda *a, **k: (signal.raise_signal(signal.SIGTERM), embed(*a, **k))[1]
    )
    status, _, err = cosup("index", "build", tmp_path / "checkpoint", "--corpus", data_folder / "passages.jsonl")
    assert status == 130
    assert "interrupted:" in err


def test_checkpoints_come_by_minutes_too(make_trainer, tmp_path):
    make_trainer(steps=3, checkpoint_every=None, checkpoint_minutes=1e-9, keep_checkpoints=9).train()
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == [f"step-00000{i}" for i in (1, 2, 3)]
    make_trainer(output=tmp_path / "b", steps=3, checkpoint_every=None, checkpoint_minutes=60).train()
    assert [path.name for path in checkpoints(tmp_path / "b" / "checkpoints")] == ["step-000003"]


def test_minutes_count_from_the_checkpoint_before(make_trainer, tmp_path, monkeypatch):
    """A step takes a minute here."""
    made = []
    clock = SimpleNamespace(monotonic=lambda: 60.0 * sum(t.step for t in made), perf_counter=time.perf_counter)
    monkeypatch.setattr("cosup_fast.training.trainer.time", clock)
    made.append(make_trainer(steps=6, checkpoint_every=None, checkpoint_minutes=2, keep_checkpoints=9))
    made[0].train()
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == [f"step-00000{i}" for i in (2, 4, 6)]


SPIKE = {"steps": 60, "batch_size": 1, "lr": 3e-3, "balance_lengths": False, "warmup": 0.0, "seed": 3,
         "spike_window": 16, "spike_factor": 10.0, "checkpoint_every": None, "on_spike": "skip"}  # fmt: skip


def test_a_bad_example_ends_the_run_before_it_does_harm(make_model, make_trainer, planted, tmp_path):
    """A real run: it learns plain examples until the planted one's loss jumps."""
    fields = SPIKE | {"on_spike": "stop", "checkpoint_every": 4, "keep_checkpoints": 1}
    seen: list[StepMetrics] = []
    trainer = make_trainer(make_model(), chosen=planted, seen=seen, **fields)
    with pytest.raises(TrainingError, match=r"step \d+: NTP loss .* robust standard deviations above") as error:
        trainer.train()
    bad = len(seen) + 1
    assert [e.id for e in trainer.batch_examples(bad - 1)] == ["planted"]
    assert "the highest NTP loss alone has planted" in str(error.value)
    record = json.loads((tmp_path / "refused-step.json").read_text())
    assert record["step"] == bad
    assert record["ntp"] == pytest.approx(record["ntp_of_examples"]["planted"], rel=1e-4)
    *before, saved = checkpoints(tmp_path / "checkpoints")
    assert saved.name == f"step-{bad - 1:06d}"
    assert str(saved) in str(error.value)
    assert len(before) == 1  # the one that was there is kept besides
    for p, q in zip(trainer.model.parameters(), CoSupervisionModel.load(saved).parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.grad is None
    rest: list[StepMetrics] = []
    resumed = make_trainer(CoSupervisionModel.load(saved), chosen=planted, seen=rest, **fields | {"spike_factor": None})
    resumed.resume(saved)
    resumed.train()
    assert [m.step for m in rest] == list(range(bad, 61))
    assert rest[0].ntp == pytest.approx(record["ntp"], rel=1e-6)


def test_a_bad_batch_is_passed_over_and_named(make_model, make_trainer, planted, tmp_path):
    seen: list = []
    trainer = make_trainer(make_model(), tmp_path / "whole", seen, planted, **SPIKE)
    trainer.train()
    skipped = [m for m in seen if isinstance(m, Skipped)]
    assert {tuple(m.examples) for m in skipped} == {("planted",)}
    assert all("robust standard deviations above" in m.problems[0] for m in skipped)
    assert len([m for m in seen if isinstance(m, StepMetrics)]) == 60 - len(skipped)
    first = skipped[0].step
    parts = make_trainer(make_model(), tmp_path / "parts", None, planted, **SPIKE | {"steps": first})
    saved = parts.train()
    rest: list = []
    resumed = make_trainer(CoSupervisionModel.load(saved), tmp_path / "parts", rest, planted, **SPIKE)
    resumed.resume(saved)
    resumed.replay(as_record(m) for m in seen if m.step <= first)
    assert resumed.skipped_in_a_row == 1
    resumed.train()
    losses = [(m.step, m.ntp, m.gen_grad_norm) for m in rest if isinstance(m, StepMetrics)]
    assert losses == [(m.step, m.ntp, m.gen_grad_norm) for m in seen if isinstance(m, StepMetrics) and m.step > first]


def test_steps_are_skipped_at_most_so_many_times_in_a_row(make_trainer, tmp_path):
    seen: list = []
    trainer = make_trainer(seen=seen, steps=9, on_spike="skip", max_skips=2)
    trainer.take_step()
    with torch.no_grad():
        trainer.model.gen.lm_head.weight[5] = math.nan
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(TrainingError, match=r"step 4 after 2 skipped in a row: NTP loss nan"):
        trainer.train()
    assert [(m.step, m.in_a_row) for m in seen if isinstance(m, Skipped)] == [(2, 1), (3, 2)]
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(p, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_step_that_is_taken_ends_a_row_of_skipped_ones(make_trainer):
    trainer = make_trainer(steps=9, on_spike="skip", max_skips=1)
    row, found = trainer.model.gen.lm_head.weight[5], []
    right = row.detach().clone()
    for broken in (True, False, True):
        with torch.no_grad():
            row.fill_(math.nan) if broken else row.copy_(right)
        found.append(trainer.take_step())
    assert [type(metrics) for metrics in found] == [Skipped, StepMetrics, Skipped]
    assert found[2].in_a_row == 1


def test_a_refused_step_draws_no_random_numbers(make_model, make_trainer, gpt2_folder):
    """So that the run that is resumed from it is the one that would have been."""
    trainer = make_trainer(make_model(embseq=gpt2_folder, gen=gpt2_folder).train())
    trainer.take_step()
    with torch.no_grad():
        trainer.model.gen.lm_head.weight[5] = math.nan
    state = torch.get_rng_state()
    with pytest.raises(TrainingError):
        trainer.take_step()
    assert torch.equal(torch.get_rng_state(), state)


def test_what_may_change_on_resume_is_said_and_recorded(configure):
    config = configure(training__steps=2)
    train(config)
    changed = configure(training__lr=1e-3, training__clip=0.5, training__weight_decay=0.1, training__log_every=1)
    _, said = train(changed, resume=True)
    for change in ("training.lr was 0.01, and is 0.001", "training.clip was 1.0, and is 0.5", "training.steps was 2"):
        assert f"{change}" in said
    (record,) = records(config.output, "changed")
    assert record["step"] == 2
    assert record["fields"]["training.lr"] == [0.01, 0.001]
    assert record["fields"]["training.weight_decay"] == [0.0, 0.1]
    assert [r["lr"] for r in records(config.output, "step")] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3])
    train(configure(training__lr=1e-3, training__clip=0.5, training__weight_decay=0.1, training__steps=5), resume=True)
    assert [r["fields"] for r in records(config.output, "changed")[1:]] == [{"training.steps": [4, 5]}]
    for field, value in (("nsp__temperature", 0.1), ("training__batch_size", 4), ("training__warmup", 0.5)):
        with pytest.raises(ConfigError, match=rf"--resume: {field.replace('__', '.')}=.* was started with"):
            train(configure(**{field: value}), resume=True)


def test_warm_up_and_decay_across_epochs_as_metrics_tell(configure):
    """Three steps of warm-up, then a straight line to the floor, halved by each epoch of two steps."""
    fields = {"warmup": 3, "schedule": "linear", "min_lr": 0.1, "lr_decay": 0.5, "steps": 7}
    config = configure(**{f"training__{name}": x for name, x in fields.items()})
    train(config)
    line = [0.1 + 0.9 * (1 - i / 4) for i in range(4)]
    expected = [1 / 3, 2 / 3, 0.5, 0.5 * line[0], 0.25 * line[1], 0.25 * line[2], 0.1]
    found = records(config.output, "step")
    assert [r["lr"] for r in found] == pytest.approx([1e-2 * factor for factor in expected])
    assert [r["epoch"] for r in found] == pytest.approx([0.5 * i for i in range(1, 8)])


def test_an_extended_run_goes_on_from_its_learning_rate(configure):
    """A warm-up of half the steps would begin again, and a cosine would jump."""
    fields = {"training__warmup": 0.5, "training__schedule": "cosine"}
    train(configure(**fields))
    config = configure(**fields, training__steps=20, training__checkpoint_every=1)
    train(config, resume=True)
    rates = [r["lr"] for r in records(config.output, "step")]
    assert rates[:4] == pytest.approx([0.5e-2, 1e-2, 1e-2, 0.5e-2])
    assert rates[4] == rates[3]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 0.1 * rates[3]
    # From any of its checkpoints the extended run is the same again.
    folder = Path(config.output)
    for saved in checkpoints(folder / "checkpoints")[1:]:
        (saved / "manifest.json").unlink()
    train(config, resume=True)
    assert [r["lr"] for r in records(config.output, "step")] == rates


def _refusal(saved, rank, ranks):
    try:
        verify(saved, rank, ranks)
    except CheckpointError as error:
        return str(error).split(" (")[0]
    return None


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_file_of_a_checkpoint_is_verified_by_one_rank(save_checkpoint, ranks, model, tmp_path):
    saved = save_checkpoint(tmp_path, 1, model, LocalOptimizer(model.named_parameters(), "adamw", lr=1e-3))
    files = json.loads((saved / "manifest.json").read_text())["files"]
    assert len(files) > 5
    for name in files:
        path = saved / name
        whole = path.read_bytes()
        path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        refused = [_refusal(saved, rank, ranks) for rank in range(ranks)]
        assert [message for message in refused if message] == [f"{path} was altered"], name
        path.write_bytes(whole)
    for rank in range(ranks):
        verify(saved, rank, ranks)
