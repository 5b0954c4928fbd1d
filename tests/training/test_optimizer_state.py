"""Optimizer states of other ranks: cut again where they are plain numbers, quantized again where they are blocks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from cosup_fast.training.adamw import dequantize
from cosup_fast.training.optimizer_state import densified, load_states, save_states
from cosup_fast.training.optimizers import LocalOptimizer

ROWS = 41  # of unequal shares


@pytest.fixture
def shard_of():
    """A function that gives a rank its share of a tensor, in so many replicas of shards."""

    def shard(whole, rank, ranks, replicas):
        if ranks == 1:
            return whole
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        shards = ranks // replicas
        # Named by the rank: DTensor caches what it finds out about a mesh, where a process usually is one rank.
        mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicas", f"shards seen by {rank}"))
        parts = [*whole.split(-(-len(whole) // shards)), whole[:0]]
        part = parts[min(rank % shards, len(parts) - 1)].clone()
        placements = [Replicate(), Shard(0)]
        return DTensor.from_local(part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())

    yield shard
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def optimizer_of(shard_of):
    """A function that makes the optimizer of a rank that has a share of the rows of a matrix and a vector."""

    def make(name, rank, ranks, replicas=1, *, steps=3):
        torch.manual_seed(0)
        whole = {"matrix": torch.randn(ROWS, 512), "vector": torch.randn(ROWS)}
        mine = {key: nn.Parameter(shard_of(x, rank, ranks, replicas)) for key, x in whole.items()}
        made = LocalOptimizer(mine.items(), name, lr=1e-3)
        for step in range(steps):
            torch.manual_seed(step + 1)
            for key, p in mine.items():
                p.grad = shard_of(torch.randn_like(whole[key]) + 0.1, rank, ranks, replicas)
            made.step()
        return made

    return make


@pytest.fixture
def saved_by(optimizer_of):
    """A function that gives what all ranks save."""

    def save(name, ranks, replicas=1):
        return [save_states(optimizer_of(name, r, ranks, replicas), r) for r in range(ranks)]

    return save


def moments(optimizer, *saved):
    """All rows of each moment, in fp32."""
    keys = sorted({key.rsplit(".", 1)[0] for key in saved[0].tensors})
    return {key: torch.cat([densified(optimizer, one, *key.split("/")) for one in saved]) for key in keys}


def moment(optimizer, name, key):
    """A moment of this rank's part, in fp32."""
    parts = optimizer.kind.unpack(optimizer.states()[name], key)
    shape = optimizer.locals[name].shape
    return dequantize(parts, optimizer.kind.code_book(key), shape) if "codes" in parts else parts["values"].float()


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 1), (1, 1)), ((2, 1), (2, 1)), ((2, 1), (1, 1)), ((1, 1), (3, 1)), ((3, 1), (2, 1)), ((4, 2), (4, 2)),
     ((4, 2), (4, 1)), ((2, 1), (4, 2)), ((2, 2), (1, 1))],
)  # fmt: skip
@pytest.mark.parametrize("name", ["adamw", "adamw-8bit"])
def test_states_are_those_of_the_rows(name, before, after, saved_by, optimizer_of):
    """Before and after: how many ranks, in how many replicas."""
    saved = saved_by(name, *before)
    shards_before, shards = (ranks // replicas for ranks, replicas in (before, after))
    assert [bool(one.tensors) for one in saved] == [rank < shards_before for rank in range(before[0])]
    share = -(-ROWS // shards)
    for rank in range(after[0]):
        made = optimizer_of(name, rank, *after, steps=0)
        expected = moments(made, *saved[:shards_before])
        again = load_states(made, saved, rank)
        assert again == (name == "adamw-8bit" and shards_before != shards)
        row = rank % shards * share
        for key, y in expected.items():
            x, y = moment(made, *key.split("/")), y[row : row + share]
            if not again:
                assert torch.equal(x.view_as(y), y), key
            else:  # twice a step of 8 bits of the largest of a block
                assert (x.view_as(y) - y).abs().max() <= 0.03 * y.abs().max(), key
        assert all(int(state["step"]) == 3 for state in made.states().values())


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit", pytest.param("adamw-8bit-torchao", marks=pytest.mark.slow)])
def test_a_step_behind_a_checkpoint_has_the_same_bits(name, monkeypatch):
    model = nn.Linear(128, 64)
    optimizer = LocalOptimizer(model.named_parameters(), name, lr=1e-3)

    def step(chosen, which):
        for p in which.parameters():
            p.grad = torch.ones_like(p) * p.detach().sin()
        chosen.step()

    step(optimizer, model)
    other = nn.Linear(128, 64)
    other.load_state_dict(model.state_dict())
    restored = LocalOptimizer(other.named_parameters(), name, lr=1e-3)
    assert not load_states(restored, [save_states(optimizer, 0)], 0)
    for _ in range(2):
        step(optimizer, model)
        step(restored, other)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_states_of_other_parameters_are_refused(saved_by):
    saved = saved_by("adamw", 1)
    with pytest.raises(ValueError, match="matrix is not trained here"):
        load_states(LocalOptimizer(nn.Linear(4, 4).named_parameters(), "adamw", lr=1e-3), saved, 0)
