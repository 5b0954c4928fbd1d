"""Products through oneDNN: the values of torch, where it is used and where not, and nothing left on the model."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cosup_fast.model import linear as module
from cosup_fast.model.linear import fast_linears, linear, plain_linears


@given(
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=2),
    n=st.integers(1, 300),
    k=st.integers(1, 300),
    bias=st.booleans(),
    strided=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_values_are_those_of_torch(rows, n, k, bias, strided):
    random = torch.Generator().manual_seed(n * 1000 + k)
    x = torch.randn(*rows, 2 * k, generator=random)[..., ::2] if strided else torch.randn(*rows, k, generator=random)
    weight = torch.randn(n, k, generator=random, requires_grad=True)
    b = torch.randn(n, generator=random) if bias else None
    exact = nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    eager = (nn.functional.linear(x, weight, b) - exact).abs().max()
    with torch.inference_mode():
        ours = linear(x, weight, b)
    assert ours.shape == exact.shape
    assert (ours - exact).abs().max() <= 2 * eager + 1e-6 * k**0.5


def test_a_layer_goes_through_it_inside_and_is_itself_outside(monkeypatch):
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(4, 5), Twice(5, 3))
    seen = []
    monkeypatch.setattr(module, "linear", lambda x, w, b: seen.append(len(w)) or nn.functional.linear(x, w, b))
    x = torch.randn(2, 4)
    expected = model(x)
    with contextlib.suppress(RuntimeError), fast_linears(plain_linears(model)):
        torch.testing.assert_close(model(x), expected)
        raise RuntimeError
    assert seen == [5]
    assert all("forward" not in layer.__dict__ for layer in model)


@pytest.mark.parametrize("case", ["gradients", "fp64", "bf16", "autocast", "no rows", "another processor"])
def test_everything_else_is_left_to_torch(monkeypatch, case):
    if not module.X86 or not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN here")
    if case == "another processor":
        monkeypatch.setattr(module, "X86", False)
    dtype = {"fp64": torch.float64, "bf16": torch.bfloat16}.get(case, torch.float32)
    x, weight = torch.randn(0 if case == "no rows" else 3, 7).to(dtype), torch.randn(6, 7).to(dtype).requires_grad_()
    with torch.set_grad_enabled(case == "gradients"), torch.autocast("cpu", enabled=case == "autocast"):
        ours, expected = linear(x, weight), nn.functional.linear(x, weight)
    assert torch.equal(ours, expected)
    assert ours.requires_grad == (case == "gradients")
