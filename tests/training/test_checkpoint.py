"""Checkpoints: order, what was there before, and parameters that never had a gradient."""

from __future__ import annotations

import pytest
import torch

from cosup_fast.training import checkpoint
from cosup_fast.training.checkpoint import (
    CheckpointError,
    checkpoints,
    load_trainer_state,
    newest,
    save_checkpoint,
)
from cosup_fast.training.optimizers import LocalOptimizer


def _optimizer(model, **fields):
    return LocalOptimizer(model.named_parameters(), "adamw", lr=1e-3, **fields)


def test_checkpoints_sort_by_step_and_the_newest_survives(make_model, tmp_path):
    model = make_model()
    optimizer = _optimizer(model)
    for step in (5, 999_999, 1_000_000):
        save_checkpoint(tmp_path, step, model, optimizer, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-999999", "step-1000000"]


def test_a_whole_checkpoint_of_another_run_is_not_overwritten_a_broken_one_is(make_model, tmp_path):
    model = make_model()
    saved = save_checkpoint(tmp_path, 3, model, _optimizer(model))
    with pytest.raises(CheckpointError, match="is there already, from another run"):
        save_checkpoint(tmp_path, 3, model, _optimizer(model))
    (saved / "manifest.json").unlink()
    assert checkpoints(tmp_path) == []
    assert save_checkpoint(tmp_path, 3, model, _optimizer(model)) == saved
    assert checkpoints(tmp_path) == [saved]


def test_parameters_without_a_gradient_so_far_resume(make_model, tmp_path):
    model = make_model()
    optimizer = _optimizer(model)
    name, used = next((n, p) for n, p in model.named_parameters() if "layers.0" in n)
    used.grad = torch.ones_like(used)
    optimizer.step()
    saved = save_checkpoint(tmp_path, 1, model, optimizer)
    other = make_model()
    restored = _optimizer(other)
    assert load_trainer_state(saved, other, restored) == 1
    assert torch.equal(restored.states()[name]["exp_avg"], optimizer.states()[name]["exp_avg"])
    for p in other.parameters():
        p.grad = torch.ones_like(p)
    restored.step()
    assert int(restored.states()[name]["step"]) == 2
    assert int(restored.states()["gen.lm_head.weight"]["step"]) == 1


def test_newest_takes_a_checkpoint_or_a_run(make_model, tmp_path):
    model = make_model()
    saved = save_checkpoint(tmp_path / "checkpoints", 3, model, _optimizer(model))
    assert newest(tmp_path) == newest(saved) == saved
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        newest(tmp_path / "checkpoints")


def test_a_file_that_cannot_be_written_loses_nothing(make_model, tmp_path, monkeypatch):
    model = make_model()
    saved = save_checkpoint(tmp_path, 1, model, _optimizer(model))

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"step-000002 was not written .*No space left.*earlier.*whole"):
        save_checkpoint(tmp_path, 2, model, _optimizer(model))
    assert checkpoints(tmp_path) == [saved]
    assert [path.name for path in tmp_path.iterdir()] == [saved.name]
