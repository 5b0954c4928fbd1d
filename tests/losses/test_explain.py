"""What `explain` says against what is counted."""

from __future__ import annotations

import pytest
import torch

from cosup_fast.functional import explain, info_nce
from cosup_fast.testing import count

N, M, D = 96, 160, 24
HALF = torch.bfloat16


@pytest.mark.parametrize("budget", [2**30, 1], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["one way", "symmetric"])
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_products_are_those_counted(budget, reduction, symmetric, frozen, monkeypatch):
    monkeypatch.setenv("COSUP_WORKSPACE_BYTES", str(budget))
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
    assert plan.impl != "reference"
    assert plan.workspace < 2**30 + 4 * 2**20 * 4096
    assert plan.chunks * plan.rows >= 2**20


@pytest.mark.parametrize("impl", ["fused", "rows", "recomputed"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["one way", "symmetric"])
@pytest.mark.parametrize("budget", [2**30, 1], ids=["one chunk", "chunks"])
def test_products_of_kernels_are_those_counted(impl, reduction, symmetric, budget, monkeypatch):
    pytest.importorskip("triton", reason="Triton's wheels are for Linux")
    if impl == "fused" and symmetric:
        pytest.skip("fused normalises rows alone")
    monkeypatch.setenv("COSUP_WORKSPACE_BYTES", str(budget))
    x, w = torch.randn(N, D, requires_grad=True), torch.randn(M, D, requires_grad=True)
    with count() as counts:
        plan = explain(N, M, D, symmetric=symmetric, reduction=reduction, impl=impl)
        info_nce(x, w, symmetric=symmetric, reduction=reduction, impl=impl).sum().backward()
    assert counts.products(N, M, 32) == plan.products  # D is padded to a multiple of 16, tiles are 32 deep
    assert plan.chunks == (1 if budget > 1 else 3)


@pytest.mark.parametrize(
    ("sizes", "options", "impl", "products"),
    [
        ((65536, 65536, 4096), {}, "fused", 3),
        ((8192, 128256, 4096), {}, "fused", 3),
        ((65536, 65536, 1024), {"dtype": torch.float32}, "fused", 3),
        ((4096, 4096, 4096), {"reduction": "none"}, "recomputed", 4),
        ((4096, 4096, 4096), {"gradients": 0}, "recomputed", 1),
        ((8192, 8192, 4096), {"symmetric": True}, "rows", 3),
        ((8192, 8192, 1024), {"symmetric": True}, "recomputed", 4),
        ((65536, 65536, 4096), {"symmetric": True}, "recomputed", 4),
        ((8192, 49152, 4096), {"softcap": 30.0}, "rows", 3),
        ((8192, 49152, 576), {"softcap": 30.0}, "recomputed", 4),
        ((4096, 4096, 1024), {"dtype": torch.float64}, "stored", 3),
    ],
    ids=str,
)
def test_what_auto_runs_on_a_gpu(sizes, options, impl, products, monkeypatch):
    pytest.importorskip("triton", reason="Triton's wheels are for Linux")
    monkeypatch.delenv("COSUP_WORKSPACE_BYTES", raising=False)
    options = {"dtype": HALF, "device": "cuda", **options}
    plan = explain(*sizes, **options)
    assert (plan.impl, plan.products) == (impl, products)
    assert plan.reason.startswith(f"least modelled cost: {impl} 1.00")
    assert plan.cost == explain(*sizes, **options, impl=impl).cost <= explain(*sizes, **options, impl="stored").cost


def test_a_smaller_budget_is_never_cheaper(monkeypatch):
    pytest.importorskip("triton", reason="Triton's wheels are for Linux")
    costs = []
    for budget in (2**20, 2**24, 2**28, 2**32):
        monkeypatch.setenv("COSUP_WORKSPACE_BYTES", str(budget))
        costs.append(explain(16384, 16384, 2048, dtype=HALF, device="cuda").cost)
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]


def test_auto_elsewhere_is_stored():
    for device in ("cpu", "meta"):
        plan = explain(64, 64, 8, device=device)
        assert (plan.impl, plan.reason) == ("stored", f"the one for {device} devices")
    assert explain(64, 64, 8, impl="stored").reason == "asked for"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 0}, "n is 0; pass a size of at least 1"),
        ({"gradients": 3}, "gradients is 3"),
        ({"impl": "reference"}, "impl is 'reference', which materialises every score"),
        ({"impl": "fast"}, "impl is 'fast'; pass one of"),
        ({"reduction": "max"}, "reduction is 'max'; pass one of"),
        ({"softcap": 0.0}, "softcap is 0.0; pass a positive number"),
        ({"impl": "fused"}, "impl is 'fused', which needs"),
        ({"impl": "fused", "device": "cuda", "symmetric": True}, "impl is 'fused', which n"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        explain(**{"n": 2, "m": 2, "d": 2, **wrong})
