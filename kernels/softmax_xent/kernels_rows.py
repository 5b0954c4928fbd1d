"""Kernels over scores that another kernel, or cuBLAS, has multiplied: statistics and gradients of rows, their merging.

Each tile of a chunk is read, turned and written once. Partials of tiles are merged by a kernel of their own, so that
one row can be the work of many programs and still every element has one owner.

Legend: N rows, M candidates; tiles of (BM, BN) scores, T columns of tiles; F fields of a partial, see `tile`.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from .tile import (
    FAR,
    LOG2E,
    VARIES,
    candidates,
    exp_between,
    exponent_between,
    finite,
    in_memory,
    logit_gradient,
    logits,
    positives,
    store_positive,
    store_ranks,
    store_softmax,
)

HIGHEST = tl.constexpr(85.0)
"""exp(-HIGHEST) is not 0 in bf16 and fp32, and exp(HIGHEST) no infinity."""
NEGLIGIBLE = tl.constexpr(17.0)
"""exp(-NEGLIGIBLE) beside 1 is lost in fp32."""


@triton.jit(do_not_specialize=["T", "N"])
def merge_fwd_kernel(
    parts, out, T, N, SEVERAL: tl.constexpr, SMOOTHING: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """A program owns BR softmaxes of out (F, N), merged from partials (T, F, N)."""
    F: tl.constexpr = 2 + 2 * SEVERAL + 2 * SMOOTHING
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_r = o_r < N
    for i_f in tl.static_range(0, F - 2 * SMOOTHING, 2):
        b_max = tl.full((BR,), -float("inf"), dtype=tl.float32)
        b_sum = tl.zeros((BR,), dtype=tl.float32)
        for i_t in range(0, T, BT):
            o_t = tl.cast(i_t, tl.int64) + tl.arange(0, BT)
            m = (o_t < T)[:, None] & m_r[None, :]
            p = parts + (o_t[:, None] * F + i_f) * N + o_r[None, :]
            b_part = tl.load(p, mask=m, other=-float("inf"))
            b_top = tl.maximum(b_max, tl.max(b_part, 0))
            b_shift = finite(b_top)
            b_new = tl.load(p + N, mask=m, other=0.0) * exp_between(b_part, b_shift[None, :])
            b_sum = b_sum * tl.exp(b_max - b_shift) + tl.sum(b_new, 0)
            b_max = b_top
        p_out = out + tl.cast(N, tl.int64) * i_f + o_r
        tl.store(p_out, b_max, mask=m_r)
        tl.store(p_out + N, b_sum, mask=m_r)
    if SMOOTHING:
        for i_f in tl.static_range(F - 2, F):
            b_sum = tl.zeros((BR,), dtype=tl.float32)
            for i_t in range(0, T, BT):
                o_t = tl.cast(i_t, tl.int64) + tl.arange(0, BT)
                m = (o_t < T)[:, None] & m_r[None, :]
                b_sum += tl.sum(tl.load(parts + (o_t[:, None] * F + i_f) * N + o_r[None, :], mask=m, other=0.0), 0)
            tl.store(out + tl.cast(N, tl.int64) * i_f + o_r, b_sum, mask=m_r)


@triton.jit(do_not_specialize=["max", "sum", "pos_max", "pos_sum", "count", "g", "N"])
def weights_bwd_kernel(
    max, sum, pos_max, pos_sum, count, g, scale, out, N, smoothing, z_loss, BR: tl.constexpr
):  # fmt: skip
    """A program owns BR columns of out (5, N): max, the weight of p, pos_max, the weights of t and of the uniform."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m = o_r < N
    b_max = tl.load(max + o_r, mask=m, other=0.0).to(tl.float32)
    b_sum = tl.load(sum + o_r, mask=m, other=0.0).to(tl.float32)
    b_pos_sum = tl.load(pos_sum + o_r, mask=m, other=0.0).to(tl.float32)
    b_g = tl.load(g + o_r, mask=m, other=0.0).to(tl.float32)
    if scale.dtype.is_ptr():
        b_g = b_g * tl.load(scale)
    else:
        b_g = b_g * scale
    b_p = b_g
    if z_loss is not None:
        b_p = b_p * (1 + 2 * z_loss * (b_max + tl.log(b_sum)))
    p = out + o_r
    row = tl.cast(N, tl.int64)
    tl.store(p, b_max, mask=m)
    tl.store(p + row, tl.where(b_sum == 0.0, 0.0, b_p / b_sum), mask=m)  # of NaN, NaN
    tl.store(p + 2 * row, tl.load(pos_max + o_r, mask=m, other=0.0).to(tl.float32), mask=m)
    b_t = tl.where(b_pos_sum == 0.0, 0.0, b_g / b_pos_sum)
    if smoothing is not None:
        b_count = tl.load(count + o_r, mask=m, other=0).to(tl.float32)
        b_t = b_t * (1 - smoothing)
        tl.store(p + 4 * row, tl.where(b_count > 0, b_g * smoothing / b_count, 0.0), mask=m)
    tl.store(p + 3 * row, b_t, mask=m)


@triton.jit(do_not_specialize=VARIES)
def stored_bwd_logits_kernel(
    e, stride_e, parts, rows, columns, N, M,
    bias, target, key_ids, query_ids, positive_ids, P,
    SEVERAL: tl.constexpr, DUPLICATES_ARE_POSITIVE: tl.constexpr, SMOOTHING: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program owns a (BM, BN) tile of e, exponentials above the maxima in `parts`, and turns it into the gradient.

    BN is that of the tiles whose maxima these are. The one positive's p - t is formed from its fp32 logit. What columns
    weigh is exact where exponentials have not underflowed; see `underflow_bwd_kernel` for the rest.
    """
    F: tl.constexpr = 2 + 2 * SEVERAL + 2 * SMOOTHING
    tiles_n = tl.cdiv(M, BN)
    i_m, i_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    m_m, m_n = o_m < N, o_n < M
    p_e = e + o_m.to(tl.int64)[:, None] * stride_e + o_n[None, :]
    m_e = m_m[:, None] & in_memory(o_n, M)[None, :]
    b_e = tl.load(p_e, mask=m_e, other=0.0).to(tl.float32)
    p_part = parts + i_n.to(tl.int64) * F * N + o_m
    p_row = rows + o_m
    row = tl.cast(N, tl.int64)
    b_shift = finite(tl.load(p_row, mask=m_m, other=0.0))
    b_p = tl.load(p_row + row, mask=m_m, other=0.0)
    b_pos_max = tl.load(p_row + 2 * row, mask=m_m, other=0.0)
    b_t = tl.load(p_row + 3 * row, mask=m_m, other=0.0)
    b_max = tl.load(p_part, mask=m_m, other=-float("inf"))
    b_rest = b_p * exp_between(b_max, b_shift)
    m_pos = positives(
        b_e, o_m, o_n, N, M, target, key_ids, query_ids, positive_ids, P, SEVERAL, DUPLICATES_ARE_POSITIVE
    )
    if SEVERAL:
        b_own = tl.load(p_part + 2 * row, mask=m_m, other=-float("inf"))
        b_pos = b_p * exp_between(b_own, b_shift) - b_t * exp_between(b_own, finite(b_pos_max))
        b_d = b_e * tl.where(m_pos, b_pos[:, None], b_rest[:, None])
    else:
        b_pos = b_p * tl.exp(b_pos_max - b_shift) - b_t
        b_each = b_rest[:, None]
        if columns is not None:
            column = tl.cast(M, tl.int64)
            b_column = finite(tl.load(columns + o_n, mask=m_n, other=0.0))
            b_weight = tl.load(columns + column + o_n, mask=m_n, other=0.0)
            b_lift = tl.minimum(exponent_between(finite(b_max)[:, None], b_column[None, :]), HIGHEST * LOG2E)
            b_each = b_each + tl.exp2(b_lift) * b_weight[None, :]
            p_own = columns + tl.load(target + o_m, mask=m_m, other=0)
            b_above = b_pos_max - tl.load(p_own, mask=m_m, other=0.0)
            b_apart = b_pos_max - tl.load(p_own + 2 * column, mask=m_m, other=0.0)
            b_pos += tl.exp(b_above) * tl.load(p_own + column, mask=m_m, other=0.0)
            b_pos -= tl.exp(b_apart) * tl.load(p_own + 3 * column, mask=m_m, other=0.0)
        b_d = tl.where(m_pos, b_pos[:, None], b_e * b_each)
    if SMOOTHING:
        m = candidates(o_m, o_n, N, M, m_pos, key_ids, query_ids, DUPLICATES_ARE_POSITIVE)
        if bias is not None:
            m = m & (tl.load(bias + o_n, mask=m_n, other=0.0) > -float("inf"))[None, :]
        b_uniform = tl.load(p_row + 4 * row, mask=m_m, other=0.0)[:, None]
        if columns is not None:
            b_uniform = b_uniform + tl.load(columns + 4 * column + o_n, mask=m_n, other=0.0)[None, :]
        b_d -= tl.where(m, b_uniform, 0.0)
    tl.store(p_e, b_d.to(e.dtype.element_ty), mask=m_e)


@triton.jit(do_not_specialize=["N", "M"])
def levelled_bwd_kernel(
    e, stride_e, parts, rows, reference, target, out, N, M, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """A program owns BM rows of e, exponentials above `reference`, and their weights `out` (N,): dz_ij = out_i e_ij.

    BN is the width of the tiles of `parts`. The target's e becomes what makes its dz p - 1, formed in fp32. In a row
    that has a maximum `FAR` above its positive, and so tiles above their own, all are put above the one maximum.
    """
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    m_m = o_m < N
    p_row = rows + o_m
    row = tl.cast(N, tl.int64)
    b_level = finite(tl.load(reference + o_m, mask=m_m, other=0.0))
    b_shift = finite(tl.load(p_row, mask=m_m, other=0.0))
    b_p = tl.load(p_row + row, mask=m_m, other=0.0)
    b_pos_max = tl.load(p_row + 2 * row, mask=m_m, other=0.0)
    b_t = tl.load(p_row + 3 * row, mask=m_m, other=0.0)
    b_target = tl.load(target + o_m, mask=m_m, other=0)
    m_far = m_m & (b_shift > b_level + FAR)
    b_weight = b_p * tl.where(m_far, 1.0, exp_between(b_level, b_shift))
    tl.store(out + o_m, b_weight, mask=m_m)
    b_d = b_p * tl.exp(b_pos_max - b_shift) - b_t
    p_e = e + o_m.to(tl.int64) * stride_e
    tl.store(p_e + b_target, tl.where(b_weight == 0.0, 0.0, b_d / b_weight).to(e.dtype.element_ty), mask=m_m)
    if tl.max(m_far.to(tl.int32), 0) != 0:
        for i_t in range(0, tl.cdiv(M, BN)):
            o_n = i_t * BN + tl.arange(0, BN)
            b_from = tl.load(parts + tl.cast(i_t, tl.int64) * 2 * N + o_m, mask=m_m, other=-float("inf"))
            m_e = m_far[:, None] & (o_n < M)[None, :] & (o_n[None, :] != b_target[:, None])
            b_e = tl.load(p_e[:, None] + o_n[None, :], mask=m_e, other=0.0).to(tl.float32)
            b_e *= exp_between(b_from, b_shift)[:, None]
            tl.store(p_e[:, None] + o_n[None, :], b_e.to(e.dtype.element_ty), mask=m_e)


@triton.jit(do_not_specialize=["N", "M", "F"])
def underflow_bwd_kernel(
    rows, columns, weights, again, N, M, F,
    BM: tl.constexpr, BN: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A program owns `again` of a (BM, BN) tile: whether exponentials of it that a column needs may have underflowed.

    An exponential is above its row's maximum a_i in a tile of WIDTH columns (`rows`), and 0 below a_i - HIGHEST. A
    column of maximum C_j needs what lies above C_j - NEGLIGIBLE, if its own maximum in these rows, of tiles of HEIGHT
    (`columns`), does. `weights` (5, M) say C_j and what a column weighs.
    """
    tiles_n = tl.cdiv(M, BN)
    i_m, i_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    m_m, m_n = o_m < N, o_n < M
    b_row = tl.full((BM,), -float("inf"), dtype=tl.float32)
    for i_t in range(i_n * BN // WIDTH, tl.cdiv(tl.minimum(i_n * BN + BN, M), WIDTH)):
        b_row = tl.maximum(b_row, tl.load(rows + tl.cast(i_t, tl.int64) * F * N + o_m, mask=m_m, other=-float("inf")))
    b_column = tl.full((BN,), -float("inf"), dtype=tl.float32)
    for i_t in range(i_m * BM // HEIGHT, tl.cdiv(tl.minimum(i_m * BM + BM, N), HEIGHT)):
        p_part = columns + tl.cast(i_t, tl.int64) * F * M + o_n
        b_column = tl.maximum(b_column, tl.load(p_part, mask=m_n, other=-float("inf")))
    b_needed = tl.load(weights + o_n, mask=m_n, other=0.0) - NEGLIGIBLE
    b_weight = tl.load(weights + tl.cast(M, tl.int64) + o_n, mask=m_n, other=0.0)
    # `exp_above` rounds a large maximum, by which its exponentials are shifted; C_j - NEGLIGIBLE may round to C_j.
    b_top = tl.max(tl.maximum(b_row * (1 + 2.0**-23), b_row * (1 - 2.0**-23)), 0)
    m_needed = m_n & (b_weight != 0.0) & (b_column >= b_needed) & (b_top - HIGHEST > b_needed)
    tl.store(again + tl.program_id(0), tl.max(m_needed.to(tl.int32), 0))


@triton.jit(do_not_specialize=VARIES)
def rows_fwd_kernel(
    a, stride_a, rows, columns, positive,
    N, M, scale, bias, softcap, target, key_ids, query_ids, positive_ids, P, limit,
    SEVERAL: tl.constexpr, DUPLICATES_ARE_POSITIVE: tl.constexpr, SMOOTHING: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program owns the partials of the rows and columns of a (BM, BN) tile of the products a."""
    tiles_n = tl.cdiv(M, BN)
    i_m, i_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    m = (o_m < N)[:, None] & in_memory(o_n, M)[None, :]
    b_a = tl.load(a + o_m.to(tl.int64)[:, None] * stride_a + o_n[None, :], mask=m, other=0.0)
    m_pos = positives(
        b_a, o_m, o_n, N, M, target, key_ids, query_ids, positive_ids, P, SEVERAL, DUPLICATES_ARE_POSITIVE
    )
    b_z = logits(
        b_a, i_m, i_n, o_m, o_n, N, M, m_pos, True, scale, bias, softcap, target, key_ids, query_ids, limit,
        SEVERAL, DUPLICATES_ARE_POSITIVE, columns is not None,
    )  # fmt: skip
    if positive is not None:
        store_positive(b_z, positive, target, o_m, o_n, i_n, N)
    if columns is not None:
        store_softmax(b_z, m_pos, columns, i_m, o_n, M, 0, SEVERAL, SMOOTHING)
    store_softmax(b_z, m_pos, rows, i_n, o_m, N, 1, SEVERAL, SMOOTHING)


@triton.jit(do_not_specialize=VARIES)
def ranks_fwd_kernel(
    a, stride_a, ranks, reference,
    N, M, scale, bias, softcap, target, key_ids, query_ids, positive_ids, P, limit,
    SEVERAL: tl.constexpr, DUPLICATES_ARE_POSITIVE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program owns, of a (BM, BN) tile of the products a, each row's count above its best positive and its best."""
    tiles_n = tl.cdiv(M, BN)
    i_m, i_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    m = (o_m < N)[:, None] & in_memory(o_n, M)[None, :]
    b_a = tl.load(a + o_m.to(tl.int64)[:, None] * stride_a + o_n[None, :], mask=m, other=0.0)
    m_pos = positives(
        b_a, o_m, o_n, N, M, target, key_ids, query_ids, positive_ids, P, SEVERAL, DUPLICATES_ARE_POSITIVE
    )
    b_z = logits(
        b_a, i_m, i_n, o_m, o_n, N, M, m_pos, True, scale, bias, softcap, target, key_ids, query_ids, limit,
        SEVERAL, DUPLICATES_ARE_POSITIVE, False,
    )  # fmt: skip
    b_max = tl.max(b_z, 1)
    store_ranks(b_z, b_max, m_pos, True, ranks, reference, target, o_m, o_n, i_n, N, M, SEVERAL)


@triton.jit(do_not_specialize=VARIES)
def rows_bwd_logits_kernel(
    a, stride_a, out, stride_out, rows, columns,
    N, M, scale, bias, softcap, target, key_ids, query_ids, positive_ids, P, limit,
    SEVERAL: tl.constexpr, DUPLICATES_ARE_POSITIVE: tl.constexpr, SMOOTHING: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program owns the gradient `out` of a (BM, BN) tile of the products a; out may be a."""
    tiles_n = tl.cdiv(M, BN)
    i_m, i_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    m = (o_m < N)[:, None] & in_memory(o_n, M)[None, :]
    b_a = tl.load(a + o_m.to(tl.int64)[:, None] * stride_a + o_n[None, :], mask=m, other=0.0)
    m_pos = positives(
        b_a, o_m, o_n, N, M, target, key_ids, query_ids, positive_ids, P, SEVERAL, DUPLICATES_ARE_POSITIVE
    )
    b_z = logits(
        b_a, i_m, i_n, o_m, o_n, N, M, m_pos, True, scale, bias, softcap, target, key_ids, query_ids, limit,
        SEVERAL, DUPLICATES_ARE_POSITIVE, False,
    )  # fmt: skip
    b_d = logit_gradient(b_z, m_pos, True, rows, columns, target, o_m, o_n, N, M, softcap, SEVERAL, SMOOTHING)
    tl.store(out + o_m.to(tl.int64)[:, None] * stride_out + o_n[None, :], b_d.to(out.dtype.element_ty), mask=m)
