"""Row gather, RMSNorm and L2 norm of hidden states, forward and backward, in plain torch.

    x_r = hidden[rows_r]      u = x rsqrt(mean(x^2) + eps)      h = u * w      y = h / |h|  (0 where |h| <= TINY)
    dh = (dy - y <y, dy>) / |h|      dw = sum_r dh * u      dx = rsqrt(...) (v - u <u, v> / D),  v = dh * w

Never materialised: the norm of a row that nobody asked for; backward writes the dense gradient once.

Legend: T rows of hidden states, R gathered rows, D width. Arithmetic is fp32 (fp64 for fp64), rounded once at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TINY = 1e-12
"""A row this short has no direction: its unit vector and its gradient are zero."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64, everything else is summed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / |x| along the last dimension and 1 / |x|, both 0 for a row no longer than `TINY`."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = torch.where(norm > TINY, norm.reciprocal(), 0.0)
    return x * inverse, inverse


def unit_backward(dy: Tensor, y: Tensor, inverse: Tensor) -> Tensor:
    return (dy - y * (y * dy).sum(-1, keepdim=True)) * inverse


class _GatherLastHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, rows, norm_weight, eps, normalize):
        y = x = hidden[rows].to(accumulator(hidden.dtype))  # (R, D)
        if norm_weight is not None:
            y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm_weight
        if normalize:
            y, _ = unit(y)
        ctx.save_for_backward(x.to(hidden.dtype), rows, norm_weight)
        ctx.shape, ctx.eps, ctx.normalize = hidden.shape, eps, normalize
        return y.to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        x, rows, norm_weight = ctx.saved_tensors
        dtype, x = x.dtype, x.to(accumulator(x.dtype))
        g, u, h, dw = grads[0].to(x.dtype), x, x, None
        if norm_weight is not None:
            inverse_rms = torch.rsqrt(x.square().mean(-1, keepdim=True) + ctx.eps)
            u = x * inverse_rms
            h = u * norm_weight
        if ctx.normalize:
            g = unit_backward(g, *unit(h))
        if norm_weight is not None:
            if ctx.needs_input_grad[2]:
                dw = (g * u).sum(0).to(norm_weight.dtype)
            g = g * norm_weight
            g = (g - u * (u * g).mean(-1, keepdim=True)) * inverse_rms
        dense = None
        if ctx.needs_input_grad[0]:
            # Accumulating index_put sorts its indices, so a row gathered twice sums in the same order on every run.
            dense = g.new_zeros(ctx.shape, dtype=dtype).index_put_((rows,), g.to(dtype), accumulate=True)
        return dense, None, dw, None, None


def gather_last_hidden(
    hidden: Tensor,  # (T, D)
    rows: Tensor,  # (R,) int64
    norm_weight: Tensor | None = None,  # (D,)
    eps: float = 1e-6,
    normalize: bool = False,
) -> Tensor:  # (R, D)
    return _GatherLastHidden.apply(hidden, rows, norm_weight, eps, normalize)  # pyright: ignore[reportReturnType]
