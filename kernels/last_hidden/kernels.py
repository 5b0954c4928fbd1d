"""The Triton kernels of `op.py`, whose docstring holds the equations, and their launchers.

    a = inverse_rms inverse_norm      s_r = <x_r, dy_r * w>      (a factor is 1, and w too, where its option is off)
    dh = (dy - a x w (a s)) inverse_norm      dw = sum_r dh * x inverse_rms
    dx = dh * w inverse_rms with an L2 norm, else (dy * w - x s inverse_rms^2 / D) inverse_rms

An L2 norm absorbs the RMSNorm's own projection: dh is orthogonal to h, so <u, dh * w> = <h, dh> = 0. Either way one dot
product by row is all that the elements of a gradient share.

Backward sorts the gathered rows once; the owner of a dense row finds its occurrences by a range of that order, adds
them up in it and stores the row once: no memset, no atomics, nothing to wait for. A row outside 0..T-1 reads as NaN and
receives nothing.

Legend: T rows of hidden states, R gathered rows, D width, G groups of gathered rows. Sums are fp32.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..numerics import TINY

MAX_BLOCK = 2048
"""Columns that a program holds at a time."""

GROUP, BLOCK_ROWS, BLOCK_COLUMNS = 64, 16, 128
"""Rows of a partial sum of dw, and the tile it is added up by."""


@triton.jit(do_not_specialize=["T"])
def last_hidden_fwd_kernel(
    hidden, rows, norm_weight, y, x, inverse_rms, inverse_norm, T, D, stride_h, eps,
    NORM: tl.constexpr, UNIT: tl.constexpr, SAVE: tl.constexpr, TINY: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program owns one gathered row: of y and, where saved, of x and of the inverse norms."""
    i_r = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    i_t = tl.load(rows + i_r)
    m_t = (i_t >= 0) & (i_t < T)
    p_h = hidden + i_t * stride_h
    scale = tl.where(m_t, 1.0, float("nan"))
    if NORM or UNIT:
        b_xx = tl.zeros((BD,), dtype=tl.float32)
        b_hh = tl.zeros((BD,), dtype=tl.float32)
        for i_d in range(0, D, BD):
            m_d = i_d + o_d < D
            b_x = tl.load(p_h + i_d + o_d, mask=m_d & m_t, other=0.0).to(tl.float32)
            b_xx += b_x * b_x
            if NORM and UNIT:
                b_h = b_x * tl.load(norm_weight + i_d + o_d, mask=m_d, other=0.0).to(tl.float32)
                b_hh += b_h * b_h
        length = tl.sum(b_hh if NORM else b_xx, 0)
        if NORM:
            rms = tl.rsqrt(tl.sum(b_xx, 0) / D + eps)
            scale *= rms
            length *= rms * rms
            if SAVE:
                tl.store(inverse_rms + i_r, rms)
        if UNIT:
            length = tl.sqrt(length)
            inverse = tl.where(length > TINY, 1.0 / length, 0.0)
            scale *= inverse
            if SAVE:
                tl.store(inverse_norm + i_r, inverse)
    for i_d in range(0, D, BD):
        m_d = i_d + o_d < D
        o_y = i_r * D + i_d + o_d
        b_x = tl.load(p_h + i_d + o_d, mask=m_d & m_t, other=0.0)
        if SAVE:
            tl.store(x + o_y, b_x, mask=m_d)
        b_y = b_x.to(tl.float32) * scale
        if NORM:
            b_y *= tl.load(norm_weight + i_d + o_d, mask=m_d, other=0.0).to(tl.float32)
        tl.store(y + o_y, b_y.to(y.dtype.element_ty), mask=m_d)


@triton.jit
def last_hidden_bwd_dot_kernel(dy, x, norm_weight, dot, D, NORM: tl.constexpr, BD: tl.constexpr):
    """One program owns one dot_r = <x_r, dy_r * w>."""
    i_r = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    b_dot = tl.zeros((BD,), dtype=tl.float32)
    for i_d in range(0, D, BD):
        m_d = i_d + o_d < D
        o_x = i_r * D + i_d + o_d
        b_g = tl.load(dy + o_x, mask=m_d, other=0.0).to(tl.float32)
        if NORM:
            b_g *= tl.load(norm_weight + i_d + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_dot += b_g * tl.load(x + o_x, mask=m_d, other=0.0).to(tl.float32)
    tl.store(dot + i_r, tl.sum(b_dot, 0))


@triton.jit
def _before_unit(b_g, b_h, rms, inverse, dot):
    """The gradient at what was L2-normalised, b_h being x * w."""
    return (b_g - b_h * (rms * inverse) * (rms * inverse * dot)) * inverse


@triton.jit
def last_hidden_bwd_hidden_kernel(
    dy, x, norm_weight, inverse_rms, inverse_norm, dot, order, starts, dhidden, D,
    NORM: tl.constexpr, UNIT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program owns one dense row: zeros, or the sum over the gathered rows that it is."""
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    start, end = tl.load(starts + i_t), tl.load(starts + i_t + 1)
    for i_d in range(0, D, BD):
        m_d = i_d + o_d < D
        b_sum = tl.zeros((BD,), dtype=tl.float32)
        for i in range(start, end):
            i_r = tl.load(order + i)
            o_x = i_r * D + i_d + o_d
            b_dx = tl.load(dy + o_x, mask=m_d, other=0.0).to(tl.float32)
            if NORM or UNIT:
                b_x = tl.load(x + o_x, mask=m_d, other=0.0).to(tl.float32)
                s = tl.load(dot + i_r)
                rms, b_w = 1.0, 1.0
                if NORM:
                    rms = tl.load(inverse_rms + i_r)
                    b_w = tl.load(norm_weight + i_d + o_d, mask=m_d, other=0.0).to(tl.float32)
                if UNIT:
                    b_dx = _before_unit(b_dx, b_x * b_w, rms, tl.load(inverse_norm + i_r), s) * b_w * rms
                else:
                    b_dx = (b_dx * b_w - b_x * rms * (s * rms / D)) * rms
            b_sum += b_dx
        tl.store(dhidden + i_t * D + i_d + o_d, b_sum.to(dhidden.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["R"])
def last_hidden_bwd_weight_kernel(
    dy, x, norm_weight, inverse_rms, inverse_norm, dot, partial, R, D,
    UNIT: tl.constexpr, GROUP: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program owns BD columns of one partial sum, that of GROUP consecutive gathered rows."""
    i_g = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_dw = tl.zeros((BR, BD), dtype=tl.float32)
    for i in range(0, GROUP, BR):
        o_r = i_g * GROUP + i + tl.arange(0, BR)
        m_r = o_r < R
        o_x, m_x = o_r[:, None] * D + o_d[None, :], m_r[:, None] & m_d[None, :]
        b_x = tl.load(x + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_g = tl.load(dy + o_x, mask=m_x, other=0.0).to(tl.float32)
        rms = tl.load(inverse_rms + o_r, mask=m_r, other=0.0)[:, None]
        if UNIT:
            b_w = tl.load(norm_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
            inverse = tl.load(inverse_norm + o_r, mask=m_r, other=0.0)[:, None]
            s = tl.load(dot + o_r, mask=m_r, other=0.0)[:, None]
            b_g = _before_unit(b_g, b_x * b_w, rms, inverse, s)
        b_dw += b_g * (b_x * rms)
    tl.store(partial + i_g * D + o_d, tl.sum(b_dw, 0), mask=m_d)


def _block(width: int) -> int:
    return min(MAX_BLOCK, 1 << max(width - 1, 0).bit_length())


def forward(
    hidden: Tensor,  # (T, D)
    rows: Tensor,  # (R,) int64
    norm_weight: Tensor | None,  # (D,)
    eps: float,
    normalize: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `op.gather_last_hidden_op`."""
    if hidden.stride(1) != 1:
        hidden, rows = hidden[rows], torch.arange(len(rows), device=rows.device)
    T, D = hidden.shape
    R, norm, w = len(rows), norm_weight is not None, None if norm_weight is None else norm_weight.contiguous()
    save = save and (norm or normalize)
    y = hidden.new_empty(R, D)
    x = hidden.new_empty(R if save else 0, D)
    inverse_rms = hidden.new_empty(R if save and norm else 0, dtype=torch.float32)
    inverse_norm = hidden.new_empty(R if save and normalize else 0, dtype=torch.float32)
    if y.numel():
        launch(
            last_hidden_fwd_kernel, (R,), hidden,
            hidden, rows.contiguous(), w, y, x, inverse_rms, inverse_norm, T, D, hidden.stride(0), eps,
            NORM=norm, UNIT=normalize, SAVE=save, TINY=TINY, BD=_block(D),
        )  # fmt: skip
    return y, x, inverse_rms, inverse_norm


def backward(
    dy: Tensor,  # (R, D)
    rows: Tensor,  # (R,) int64
    norm_weight: Tensor | None,  # (D,)
    x: Tensor,  # (R, D), with the inverses what forward saved
    inverse_rms: Tensor,  # (R,)
    inverse_norm: Tensor,  # (R,)
    height: int,  # T
    normalize: bool,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """See `op.gather_last_hidden_backward_op`."""
    (R, D), norm = dy.shape, norm_weight is not None
    dy, w = dy.contiguous(), None if norm_weight is None else norm_weight.contiguous()
    dhidden = dy.new_empty(height if need_hidden else 0, D)
    dw = dy.new_empty(0) if norm_weight is None else norm_weight.new_empty(0)
    dot = dy.new_empty(R if normalize or (norm and need_hidden) else 0, dtype=torch.float32)
    if dot.numel():
        launch(last_hidden_bwd_dot_kernel, (R,), dy, dy, x, w, dot, D, NORM=norm, BD=_block(D))
    if dhidden.numel():
        ordered, order = torch.sort(rows, stable=True)
        starts = torch.searchsorted(ordered, torch.arange(height + 1, device=rows.device))
        launch(
            last_hidden_bwd_hidden_kernel, (height,), dy,
            dy, x, w, inverse_rms, inverse_norm, dot, order, starts, dhidden, D,
            NORM=norm, UNIT=normalize, BD=_block(D),
        )  # fmt: skip
    if need_weight and norm_weight is not None:
        groups = triton.cdiv(R, GROUP)
        partial = dy.new_empty(groups, D, dtype=torch.float32)
        if partial.numel():
            launch(
                last_hidden_bwd_weight_kernel, (groups, triton.cdiv(D, BLOCK_COLUMNS)), dy,
                dy, x, w, inverse_rms, inverse_norm, dot, partial, R, D,
                UNIT=normalize, GROUP=GROUP, BR=BLOCK_ROWS, BD=BLOCK_COLUMNS,
            )  # fmt: skip
        dw = partial.sum(0).to(norm_weight.dtype)
    return dhidden, dw


def _case(kernel: object, pointers: dict[str, str], integers: dict[str, str], name: str = "", **constexprs: object):
    return {
        "kernel": kernel,
        "signature": {**pointers, **integers},
        "dtypes": ["bf16", "fp16", "fp32"],
        "constexprs": constexprs,
        "name": name,
    }


_SAVED = {"inverse_rms": "*fp32", "inverse_norm": "*fp32"}
_FWD = {"hidden": "*{dtype}", "rows": "*i64", "y": "*{dtype}", "x": "*{dtype}", **_SAVED}
_FWD_INTEGERS = {"T": "i32", "eps": "fp32", "D": "i32:16", "stride_h": "i32:16"}
_BWD = {"dy": "*{dtype}", "x": "*{dtype}", "dot": "*fp32"}
_DENSE = {**_BWD, **_SAVED, "order": "*i64", "starts": "*i64", "dhidden": "*{dtype}"}
_W = {"norm_weight": "*{dtype}"}
_WIDE = {"D": "i32:16"}
_OFF = {"norm_weight": None, "NORM": False}

COMPILE_CASES = [
    _case(last_hidden_fwd_kernel, {**_FWD, **_W}, _FWD_INTEGERS, NORM=True, UNIT=True, SAVE=True, TINY=TINY, BD=2048),
    _case(
        last_hidden_fwd_kernel, {**_FWD, **_W}, {**_FWD_INTEGERS, "D": "i32", "stride_h": "i32"}, "odd width",
        NORM=True, UNIT=True, SAVE=True, TINY=TINY, BD=1024,
    ),
    _case(last_hidden_fwd_kernel, _FWD, _FWD_INTEGERS, "gather", **_OFF, UNIT=False, SAVE=False, TINY=TINY, BD=2048),
    _case(last_hidden_bwd_dot_kernel, {**_BWD, **_W}, _WIDE, NORM=True, BD=2048),
    _case(last_hidden_bwd_hidden_kernel, {**_DENSE, **_W}, _WIDE, NORM=True, UNIT=True, BD=2048),
    _case(last_hidden_bwd_hidden_kernel, {**_DENSE, **_W}, {"D": "i32"}, "odd width", NORM=True, UNIT=False, BD=1024),
    _case(last_hidden_bwd_hidden_kernel, _DENSE, _WIDE, "gather", **_OFF, UNIT=False, BD=2048),
    _case(
        last_hidden_bwd_weight_kernel, {**_BWD, **_SAVED, **_W, "partial": "*fp32"}, {"R": "i32", **_WIDE},
        UNIT=True, GROUP=GROUP, BR=BLOCK_ROWS, BD=BLOCK_COLUMNS,
    ),
]  # fmt: skip
