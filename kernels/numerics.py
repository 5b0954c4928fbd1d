"""Small numerics that several operators share: the accumulator dtype, unit vectors, sums that repeat bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-12
"""A row this short has no direction: its unit vector and its gradient are zero."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64, everything else is summed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), which costs a call where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / |x| along the last dimension and 1 / |x|, both 0 for a row no longer than `TINY`."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = torch.where(norm > TINY, norm.reciprocal(), 0.0)
    return x * inverse, inverse


def unit_backward(dy: Tensor, y: Tensor, inverse: Tensor) -> Tensor:
    return (dy - y * (y * dy).sum(-1, keepdim=True)) * inverse


def finite(t: Tensor) -> Tensor:
    """0 for -inf: a shift that makes the exponentials of an empty set 0 rather than NaN."""
    return t.masked_fill(t == -torch.inf, 0.0)


def ratio(g: Tensor, total: Tensor) -> Tensor:
    """g / total, 0 for the sum of an empty set; a sum of NaN stays NaN."""
    return torch.where(total == 0, 0.0, g / total)


def sum_by(index: Tensor, values: Tensor, size: int) -> Tensor:
    """Sums by index. Accumulating index_put sorts first: the same sums on every run."""
    return values.new_zeros(size).index_put_((index,), values, accumulate=True)
