"""Softmax cross-entropy of linear scores, in chunks of rows: the engine behind InfoNCE and the LM head.

    a_ij = s <x_i, w_j> + b_j       z_ij = c tanh(a_ij / c) with a softcap c, else a_ij; -inf where j is no candidate
    p_ij = exp(z_ij - lse_i)        t_ij = exp(z_ij - lse+_i) over the positives of row i, else 0
    L_i  = (1 - e) (lse_i - lse+_i) + e (lse_i - mean_j z_ij) + q lse_i^2
    dz   = g_i ((1 + 2 q lse_i) p_ij - (1 - e) t_ij - e / C_i)      da = dz (1 - (z / c)^2)
    dx   = s da w      dw = s da' x      db = sum_i da      ds = sum_i <x_i, dx_i> / s

A symmetric loss also softmaxes the columns, by the same formulas on z transposed; row i pays for its target's column:

    L_i  = (row loss of i + column loss of y(i)) / 2
    dz   = (g_i (p_ij - t_ij) + h_j (pcol_ij - tcol_ij)) / 2      h_j = sum of g_i over the rows with y(i) = j

Two phases, also usable apart: `statistics` (maxima, sums of exponentials, positives, rank, top-1) and `gradient` (given
the statistics and g). A scalar reduction knows g at once and runs both on each chunk of scores: three matrix products.
Never materialised: more of z than one chunk of rows, whose bytes COSUP_WORKSPACE_BYTES bounds.

The chunks are computed by the implementation that `dispatch` chooses. Private candidates, few by nature, are batched
products of the engine's own. Legend: see scores.py. Statistics and sums over chunks are fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..numerics import accumulator, finite, ratio, sum_by
from ..workspace import workspace_bytes
from .chunk_torch import TorchChunk, product
from .scores import Chunk, Gradients, Needs, Scores, Softmax, Statistics

MIN_ROWS = 32
"""Rows of the smallest chunk, whatever the budget: products of fewer rows leave the machine idle."""
Merge = Callable[[Softmax], Softmax]
"""Completes the statistics of the columns with those of rows that are scored elsewhere."""
LIFTED = 2.0**12
"""fp16 logit gradients are scaled so that the largest row weight becomes this: 1 / N and p would underflow."""


def chunks(s: Scores, kind: type[Chunk] = TorchChunk) -> list[slice]:
    """Runs of rows of nearly equal length whose scores fit the workspace."""
    n = len(s.x)
    rows = max(MIN_ROWS, workspace_bytes() // (kind.score_bytes(s) * max(1, len(s.w))))
    count = -(-n // rows)
    return [slice(i * n // count, (i + 1) * n // count) for i in range(count)]


def column_gradient(s: Scores, g: Tensor) -> Tensor:
    """h (M,): what the rows whose target a column is pay for it, g (N,) each."""
    assert s.target is not None
    return sum_by(s.target, g, len(s.w))


class _Private:
    """The candidates (n, K) that each row of a chunk has to itself: negatives after the shared ones."""

    def __init__(self, s: Scores):
        assert s.private is not None
        wide = accumulator(s.x.dtype)
        self.s, self.z = s, product(s.private, s.x[:, :, None]).squeeze(2).to(wide) * s.scale

    def extend(self, stats: Statistics) -> Statistics:
        """The statistics of the shared and the private candidates."""
        rows, z = stats.rows, self.z
        if not z.shape[1]:
            return stats
        top, best = z.max(1)
        none = torch.full_like(top, -torch.inf), torch.zeros_like(top)
        total = count = None
        if self.s.label_smoothing:
            total, count = z.sum(1), torch.full_like(best, z.shape[1])
        rank, top1 = stats.rank, stats.top1
        if rank is not None and top1 is not None:
            rank = rank + (z > rows.pos_max[:, None]).sum(1)
            top1 = torch.where(top > rows.max, len(self.s.w) + best, top1)
        mine = Softmax(top, (z - top[:, None]).exp().sum(1), *none, total, count)
        return Statistics(rows.merge(mine), stats.columns, rank, top1)

    def logit_gradient(self, rows: Softmax, g: Tensor) -> Tensor:
        s, g = self.s, g * self.s.scale
        dz = (self.z - finite(rows.max)[:, None]).exp_()
        dz *= ratio(g * (1 + 2 * s.z_loss * rows.lse) if s.z_loss else g, rows.sum)[:, None]
        return dz if rows.count is None else dz - (s.label_smoothing * g / rows.count)[:, None]


class _Sums:
    """Gradients of the operands, gathered chunk by chunk."""

    def __init__(self, s: Scores, needs: Needs, several: bool):
        self.s, self.needs, self.wide, self.several = s, needs, accumulator(s.x.dtype), several
        rounded = s.x.device.type == "cpu" and s.x.dtype == torch.bfloat16
        self.dtype = s.x.dtype if rounded else self.wide  # what products of the operands come in
        self.dx = torch.empty_like(s.x, dtype=self.dtype) if needs.x else None
        self.columns = needs.w if isinstance(needs.w, slice) else slice(None)
        self.dw = None
        if needs.w and several:
            self.dw = torch.zeros_like(s.w[self.columns], dtype=self.wide)
        self.ds = s.x.new_zeros((), dtype=self.wide) if needs.scale else None
        self.db = s.x.new_zeros(len(s.w), dtype=self.wide) if needs.bias else None
        private = s.private if needs.private else None
        self.dprivate = None if private is None else torch.empty_like(private, dtype=self.wide)

    def add(self, chunk: slice, d: Tensor, d_private: Tensor | None) -> None:
        """Adds the part of rows `chunk`, given s dL/da of the shared (n, M) and of the private candidates (n, K)."""
        s, x = self.s, self.s.x[chunk]
        if self.db is not None:
            self.db += d.sum(0, dtype=self.wide) / s.scale
        if self.dx is not None or self.ds is not None:
            if self.dx is not None and self.dtype == d.dtype:
                part = torch.mm(d, s.w, out=self.dx[chunk])
            else:
                part = product(d, s.w)
            if s.private is not None and d_private is not None:
                part += product(d_private.to(x.dtype)[:, None], s.private[chunk]).squeeze(1)
            if self.dx is not None and self.dtype != d.dtype:
                self.dx[chunk] = part
            if self.ds is not None:
                self.ds += (x.to(self.wide) * part).sum() / s.scale
        if self.needs.w:
            d = d[:, self.columns]
            if not self.several:
                self.dw = product(d.t(), x)
            elif self.dw is not None:
                if d.dtype == self.wide:
                    torch.addmm(self.dw, d.t(), x, out=self.dw)
                else:
                    self.dw += product(d.t(), x)
        if self.dprivate is not None and d_private is not None:
            torch.mul(d_private[:, :, None], x[:, None], out=self.dprivate[chunk])

    def gradients(self) -> Gradients:
        return Gradients(self.dx, self.dw, self.ds, self.db, self.dprivate)


def _of_chunk(
    chunk: Chunk, s: Scores, ranks: bool, g: Tensor | None, h: Tensor | None, merge: Merge | None
) -> tuple[Statistics, Tensor | None, Tensor | None]:
    """Statistics of some rows and, given g, s dL/da of the shared and of the private candidates."""
    private = None if s.private is None else _Private(s)
    if g is not None and private is None and not s.symmetric:
        return *chunk.statistics_and_logit_gradient(g, ranks=ranks), None
    stats = chunk.statistics(ranks=ranks)
    if private is not None:
        stats = private.extend(stats)
    if g is None:
        return stats, None, None
    if merge is not None and stats.columns is not None:
        stats = stats._replace(columns=merge(stats.columns))
    d = chunk.logit_gradient(stats.rows, stats.columns, g, h)
    return stats, d, None if private is None else private.logit_gradient(stats.rows, g)


def _walk(
    s: Scores, kind: type[Chunk], ranks: bool, sums: _Sums | None = None, g: Tensor | None = None,
    h: Tensor | None = None, merge: Merge | None = None,
) -> Statistics:  # fmt: skip
    """Statistics and, into `sums`, the gradient of each chunk while its scores are at hand."""
    found: list[Statistics] = []
    s = kind.prepare(s)
    for part in chunks(s, kind):
        rows = s.rows(part)
        chunk = kind(rows)
        stats, d, d_private = _of_chunk(chunk, rows, ranks, None if g is None else g[part], h, merge)
        found.append(stats)
        if sums is not None and d is not None:
            sums.add(part, d, d_private)
        chunk.close()
        del chunk, d, d_private  # before the next chunk's are there
    if len(found) == 1:
        return found[0]
    columns = None
    for one in found:
        columns = one.columns if columns is None or one.columns is None else columns.merge(one.columns)
    rows = Softmax(*(None if t[0] is None else torch.cat(t) for t in zip(*(one.rows for one in found))))  # pyright: ignore
    ranked = (torch.cat(t) for t in zip(*((one.rank, one.top1) for one in found if one.rank is not None)))  # pyright: ignore
    return Statistics(rows, columns, *ranked)


def statistics(s: Scores, *, ranks: bool = False, kind: type[Chunk] = TorchChunk) -> Statistics:
    """Statistics of every row and, for a symmetric loss, of every column: one matrix product."""
    return _walk(s, kind, ranks)


def gradient(
    s: Scores,
    stats: Statistics,
    g: Tensor,
    needs: Needs,
    *,
    h: Tensor | None = None,
    kind: type[Chunk] = TorchChunk,
) -> Gradients:
    """Gradients given the statistics, dL/dL_i = g (N,) and, for a symmetric loss, h (M,): three matrix products.

    The statistics may cover more candidates, and those of the columns more rows, than the scores given here.
    """
    s, parts = kind.prepare(s), chunks(s, kind)
    sums, (g, h, lift) = _Sums(s, needs, len(parts) > 1), _lifted(s, g, h)
    for part in parts:
        rows, seen = s.rows(part), stats.rows.at(part)
        private = None if s.private is None else _Private(rows).logit_gradient(seen, g[part])
        chunk = kind(rows)
        sums.add(part, chunk.logit_gradient(seen, stats.columns, g[part], h), private)
        chunk.close()
        del chunk
    return _lowered(sums.gradients(), lift)


def statistics_and_gradient(
    s: Scores,
    g: Tensor,
    needs: Needs,
    *,
    h: Tensor | None = None,
    ranks: bool = False,
    kind: type[Chunk] = TorchChunk,
    merge: Merge | None = None,
) -> tuple[Statistics, Gradients]:
    """Both phases on each chunk of scores: three matrix products, four where columns span several chunks.

    `merge` is called once, between the phases, if the loss is symmetric.
    """
    several = len(chunks(s, kind)) > 1
    if s.symmetric and several:
        stats = statistics(s, ranks=ranks, kind=kind)
        if merge is not None and stats.columns is not None:
            stats = stats._replace(columns=merge(stats.columns))
        return stats, gradient(s, stats, g, needs, h=h, kind=kind)
    sums, (g, h, lift) = _Sums(s, needs, several), _lifted(s, g, h)
    return _walk(s, kind, ranks, sums, g, h, merge), _lowered(sums.gradients(), lift)


def _lifted(s: Scores, g: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """g and h scaled into fp16's range, and by what; as they are in other dtypes."""
    if s.x.dtype != torch.float16 or not len(g):
        return g, h, None
    top = g.abs().amax() * s.scale
    lift = torch.where(top > 0, LIFTED / top, 1.0)
    return g * lift, None if h is None else h * lift, lift


def _lowered(grads: Gradients, lift: Tensor | None) -> Gradients:
    return grads if lift is None else Gradients(*(None if t is None else t.div_(lift) for t in grads))
