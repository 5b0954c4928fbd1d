"""Softmax cross-entropy of linear scores in plain torch, chunked over rows: the engine behind InfoNCE and the LM head.

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
Never materialised: more of z than one chunk of rows, whose bytes COSUP_FAST_WORKSPACE_BYTES bounds.

Legend: N rows, M candidates, D width, K private candidates of a row, P positive ids of a row, n rows of a chunk.
Scores, statistics and sums over chunks are fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .last_hidden import accumulator, unit, unit_backward

WORKSPACE_BYTES = 512 * 2**20
"""Bytes of a chunk of scores with its temporaries; the environment variable COSUP_FAST_WORKSPACE_BYTES overrides it."""
MIN_ROWS = 32
"""Rows of the smallest chunk, whatever the budget: products of fewer rows leave the machine idle."""


def workspace_bytes() -> int:
    text = os.environ.get("COSUP_FAST_WORKSPACE_BYTES")
    if text is None:
        return WORKSPACE_BYTES
    if not text.strip().isdecimal() or int(text) == 0:
        raise ValueError(f"COSUP_FAST_WORKSPACE_BYTES is {text!r}; set it to a positive whole number of bytes")
    return int(text)


class Softmax(NamedTuple):
    """Softmaxes as maxima and sums of exponentials above them, so that parts of the candidates can be merged.

    lse = max + log(sum), kept apart because at raw scores near 1,800 their fp32 sum is wrong by 1e-4.
    """

    max: Tensor
    sum: Tensor
    pos_max: Tensor  # the same over the positives
    pos_sum: Tensor
    total: Tensor | None = None  # sum of the candidates' scores and their number, for label smoothing
    count: Tensor | None = None

    def at(self, index: slice | Tensor) -> Softmax:
        return Softmax(*(None if t is None else t[index] for t in self))  # pyright: ignore[reportArgumentType]

    @property
    def lse(self) -> Tensor:
        return self.max + self.sum.log()

    @property
    def positive_logit(self) -> Tensor:
        return self.pos_max + self.pos_sum.log()

    def merge(self, other: Softmax) -> Softmax:
        """The softmaxes over the union of two disjoint sets of candidates."""
        top, pos_top = torch.maximum(self.max, other.max), torch.maximum(self.pos_max, other.pos_max)
        shift, pos_shift = _finite(top), _finite(pos_top)
        return Softmax(
            top,
            self.sum * (self.max - shift).exp() + other.sum * (other.max - shift).exp(),
            pos_top,
            self.pos_sum * (self.pos_max - pos_shift).exp() + other.pos_sum * (other.pos_max - pos_shift).exp(),
            None if self.total is None or other.total is None else self.total + other.total,
            None if self.count is None or other.count is None else self.count + other.count,
        )

    def loss(self, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
        log_sum = self.sum.log()
        loss = (self.max - self.pos_max) + (log_sum - self.pos_sum.log())
        if self.total is not None and self.count is not None:
            uniform = (self.max - self.total / self.count) + log_sum
            loss = (1 - label_smoothing) * loss + label_smoothing * uniform
        return loss + z_loss * self.lse.square() if z_loss else loss


class Statistics(NamedTuple):
    rows: Softmax  # (N,)
    columns: Softmax | None = None  # (M,)
    rank: Tensor | None = None  # (N,) int64, how many candidates lie above the best positive
    top1: Tensor | None = None  # (N,) int64, M + k for private candidate k


class Needs(NamedTuple):
    x: bool
    w: bool
    scale: bool
    bias: bool
    private: bool


class Gradients(NamedTuple):
    """fp32 gradients of the operands, None for those not asked for."""

    x: Tensor | None  # (N, D)
    w: Tensor | None  # (M, D)
    scale: Tensor | None  # ()
    bias: Tensor | None  # (M,)
    private: Tensor | None  # (N, K, D)


@dataclass
class Scores:
    """Linear scores, which of them are candidates and which are positives, and the loss asked of them."""

    x: Tensor  # (N, D)
    w: Tensor  # (M, D)
    scale: float | Tensor = 1.0
    bias: Tensor | None = None  # (M,)
    private: Tensor | None = None  # (N, K, D)
    target: Tensor | None = None  # (N,) int64 index of the positive
    query_ids: Tensor | None = None  # (N,) int64; a key of this id other than the target duplicates the positive
    key_ids: Tensor | None = None  # (M,) int64; negative: no candidate
    positive_ids: Tensor | None = None  # (N, P) int64; every key of such an id is a positive
    duplicates_are_positive: bool = False  # else they are no candidates
    symmetric: bool = False
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @property
    def several_positives(self) -> bool:
        return self.positive_ids is not None or (self.query_ids is not None and self.duplicates_are_positive)

    def rows(self, chunk: slice) -> Scores:
        """The same of some rows against every candidate."""
        names = ("x", "private", "target", "query_ids", "positive_ids")
        return replace(self, **{k: v[chunk] for k in names if (v := getattr(self, k)) is not None})

    def chunks(self) -> list[slice]:
        """Runs of rows whose scores, exponentials, masks and temporaries fit the workspace."""
        n, candidates = len(self.x), len(self.w) + (0 if self.private is None else self.private.shape[1])
        extra = self.softcap is not None or self.label_smoothing > 0
        copies = 3 + 2 * extra + 2 * self.several_positives + self.symmetric
        rows = max(MIN_ROWS, workspace_bytes() // (copies * accumulator(self.x.dtype).itemsize * candidates))
        count = -(-n // rows)
        return [slice(i * n // count, (i + 1) * n // count) for i in range(count)]


def _finite(t: Tensor) -> Tensor:
    """0 for -inf: a shift that makes the exponentials of an empty set 0 rather than NaN."""
    return t.masked_fill(t == -torch.inf, 0.0)


def _ratio(g: Tensor, total: Tensor) -> Tensor:
    return torch.where(total > 0, g / total, 0.0)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, 2-D or batched, with fp32 results."""
    wide = accumulator(a.dtype)
    return a @ b if a.dtype == wide else (torch.mm if a.ndim == 2 else torch.bmm)(a, b, out_dtype=wide)


class _Block:
    """The scores z (n, M + K) of a chunk of rows, and the mask of positives (n, M) where a row can have several."""

    def __init__(self, scores: Scores, chunk: slice):
        self.s = s = scores.rows(chunk)
        self.m = len(s.w)
        x = s.x
        widened = x.dtype == accumulator(x.dtype)
        z = _product(x * s.scale, s.w.t()) if widened else _product(x, s.w.t()).mul_(s.scale)
        if s.bias is not None:
            z += s.bias
        if s.softcap is not None:
            z.div_(s.softcap).tanh_().mul_(s.softcap)
        self.positives = None if s.key_ids is None else self._mask(z, s.key_ids)
        if s.private is not None:
            z = torch.cat([z, _product(s.private, x[:, :, None]).squeeze(2).mul_(s.scale)], 1)
        self.z = z
        self.e: Tensor | None = None

    def _mask(self, z: Tensor, key_ids: Tensor) -> Tensor | None:
        s = self.s
        drop, positives = key_ids < 0, None
        duplicate = None if s.query_ids is None else key_ids == s.query_ids[:, None]
        if s.several_positives:
            positives = torch.zeros_like(z, dtype=torch.bool)
            if duplicate is not None and s.duplicates_are_positive:
                positives |= duplicate
            if s.positive_ids is not None:
                for ids in s.positive_ids.unbind(1):
                    positives |= key_ids == ids[:, None]
            if s.target is not None:
                positives.scatter_(1, s.target[:, None], True)
        if duplicate is not None and not s.duplicates_are_positive:
            if positives is not None:
                duplicate &= ~positives
            elif s.target is not None:
                duplicate.scatter_(1, s.target[:, None], False)
            drop = drop | duplicate
        z.masked_fill_(drop, -torch.inf)
        return positives

    def positive_scores(self) -> Tensor:
        assert self.positives is not None
        return self.z[:, : self.m].masked_fill(~self.positives, -torch.inf)

    def _softmax(self, z: Tensor, dim: int, positive: tuple[Tensor, Tensor]) -> Softmax:
        top = z.amax(dim, keepdim=True)
        e = (z - _finite(top)).exp_()
        if dim == 1:
            self.e = e
        total = count = None
        if self.s.label_smoothing:
            total, count = _finite(z).sum(dim), (z > -torch.inf).sum(dim)
        return Softmax(top.squeeze(dim), e.sum(dim), *positive, total, count)

    def _positive(self, dim: int) -> tuple[Tensor, Tensor]:
        z = self.positive_scores()
        top = z.amax(dim, keepdim=True)
        return top.squeeze(dim), (z - _finite(top)).exp_().sum(dim)

    def rows(self) -> Softmax:
        if self.positives is not None:
            return self._softmax(self.z, 1, self._positive(1))
        assert self.s.target is not None
        logit = self.z.gather(1, self.s.target[:, None]).squeeze(1)
        return self._softmax(self.z, 1, (logit, torch.ones_like(logit)))

    def columns(self, rows: Softmax) -> Softmax:
        z = self.z[:, : self.m]
        if self.positives is not None:
            return self._softmax(z, 0, self._positive(0))
        assert self.s.target is not None
        top = z.new_full((self.m,), -torch.inf).scatter_reduce_(0, self.s.target, rows.pos_max, "amax")
        total = _sum_by(self.s.target, (rows.pos_max - top[self.s.target]).exp(), self.m)
        return self._softmax(z, 0, (top, total))

    def ranks(self, rows: Softmax) -> tuple[Tensor, Tensor]:
        return (self.z > rows.pos_max[:, None]).sum(1), self.z.argmax(1)

    def logit_gradient(self, rows: Softmax, columns: Softmax | None, g: Tensor, h: Tensor | None) -> Tensor:
        """s dL/da (n, M + K). p - t is formed in fp32."""
        s, z, keys = self.s, self.z, slice(self.m)
        share, g = 1 - s.label_smoothing, g * s.scale
        dz = (z - _finite(rows.max)[:, None]).exp_() if self.e is None else self.e
        self.e = None
        dz *= _ratio(g * (1 + 2 * s.z_loss * rows.lse) if s.z_loss else g, rows.sum)[:, None]
        on_target = share * g
        if rows.count is not None:
            dz -= (z > -torch.inf) * (s.label_smoothing * g / rows.count)[:, None]
        if self.positives is not None:
            t = (self.positive_scores() - _finite(rows.pos_max)[:, None]).exp_()
            dz[:, keys] -= t.mul_(_ratio(on_target, rows.pos_sum)[:, None])
        if columns is not None and h is not None:
            h = h * s.scale
            dz[:, keys] += (z[:, keys] - _finite(columns.max)).exp_().mul_(_ratio(h, columns.sum))
            h_pos = share * _ratio(h, columns.pos_sum)
            if columns.count is not None:
                dz[:, keys] -= (z[:, keys] > -torch.inf) * (s.label_smoothing * _ratio(h, columns.count))
            if self.positives is not None:
                dz[:, keys] -= (self.positive_scores() - _finite(columns.pos_max)).exp_().mul_(h_pos)
            else:
                on_target = on_target + h_pos[s.target] * (rows.pos_max - columns.pos_max[s.target]).exp()
        if self.positives is None:
            dz[torch.arange(len(dz), device=dz.device), s.target] -= on_target
        if s.softcap is not None:
            dz *= 1 - (z / s.softcap).square_()
        return dz


def _sum_by(index: Tensor, values: Tensor, size: int) -> Tensor:
    """Sums by index. Accumulating index_put sorts first: the same sums on every run."""
    return values.new_zeros(size).index_put_((index,), values, accumulate=True)


def column_gradient(s: Scores, g: Tensor) -> Tensor:
    """h (M,): what the rows whose target a column is pay for it, g (N,) each."""
    assert s.target is not None
    return _sum_by(s.target, g, len(s.w))


class _Sums:
    """Gradients of the operands, gathered chunk by chunk."""

    def __init__(self, s: Scores, needs: Needs):
        def zeros(needed: bool, *shape: int) -> Tensor | None:
            return s.x.new_zeros(shape, dtype=accumulator(s.x.dtype)) if needed else None

        self.s = s
        private = None if s.private is None else zeros(needs.private, *s.private.shape)
        scale, bias = zeros(needs.scale), zeros(needs.bias, len(s.w))
        self.grads = Gradients(zeros(needs.x, *s.x.shape), zeros(needs.w, *s.w.shape), scale, bias, private)

    def add(self, chunk: slice, dz: Tensor) -> None:
        """Adds the part of rows `chunk`, given s dL/da (n, M + K) of them."""
        s, (dx, dw, ds, db, dprivate) = self.s, self.grads
        x, m = s.x[chunk], len(s.w)
        dz, dz_private = dz[:, :m], dz[:, m:]
        if db is not None:
            db += dz.sum(0) / s.scale
        d = dz.to(x.dtype)
        if dx is not None or ds is not None:
            part = _product(d, s.w)
            if s.private is not None:
                part += _product(dz_private.to(x.dtype)[:, None], s.private[chunk]).squeeze(1)
            if dx is not None:
                dx[chunk] = part
            if ds is not None:
                ds += (x * part).sum() / s.scale
        if dw is not None:
            if x.dtype == dw.dtype:
                torch.addmm(dw, d.t(), x, out=dw)
            else:
                dw += _product(d.t(), x)
        if dprivate is not None:
            torch.mul(dz_private[:, :, None], x[:, None], out=dprivate[chunk])


def _walk(s: Scores, ranks: bool, sums: _Sums | None = None, g: Tensor | None = None, h: Tensor | None = None):
    """Statistics and, into `sums`, the gradient of each block while its exponentials are at hand."""
    parts, columns, rank = [], None, []
    for chunk in s.chunks():
        block = _Block(s, chunk)
        parts.append(rows := block.rows())
        if ranks:
            rank.append(block.ranks(rows))
        if s.symmetric:
            seen = block.columns(rows)
            columns = seen if columns is None else columns.merge(seen)
        if sums is not None and g is not None:
            sums.add(chunk, block.logit_gradient(rows, columns, g[chunk], h))
    rows = Softmax(*(None if t[0] is None else torch.cat(t) for t in zip(*parts)))  # pyright: ignore
    return Statistics(rows, columns, *(torch.cat(t) for t in zip(*rank)))


def statistics(s: Scores, *, ranks: bool = False) -> Statistics:
    """Statistics of every row and, for a symmetric loss, of every column: one matrix product."""
    return _walk(s, ranks)


def gradient(s: Scores, stats: Statistics, g: Tensor, needs: Needs, *, h: Tensor | None = None) -> Gradients:
    """Gradients given the statistics, dL/dL_i = g (N,) and, for a symmetric loss, h (M,): three matrix products.

    The statistics may cover more candidates, and those of the columns more rows, than the scores given here.
    """
    sums = _Sums(s, needs)
    for chunk in s.chunks():
        sums.add(chunk, _Block(s, chunk).logit_gradient(stats.rows.at(chunk), stats.columns, g[chunk], h))
    return sums.grads


def statistics_and_gradient(
    s: Scores, g: Tensor, needs: Needs, *, h: Tensor | None = None, ranks: bool = False
) -> tuple[Statistics, Gradients]:
    """Both phases on each chunk of scores: three matrix products, four where columns span several chunks."""
    if s.symmetric and len(s.chunks()) > 1:
        stats = statistics(s, ranks=ranks)
        return stats, gradient(s, stats, g, needs, h=h)
    sums = _Sums(s, needs)
    return _walk(s, ranks, sums, g, h), sums.grads


class _Call(NamedTuple):
    """The arguments of `softmax_xent` that are not differentiated."""

    scores: dict[str, Any]  # fields of Scores
    scale: float
    normalize: bool
    product_dtype: torch.dtype
    reduction: str
    ranks: bool
    grad: bool


class _Problem:
    """The scores of a call, the loss by row, and the way back from gradients of operands to those of inputs."""

    def __init__(self, call: _Call, x, w, scale, bias, private):
        wide = accumulator(call.product_dtype)
        self.units: dict[str, tuple[Tensor, Tensor]] = {}

        def enter(name: str, t: Tensor) -> Tensor:
            dtype = t.dtype
            if call.normalize:
                t, _ = self.units[name] = unit(t.to(wide))
            # Only CUDA multiplies half-precision operands into fp32 results; elsewhere autocast alone rounds them.
            if t.is_cuda:
                return t.to(call.product_dtype)
            return t.to(wide) if dtype == call.product_dtype else t.to(call.product_dtype).to(wide)

        self.supervised, fields = None, dict(call.scores)
        if fields.pop("ignoring", False):
            self.supervised = fields["target"] >= 0
            fields["target"] = fields["target"].clamp(min=0)
        self.scores = Scores(
            enter("x", x),
            enter("w", w),
            call.scale if scale is None else scale.to(wide),
            None if bias is None else bias.to(wide),
            None if private is None else enter("private", private),
            **fields,
        )

    def loss(self, stats: Statistics) -> Tensor:
        s = self.scores
        loss = stats.rows.loss(s.label_smoothing, s.z_loss)
        if stats.columns is not None and s.target is not None:
            loss = (loss + stats.columns.at(s.target).loss(s.label_smoothing)) / 2
        return loss if self.supervised is None else loss.where(self.supervised, 0.0)

    def upstream(self, g: Tensor) -> tuple[Tensor, Tensor | None]:
        """g and h of a sum of losses weighted by g (N,)."""
        if self.supervised is not None:
            g = g.where(self.supervised, 0.0)
        return (g / 2, column_gradient(self.scores, g / 2)) if self.scores.symmetric else (g, None)

    def count(self) -> int | Tensor:
        return len(self.scores.x) if self.supervised is None else self.supervised.sum().clamp(min=1)

    def leave(self, grads: Gradients) -> list[Tensor | None]:
        return [
            unit_backward(g, *self.units[name]) if g is not None and name in self.units else g
            for name, g in grads._asdict().items()
        ]


class _SoftmaxXent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Tensor | None):
        ctx.call, ctx.dtypes = call, [None if t is None else t.dtype for t in inputs]
        needs = Needs(*(call.grad and need for need in ctx.needs_input_grad[1:]))
        with torch.autocast(_device_type(inputs), enabled=False):
            problem = _Problem(call, *inputs)
            s = problem.scores
            ctx.in_forward = call.reduction != "none" and any(needs)
            if ctx.in_forward:
                ones = s.x.new_ones(len(s.x), dtype=accumulator(s.x.dtype))
                g, h = problem.upstream(ones / problem.count() if call.reduction == "mean" else ones)
                stats, grads = statistics_and_gradient(s, g, needs, h=h, ranks=call.ranks)
                # fp16 cannot hold a gradient whose loss scale is still to come.
                ctx.save_for_backward(
                    *(
                        g if g is None or dtype == torch.float16 else g.to(dtype)
                        for g, dtype in zip(problem.leave(grads), ctx.dtypes)
                    )
                )
            else:
                stats = statistics(s, ranks=call.ranks)
                if any(needs):
                    ctx.save_for_backward(*inputs, *stats.rows, *(stats.columns or ()))
            loss = problem.loss(stats)
            if call.reduction != "none":
                loss = loss.sum()
            if call.reduction == "mean":
                loss = loss / problem.count()
        by_row = (stats.rows.lse, stats.rows.positive_logit, stats.rank, stats.top1) if call.ranks else ()
        ctx.mark_non_differentiable(*by_row)
        return loss, *by_row

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor):
        g = upstream[0]
        if ctx.in_forward:
            grads = [None if t is None else t * g for t in ctx.saved_tensors]
        else:
            inputs, stats = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
            with torch.autocast(_device_type(inputs), enabled=False):
                problem = _Problem(ctx.call, *inputs)
                rows, columns = Softmax(*stats[:6]), Softmax(*stats[6:]) if stats[6:] else None
                g, h = problem.upstream(g)
                needs = Needs(*ctx.needs_input_grad[1:])
                grads = problem.leave(gradient(problem.scores, Statistics(rows, columns), g, needs, h=h))
        return None, *(None if t is None else t.to(dtype) for t, dtype in zip(grads, ctx.dtypes))


def _device_type(inputs: tuple[Tensor | None, ...]) -> str:
    assert inputs[0] is not None
    return inputs[0].device.type


def softmax_xent(
    x: Tensor,  # (N, D), N > 0
    w: Tensor,  # (M, D)
    *,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,  # (M,)
    private: Tensor | None = None,  # (N, K, D)
    normalize: bool = False,
    product_dtype: torch.dtype | None = None,
    reduction: str = "mean",
    ranks: bool = False,
    **scores: Any,
) -> tuple[Tensor, ...]:
    """The loss, by row or reduced, and with `ranks` by row (lse, positive logit, rank, top-1).

    `scores` are fields of `Scores`, and `ignoring=True` where a negative target means a row without loss.
    `product_dtype` is what x, w and private are rounded to before they are multiplied, by default their own.
    """
    learnt = isinstance(scale, Tensor)
    dtype = x.dtype if product_dtype is None else product_dtype
    call = _Call(scores, 1.0 if learnt else scale, normalize, dtype, reduction, ranks, torch.is_grad_enabled())
    return _SoftmaxXent.apply(call, x, w, scale if learnt else None, bias, private)  # pyright: ignore
