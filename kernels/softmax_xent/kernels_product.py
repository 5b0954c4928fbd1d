"""Score products whose epilogues are a softmax: exponentials and statistics of a tile, or its gradient.

Scores never reach memory. Programs are persistent: each walks over tiles, in an order that keeps operands in the cache,
and owns all that is stored of them. Never materialised: scores, fp32 anything.

Legend: N rows, M candidates, D width; tiles of (BM, BN) scores, T columns of tiles; F fields of a partial.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportOptionalOperand=false

from __future__ import annotations

import triton
import triton.language as tl

from .tile import (
    logit_gradient,
    logits,
    part_of,
    positives,
    product_tile,
    scored,
    store_positive,
    store_ranks,
    store_softmax,
    store_tile,
    tile_at,
)


@triton.jit
def scores_fwd_kernel(
    x, w, out, stride_out, rows, columns, positive, ranks, reference,
    N, M, D, stride_x, stride_w,
    scale, bias, softcap, target, key_ids, query_ids, positive_ids, P,
    SEVERAL: tl.constexpr, DUPLICATES_ARE_POSITIVE: tl.constexpr, SMOOTHING: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A program owns, of each of its tiles, the exponentials `out`, the partials of rows and columns, and the ranks.

    The logit of a row's one positive belongs to the tile that holds it.
    """
    BC: tl.constexpr = BN // PARTS
    tiles_m, tiles_n = tl.cdiv(N, BM), tl.cdiv(M, BN)
    for i_t in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        i_m, i_n = tile_at(i_t, tiles_m, tiles_n, GROUP)
        b_a = product_tile(x, w, i_m, i_n, N, M, D, stride_x, stride_w, BM, BN, BK, TMA, PRECISION)
        o_m = i_m * BM + tl.arange(0, BM)
        for i_p in tl.static_range(PARTS):
            i_c = i_n * PARTS + i_p
            o_n = i_c * BC + tl.arange(0, BC)
            b_s = part_of(b_a, i_p, PARTS)
            m_pos = positives(
                b_s, o_m, o_n, N, M, target, key_ids, query_ids, positive_ids, P, SEVERAL, DUPLICATES_ARE_POSITIVE
            )
            b_z = logits(b_s, o_m, o_n, N, M, m_pos, scale, bias, softcap, key_ids, query_ids, DUPLICATES_ARE_POSITIVE)
            if positive is not None:
                store_positive(b_z, m_pos, positive, target, o_m, i_c, N, BC)
            if ranks is not None:
                store_ranks(b_z, m_pos, ranks, reference, i_c, o_m, N, BC)
            if columns is not None:
                store_softmax(b_z, m_pos, columns, i_m, o_n, M, 0, SEVERAL, SMOOTHING)
            b_e = store_softmax(b_z, m_pos, rows, i_c, o_m, N, 1, SEVERAL, SMOOTHING)
            if out is not None:
                store_tile(out, stride_out, b_e, i_m, i_c, o_m, o_n, N, M, BM, BC, TMA)


@triton.jit
def scores_bwd_logits_kernel(
    x, w, out, stride_out, rows, columns,
    N, M, D, stride_x, stride_w,
    scale, bias, softcap, target, key_ids, query_ids, positive_ids, P,
    SEVERAL: tl.constexpr, DUPLICATES_ARE_POSITIVE: tl.constexpr, SMOOTHING: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A program owns the gradient `out` of each of its tiles, formed from the weights of its rows and columns."""
    BC: tl.constexpr = BN // PARTS
    tiles_m, tiles_n = tl.cdiv(N, BM), tl.cdiv(M, BN)
    for i_t in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        i_m, i_n = tile_at(i_t, tiles_m, tiles_n, GROUP)
        b_a = product_tile(x, w, i_m, i_n, N, M, D, stride_x, stride_w, BM, BN, BK, TMA, PRECISION)
        o_m = i_m * BM + tl.arange(0, BM)
        for i_p in tl.static_range(PARTS):
            i_c = i_n * PARTS + i_p
            o_n = i_c * BC + tl.arange(0, BC)
            b_s = part_of(b_a, i_p, PARTS)
            m_pos = positives(
                b_s, o_m, o_n, N, M, target, key_ids, query_ids, positive_ids, P, SEVERAL, DUPLICATES_ARE_POSITIVE
            )
            b_z = logits(b_s, o_m, o_n, N, M, m_pos, scale, bias, softcap, key_ids, query_ids, DUPLICATES_ARE_POSITIVE)
            b_d = logit_gradient(b_z, m_pos, rows, columns, o_m, o_n, N, M, softcap, SEVERAL, SMOOTHING)
            store_tile(out, stride_out, b_d, i_m, i_c, o_m, o_n, N, M, BM, BC, TMA)


@triton.jit
def positives_fwd_kernel(
    x, w, out, N, D, stride_x, stride_w, scale, bias, softcap, target, BR: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """A program owns the logits `out` (N,) of BR rows' targets."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_k = tl.arange(0, BK)
    m_r = o_r < N
    b_target = tl.load(target + o_r, mask=m_r, other=0).to(tl.int64)
    b_sum = tl.zeros((BR,), dtype=tl.float32)
    for i_k in range(0, D, BK):
        m = m_r[:, None] & (o_k < D - i_k)[None, :]
        b_x = tl.load(x + o_r[:, None] * stride_x + (i_k + o_k)[None, :], mask=m, other=0.0).to(tl.float32)
        b_w = tl.load(w + b_target[:, None] * stride_w + (i_k + o_k)[None, :], mask=m, other=0.0).to(tl.float32)
        b_sum += tl.sum(b_x * b_w, 1)
    if bias is not None:
        b_z = scored(b_sum, scale, tl.load(bias + b_target, mask=m_r, other=0.0), softcap)
    else:
        b_z = scored(b_sum, scale, None, softcap)
    tl.store(out + o_r, b_z, mask=m_r)
