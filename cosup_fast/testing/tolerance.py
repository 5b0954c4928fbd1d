"""One assertion for every kernel: as close to the exact result as plain PyTorch is.

    |ours - exact| <= 2 |eager - exact| + small        |ours - exact| <= limit |exact|

|.| is the Frobenius norm. exact is computed in fp64 from the same (rounded) inputs, eager by plain PyTorch in the type
under test; small is what rounding to that type costs in the mean, ulp(exact) / sqrt(12), twice (16 times for fp32 and
fp64, where another order of summation moves several last bits). In the mean, since a single number may happen to need
no rounding. The limit holds however bad eager is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

LIMITS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-18, torch.float64: 2.0**-45}
"""Relative errors never to be passed where the function is well conditioned."""


def assert_close_to_fp64(
    ours: Any,
    eager: Any,
    exact: Any,
    *,
    dtype: torch.dtype | None = None,
    atol: float = 0.0,
    well_conditioned: bool = True,
    name: str = "result",
) -> None:
    """Asserts that ours is within twice eager's own error of exact, and within the limit of its type.

    Infinities must be where the exact result has them, and NaN nowhere else than there.

    Args:
        ours, eager, exact: tensors, or equally built sequences or mappings of them; None matches None.
        dtype: the type of the arithmetic under test, by default that of ours: name it for fp32 results of bf16 steps.
        atol: an absolute error that every stable algorithm can make, such as 2^-24 times the largest logit where the
            result is a difference of logits. Added to both bounds.
        well_conditioned: False drops the second bound, for inputs whose rounding alone moves the result further.
        name: what the message calls the result.
    """
    options = {"dtype": dtype, "atol": atol, "well_conditioned": well_conditioned}
    if isinstance(exact, Mapping):
        assert set(ours) == set(eager) == set(exact), f"{name}: {sorted(ours)}, {sorted(eager)} and {sorted(exact)}"
        for key in exact:
            assert_close_to_fp64(ours[key], eager[key], exact[key], **options, name=f"{name}[{key!r}]")
    elif isinstance(exact, Sequence):
        assert len(ours) == len(eager) == len(exact), f"{name}: {len(ours)}, {len(eager)} and {len(exact)} parts"
        for i, parts in enumerate(zip(ours, eager, exact)):
            assert_close_to_fp64(*parts, **options, name=f"{name}[{i}]")
    elif exact is None:
        assert ours is None, f"{name}: expected None, found a tensor of shape {tuple(ours.shape)}"
    else:
        _check(ours, eager, exact, dtype or ours.dtype, atol, well_conditioned, name)


def _rounding(exact: Tensor, dtype: torch.dtype) -> float:
    """The root of the summed squares of what rounding each entry costs in the mean; zeros need none."""
    info = torch.finfo(dtype)
    ulp = info.eps * torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 1).clamp(min=info.tiny)
    return ulp[exact != 0].norm().item() / 12**0.5


def _check(
    ours: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype, atol: float, well_conditioned: bool, name: str
) -> None:
    assert exact.dtype == torch.float64, f"{name}: exact is {exact.dtype}; compute it in fp64"
    assert ours.shape == eager.shape == exact.shape, (
        f"{name}: shapes {tuple(ours.shape)}, {tuple(eager.shape)} and {tuple(exact.shape)}"
    )
    ours, eager, exact = (t.detach().cpu().double() for t in (ours, eager, exact))
    finite = exact.isfinite()
    special = ~finite & ~(ours == exact) & ~(exact.isnan() & ours.isnan())
    broken = special | (finite & ~ours.isfinite())
    if broken.any():
        at = tuple(broken.nonzero()[0].tolist())
        value, expected = ours[at].item(), exact[at].item()
        raise AssertionError(f"{name}{list(at)} is {value}, exactly {expected} ({int(broken.sum())} such)")
    ours, eager, exact = ours[finite], eager[finite], exact[finite]
    size, error = exact.norm().item(), (ours - exact).norm().item()
    eager_error = (eager - exact).nan_to_num(nan=torch.inf, posinf=torch.inf).norm().item()
    small = (2 if dtype.itemsize < 4 else 16) * _rounding(exact, dtype) + atol
    worst = f" (largest for {exact[(ours - exact).abs().argmax()].item():.6g})" if exact.numel() else ""
    assert error <= 2 * eager_error + small, (
        f"{name}: error {error:.3g} exceeds 2 x eager's {eager_error:.3g} + {small:.3g}, result {size:.3g}{worst}"
    )
    limit = LIMITS[dtype] * size + atol
    assert not well_conditioned or error <= limit, (
        f"{name}: error {error:.3g} exceeds the limit {limit:.3g} of {dtype}, result {size:.3g}{worst}"
    )
