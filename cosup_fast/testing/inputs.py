"""Inputs that break kernels: shapes that no tile divides, logits at the ends of their range, rows of one and of none.

Everything is made on the CPU from a seed and does not depend on the number of threads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

EXTREME = 1800.0
"""Raw dot products of a small language model's hidden states reach this; bf16's step there is 8."""


class Shape(NamedTuple):
    """Rows, candidates and width of a product."""

    n: int
    m: int
    d: int


ODD_SHAPES = (
    Shape(1, 1, 1),
    Shape(1, 67, 24),  # one row
    Shape(33, 1, 24),  # one candidate
    Shape(7, 13, 5),
    Shape(64, 64, 64),
    Shape(123, 252, 40),
    Shape(65, 507, 72),
    Shape(130, 31, 129),
)
"""Shapes around, between and far from powers of two; one of them divides into tiles."""

LOGITS = ("normal", "extreme", "near-uniform", "tiny", "confident")
"""What `operands` and `logits` can make."""


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, requires_grad: bool = False) -> Tensor:
    """Standard normal entries, the same for the same shape and seed, rounded from fp64."""
    g = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)


def operands(
    n: int, m: int, d: int, kind: str = "normal", dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """x (n, d) and w (m, d) whose dot products are of the kind asked for.

    normal: standard deviation 1. extreme: up to 1,800 in absolute value. near-uniform: all about 50, for a common mean,
    and 0.01 apart (more in bf16, whose steps are wider). tiny: about 1e-3. confident: row i is 40 above the others at
    candidate i (mod m).
    """
    g = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(rows, d, generator=g, dtype=torch.float64) for rows in (n, m))
    if kind == "normal":
        x /= math.sqrt(d)
    elif kind == "extreme":
        x *= EXTREME / (x @ w.T).abs().max().clamp_min(1e-9)
    elif kind == "near-uniform":
        common = torch.full((d,), math.sqrt(50 / d), dtype=torch.float64)
        x, w = common + 0.001 * x, common + 0.001 * w
    elif kind == "tiny":
        x *= 1e-3 / math.sqrt(d)
    elif kind == "confident":
        w /= torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp_min(1e-9)
        x = 0.01 * x + 40 * w[torch.arange(n) % m]
    else:
        raise ValueError(f"kind is {kind!r}; it can be {', '.join(LOGITS)}")
    return x.to(dtype), w.to(dtype)


def logits(
    n: int, m: int, kind: str = "normal", dtype: torch.dtype = torch.float32, masked: str = "none", seed: int = 0
) -> Tensor:
    """Scores (n, m) of a kind that `operands` has, some of them -inf.

    masked: "none"; "some", a third at random, never a whole row; "all", every score of each third row.
    """
    x, w = operands(n, m, 16, kind, torch.float64, seed)
    z = x @ w.T
    if masked == "some":
        g = torch.Generator().manual_seed(seed + 1)
        drop = torch.rand(n, m, generator=g) < 1 / 3
        drop[torch.arange(n), torch.arange(n) % m] = False
        z.masked_fill_(drop, -torch.inf)
    elif masked == "all":
        z[::3] = -torch.inf
    elif masked != "none":
        raise ValueError(f"masked is {masked!r}; it can be none, some or all")
    return z.to(dtype)


def with_gaps(tensor: Tensor, gap: int = 8) -> Tensor:
    """The same values as a view whose rows lie `gap` elements further apart, with NaN (large integers) between them.

    A contiguous matrix hides a lane past the end of a row: it reads the next row. Here it reads NaN, and the sanitizer
    calls it out of bounds. A gap that is a multiple of 16 bytes keeps rows aligned.
    """
    width = tensor.shape[-1]
    fill = math.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    wide = torch.full((*tensor.shape[:-1], width + gap), fill, dtype=tensor.dtype, device=tensor.device)
    wide[..., :width] = tensor
    return wide[..., :width]
