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
    VARIES,
    finite,
    holds_target,
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


@triton.jit(do_not_specialize=VARIES)
def scores_fwd_kernel(
    x, w, out, stride_out, rows, columns, positive, ranks, tops, reference,
    N, M, D, stride_x, stride_w,
    scale, bias, softcap, target, key_ids, query_ids, positive_ids, P, limit,
    SEVERAL: tl.constexpr, DUPLICATES_ARE_POSITIVE: tl.constexpr, SMOOTHING: tl.constexpr, LEVEL: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A program owns, of each of its tiles, the exponentials `out`, the partials of rows and columns, and the ranks.

    The logit of a row's one positive belongs to the tile that holds it; its `reference` is known before, and with LEVEL
    the exponentials are above it. Then `tops` (T, N) has the rows' maxima, for who asks.
    """
    BC: tl.constexpr = BN // PARTS
    tiles_m, tiles_n = tl.cdiv(N, BM), tl.cdiv(M, BN)
    for i_t in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        i_m, i_n = tile_at(i_t, tiles_m, tiles_n, GROUP)
        o_m = i_m * BM + tl.arange(0, BM)
        held = holds_target(target, o_m, N, i_n * BN, BN, SEVERAL)
        b_a = product_tile(x, w, i_m, i_n, N, M, D, stride_x, stride_w, BM, BN, BK, TMA, PRECISION)
        for i_p in tl.static_range(PARTS):
            i_c = i_n * PARTS + i_p
            o_n = i_c * BC + tl.arange(0, BC)
            b_s = part_of(b_a, i_p, PARTS)
            m_pos = positives(
                b_s, o_m, o_n, N, M, target, key_ids, query_ids, positive_ids, P, SEVERAL, DUPLICATES_ARE_POSITIVE
            )
            b_z = logits(
                b_s, i_m, i_c, o_m, o_n, N, M, m_pos, held, scale, bias, softcap, target, key_ids, query_ids, limit,
                SEVERAL, DUPLICATES_ARE_POSITIVE, columns is not None,
            )  # fmt: skip
            if positive is not None and held:
                store_positive(b_z, positive, target, o_m, o_n, i_c, N)
            if columns is not None:
                store_softmax(b_z, m_pos, columns, i_m, o_n, M, 0, SEVERAL, SMOOTHING)
            if LEVEL:
                b_level = finite(tl.load(reference + o_m, mask=o_m < N, other=0.0))
                b_e, b_max = store_softmax(b_z, m_pos, rows, i_c, o_m, N, 1, SEVERAL, SMOOTHING, b_level)
            else:
                b_e, b_max = store_softmax(b_z, m_pos, rows, i_c, o_m, N, 1, SEVERAL, SMOOTHING)
            if tops is not None:
                tl.store(tops + tl.cast(i_c, tl.int64) * N + o_m, b_max, mask=o_m < N)
            if ranks is not None:
                store_ranks(b_z, b_max, m_pos, held, ranks, reference, target, o_m, o_n, i_c, N, M, SEVERAL)
            if out is not None:
                store_tile(out, stride_out, b_e, i_m, i_c, o_m, o_n, N, M, BM, BC, TMA)


@triton.jit(do_not_specialize=VARIES)
def scores_bwd_logits_kernel(
    x, w, out, stride_out, rows, columns, again,
    N, M, D, stride_x, stride_w,
    scale, bias, softcap, target, key_ids, query_ids, positive_ids, P, limit,
    SEVERAL: tl.constexpr, DUPLICATES_ARE_POSITIVE: tl.constexpr, SMOOTHING: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A program owns the gradient `out` of each of its tiles, formed from the weights of its rows and columns.

    Given `again` (tiles), only of those where it is not 0.
    """
    tiles_m, tiles_n = tl.cdiv(N, BM), tl.cdiv(M, BN)
    for i_t in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        i_m, i_n = tile_at(i_t, tiles_m, tiles_n, GROUP)
        if again is None or tl.load(again + i_m * tiles_n + i_n) != 0:
            gradient_tile(
                x, w, out, stride_out, rows, columns, i_m, i_n, N, M, D, stride_x, stride_w,
                scale, bias, softcap, target, key_ids, query_ids, positive_ids, P, limit,
                SEVERAL, DUPLICATES_ARE_POSITIVE, SMOOTHING, TMA, PRECISION, BM, BN, BK, PARTS,
            )  # fmt: skip


@triton.jit
def gradient_tile(
    x, w, out, stride_out, rows, columns, i_m, i_n, N, M, D, stride_x, stride_w,
    scale, bias, softcap, target, key_ids, query_ids, positive_ids, P, limit,
    SEVERAL: tl.constexpr, DUPLICATES_ARE_POSITIVE: tl.constexpr, SMOOTHING: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Multiplies one tile and stores its gradient."""
    BC: tl.constexpr = BN // PARTS
    o_m = i_m * BM + tl.arange(0, BM)
    held = holds_target(target, o_m, N, i_n * BN, BN, SEVERAL)
    b_a = product_tile(x, w, i_m, i_n, N, M, D, stride_x, stride_w, BM, BN, BK, TMA, PRECISION)
    for i_p in tl.static_range(PARTS):
        i_c = i_n * PARTS + i_p
        o_n = i_c * BC + tl.arange(0, BC)
        b_s = part_of(b_a, i_p, PARTS)
        m_pos = positives(
            b_s, o_m, o_n, N, M, target, key_ids, query_ids, positive_ids, P, SEVERAL, DUPLICATES_ARE_POSITIVE
        )
        b_z = logits(
            b_s, i_m, i_c, o_m, o_n, N, M, m_pos, held, scale, bias, softcap, target, key_ids, query_ids, limit,
            SEVERAL, DUPLICATES_ARE_POSITIVE, False,
        )  # fmt: skip
        b_d = logit_gradient(b_z, m_pos, held, rows, columns, target, o_m, o_n, N, M, softcap, SEVERAL, SMOOTHING)
        store_tile(out, stride_out, b_d, i_m, i_c, o_m, o_n, N, M, BM, BC, TMA)


@triton.jit(do_not_specialize=["N", "M"])
def positives_fwd_kernel(
    x, w, out, N, M, D, stride_x, stride_w, scale, bias, softcap, target,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A program owns the logits `out` (N,) of the targets of min(BM, BN) rows; NaN where a target is none of 0..M-1.

    They are the diagonal of a product of the score kernels' own tile, and so summed in the same order: what equals the
    positive has its score to the last bit. TRANSPOSED: tiles of w are loaded as descriptors load them.
    """
    R: tl.constexpr = BM if BM < BN else BN
    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    first = tl.program_id(0).to(tl.int64) * R
    o_r = first + o_m
    b_target = tl.load(target + first + o_n, mask=(o_n < R) & (first + o_n < N), other=-1)
    m_w = (b_target >= 0) & (b_target < M)
    p_x = x + o_r[:, None] * stride_x + o_k[None, :]
    p_w = w + b_target.to(tl.int64) * stride_w
    b_a = tl.zeros((BM, BN), dtype=tl.float32)
    for i_k in range(0, D, BK):
        m_k = o_k < D - i_k
        b_x = tl.load(p_x + i_k, mask=(o_r < N)[:, None] & m_k[None, :], other=0.0)
        if TRANSPOSED:
            b_w = tl.load(p_w[:, None] + (i_k + o_k)[None, :], mask=m_w[:, None] & m_k[None, :], other=0.0).T
        else:
            b_w = tl.load(p_w[None, :] + (i_k + o_k)[:, None], mask=m_w[None, :] & m_k[:, None], other=0.0)
        b_a = tl.dot(b_x, b_w, b_a, input_precision=PRECISION)
    m_diagonal = o_m[:, None] == o_n[None, :]
    b_sum = tl.sum(tl.where(m_diagonal, b_a, 0.0), 1)
    m_r = (o_m < R) & (o_r < N)
    b_own = tl.load(target + o_r, mask=m_r, other=-1)
    m_own = (b_own >= 0) & (b_own < M)
    if bias is not None:
        b_z = scored(b_sum, scale, tl.load(bias + b_own, mask=m_own, other=0.0), softcap)
    else:
        b_z = scored(b_sum, scale, None, softcap)
    tl.store(out + o_r, tl.where(m_own, b_z, float("nan")), mask=m_r)
