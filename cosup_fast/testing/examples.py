"""Four small kernels in the style the kit expects: a matmul, a row softmax, an online log-sum-exp, a descriptor matmul.

They serve as examples of `COMPILE_CASES` and as the clean kernels that every check must pass.
Legend: M, N, K rows, columns and depth of a product; R rows, C columns of a matrix.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def matmul_fwd_kernel(
    a, b, c, M, N, K, stride_a, stride_b, stride_c,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program owns one (BM, BN) tile of c = a b."""
    i_m, i_n = tl.program_id(0), tl.program_id(1)
    o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)
    o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    p_a = a + o_m[:, None] * stride_a + o_k[None, :]
    p_b = b + o_k.to(tl.int64)[:, None] * stride_b + o_n[None, :]
    b_c = tl.zeros((BM, BN), dtype=tl.float32)
    for i_k in range(0, K, BK):
        b_a = tl.load(p_a, mask=(o_m[:, None] < M) & (o_k[None, :] < K - i_k), other=0.0)
        b_b = tl.load(p_b, mask=(o_k[:, None] < K - i_k) & (o_n[None, :] < N), other=0.0)
        b_c = tl.dot(b_a, b_b, b_c, input_precision=PRECISION)
        p_a += BK
        p_b += BK * stride_b.to(tl.int64)
    p_c = c + o_m[:, None] * stride_c + o_n[None, :]
    tl.store(p_c, b_c.to(c.dtype.element_ty), mask=(o_m[:, None] < M) & (o_n[None, :] < N))


@triton.jit
def softmax_fwd_kernel(x, y, C, stride_x, stride_y, BC: tl.constexpr):
    """One program owns one row of y = softmax(x)."""
    i_r = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    b_x = tl.load(x + i_r * stride_x + o_c, mask=m_c, other=-float("inf")).to(tl.float32)
    b_e = tl.exp(b_x - tl.max(b_x, 0))
    tl.store(y + i_r * stride_y + o_c, (b_e / tl.sum(b_e, 0)).to(y.dtype.element_ty), mask=m_c)


@triton.jit
def logsumexp_fwd_kernel(x, lse, R, C, stride_x, BR: tl.constexpr, BC: tl.constexpr):
    """One program owns BR entries of lse = logsumexp(x), in one pass over the columns."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_c = tl.arange(0, BC)
    m_r = o_r < R
    b_max = tl.full((BR,), -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros((BR,), dtype=tl.float32)
    for i_c in range(0, C, BC):
        m_x = m_r[:, None] & (i_c + o_c < C)[None, :]
        b_x = tl.load(x + o_r[:, None] * stride_x + i_c + o_c[None, :], mask=m_x, other=-float("inf")).to(tl.float32)
        b_top = tl.maximum(b_max, tl.max(b_x, 1))
        b_shift = tl.where(b_top == -float("inf"), 0.0, b_top)
        b_sum = b_sum * tl.exp(b_max - b_shift) + tl.sum(tl.exp(b_x - b_shift[:, None]), 1)
        b_max = b_top
    tl.store(lse + o_r, b_max + tl.log(b_sum), mask=m_r)


@triton.jit
def descriptor_matmul_fwd_kernel(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """One program owns one (BM, BN) tile of c = a b'; a (M, K), b (N, K) and c are tensor descriptors."""
    i_m, i_n = tl.program_id(0) * BM, tl.program_id(1) * BN
    b_c = tl.zeros((BM, BN), dtype=tl.float32)
    for i_k in range(0, K, BK):
        b_c = tl.dot(a.load([i_m, i_k]), b.load([i_n, i_k]).T, b_c)
    c.store([i_m, i_n], b_c.to(c.dtype))


def matmul(a: Tensor, b: Tensor, precision: str = "ieee", blocks: tuple[int, int, int] = (32, 32, 32)) -> Tensor:
    """a b for a (M, K) and b (K, N) with contiguous rows."""
    (M, K), N = a.shape, b.shape[1]
    c = torch.empty(M, N, dtype=a.dtype, device=a.device)
    BM, BN, BK = blocks
    grid = (triton.cdiv(M, BM), triton.cdiv(N, BN))
    matmul_fwd_kernel[grid](
        a, b, c, M, N, K, a.stride(0), b.stride(0), c.stride(0), BM=BM, BN=BN, BK=BK, PRECISION=precision
    )  # fmt: skip
    return c


def softmax(x: Tensor) -> Tensor:
    """softmax of the rows of x (R, C)."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    BC = triton.next_power_of_2(x.shape[1])
    softmax_fwd_kernel[(x.shape[0],)](x, y, x.shape[1], x.stride(0), y.stride(0), BC=BC)
    return y


def logsumexp(x: Tensor, blocks: tuple[int, int] = (16, 32)) -> Tensor:
    """logsumexp of the rows of x (R, C), fp32."""
    lse = torch.empty(x.shape[0], device=x.device)
    BR, BC = blocks
    logsumexp_fwd_kernel[(triton.cdiv(x.shape[0], BR),)](x, lse, x.shape[0], x.shape[1], x.stride(0), BR=BR, BC=BC)
    return lse


def descriptor_matmul(a: Tensor, b: Tensor, blocks: tuple[int, int, int] = (32, 32, 32)) -> Tensor:
    """a b' for a (M, K) and b (N, K) whose rows start at multiples of 16 bytes."""
    (M, K), N = a.shape, b.shape[0]
    c = torch.empty(M, -(-N // 8) * 8, dtype=a.dtype, device=a.device)[:, :N]
    BM, BN, BK = blocks
    grid = (triton.cdiv(M, BM), triton.cdiv(N, BN))
    d_a, d_b, d_c = (
        TensorDescriptor(t, list(t.shape), list(t.stride()), block)
        for t, block in ((a, [BM, BK]), (b, [BN, BK]), (c, [BM, BN]))
    )
    descriptor_matmul_fwd_kernel[grid](d_a, d_b, d_c, K, BM=BM, BN=BN, BK=BK)
    return c


COMPILE_CASES = [
    {
        "kernel": matmul_fwd_kernel,
        "signature": {
            "a": "*{dtype}", "b": "*{dtype}", "c": "*{dtype}", "M": "i32", "N": "i32", "K": "i32:16",
            "stride_a": "i32:16", "stride_b": "i32:16", "stride_c": "i32:16",
        },
        "dtypes": ["bf16", "fp16"],
        "constexprs": {"BM": 128, "BN": 128, "BK": 64, "PRECISION": "ieee"},
        "options": {"num_warps": 8, "num_stages": 3},
        "tensor_cores": True,
    },
    {
        "kernel": softmax_fwd_kernel,
        "signature": {"x": "*{dtype}", "y": "*{dtype}", "C": "i32", "stride_x": "i32", "stride_y": "i32"},
        "dtypes": ["bf16", "fp32"],
        "constexprs": {"BC": 1024},
    },
    {
        "kernel": logsumexp_fwd_kernel,
        "signature": {"x": "*{dtype}", "lse": "*fp32", "R": "i32", "C": "i32", "stride_x": "i32:16"},
        "dtypes": ["bf16", "fp32"],
        "constexprs": {"BR": 16, "BC": 128},
    },
    {
        "kernel": descriptor_matmul_fwd_kernel,
        "signature": {
            "a": "tensordesc<{dtype}[BM, BK]>", "b": "tensordesc<{dtype}[BN, BK]>",
            "c": "tensordesc<{dtype}[BM, BN]>", "K": "i32:16",
        },
        "dtypes": ["bf16"],
        "constexprs": {"BM": 128, "BN": 128, "BK": 64},
        "options": {"num_warps": 8, "num_stages": 3},
        "targets": ["sm_90", "sm_100", "sm_120"],
        "tensor_cores": True,
    },
]  # fmt: skip
