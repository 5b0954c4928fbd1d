"""The scores of a call, the loss by row, and the way back from gradients of operands to those of inputs."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..numerics import accumulator, cast, unit, unit_backward
from . import dispatch
from .call import LOCAL, ByRow, Call, Pool
from .chunk_torch import operand_dtype
from .engine import column_gradient, gradient, statistics, statistics_and_gradient
from .scores import Chunk, Gradients, Needs, Scores, Statistics, no_rows

ALIGNMENT = 16
"""Elements: what Triton takes a multiple of for a reason to read several at once."""


class Problem:
    """The scores of a call, the loss by row, and the way back from gradients of operands to those of inputs."""

    def __init__(self, call: Call, pool: Pool = LOCAL):
        self.call, self.pool = call, pool
        self.needs = pool.needs(Needs(*call.needs))
        self.wanted = pool.wanted(self.needs)
        self.wide = accumulator(call.product_dtype)
        self.units: dict[str, tuple[Tensor, Tensor]] = {}
        x, w, target = call.x, call.w, call.target
        self.queries, keys = pool.sizes(x.shape[0], w.shape[0])
        self.aligned = call.impl in dispatch.KERNELS or x.is_cuda
        self.operand_dtype = operand_dtype(call.product_dtype, x.device, self.queries * keys * x.shape[1])
        if self.aligned:
            self.operand_dtype = call.product_dtype
        self.supervised = self.void = None
        if call.ignoring and target is not None:
            self.supervised = target >= 0
        if target is not None and not call.checked:
            inside = target.clamp(0, keys - 1)
            void = inside != target if self.supervised is None else self.supervised & (inside != target)
            if os.environ.get("COSUP_CHECK_TARGETS") == "1":
                message = f"a target is none of the rows 0..{keys - 1} of the candidates"
                torch.ops.aten._assert_async(~void.any(), message)
            # The columns of a symmetric loss do not know what their positives are.
            self.void, target = void.any().expand_as(void) if call.symmetric else void, inside
        elif self.supervised is not None and target is not None:
            target = target.clamp(min=0)
        self.scores = Scores(
            cast(self._enter("x", x), self.operand_dtype),
            cast(pool.gather(self._enter("w", w)), self.operand_dtype),
            call.fixed_scale if call.scale is None else call.scale.to(self.wide),
            None if call.bias is None else call.bias.to(self.wide),
            None if call.private is None else self._enter("private", call.private).to(self.operand_dtype),
            target,
            call.query_ids,
            call.key_ids,
            call.positive_ids,
            call.limit,
            call.limit is None,
            call.duplicates_are_positive,
            call.symmetric,
            call.softcap,
            call.label_smoothing,
            call.z_loss,
        )
        if call.margin is not None:
            self.scores.limit = self._limit(call.margin)

    def _limit(self, margin: float) -> Tensor:
        """(N,) the largest score of a candidate: the target's, less the margin."""
        s = self.scores
        assert s.target is not None
        own = (s.x.to(self.wide) * s.w[s.target].to(self.wide)).sum(1)
        return (own - margin) * s.scale

    def _enter(self, name: str, t: Tensor) -> Tensor:
        """An operand as it travels: normalised if asked, rounded to the product's dtype.

        A CPU that multiplies no half precision itself takes what is rounded in fp32, and unit vectors whole. A GPU gets
        rows that begin at multiples of 32 bytes, padded with zeros.
        """
        dtype = self.call.product_dtype
        if self.call.normalize:
            if t.dtype == dtype:
                dtype = self.operand_dtype
            t, _ = self.units[name] = unit(t.to(self.wide))
        t = cast(t, dtype)
        return _aligned(t) if self.aligned else t

    def run(self) -> tuple[Statistics, Gradients | None]:
        """The statistics and, where the weights of the rows are known and anybody asks, the gradients."""
        if self.call.at_once and self.wanted:
            g, h = self.upstream(self.weights())
            if not self.scores.x.shape[0]:
                return self._no_rows(), self._no_gradient()
            stats, grads = statistics_and_gradient(
                self.scores, g, self.needs, h=h, ranks=self.call.ranks, kind=self.kind(), merge=self.pool.merge,
                wide=self._wide_gradients,
            )  # fmt: skip
            return stats, grads
        if not self.scores.x.shape[0]:
            return self._no_rows(), None
        stats = statistics(self.scores, ranks=self.call.ranks, kind=self.kind())
        return self._merged(stats), None

    def gradient(self, stats: Statistics, g: Tensor) -> Gradients:
        """The gradients of losses that are weighted by g (N,)."""
        g, h = self.upstream(g)
        if not self.scores.x.shape[0]:
            return self._no_gradient()
        return gradient(self.scores, stats, g, self.needs, h=h, kind=self.kind(), wide=self._wide_gradients)

    @property
    def _wide_gradients(self) -> bool:
        """Whether something is done to gradients before they are rounded."""
        return bool(self.units) or self.pool is not LOCAL

    def kind(self) -> type[Chunk]:
        gradients = self.needs.x + bool(self.needs.w)
        return dispatch.kind(self.call.impl, self.scores, self.call.ranks, self.call.at_once, gradients)

    def _merged(self, stats: Statistics) -> Statistics:
        if stats.columns is None or self.pool.merge is None:
            return stats
        return stats._replace(columns=self.pool.merge(stats.columns))

    def _no_rows(self) -> Statistics:
        return self._merged(no_rows(self.scores))

    def _no_gradient(self) -> Gradients:
        """Of a process without queries, whose keys others may well score."""
        s, w = self.scores, self.needs.w
        operands = s.x, s.w[w] if isinstance(w, slice) else s.w, s.scale, s.bias, s.private
        zeros = (
            torch.zeros_like(t, dtype=self.wide) if need and isinstance(t, Tensor) else None
            for t, need in zip(operands, self.needs)
        )
        return Gradients(*zeros)

    def loss(self, stats: Statistics) -> Tensor:
        s = self.scores
        positives = s.target is not None or s.positive_ids is not None
        loss = stats.rows.loss(s.label_smoothing, s.z_loss) if positives else stats.rows.lse
        if stats.columns is not None and s.target is not None:
            loss = (loss + stats.columns.at(s.target).loss(s.label_smoothing)) / 2
        if self.supervised is not None:
            loss = loss.where(self.supervised, 0.0)
        loss = self._spoilt(loss)
        if self.call.reduction == "none":
            return loss
        if self.call.reduction == "mean":
            whole = self.supervised is None and self.queries == loss.shape[0] > 0
            return loss.mean() if whole else loss.sum() / self.count()
        return loss.sum()

    def by_row(self, stats: Statistics) -> ByRow:
        if not self.call.ranks:
            return ByRow()
        return ByRow(stats.rows.lse, self._spoilt(stats.rows.positive_logit), stats.rank, stats.top1)

    def _spoilt(self, t: Tensor) -> Tensor:
        """t (N,) with NaN where the target is not a candidate at all."""
        return t if self.void is None else t.masked_fill(self.void, torch.nan)

    def weights(self) -> Tensor:
        """What each row weighs in the reduced loss."""
        n = self.scores.x.shape[0]
        if self.call.reduction == "mean" and self.supervised is None:
            return self.scores.x.new_full((n,), 1 / self.count(), dtype=self.wide)
        ones = self.scores.x.new_ones(n, dtype=self.wide)
        return ones / self.count() if self.call.reduction == "mean" else ones

    def upstream(self, g: Tensor) -> tuple[Tensor, Tensor | None]:
        """g and h of a sum of losses weighted by g (N,)."""
        if self.supervised is not None:
            g = g.where(self.supervised, 0.0)
        g = self._spoilt(g)
        if not self.scores.symmetric:
            return g, None
        return g / 2, self.pool.sum(column_gradient(self.scores, g / 2))

    def count(self) -> Any:
        return max(1, self.queries) if self.supervised is None else self.supervised.sum().clamp(min=1)

    def leave(self, found: Gradients) -> list[Tensor | None]:
        """Gradients of the inputs, in their dtypes; fp16 cannot hold one whose loss scale is still to come."""
        if found.w is not None and self.pool is not LOCAL:
            found = found._replace(w=self.pool.give(found.w))
        grads = []
        for name, g, t in zip(Gradients._fields, found, self.call.operands):
            if g is None or t is None:
                grads.append(None)
                continue
            if g.shape != t.shape:
                g = g[..., : t.shape[-1]].contiguous()
            if name in self.units:
                g = unit_backward(g.to(self.wide), *self.units[name])
            grads.append(cast(g, kept(t.dtype)))
        return grads


def _aligned(t: Tensor) -> Tensor:
    """t, or a copy padded with zeros to a width, and to rows that begin at, multiples of `ALIGNMENT` elements.

    Products of GPUs read 16 bytes at a time: padding costs one copy of an operand here, and every tile of it there.
    """
    strides = (*t.stride()[:-1], t.shape[-1])
    if t.stride(-1) == 1 and all(stride % ALIGNMENT == 0 for stride in strides) and t.data_ptr() % 16 == 0:
        return t
    return torch.nn.functional.pad(t, (0, -t.shape[-1] % ALIGNMENT)).contiguous()


def kept(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a gradient is kept in until backward."""
    return torch.float32 if dtype == torch.float16 else dtype
