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
LOG2E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(40.0)
"""exp(FAR), times as many as there are, is far from infinity, and what a row of 1 / N weighs over it from 0."""


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
def exp_above(b_z, b_shift):
    """2^(z log2 e - r) with r = b_shift log2 e, rounded: exp(z - b_shift) by one fma and one ex2.

    The rounding of r, up to 1e-4 at scores near 1,800, is common to all that is above one shift: `exp_between`
    takes it back. Beyond 10^9 it exceeds the range of exponents, and the result is not a number.
    """
    return tl.exp2(tl.fma(b_z, LOG2E, -(b_shift * LOG2E)))


@triton.jit
def exp_between(b_part, b_shift):
    """What turns `exp_above` b_part into exponentials above b_shift, and takes back the rounding of the former."""
    return tl.exp2(exponent_between(b_part, b_shift))


@triton.jit
def exponent_between(b_part, b_shift):
    """Its binary logarithm."""
    return tl.fma(-b_shift, LOG2E, b_part * LOG2E)


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
def holds_target(target, o_m, N, first, WIDTH: tl.constexpr, SEVERAL: tl.constexpr):
    """Whether one of the columns `first` to `first + WIDTH` is the target of a row; True if rows have SEVERAL."""
    held = True
    if not SEVERAL:
        b_target = tl.load(target + o_m, mask=o_m < N, other=-1)
        held = tl.max(((b_target >= first) & (b_target < first + WIDTH)).to(tl.int32), 0) != 0
    return held


@triton.jit
def targets(b, o_m, o_n, N, target):
    """Which of a tile's candidates are the targets of its rows; b is any tile of fp32 that lies as the scores do."""
    # None so far. Made of b, the mask stays in registers; made of o_m and o_n, it moves through shared memory.
    m_pos = b > float("inf")
    if target is not None:
        m_pos |= tl.load(target + o_m, mask=o_m < N, other=-1)[:, None] == o_n[None, :]
    return m_pos


@triton.jit
def positives(
    b, o_m, o_n, N, M, target, key_ids, query_ids, positive_ids, P,
    SEVERAL: tl.constexpr, DUPLICATES_ARE_POSITIVE: tl.constexpr,
):  # fmt: skip
    """The same of their positives."""
    m_pos = targets(b, o_m, o_n, N, target)
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
    b_a, i_m, i_n, o_m, o_n, N, M, m_pos, held, scale, bias, softcap, target, key_ids, query_ids, limit,
    SEVERAL: tl.constexpr, DUPLICATES_ARE_POSITIVE: tl.constexpr, BY_COLUMN: tl.constexpr,
):  # fmt: skip
    """z of a tile of products; a score above its row's `limit` that is no positive's is no candidate's.

    What only some tiles need, those at an end of the matrix or with a target, is in branches that the others skip:
    `held` says whether this one may hold a target. m_pos counts where rows have SEVERAL positives, else `target`. Rows
    past the end have scores, which matter only to softmaxes BY_COLUMN.
    """
    if bias is not None:
        b_z = scored(b_a, scale, tl.load(bias + o_n, mask=o_n < M, other=-float("inf"))[None, :], softcap)
    else:
        b_z = scored(b_a, scale, None, softcap)
    BY_ID: tl.constexpr = query_ids is not None and not DUPLICATES_ARE_POSITIVE
    RESTORED: tl.constexpr = BY_ID or limit is not None
    if RESTORED:
        if SEVERAL:
            b_own = b_z
        else:  # one logit of a row, not all of the tile's, waits for the masks
            b_own = tl.zeros((b_z.shape[0],), dtype=tl.float32)
            if held:
                b_own = tl.sum(tl.where(targets(b_z, o_m, o_n, N, target), b_z, 0.0), 1)
    if limit is not None:
        b_z = tl.where(b_z <= tl.load(limit + o_m, mask=o_m < N, other=0.0)[:, None], b_z, -float("inf"))
    if key_ids is not None:
        b_key = tl.load(key_ids + o_n, mask=o_n < M, other=-1)
        m = (b_key >= 0)[None, :]
        if BY_ID:
            m = m & (tl.load(query_ids + o_m, mask=o_m < N, other=-2)[:, None] != b_key[None, :])
        b_z = tl.where(m, b_z, -float("inf"))
    if RESTORED:
        if SEVERAL:
            b_z = restored(b_z, b_own, m_pos, key_ids, o_n, M)
        elif held:
            b_z = restored(b_z, b_own[:, None], targets(b_z, o_m, o_n, N, target), key_ids, o_n, M)
    # Columns past the end have no key, and a bias of -inf.
    UNMASKED: tl.constexpr = key_ids is None and (bias is None or softcap is not None)
    if UNMASKED or BY_COLUMN:
        edge = (i_n + 1) * b_a.shape[1] > M
        if BY_COLUMN:
            edge = edge | ((i_m + 1) * b_a.shape[0] > N)
        if edge:  # of both axes: on sm_90 a mask of columns alone makes the epilogue a fifth longer
            b_z = tl.where((o_m < N)[:, None] & (o_n < M)[None, :], b_z, -float("inf"))
    return b_z


@triton.jit
def restored(b_z, b_own, m_pos, key_ids, o_n, M):
    """b_z, and b_own where a candidate is a positive and no padding."""
    if key_ids is not None:
        m_pos = m_pos & (tl.load(key_ids + o_n, mask=o_n < M, other=-1) >= 0)[None, :]
    return tl.where(m_pos, b_own, b_z)


@triton.jit
def store_softmax(
    b_z, m_pos, parts, i_t, o, size, AXIS: tl.constexpr, SEVERAL: tl.constexpr, SMOOTHING: tl.constexpr, b_level=None
):  # fmt: skip
    """Stores the softmax of a tile over one axis as partial i_t, and returns its exponentials and maxima.

    They are `exp_above` the maximum; where there can be several positives, theirs are above the positives' own maximum,
    so that a positive far below the rest is not lost. Given levels, those of one positive, they are above these, which
    stand for the maximum in the partial, unless the maximum is `FAR` above its level.
    """
    F: tl.constexpr = 2 + 2 * SEVERAL + 2 * SMOOTHING
    m = o < size
    p = parts + tl.cast(i_t, tl.int64) * F * size + o
    b_max = tl.max(b_z, AXIS)
    b_from = b_max
    if b_level is not None:
        b_from = tl.where(b_max > b_level + FAR, b_max, b_level)
    b_shift = finite(b_from)
    if SEVERAL:
        b_pos_max = tl.max(tl.where(m_pos, b_z, -float("inf")), AXIS)
        b_apart = tl.expand_dims(finite(b_pos_max), AXIS)
        b_e = exp_above(b_z, tl.where(m_pos, b_apart, tl.expand_dims(b_shift, AXIS)))
        b_pos_sum = tl.sum(tl.where(m_pos, b_e, 0.0), AXIS)
        b_sum = tl.sum(tl.where(m_pos, 0.0, b_e), AXIS)
        b_sum += b_pos_sum * exp_between(b_pos_max, b_shift) / exp_between(b_shift, b_shift)
        tl.store(p + 2 * tl.cast(size, tl.int64), b_pos_max, mask=m)
        tl.store(p + 3 * tl.cast(size, tl.int64), b_pos_sum, mask=m)
    else:
        b_e = exp_above(b_z, tl.expand_dims(b_shift, AXIS))
        b_sum = tl.sum(b_e, AXIS)
    tl.store(p, b_from, mask=m)
    tl.store(p + size, b_sum, mask=m)
    if SMOOTHING:
        tl.store(p + (F - 2) * tl.cast(size, tl.int64), tl.sum(finite(b_z), AXIS), mask=m)
        tl.store(p + (F - 1) * tl.cast(size, tl.int64), tl.sum((b_z > -float("inf")).to(tl.float32), AXIS), mask=m)
    return b_e, b_max


@triton.jit
def store_positive(b_z, positive, target, o_m, o_n, i_n, N):
    """Stores the logits of rows whose target is in a tile."""
    BN: tl.constexpr = b_z.shape[1]
    b_target = tl.load(target + o_m, mask=o_m < N, other=-1)
    first = i_n * BN
    m = (o_m < N) & (b_target >= first) & (b_target < first + BN)
    tl.store(positive + o_m, tl.sum(tl.where(targets(b_z, o_m, o_n, N, target), b_z, 0.0), 1), mask=m)


@triton.jit
def store_ranks(b_z, b_max, m_pos, held, ranks, reference, target, o_m, o_n, i_n, N, M, SEVERAL: tl.constexpr):
    """Stores in ranks (T, 2, N) how many other candidates of a tile lie above the positive, and which one is best."""
    p = ranks + tl.cast(i_n, tl.int64) * 2 * N + o_m
    m_above = b_z > tl.load(reference + o_m, mask=o_m < N, other=0.0)[:, None]
    b_above = tl.sum(m_above.to(tl.int32), 1)
    if SEVERAL:
        b_above -= tl.sum((m_above & m_pos).to(tl.int32), 1)
    elif held:
        b_above -= tl.sum((m_above & targets(b_z, o_m, o_n, N, target)).to(tl.int32), 1)
    tl.store(p, b_above, mask=o_m < N)
    # The first of equal ones, and where all are NaN some candidate.
    b_best = tl.min(tl.where(b_z == b_max[:, None], o_n[None, :], M - 1), 1)
    tl.store(p + N, b_best, mask=o_m < N)


@triton.jit
def softmax_gradient(b_z, weights, o, size, AXIS: tl.constexpr, SMOOTHING: tl.constexpr):
    """The part of dz of one axis but for the positives': p and the uniform by `weights` (5, size)."""
    m = o < size
    p = weights + o
    b_max = finite(tl.load(p, mask=m, other=0.0))
    b_p = tl.load(p + size, mask=m, other=0.0) * exp_between(b_max, b_max)
    b_d = exp_above(b_z, tl.expand_dims(b_max, AXIS)) * tl.expand_dims(b_p, AXIS)
    if SMOOTHING:
        b_uniform = tl.load(p + 4 * tl.cast(size, tl.int64), mask=m, other=0.0)
        b_d -= tl.where(b_z > -float("inf"), tl.expand_dims(b_uniform, AXIS), 0.0)
    return b_d


@triton.jit
def positive_gradient(b_z, weights, o, size, AXIS: tl.constexpr, EXACT: tl.constexpr):
    """What a positive's dz is less for one axis, by `weights` (5, size) of `weights_bwd_kernel`.

    EXACT: the one positive has t = 1, whatever its logit was rounded to.
    """
    m = o < size
    p = weights + 2 * tl.cast(size, tl.int64) + o
    b_t = tl.load(p + size, mask=m, other=0.0)
    b_d = tl.expand_dims(b_t, AXIS)
    if not EXACT:
        b_max = finite(tl.load(p, mask=m, other=0.0))
        b_d = exp_above(b_z, tl.expand_dims(b_max, AXIS)) * (b_d * tl.expand_dims(exp_between(b_max, b_max), AXIS))
    return b_d


@triton.jit
def less_positives(b_d, b_z, m_pos, rows, columns, o_m, o_n, N, M, SEVERAL: tl.constexpr):
    """dz of a tile, given that of all as if they were no positives."""
    b_t = positive_gradient(b_z, rows, o_m, N, 1, not SEVERAL)
    if columns is not None:
        b_t = b_t + positive_gradient(b_z, columns, o_n, M, 0, False)
    return tl.where(m_pos, b_d - b_t, b_d)


@triton.jit
def logit_gradient(
    b_z, m_pos, held, rows, columns, target, o_m, o_n, N, M, softcap, SEVERAL: tl.constexpr, SMOOTHING: tl.constexpr
):  # fmt: skip
    """s dL/da of a tile of logits."""
    b_d = softmax_gradient(b_z, rows, o_m, N, 1, SMOOTHING)
    if columns is not None:
        b_d += softmax_gradient(b_z, columns, o_n, M, 0, SMOOTHING)
    if SEVERAL:
        b_d = less_positives(b_d, b_z, m_pos, rows, columns, o_m, o_n, N, M, True)
    elif held:
        b_d = less_positives(b_d, b_z, targets(b_z, o_m, o_n, N, target), rows, columns, o_m, o_n, N, M, False)
    if softcap is not None:
        b_u = finite(b_z) / softcap
        b_d *= 1 - b_u * b_u
    return b_d
