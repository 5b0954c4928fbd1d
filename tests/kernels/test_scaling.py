"""A tensor times a scalar of the device: right, and untouched where the scalar is 1."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton's wheels are for Linux")

import triton.compiler.code_generator  # noqa: F401  (first imported while interpreting, it breaks later compilations)

from cosup_fast.kernels import scaling
from cosup_fast.kernels.scaling import scale_
from cosup_fast.testing import count, operands, sanitize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("g", [1.0, 0.0, -1.7, float("nan")])
def test_scaling_in_place(g, dtype, monkeypatch):
    """As torch multiplies, to the last bit, in more blocks than there are programs."""
    monkeypatch.setattr(scaling, "BLOCK", 256)
    monkeypatch.setattr(scaling, "PROGRAMS", 2)
    t, _ = operands(33, 1, 48, dtype=dtype)
    expected = t * torch.tensor(g)
    with sanitize(shuffles=2):
        assert scale_(t, torch.tensor(g)) is t
    assert torch.equal(t.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("g", [1.0, 2.0])
def test_a_factor_of_one_moves_nothing(g):
    t, _ = operands(64, 1, 64, dtype=torch.bfloat16)
    with count() as counts:
        scale_(t, torch.tensor(g))
    moved = 0 if g == 1 else t.numel() * t.itemsize
    assert counts.launches["scale_kernel"] == 1
    assert counts.loaded == {("scale_kernel", "g"): 4} | ({("scale_kernel", "t"): moved} if moved else {})
    assert counts.stored == ({("scale_kernel", "t"): moved} if moved else {})


@pytest.mark.parametrize("t", [torch.ones(5), torch.ones(32, 3).t(), torch.ones(16, dtype=torch.float64)], ids=str)
def test_what_the_kernel_does_not_take_is_multiplied_by_torch(t):
    with count() as counts:
        assert (scale_(t, torch.tensor(2.0)) == 2).all()
    assert not counts.launches
