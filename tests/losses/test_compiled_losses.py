"""The losses where nothing is computed yet: compiled graphs and fake tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cosup_fast.functional import info_nce, linear_cross_entropy

HALF = torch.bfloat16


def both_losses(x: Tensor, w: Tensor, target: Tensor, key_ids: Tensor) -> Tensor:
    return linear_cross_entropy(x, w, target) + info_nce(x, w, key_ids=key_ids, symmetric=True)


def test_compiles_without_a_graph_break():
    x, w, key_ids = torch.randn(16, 8).double(), torch.randn(32, 8).double(), torch.arange(32) % 20
    x.requires_grad_()
    w.requires_grad_()
    target = torch.arange(16)
    target[::5] = -100
    expected = torch.autograd.grad(both_losses(x, w, target, key_ids), (x, w))
    compiled = torch.compile(both_losses, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(x, w, target, key_ids), (x, w)), expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_fake_tensors_need_no_values():
    """Nor are values checked: the entries that fail on real CPU tensors pass."""
    with FakeTensorMode():
        x, w = torch.empty(16, 8, dtype=HALF, requires_grad=True), torch.empty(32, 8, dtype=HALF, requires_grad=True)
        both_losses(x, w, torch.full((16,), 99), torch.full((32,), -1)).backward()
        info_nce(x, w, torch.full((16,), 99), scale=torch.tensor(-1.0))
    assert (w.grad.shape, w.grad.dtype) == (w.shape, HALF)
