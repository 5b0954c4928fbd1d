"""What the losses cost on a CPU: products, and memory within the workspace."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cosup_fast.functional import info_nce, linear_cross_entropy
from cosup_fast.kernels.softmax_xent import chunk_torch, engine
from cosup_fast.testing import count
from cosup_fast.testing.torch_ops import TorchOps


def products(f: Callable, tensors: dict[str, Tensor], unit: int, backward: bool = True, **options) -> float:
    """FLOP of forward and backward, in units of one score product."""
    with count() as counts:
        loss = f(**tensors, **options)
        if backward:
            loss.sum().backward()
    return counts.flops / unit


def test_matrix_products(monkeypatch):
    monkeypatch.setenv("COSUP_WORKSPACE_BYTES", "1")  # a budget that no chunk of more than three rows fits
    monkeypatch.setattr(engine, "MIN_ROWS", 3)
    n, m, d = 24, 40, 8
    unit = 2 * n * m * d
    q, k = (torch.randn(size, d, dtype=torch.float64, requires_grad=True) for size in (n, m))
    assert products(info_nce, {"query": q, "keys": k}, unit) == 3
    assert products(info_nce, {"query": q, "keys": k}, unit, return_stats=False, reduction="sum") == 3
    assert products(info_nce, {"query": q, "keys": k}, unit, reduction="none") == 4
    assert products(info_nce, {"query": q, "keys": k.detach()}, unit) == 2
    assert products(info_nce, {"query": q.detach(), "keys": k}, unit) == 2
    assert products(info_nce, {"query": q.detach(), "keys": k.detach()}, unit, backward=False) == 1
    with torch.no_grad():
        assert products(info_nce, {"query": q, "keys": k}, unit, backward=False) == 1
    assert products(info_nce, {"query": q, "keys": k}, unit, symmetric=True) == 3.5  # four of eight chunks are held
    monkeypatch.setattr(engine, "MIN_ROWS", 6)
    assert products(info_nce, {"query": q, "keys": k}, unit, symmetric=True) == 3
    monkeypatch.delenv("COSUP_WORKSPACE_BYTES")
    assert products(info_nce, {"query": q, "keys": k}, unit, symmetric=True) == 3
    target = torch.full((n,), -100)
    target[::4] = 7
    tensors = {"hidden": q, "weight": k, "target": target}
    assert products(linear_cross_entropy, tensors, unit) == 3 / 4


class Peak:
    """The most bytes alive at once in what operations returned."""

    def __init__(self):
        self.holders: dict[int, int] = {}
        self.alive = self.peak = 0

    def release(self, storage: int, size: int) -> None:
        self.holders[storage] -= 1
        if not self.holders[storage]:
            del self.holders[storage]
            self.alive -= size

    def see(self, op, args, kwargs, run):
        out = run()
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                storage, size = t.untyped_storage()._cdata, t.untyped_storage().nbytes()
                if storage not in self.holders:
                    self.holders[storage] = 0
                    self.alive += size
                self.holders[storage] += 1
                weakref.finalize(t, self.release, storage, size)
        self.peak = max(self.peak, self.alive)
        return out


KEY_IDS = torch.arange(2048) % 1000


@pytest.mark.parametrize("whole", [False, True], ids=["chunks", "one chunk"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none"},
        {"label_smoothing": 0.1},
        {"key_ids": KEY_IDS, "return_stats": True},
        {"key_ids": KEY_IDS, "duplicates": "positive"},
        {"symmetric": True},
        {"symmetric": True, "key_ids": KEY_IDS, "duplicates": "positive", "label_smoothing": 0.1},
        {"softcap": 3.0, "z_loss": 0.1},
    ],
    ids=lambda o: ", ".join(o) or "plain",
)
def test_memory_stays_within_the_workspace(options, whole, monkeypatch):
    n, m, d = 512, 2048, 4
    x, w = (torch.randn(size, d, requires_grad=True) for size in (n, m))
    budget = 2**22 if whole else 2**20
    monkeypatch.setenv("COSUP_WORKSPACE_BYTES", str(budget))
    monkeypatch.setattr(chunk_torch, "BLOCK_BYTES", block := 2**16)
    memory = Peak()
    with TorchOps(memory.see):
        if "softcap" in options:
            loss = linear_cross_entropy(x, w, torch.arange(n), **options)
        else:
            loss = info_nce(x, w, **options)
        (loss[0] if options.get("return_stats") else loss).sum().backward()
    gradients_and_statistics = 4 * (n + m) * (4 * d + 16)
    held = engine.HELD if "symmetric" in options and not whole else 1
    assert memory.peak <= held * budget + 8 * block + gradients_and_statistics
    assert whole or held > 1 or memory.peak < n * m * 4


@pytest.mark.parametrize("value", ["", "0", "-5", "1e9", "much"])
def test_workspace_budget_is_validated(value, monkeypatch):
    monkeypatch.setenv("COSUP_WORKSPACE_BYTES", value)
    with pytest.raises(ValueError, match=f"COSUP_WORKSPACE_BYTES is '{value}'"):
        info_nce(torch.randn(2, 2), torch.randn(2, 2))
