"""Checkpoints: order, what was there before, and parameters that never had a gradient."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cosup_fast.training import checkpoint
from cosup_fast.training.checkpoint import (
    CheckpointError,
    checkpoints,
    chosen_checkpoint,
    load_trainer_state,
    verify,
)
from cosup_fast.training.optimizers import LocalOptimizer


def _optimizer(model, **fields):
    return LocalOptimizer(model.named_parameters(), "adamw", lr=1e-3, **fields)


def test_checkpoints_sort_by_step_and_the_newest_survives(save_checkpoint, make_model, tmp_path):
    model = make_model()
    optimizer = _optimizer(model)
    for step in (5, 999_999, 1_000_000):
        save_checkpoint(tmp_path, step, model, optimizer, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-999999", "step-1000000"]


def test_the_index_of_weights_tells_where_each_is_and_the_size_of_all(tmp_path):
    """As several ranks save them."""
    (tmp_path / "gen").mkdir()
    parts = {"a": {"x": torch.zeros(3, 5), "y": torch.zeros(2)}, "b": {"z": torch.zeros(7, dtype=torch.bfloat16)}}
    files = {f"gen/model-{name}.safetensors": tensors for name, tensors in parts.items()}
    for name, tensors in files.items():
        save_file(tensors, tmp_path / name, metadata={"format": "pt"})
    checkpoint._index_weights(tmp_path, files)
    index = json.loads((tmp_path / "gen" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 4 * 17 + 2 * 7}
    assert index["weight_map"] == {key: f"model-{name}.safetensors" for name in parts for key in parts[name]}
    assert [path.name for path in tmp_path.iterdir()] == ["gen"]


def test_a_whole_checkpoint_of_another_run_is_not_overwritten_a_broken_one_is(save_checkpoint, make_model, tmp_path):
    model = make_model()
    saved = save_checkpoint(tmp_path, 3, model, _optimizer(model))
    with pytest.raises(CheckpointError, match="is there already, from another run"):
        save_checkpoint(tmp_path, 3, model, _optimizer(model))
    (saved / "manifest.json").unlink()
    assert checkpoints(tmp_path) == []
    assert save_checkpoint(tmp_path, 3, model, _optimizer(model)) == saved
    assert checkpoints(tmp_path) == [saved]


def test_parameters_without_a_gradient_so_far_resume(save_checkpoint, make_model, tmp_path):
    model = make_model()
    optimizer = _optimizer(model)
    name, used = next((n, p) for n, p in model.named_parameters() if "layers.0" in n)
    used.grad = torch.ones_like(used)
    optimizer.step()
    saved = save_checkpoint(tmp_path, 1, model, optimizer)
    other = make_model()
    restored = _optimizer(other)
    assert load_trainer_state(saved, other, restored) == (1, {})
    assert torch.equal(restored.states()[name]["exp_avg"], optimizer.states()[name]["exp_avg"])
    for p in other.parameters():
        p.grad = torch.ones_like(p)
    restored.step()
    assert int(restored.states()[name]["step"]) == 2
    assert int(restored.states()["gen.lm_head.weight"]["step"]) == 1


def test_a_runs_folder_means_its_best_checkpoint_or_else_the_newest(make_model, tmp_path):
    model = make_model()
    optimizer, root = _optimizer(model), tmp_path / "checkpoints"
    writer = checkpoint.CheckpointWriter(root, 1)

    def save(step):
        writer.start(step, model, optimizer)
        return writer.finish()

    first = save(3)
    assert chosen_checkpoint(tmp_path) == chosen_checkpoint(first) == first
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        chosen_checkpoint(root)
    writer.mark_best(3)
    save(4)
    newest = save(5)
    assert checkpoints(root) == [first, newest]
    assert chosen_checkpoint(tmp_path) == first
    writer.mark_best(6)
    assert chosen_checkpoint(tmp_path) == first  # until the better one is whole
    best = save(6)
    assert checkpoints(root) == [best]
    assert chosen_checkpoint(tmp_path) == best
    shutil.rmtree(best)
    save(7)
    with pytest.raises(CheckpointError, match=r"best\.json names step-000006, which is gone: name a checkpoint"):
        chosen_checkpoint(tmp_path)
    (root / "best.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"best\.json is damaged"):
        chosen_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["step-000004.bak", "step-4", "step-", "step-000003 (copy)", "step-x"])
def test_what_lies_beside_the_checkpoints_is_left_alone(save_checkpoint, name, make_model, tmp_path):
    """A copy that someone made, whole and with a manifest."""
    model = make_model()
    saved = save_checkpoint(tmp_path, 3, model, _optimizer(model))
    shutil.copytree(saved, tmp_path / name)
    assert checkpoints(tmp_path) == [saved]
    newer = save_checkpoint(tmp_path, 5, model, _optimizer(model), keep=1)
    assert checkpoints(tmp_path) == [newer]
    assert (tmp_path / name / "manifest.json").is_file()


def test_a_link_to_a_checkpoint_is_none(save_checkpoint, make_model, tmp_path):
    model = make_model()
    saved = save_checkpoint(tmp_path, 3, model, _optimizer(model))
    (tmp_path / "step-000004").symlink_to(saved.name)
    assert checkpoints(tmp_path) == [saved]
    newer = save_checkpoint(tmp_path, 5, model, _optimizer(model), keep=2)
    assert checkpoints(tmp_path) == [saved, newer]
    verify(saved)


@pytest.mark.parametrize("what", [(checkpoint, "save_file"), (Path, "write_text")], ids=["tensors", "description"])
def test_a_file_that_cannot_be_written_loses_nothing(save_checkpoint, make_model, tmp_path, monkeypatch, what):
    model = make_model()
    saved = save_checkpoint(tmp_path, 1, model, _optimizer(model))

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(*what, full)
        with pytest.raises(CheckpointError, match=r"step-000002 was not written .*No space left.*earlier.*whole"):
            save_checkpoint(tmp_path, 2, model, _optimizer(model))
    assert checkpoints(tmp_path) == [saved]
    assert [path.name for path in tmp_path.iterdir()] == [saved.name]


def test_a_best_that_cannot_be_marked_is_an_error_of_the_checkpoint(make_model, tmp_path, monkeypatch):
    model = make_model()
    writer = checkpoint.CheckpointWriter(tmp_path, 1)
    writer.start(1, model, _optimizer(model))
    writer.finish()

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_checked", full)
    with pytest.raises(CheckpointError, match=r"best\.json was not written .*No space left"):
        writer.mark_best(1)
