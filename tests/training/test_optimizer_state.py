"""Optimizer states of other ranks: cut again where they are plain numbers, quantized again where they are blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cosup_fast.training import optimizers
from cosup_fast.training.optimizer_state import densified, load_states, save_states
from cosup_fast.training.optimizers import LocalOptimizer

ROWS = 37  # of unequal shares


def optimizer_of(monkeypatch, name, rank, ranks, *, steps):
    """The optimizer of a rank that has a share of the rows of a matrix and a vector."""
    torch.manual_seed(0)
    whole = {"matrix": nn.Parameter(torch.randn(ROWS, 512)), "vector": nn.Parameter(torch.randn(ROWS))}
    share = -(-ROWS // ranks)

    def cut(p):
        return p if ranks == 1 else nn.Parameter(p.detach()[rank * share : (rank + 1) * share].clone())

    monkeypatch.setattr(optimizers, "local_parameter", cut)
    made = LocalOptimizer(whole.items(), name, lr=1e-3)
    monkeypatch.setattr(optimizers, "local", lambda g: g[rank * share : (rank + 1) * share] if ranks > 1 else g)
    for step in range(steps):
        torch.manual_seed(step + 1)
        for p in whole.values():
            p.grad = torch.randn_like(p) + 0.1
        made.step()
    return made


def saved_by(monkeypatch, name, ranks):
    return [save_states(optimizer_of(monkeypatch, name, r, ranks, steps=3), r, ranks) for r in range(ranks)]


def moments(optimizer, *saved):
    """All rows of each moment, in fp32."""
    keys = sorted({key.rsplit(".", 1)[0] for key in saved[0].tensors})
    return {key: torch.cat([densified(optimizer, one, *key.split("/")) for one in saved]) for key in keys}


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("name", ["adamw", "adamw-8bit"])
def test_states_are_those_of_the_rows(name, before, after, monkeypatch):
    saved = saved_by(monkeypatch, name, before)
    share = -(-ROWS // after)
    for rank in range(after):
        made = optimizer_of(monkeypatch, name, rank, after, steps=0)
        expected = moments(made, *saved)
        again = load_states(made, saved, rank, after)
        assert again == (name == "adamw-8bit" and before != after)
        ours = moments(made, save_states(made, rank, after))
        assert ours.keys() == expected.keys()
        for key, x in ours.items():
            y = expected[key][rank * share : (rank + 1) * share]
            if not again:
                assert torch.equal(x, y), key
            else:  # twice a step of 8 bits of the largest of a block
                assert (x - y).abs().max() <= 0.03 * y.abs().max(), key
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
    assert not load_states(restored, [save_states(optimizer, 0, 1)], 0, 1)
    for _ in range(2):
        step(optimizer, model)
        step(restored, other)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_states_of_other_parameters_are_refused(monkeypatch):
    saved = saved_by(monkeypatch, "adamw", 1)
    with pytest.raises(ValueError, match="matrix is not trained here"):
        load_states(LocalOptimizer(nn.Linear(4, 4).named_parameters(), "adamw", lr=1e-3), saved, 0, 1)
