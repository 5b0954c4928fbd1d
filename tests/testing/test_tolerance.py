"""The assertion lets rounding pass and nothing else; the inputs are what they are called."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cosup_fast.testing import LOGITS, ODD_SHAPES, assert_close_to_fp64, logits, operands, tolerance, with_gaps

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def triple(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(50, 40).to(dtype)
    exact = x.double().softmax(1)
    return exact.to(dtype), x.softmax(1), exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_passes(dtype):
    ours, eager, exact = triple(dtype)
    assert_close_to_fp64(ours, eager, exact)
    assert_close_to_fp64(eager, eager, exact)
    assert_close_to_fp64({"a": [ours, None]}, {"a": [eager, None]}, {"a": [exact, None]})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_three_times_the_error_of_eager_does_not(dtype):
    _, eager, exact = triple(dtype)
    ours = exact + 20 * (eager.double() - exact)
    with pytest.raises(AssertionError, match=r"x's \[1\]: error .* exceeds 2 x eager's"):
        assert_close_to_fp64([eager, ours], [eager, eager], [exact, exact], dtype=dtype, name="x's ")


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2**-7), (torch.float32, 2**-18)], ids=str)
def test_a_bad_eager_is_no_excuse(dtype, limit):
    _, eager, exact = triple(dtype)
    ours, bad = exact * (1 + 1.5 * limit), exact * 1.5
    with pytest.raises(AssertionError, match="exceeds the limit"):
        assert_close_to_fp64(ours, bad, exact, dtype=dtype)
    assert_close_to_fp64(ours, bad, exact, dtype=dtype, well_conditioned=False)
    assert_close_to_fp64(exact * (1 + 0.9 * limit), bad, exact, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_many_numbers_it_is_their_own_rounding_and_of_one_that_of_its_neighbours(dtype):
    exact = torch.randn(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rounding = (exact.to(dtype).double() - exact).norm()
    assert tolerance._rounding(exact, dtype) == pytest.approx(float(rounding), rel=1e-2)
    tiny = exact * torch.finfo(dtype).tiny / 64  # where there is no smaller spacing
    assert tolerance._rounding(tiny, dtype) == pytest.approx(float((tiny.to(dtype).double() - tiny).norm()), rel=2e-2)


def test_one_number_that_needs_no_rounding_allows_the_next_and_no_more():
    exact = torch.tensor([2.75], dtype=torch.float64)
    ulp = torch.finfo(torch.float32).eps * 2
    assert_close_to_fp64((exact + ulp).float(), exact.float(), exact)
    with pytest.raises(AssertionError, match="exceeds 2 x eager's 0"):
        assert_close_to_fp64((exact + 5 * ulp).float(), exact.float(), exact)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_no_number_fails(value):
    ours, eager, exact = triple(torch.float32)
    ours = ours.clone()
    ours[3, 7] = value
    with pytest.raises(AssertionError, match=rf"result\[3, 7\] is {value}, exactly 0\.\d+ \(1 such\)"):
        assert_close_to_fp64(ours, eager, exact)
    with pytest.raises(AssertionError, match="exactly inf"):
        assert_close_to_fp64(eager, eager, exact.clone().fill_(torch.inf))


def test_infinities_and_nan_of_the_exact_result_are_asked_for():
    exact = torch.tensor([1.0, -torch.inf, torch.nan], dtype=torch.float64)
    assert_close_to_fp64(exact.float(), exact.float(), exact)


def test_zero_has_no_tolerance_unless_given():
    zero, tiny = torch.zeros(4), torch.full((4,), 1e-7)
    with pytest.raises(AssertionError):
        assert_close_to_fp64(tiny, zero, zero.double())
    assert_close_to_fp64(tiny, zero, zero.double(), atol=2.0**-22)
    assert_close_to_fp64(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.float64))


def test_mistakes_in_its_use_are_named():
    ours, eager, exact = triple(torch.float32)
    with pytest.raises(AssertionError, match=r"exact is torch\.float32"):
        assert_close_to_fp64(ours, eager, exact.float())
    with pytest.raises(AssertionError, match="shapes"):
        assert_close_to_fp64(ours[0], eager, exact)
    with pytest.raises(AssertionError, match="expected None"):
        assert_close_to_fp64(ours, None, None)
    with pytest.raises(AssertionError, match="1, 1 and 2 parts"):
        assert_close_to_fp64([ours], [eager], [exact, exact])


@pytest.mark.parametrize("kind", LOGITS)
def test_operands_have_the_products_they_promise(kind):
    x, w = operands(40, 60, 64, kind, torch.float64)
    z = x @ w.T
    assert x.shape == (40, 64)
    assert w.shape == (60, 64)
    assert operands(40, 60, 64, kind, torch.float64)[0].equal(x)
    largest = z.abs().max().item()
    if kind == "normal":
        assert 0.8 < z.std() < 1.2
    elif kind == "extreme":
        assert largest == pytest.approx(1800)
    elif kind == "near-uniform":
        assert z.mean().item() == pytest.approx(50, rel=0.01)
        assert 0.005 < z.std() < 0.02
    elif kind == "tiny":
        assert 1e-4 < z.std() < 1e-2
    else:
        assert z.argmax(1).equal(torch.arange(40))
        assert (z.topk(2)[0].diff() < -10).all()


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=lambda s: f"{s.n}x{s.m}x{s.d}")
@pytest.mark.parametrize("kind", LOGITS)
def test_operands_are_finite_for_every_shape(kind, shape):
    for dtype in DTYPES:
        x, w = operands(*shape, kind, dtype)
        assert x.isfinite().all()
        assert w.isfinite().all()


def test_masked_logits():
    assert logits(9, 5).isfinite().all()
    some = logits(9, 5, masked="some") == -torch.inf
    assert some.any()
    assert not some.all(1).any()
    every = logits(9, 5, masked="all") == -torch.inf
    assert every.all(1).tolist() == 3 * [True, False, False]
    with pytest.raises(ValueError, match="masked is 'most'"):
        logits(9, 5, masked="most")
    with pytest.raises(ValueError, match="kind is 'odd'"):
        operands(1, 1, 1, "odd")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
def test_gaps_hold_poison(dtype):
    x = torch.arange(12, dtype=dtype).view(3, 4)
    y = with_gaps(x, 4)
    assert y.equal(x)
    assert y.stride() == (8, 1)
    whole = y.as_strided((3, 8), (8, 1))
    gap = whole[:, 4:]
    assert (gap.isnan() if dtype.is_floating_point else gap > 2**60).all()
