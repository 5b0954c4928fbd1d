"""Softmax cross-entropy of linear scores, in chunks of rows: the engine behind InfoNCE and the LM head.

    a_ij = s <x_i, w_j> + b_j       z_ij = c tanh(a_ij / c) with a softcap c, else a_ij; -inf where j is not a candidate
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
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from ..numerics import accumulator, cast, finite, ratio, sum_by
from ..workspace import workspace_bytes
from .chunk_torch import TorchChunk, product, rounds_late
from .scores import Chunk, Gradients, Needs, Scores, Softmax, Statistics

MIN_ROWS = 32
"""Rows of the smallest chunk, whatever the budget: products of fewer rows leave the machine idle."""
GPU_ROWS = 128
HELD = 4
"""Chunks of scores that a symmetric loss keeps between its phases, each of the workspace's size."""
Merge = Callable[[Softmax], Softmax]
"""Completes the statistics of the columns with those of rows that are scored elsewhere."""
LIFTED = 2.0**12
"""fp16 logit gradients are scaled so that the largest row weight becomes this: 1 / N and p would underflow."""


def chunks(s: Scores, kind: type[Chunk] = TorchChunk, w: bool = False) -> list[slice]:
    """Runs of rows of nearly equal length whose scores fit the workspace; `w`: gradients of w are summed over them.

    On a GPU one chunk may also take what sums of dw over several would: in half precision 4 M D bytes, which a single
    product needs no room for. Its chunks are multiples of `GPU_ROWS`, the height of a product's tile.
    """
    n, (m, d) = s.x.shape[0], s.w.shape
    score, gpu = kind.score_bytes(s) * max(1, m), rounds_late(s.x.device)
    rows = max(MIN_ROWS, workspace_bytes() // score)
    sums = accumulator(s.x.dtype).itemsize * m * d if w and gpu and s.x.dtype.itemsize == 2 else 0
    if n <= rows or n * score <= workspace_bytes() + sums:
        return [slice(0, n)] if n else []
    if not gpu:
        count = -(-n // rows)
        return [slice(i * n // count, (i + 1) * n // count) for i in range(count)]
    tiles = -(-n // GPU_ROWS)
    count = -(-tiles // max(1, rows // GPU_ROWS))
    edges = [min(n, i * tiles // count * GPU_ROWS) for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def column_gradient(s: Scores, g: Tensor) -> Tensor:
    """h (M,): what the rows whose target a column is pay for it, g (N,) each."""
    assert s.target is not None
    return sum_by(s.target, g, len(s.w))


class _Private:
    """The candidates (n, K) that each row of a chunk has to itself: negatives after the shared ones."""

    def __init__(self, s: Scores):
        assert s.private is not None
        self.s, self.z = s, _exactly(s.private, s.x[:, :, None]).squeeze(2) * s.scale
        if s.limit is not None:
            self.z.masked_fill_(self.z > s.limit[:, None], -torch.inf)

    def extend(self, stats: Statistics) -> Statistics:
        """The statistics of the shared and the private candidates."""
        rows, z = stats.rows, self.z
        if not z.shape[1]:
            return stats
        top, best = z.max(1)
        none = torch.full_like(top, -torch.inf), torch.zeros_like(top)
        total = count = None
        if self.s.label_smoothing:
            total, count = finite(z).sum(1), (z > -torch.inf).sum(1)
        rank, top1 = stats.rank, stats.top1
        if rank is not None and top1 is not None:
            rank = rank + (z > rows.pos_max[:, None]).sum(1)
            top1 = torch.where(top > rows.max, len(self.s.w) + best, top1)
        mine = Softmax(top, (z - finite(top)[:, None]).exp().sum(1), *none, total, count)
        return Statistics(rows.merge(mine), stats.columns, rank, top1)

    def logit_gradient(self, rows: Softmax, g: Tensor) -> Tensor:
        """s dL/da (n, K), wide."""
        s, g = self.s, g * self.s.scale
        dz = (self.z - finite(rows.max)[:, None]).exp_()
        dz *= ratio(g * (1 + 2 * s.z_loss * rows.lse) if s.z_loss else g, rows.sum)[:, None]
        if rows.count is None:
            return dz
        return dz - (self.z > -torch.inf) * (s.label_smoothing * g / rows.count)[:, None]


def _candidates(s: Scores, kind: type[Chunk]) -> tuple[Chunk, _Private | None]:
    """Shared and private ones of some rows."""
    if s.private is None:
        return kind(s), None
    private = _Private(s)
    if s.alone and s.limit is not None and private.z.shape[1]:
        s = replace(s, alone=(private.z == -torch.inf).all(1))
    return kind(s), private


def _exactly(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, wide; a CPU rounds products of half precision to it, which ruins scores, so it multiplies wide copies."""
    if a.device.type == "cpu":
        wide = accumulator(a.dtype)
        return a.to(wide) @ b.to(wide)
    return product(a, b)


class Sums:
    """Gradients of the operands, gathered chunk by chunk.

    Those of x and w come in the operands' dtype, rounded once from fp32 sums, or `wide`: for what is normalised, or
    scaled, afterwards. Sums over chunks are wide until the last chunk is in.
    """

    @staticmethod
    def workspace(s: Scores, gradients: int, several: bool) -> tuple[int, int, int, int]:
        """Bytes of sums beyond the gradients that they become: before the first chunk is added, before a later one,
        while one is, and at the end.

        `gradients`: 1 of w, 2 of x and w, neither normalised.
        """
        if not gradients:
            return 0, 0, 0, 0
        size, wide = s.x.dtype.itemsize, accumulator(s.x.dtype).itemsize
        kept = wide if s.x.dtype == torch.float16 else size  # see `_lifted`
        dx = s.x.numel() * (gradients > 1)
        dw, sums = s.w.numel(), wide if several else kept
        apart = size if several and not (size == wide or rounds_late(s.x.device)) else 0  # each product
        during = dx * (kept - size) + dw * (sums + apart - size)
        end = dx * (kept if kept != size else 0) + dw * (sums if sums != size else 0)
        first = dx * (kept - size) - dw * size if several else -size * (dx + dw)
        return first, during - dw * apart if several else first, during, end

    @staticmethod
    def traffic(s: Scores) -> int:
        """Bytes that adding one more chunk moves of dw."""
        size, wide = s.x.dtype.itemsize, accumulator(s.x.dtype).itemsize
        return s.w.numel() * (2 * wide if size == wide or rounds_late(s.x.device) else 2 * size + 2 * wide)

    def __init__(self, s: Scores, needs: Needs, several: bool, wide: bool):
        self.s, self.needs, self.several = s, needs, several
        self.wide = accumulator(s.x.dtype)
        rounds = s.x.device.type == "cpu" and s.x.dtype == torch.bfloat16  # products come in bf16, whatever is asked
        self.dtype = self.wide if wide and not rounds else s.x.dtype
        self.chunk = slice(None)
        """Rows that are being added."""
        self.dx_dtype = self.wide if s.private is not None else self.dtype  # of two terms, to be rounded together
        self.dx = torch.empty_like(s.x, dtype=self.dx_dtype) if needs.x and several else None
        self.columns = needs.w if isinstance(needs.w, slice) else slice(None)
        self.dw: Tensor | None = None
        self.ds = s.x.new_zeros((), dtype=self.wide) if needs.scale else None
        self.db = s.x.new_zeros(len(s.w), dtype=self.wide) if needs.bias else None
        private = s.private if needs.private else None
        self.dprivate = None if private is None else torch.empty_like(private, dtype=self.wide)

    def add(self, d: Tensor, weights: Tensor | None = None) -> None:
        """Adds what the rows `chunk` give, of s dL/da (n, M) of the shared candidates.

        Given weights (n,), wide, that is d with its rows multiplied by them.
        """
        x = self.s.x[self.chunk] if self.several else self.s.x
        if self.db is not None:
            sums = d.sum(0, dtype=self.wide) if weights is None else product(d.t(), weights[:, None].to(d.dtype))
            self.db += sums.view(-1) / self.s.scale
        if self.needs.x or self.needs.scale:
            rounded = self.dx_dtype == d.dtype and not self.needs.scale and weights is None
            if rounded and self.dx is not None:
                torch.mm(d, self.s.w, out=self.dx[self.chunk])
            else:
                part = d @ self.s.w if rounded else product(d, self.s.w)
                if weights is not None:
                    part *= weights[:, None]
                if self.dx is not None:
                    self.dx[self.chunk] = part
                elif self.needs.x:
                    self.dx = cast(part, self.dx_dtype)
                self._scale(part)
                del part
        if self.needs.w:
            if weights is not None:
                x = torch.mul(x, weights[:, None], out=torch.empty_like(x))
            self._add_w(d if self.columns == slice(None) else d[:, self.columns], x)

    def _add_w(self, d: Tensor, x: Tensor) -> None:
        if self.dw is None:  # the first chunk writes, and a single one writes the result
            one = not self.several and self.dtype == d.dtype
            self.dw = d.t() @ x if one else product(d.t(), x)
            if self.several:
                self.dw = self.dw.to(self.wide)
        elif d.dtype == self.wide:
            torch.addmm(self.dw, d.t(), x, out=self.dw)
        elif rounds_late(d.device) and "dtype_out" in torch.ops.aten.addmm.overloads():
            torch.addmm(self.dw, d.t(), x, out_dtype=self.wide, out=self.dw)
        else:
            self.dw += product(d.t(), x)

    def add_private(self, d: Tensor) -> None:
        """The same of s dL/da (n, K), wide, of the private candidates; the shared ones have been added."""
        s, x = self.s, self.s.x[self.chunk]
        assert s.private is not None
        if self.dx is not None or self.ds is not None:
            private = s.private[self.chunk]
            left = d if d.device.type == "cpu" else d.to(private.dtype)
            part = _exactly(left[:, None], private).squeeze(1)
            if self.dx is not None:
                self.dx[self.chunk] += part
            self._scale(part)
        if self.dprivate is not None:
            torch.mul(d[:, :, None], x[:, None], out=self.dprivate[self.chunk])

    def _scale(self, part: Tensor) -> None:
        """Adds to ds what a part of dx, as wide as it comes, tells of it."""
        if self.ds is not None:
            self.ds += (self.s.x[self.chunk].to(self.wide) * part).sum() / self.s.scale

    def gradients(self) -> Gradients:
        return Gradients(self.dx, self.dw, self.ds, self.db, self.dprivate)


def _walk(
    s: Scores, kind: type[Chunk], ranks: bool, parts: list[slice], sums: Sums | None = None, g: Tensor | None = None,
    h: Tensor | None = None, merge: Merge | None = None,
) -> Statistics:  # fmt: skip
    """Statistics and, into `sums`, the gradient of each chunk while its scores are at hand."""
    found: list[Statistics] = []
    s = kind.prepare(s)
    for part in parts:
        chunk, private = _candidates(s if len(parts) == 1 else s.rows(part), kind)
        if sums is None or g is None:
            stats = chunk.statistics(ranks=ranks)
            stats = stats if private is None else private.extend(stats)
        else:
            sums.chunk = part
            if private is None and not s.symmetric:
                stats = chunk.statistics_and_accumulate(g if len(parts) == 1 else g[part], sums, ranks=ranks)
            else:
                stats = chunk.statistics(ranks=ranks)
                stats = stats if private is None else private.extend(stats)
                if merge is not None and stats.columns is not None:
                    stats = stats._replace(columns=merge(stats.columns))
                chunk.accumulate(stats, g[part], h, sums)
                if private is not None:
                    sums.add_private(private.logit_gradient(stats.rows, g[part]))
        found.append(stats)
        chunk.close()
        del chunk, private  # before the next chunk's are there
    return _together(found)


def _walk_twice(
    s: Scores, kind: type[Chunk], ranks: bool, parts: list[slice], needs: Needs, g: Tensor, h: Tensor | None,
    merge: Merge | None, wide: bool,
) -> tuple[Statistics, Sums]:  # fmt: skip
    """Statistics of all chunks, which the columns need, and then their gradients."""
    found, held = [], []
    s = kind.prepare(s)
    for i, part in enumerate(parts):
        chunk, private = _candidates(s.rows(part), kind)
        stats = chunk.statistics(ranks=ranks)
        found.append(stats if private is None else private.extend(stats))
        if kind.holds and i < HELD:
            chunk.hold()
            held.append((chunk, private))
        else:
            chunk.close()
        del chunk, private
    stats = _together(found)
    if merge is not None and stats.columns is not None:
        stats = stats._replace(columns=merge(stats.columns))
    sums = Sums(s, needs, True, wide)
    for part in parts:
        if held:
            chunk, private = held.pop(0)
        else:
            chunk, private = _candidates(s.rows(part), kind)
        seen, sums.chunk = stats._replace(rows=stats.rows.at(part)), part
        chunk.accumulate(seen, g[part], h, sums)
        if private is not None:
            sums.add_private(private.logit_gradient(seen.rows, g[part]))
        chunk.close()
        del chunk, private
    return stats, sums


def _together(found: list[Statistics]) -> Statistics:
    """The statistics of all chunks."""
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
    return _walk(s, kind, ranks, chunks(s, kind))


def gradient(
    s: Scores,
    stats: Statistics,
    g: Tensor,
    needs: Needs,
    *,
    h: Tensor | None = None,
    kind: type[Chunk] = TorchChunk,
    wide: bool = True,
) -> Gradients:
    """Gradients given the statistics, dL/dL_i = g (N,) and, for a symmetric loss, h (M,): three matrix products.

    The statistics may cover more candidates, and those of the columns more rows, than the scores given here. Those of
    x and w come in fp32 (fp64), or unless `wide` rounded to the operands' dtype.
    """
    s, parts = kind.prepare(s), chunks(s, kind, bool(needs.w))
    g, h, lift = _lifted(s, g, h)
    sums = Sums(s, needs, len(parts) > 1, wide or lift is not None)
    for part in parts:
        rows, seen = s.rows(part), stats._replace(rows=stats.rows.at(part))
        chunk, sums.chunk = kind(rows), part
        chunk.accumulate(seen, g[part], h, sums)
        chunk.close()
        del chunk
        if s.private is not None:
            sums.add_private(_Private(rows).logit_gradient(seen.rows, g[part]))
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
    wide: bool = True,
) -> tuple[Statistics, Gradients]:
    """Both phases on each chunk of scores: three matrix products.

    Where the columns of a symmetric loss span several chunks, the first `HELD` of them are held between the phases, and
    the scores of the others multiplied again.

    `merge` is called once, between the phases, if the loss is symmetric. `wide`: as for `gradient`.
    """
    parts = chunks(s, kind, bool(needs.w))
    g, h, lift = _lifted(s, g, h)
    if s.symmetric and len(parts) > 1:
        stats, sums = _walk_twice(s, kind, ranks, parts, needs, g, h, merge, wide or lift is not None)
        return stats, _lowered(sums.gradients(), lift)
    sums = Sums(s, needs, len(parts) > 1, wide or lift is not None)
    return _walk(s, kind, ranks, parts, sums, g, h, merge), _lowered(sums.gradients(), lift)


def _lifted(s: Scores, g: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """g and h scaled into fp16's range, and by what; as they are in other dtypes."""
    if s.x.dtype != torch.float16 or not g.shape[0]:
        return g, h, None
    top = g.abs().amax()
    if h is not None:  # a key that answers many queries weighs as much as all of them
        top = torch.maximum(top, h.abs().amax())
    top = top * s.scale
    lift = torch.where(top > 0, LIFTED / top, 1.0)
    return g * lift, None if h is None else h * lift, lift


def _lowered(grads: Gradients, lift: Tensor | None) -> Gradients:
    return grads if lift is None else Gradients(*(None if t is None else t.div_(lift) for t in grads))
