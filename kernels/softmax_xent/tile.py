"""Device functions of one tile of logits: its product, scores and masks, its softmax, its gradient.

    a_ij = s <x_i, w_j> + b_j       z_ij = c tanh(a_ij / c) with a softcap c, else a_ij; -inf where j is not a candidate

Kernels that multiply and kernels that read products share them, so that all agree on what a score is. An option is on
if its argument is not None; `target`, `key_ids`, `query_ids`, `positive_ids`, `limit` and `bias` are pointers, `scale`
a float or a pointer to one. Targets and ids are int32: a thread holds those of all its columns at once, in as many
registers.

Partials: the softmaxes of a tile lie in a tensor (T, F, size), T tiles along the axis that is summed, with the fields
max, sum, with several positives pos_max, pos_sum, with label smoothing total, count.

Legend: N rows, M candidates, D width, P positive ids of a row; a tile is (BM, BN), o_m and o_n its rows and columns.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportReturnType=false, reportOptionalOperand=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

VARIES = ("N", "M", "P", "query_ids", "positive_ids", "limit")
"""Arguments whose values and alignment vary from chunk to chunk and step to step; see `launch`."""


@triton.jit
def tile_at(i_t, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of tile i_t on a walk through GROUP rows of tiles at a time, whose operands stay in the cache."""
    band = GROUP * tiles_n
    first = i_t // band * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + i_t % band % height, i_t % band // height


@triton.jit
def product_tile(
    x, w, i_m, i_n, N, M, D, stride_x, stride_w,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x w' in fp32; x and w are tensor descriptors of (BM, BK) and (BN, BK) blocks if TMA, else pointers."""
    b_a = tl.zeros((BM, BN), dtype=tl.float32)
    if TMA:
        for i_k in range(0, D, BK):
            b_a = tl.dot(x.load([i_m * BM, i_k]), w.load([i_n * BN, i_k]).T, b_a, input_precision=PRECISION)
    else:
        o_m = tl.cast(i_m, tl.int64) * BM + tl.arange(0, BM)
        o_n = tl.cast(i_n, tl.int64) * BN + tl.arange(0, BN)
        o_k = tl.arange(0, BK)
        p_x = x + o_m[:, None] * stride_x + o_k[None, :]
        p_w = w + o_n[None, :] * stride_w + o_k[:, None]
        for i_k in range(0, D, BK):
            b_x = tl.load(p_x, mask=(o_m < N)[:, None] & (o_k < D - i_k)[None, :], other=0.0)
            b_w = tl.load(p_w, mask=(o_n < M)[None, :] & (o_k < D - i_k)[:, None], other=0.0)
            b_a = tl.dot(b_x, b_w, b_a, input_precision=PRECISION)
            p_x += BK
            p_w += BK
    return b_a


@triton.jit
def half_of(b, right: tl.constexpr):
    """The left or right half of a tile's columns."""
    b_left, b_right = tl.split(tl.permute(tl.reshape(b, (b.shape[0], 2, b.shape[1] // 2)), (0, 2, 1)))
    return b_right if right else b_left


@triton.jit
def part_of(b, i_p: tl.constexpr, PARTS: tl.constexpr):
    """Columns i_p BN / PARTS and on of a tile, for 1, 2, 4 or 8 parts: registers are renamed, not moved."""
    if PARTS > 1:
        b = half_of(b, i_p * 2 // PARTS % 2 == 1)
    if PARTS > 2:
        b = half_of(b, i_p * 4 // PARTS % 2 == 1)
    if PARTS > 4:
        b = half_of(b, i_p * 8 // PARTS % 2 == 1)
    return b


@triton.jit
def in_memory(o_n, M):
    """Which columns a matrix of scores has: rows are padded to whole 16s, so that for any M 16 bytes move at a time."""
    return o_n < tl.cdiv(M, 16) * 16


@triton.jit
def store_tile(
    out, stride_out, b, i_m, i_n, o_m, o_n, N, M, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """Stores a tile, rounded; out is a tensor descriptor if TMA, else a pointer."""
    if TMA:
        out.store([i_m * BM, i_n * BN], b.to(out.dtype))
    else:
        p_out = out + o_m.to(tl.int64)[:, None] * stride_out + o_n[None, :]
        tl.store(p_out, b.to(out.dtype.element_ty), mask=(o_m < N)[:, None] & in_memory(o_n, M)[None, :])


@triton.jit
def finite(b):
    """0 for -inf: a shift that makes the exponentials of an empty set 0 rather than NaN."""
    return tl.where(b == -float("inf"), 0.0, b)


@triton.jit
def scored(b_a, scale, b_bias, softcap):
    """Logits of products; b_bias broadcasts against them."""
    if scale.dtype.is_ptr():
        b_a = b_a * tl.load(scale)
    else:
        b_a = b_a * scale
    if b_bias is not None:
        b_a += b_bias
    if softcap is not None:
        b_a = libdevice.tanh(b_a / softcap) * softcap
    return b_a


@triton.jit
def positives(
    b, o_m, o_n, N, M, target, key_ids, query_ids, positive_ids, P,
    SEVERAL: tl.constexpr, DUPLICATES_ARE_POSITIVE: tl.constexpr,
):  # fmt: skip
    """Which of a tile's candidates are positives of its rows; b is any tile of fp32 that lies as the scores do."""
    # None so far. Made of b, the mask stays in registers; made of o_m and o_n, it moves through shared memory.
    m_pos = b > float("inf")
    if target is not None:
        m_pos |= tl.load(target + o_m, mask=o_m < N, other=-1)[:, None] == o_n[None, :]
    if SEVERAL:
        b_key = tl.load(key_ids + o_n, mask=o_n < M, other=-1)
        if DUPLICATES_ARE_POSITIVE:
            m_pos |= tl.load(query_ids + o_m, mask=o_m < N, other=-2)[:, None] == b_key[None, :]
        if positive_ids is not None:
            p_id = positive_ids + o_m.to(tl.int64) * P
            for i_p in range(0, P):
                m_pos |= tl.load(p_id + i_p, mask=o_m < N, other=-2)[:, None] == b_key[None, :]
    return m_pos


@triton.jit
def candidates(o_m, o_n, N, M, m_pos, key_ids, query_ids, DUPLICATES_ARE_POSITIVE: tl.constexpr):
    """Which scores of a tile count: not those past the ends, of padding, or of a duplicate of the positive."""
    m = (o_m < N)[:, None] & (o_n < M)[None, :]
    if key_ids is not None:
        b_key = tl.load(key_ids + o_n, mask=o_n < M, other=-1)
        m = m & (b_key >= 0)[None, :]
        if query_ids is not None and not DUPLICATES_ARE_POSITIVE:
            b_query = tl.load(query_ids + o_m, mask=o_m < N, other=-2)
            m = m & (m_pos | (b_query[:, None] != b_key[None, :]))
    return m


@triton.jit
def logits(
    b_a, o_m, o_n, N, M, m_pos, scale, bias, softcap, key_ids, query_ids, limit, DUPLICATES_ARE_POSITIVE: tl.constexpr
):  # fmt: skip
    """z of a tile of products; a score above its row's `limit` that is no positive's is no candidate's."""
    if bias is not None:
        b_z = scored(b_a, scale, tl.load(bias + o_n, mask=o_n < M, other=0.0)[None, :], softcap)
    else:
        b_z = scored(b_a, scale, None, softcap)
    m = candidates(o_m, o_n, N, M, m_pos, key_ids, query_ids, DUPLICATES_ARE_POSITIVE)
    if limit is not None:
        m = m & (m_pos | (b_z <= tl.load(limit + o_m, mask=o_m < N, other=0.0)[:, None]))
    return tl.where(m, b_z, -float("inf"))


@triton.jit
def store_softmax(
    b_z, m_pos, parts, i_t, o, size, AXIS: tl.constexpr, SEVERAL: tl.constexpr, SMOOTHING: tl.constexpr
):  # fmt: skip
    """Stores the softmax of a tile over one axis as partial i_t, and returns its exponentials.

    They are above the maximum; where there can be several positives, theirs are above the positives' own maximum, so
    that a positive far below the rest is not lost.
    """
    F: tl.constexpr = 2 + 2 * SEVERAL + 2 * SMOOTHING
    m = o < size
    p = parts + tl.cast(i_t, tl.int64) * F * size + o
    b_max = tl.max(b_z, AXIS)
    b_shift = finite(b_max)
    if SEVERAL:
        b_pos_max = tl.max(tl.where(m_pos, b_z, -float("inf")), AXIS)
        b_apart = tl.expand_dims(finite(b_pos_max), AXIS)
        b_e = tl.exp(b_z - tl.where(m_pos, b_apart, tl.expand_dims(b_shift, AXIS)))
        b_pos_sum = tl.sum(tl.where(m_pos, b_e, 0.0), AXIS)
        b_sum = tl.sum(tl.where(m_pos, 0.0, b_e), AXIS) + b_pos_sum * tl.exp(b_pos_max - b_shift)
        tl.store(p + 2 * tl.cast(size, tl.int64), b_pos_max, mask=m)
        tl.store(p + 3 * tl.cast(size, tl.int64), b_pos_sum, mask=m)
    else:
        b_e = tl.exp(b_z - tl.expand_dims(b_shift, AXIS))
        b_sum = tl.sum(b_e, AXIS)
    tl.store(p, b_max, mask=m)
    tl.store(p + size, b_sum, mask=m)
    if SMOOTHING:
        tl.store(p + (F - 2) * tl.cast(size, tl.int64), tl.sum(finite(b_z), AXIS), mask=m)
        tl.store(p + (F - 1) * tl.cast(size, tl.int64), tl.sum((b_z > -float("inf")).to(tl.float32), AXIS), mask=m)
    return b_e


@triton.jit
def store_positive(b_z, m_pos, positive, target, o_m, i_n, N, BN: tl.constexpr):
    """Stores the logit of a row's one positive from the tile that holds it."""
    b_target = tl.load(target + o_m, mask=o_m < N, other=-1)
    first = i_n * BN
    m = (o_m < N) & (b_target >= first) & (b_target < first + BN)
    tl.store(positive + o_m, tl.sum(tl.where(m_pos, b_z, 0.0), 1), mask=m)


@triton.jit
def store_ranks(b_z, m_pos, ranks, reference, i_n, o_m, N, BN: tl.constexpr):
    """Stores in ranks (T, 2, N) how many other candidates of a tile lie above the positive, and which one is best."""
    p = ranks + tl.cast(i_n, tl.int64) * 2 * N + o_m
    b_ref = tl.load(reference + o_m, mask=o_m < N, other=0.0)
    tl.store(p, tl.sum(((b_z > b_ref[:, None]) & (m_pos == 0)).to(tl.int32), 1), mask=o_m < N)
    tl.store(p + N, tl.argmax(b_z, 1) + i_n * BN, mask=o_m < N)


@triton.jit
def softmax_gradient(
    b_z, m_pos, weights, o, size, AXIS: tl.constexpr, EXACT: tl.constexpr, SMOOTHING: tl.constexpr
):  # fmt: skip
    """The part of dz of one axis: p, t and the uniform by the `weights` (5, size) of `weights_bwd_kernel`.

    EXACT: the one positive has t = 1, whatever its logit was rounded to.
    """
    m = o < size
    p = weights + o
    size = tl.cast(size, tl.int64)
    b_max = tl.expand_dims(finite(tl.load(p, mask=m, other=0.0)), AXIS)
    b_d = tl.exp(b_z - b_max) * tl.expand_dims(tl.load(p + size, mask=m, other=0.0), AXIS)
    b_t = tl.expand_dims(tl.load(p + 3 * size, mask=m, other=0.0), AXIS)
    if EXACT:
        b_d = tl.where(m_pos, b_d - b_t, b_d)
    else:
        b_pos_max = tl.expand_dims(finite(tl.load(p + 2 * size, mask=m, other=0.0)), AXIS)
        b_d = tl.where(m_pos, b_d - tl.exp(b_z - b_pos_max) * b_t, b_d)
    if SMOOTHING:
        b_d -= tl.where(b_z > -float("inf"), tl.expand_dims(tl.load(p + 4 * size, mask=m, other=0.0), AXIS), 0.0)
    return b_d


@triton.jit
def logit_gradient(
    b_z, m_pos, rows, columns, o_m, o_n, N, M, softcap, SEVERAL: tl.constexpr, SMOOTHING: tl.constexpr
):  # fmt: skip
    """s dL/da of a tile of logits."""
    b_d = softmax_gradient(b_z, m_pos, rows, o_m, N, 1, not SEVERAL, SMOOTHING)
    if columns is not None:
        b_d += softmax_gradient(b_z, m_pos, columns, o_n, M, 0, False, SMOOTHING)
    if softcap is not None:
        b_u = finite(b_z) / softcap
        b_d *= 1 - b_u * b_u
    return b_d
