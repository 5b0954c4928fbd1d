"""What `explain` says against what is counted."""

from __future__ import annotations

import pytest
import torch

from cosup_fast.functional import explain, info_nce
from cosup_fast.testing import count

N, M, D = 96, 160, 24


@pytest.mark.parametrize("budget", [2**30, 1], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["one way", "symmetric"])
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_products_are_those_counted(budget, reduction, symmetric, frozen, monkeypatch):
    monkeypatch.setenv("COSUP_FAST_WORKSPACE_BYTES", str(budget))
    plan = explain(N, M, D, symmetric=symmetric, reduction=reduction, gradients=2 - frozen)
    x, w = torch.randn(N, D, requires_grad=frozen < 1), torch.randn(M, D, requires_grad=frozen < 2)
    with count() as counts:
        loss = info_nce(x, w, symmetric=symmetric, reduction=reduction)
        if loss.requires_grad:
            loss.sum().backward()
    assert counts.products(N, M, D) == plan.products
    assert plan.flops == plan.products * 2 * N * M * D
    assert plan.chunks == (1 if budget > 1 else 3)
    assert plan.workspace == plan.rows * M * 4


def test_it_needs_neither_the_memory_nor_the_device():
    plan = explain(2**20, 2**20, 4096, dtype=torch.bfloat16, device="cuda")
    assert plan.impl == "stored"
    assert plan.workspace < 2**30 + 4 * 2**20 * 4096
    assert plan.chunks * plan.rows >= 2**20


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 0}, "n is 0; pass a size of at least 1"),
        ({"gradients": 3}, "gradients is 3"),
        ({"impl": "reference"}, "impl is 'reference', which materialises every score"),
        ({"impl": "fast"}, "impl is 'fast'; pass one of"),
        ({"reduction": "max"}, "reduction is 'max'; pass one of"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        explain(**{"n": 2, "m": 2, "d": 2, **wrong})
