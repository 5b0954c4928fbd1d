"""What is scored, and what a softmax over the scores is summed up by: the language of the loss engine.

    a_ij = s <x_i, w_j> + b_j       z_ij = c tanh(a_ij / c) with a softcap c, else a_ij; -inf where j is not a candidate

`Scores` says which logits there are, `Softmax` holds a softmax as maximum and sum of exponentials, a `Chunk` is what an
implementation supplies: the statistics of some rows of logits, and the gradient of the loss in them.

Legend: N rows, M candidates, D width, K private candidates of a row, P positive ids of a row, n rows of a chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..numerics import accumulator, finite, sum_by

if TYPE_CHECKING:
    from .engine import Sums


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
        shift, pos_shift = finite(top), finite(pos_top)
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
    w: bool | slice  # a slice: of these rows alone
    scale: bool
    bias: bool
    private: bool


class Gradients(NamedTuple):
    """Gradients of the operands, None for those not asked for."""

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
    scale: float | Tensor = 1.0  # a 0-d tensor is fp32 (fp64 for fp64 operands)
    bias: Tensor | None = None  # (M,) fp32 (fp64)
    private: Tensor | None = None  # (N, K, D)
    target: Tensor | None = None  # (N,) int64 index of the positive
    query_ids: Tensor | None = None  # (N,) int64; a key of this id other than the target duplicates the positive
    key_ids: Tensor | None = None  # (M,) int64; negative: no candidate
    positive_ids: Tensor | None = None  # (N, P) int64; every key of such an id is a positive
    limit: Tensor | None = None  # (N,) fp32 (fp64); a key that scores above it and is no positive is no candidate
    alone: bool | Tensor = True  # where no other candidates (n,) join these, a limit that leaves nothing is an error
    duplicates_are_positive: bool = False  # else they are not candidates
    symmetric: bool = False
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @property
    def several_positives(self) -> bool:
        """Whether rows may have any number of positives, or none at all: then their loss is the log-sum-exp."""
        if self.target is None or self.positive_ids is not None:
            return True
        return self.query_ids is not None and self.duplicates_are_positive

    def rows(self, chunk: slice) -> Scores:
        """The same of some rows against every candidate."""
        names = ("x", "private", "target", "query_ids", "positive_ids", "limit")
        return replace(self, **{k: v[chunk] for k in names if (v := getattr(self, k)) is not None})

    def column_positives(self, rows: Softmax) -> tuple[Tensor, Tensor]:
        """pos_max and pos_sum (M,) of the columns where each row has one positive, of logit rows.pos_max."""
        assert self.target is not None
        m = len(self.w)
        top = rows.pos_max.new_full((m,), -torch.inf).scatter_reduce_(0, self.target, rows.pos_max, "amax")
        return top, sum_by(self.target, (rows.pos_max - top[self.target]).exp(), m)


class Chunk(ABC):
    """The logits of n rows against M shared candidates, held or computed again, between statistics and gradient.

    Private candidates are left to the engine. Where rows have several positives they may have none among these
    candidates: pos_max = -inf and pos_sum = 0 then. A row without a candidate has max = -inf and sum = 0.
    """

    holds = True
    """Whether its scores are still there after the statistics."""
    multiplies = False
    """Whether its scores come from a kernel of its own, whose epilogue makes of them what is wanted."""

    @classmethod
    @abstractmethod
    def score_bytes(cls, scores: Scores) -> int:
        """Workspace for one score of a chunk."""

    @classmethod
    def held_bytes(cls, scores: Scores, rows: int) -> int:
        """What is left of a chunk of so many rows after `hold`."""
        return cls.score_bytes(scores) * rows * len(scores.w)

    @classmethod
    def peaks(cls, scores: Scores, rows: int, again: bool) -> tuple[int, int]:
        """Bytes that a chunk of so many rows holds while its gradient is formed, and while products read that.

        `again`: its statistics have been found before.
        """
        held = cls.score_bytes(scores) * rows * len(scores.w)
        return held, held

    @classmethod
    def traffic(cls, scores: Scores, again: float, gradients: int) -> float:
        """Bytes of memory that one score moves: multiplied once and `again`, its gradient read by so many products.

        Here: written by its product, read and written where it becomes its gradient. Off the CPU each of torch's passes
        is one over memory, and each copy in `score_bytes` is written and read.
        """
        size = scores.x.dtype.itemsize
        passes = size if scores.x.device.type == "cpu" else cls.score_bytes(scores)
        return 2 * (1 + again) * passes + (size * (1 + gradients) if gradients else 0)

    @classmethod
    def unsupported(cls, scores: Scores, ranks: bool) -> str | None:
        """Why this implementation cannot compute these scores, in words; None where it can."""
        return None

    @classmethod
    def prepare(cls, scores: Scores) -> Scores:
        """The same scores as this implementation takes them, made once for all chunks."""
        return scores

    @abstractmethod
    def __init__(self, scores: Scores): ...

    @abstractmethod
    def statistics(self, *, ranks: bool) -> Statistics:
        """Softmaxes of the rows and, for a symmetric loss, of the columns; with `ranks` rank and top1 of the rows."""

    @abstractmethod
    def logit_gradient(self, rows: Softmax, columns: Softmax | None, g: Tensor, h: Tensor | None) -> Tensor:
        """s dL/da (n, M) in the operands' dtype, given the statistics and what each row (and column) weighs.

            dz = g_i ((1 + 2 q lse_i) p_ij - (1 - e) t_ij - e / C_i) + h_j (pcol_ij - (1 - e) tcol_ij - e / Ccol_j)
            da = dz (1 - (z / c)^2)
            p = exp(z - max) / sum      t = exp(z - pos_max) / pos_sum over positives, else 0

        `rows` and `columns` may be of more candidates and more rows than this chunk's. Callable once.
        """

    def accumulate(self, stats: Statistics, g: Tensor, h: Tensor | None, sums: Sums) -> None:
        """Adds the gradients of the operands that these rows give, by products with `logit_gradient`. Callable once."""
        sums.add(self.logit_gradient(stats.rows, stats.columns, g, h))

    def statistics_and_accumulate(self, g: Tensor, sums: Sums, *, ranks: bool) -> Statistics:
        """Both, where the statistics of these rows are all that the gradient needs."""
        stats = self.statistics(ranks=ranks)
        self.accumulate(stats, g, None, sums)
        return stats

    def hold(self) -> None:  # noqa: B027
        """Gives back what the gradient does not need, where other chunks come between it and the statistics."""

    def close(self) -> None:  # noqa: B027  most have nothing to give
        """Gives its memory to the next chunk, when nothing is left to be read of it."""


def no_rows(s: Scores) -> Statistics:
    """What no rows say of M candidates: nothing."""
    wide = accumulator(s.x.dtype)

    def softmax(n: int) -> Softmax:
        none, zero = s.x.new_full((n,), -torch.inf, dtype=wide), s.x.new_zeros(n, dtype=wide)
        smoothing = (zero, zero.long()) if s.label_smoothing else ()
        return Softmax(none, zero, none, zero, *smoothing)

    index = torch.empty(0, dtype=torch.int64, device=s.x.device)
    return Statistics(softmax(0), softmax(len(s.w)) if s.symmetric else None, index, index)
