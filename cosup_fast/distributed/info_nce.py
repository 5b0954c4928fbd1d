"""Negatives across ranks: InfoNCE whose keys, and ids, are those of every rank of a process group.

    L = 1/N sum_i L_i  over the N = sum_r N_r queries of all ranks        share of rank r = 1/N sum_{i of r} L_i

Each rank scores its own queries against all M = sum_r M_r keys, an N_r x M block, and returns its share of the loss;
the shares add up to L. What one process with the whole batch would compute, this computes:

1. The keys are all-gathered, without graph, in the dtype in which they are multiplied; so are their ids.
2. Each rank has the statistics of its rows. For a symmetric loss the statistics of the columns are merged over ranks.
3. dq is complete on the rank that owns the query. dk, in fp32 (fp64), is reduce-scattered to the owner of the key
   (`key_grad="global"`), or only the block of a rank's own queries and own keys counts (`key_grad="local"`): there
   z_ij = <q_i, stop_gradient(k_j)> for every key j of another rank, as in the published code of Lee et al. 2024.

Gradients of inputs are complete. Gradients of parameters that ranks share (weights, a learnable scale) are parts that
must be SUMMED over ranks; where they are averaged, as DistributedDataParallel does, multiply the loss by the number
of ranks first. With FSDP2: `set_gradient_divide_factor(1.0)`.

A reduced loss forms its gradients, and talks to the other ranks, in the forward pass: backward waits for nobody, and
every rank must go back from the same multiple of its share. With reduction="none" any weights will do, and backward is
a collective.

Before each loss the ranks meet (`peers.py`): they compare what they are about to do and learn each other's counts. A
rank that does not come is a `PeerError` that names it.

Legend: N_r queries and M_r keys of this rank, N and M of all, D width, K private negatives, P positive ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

from cosup_fast.distributed.peers import PeerError, Peers, outside_graphs
from cosup_fast.kernels.numerics import accumulator, finite, unit, unit_backward
from cosup_fast.kernels.softmax_xent import dispatch
from cosup_fast.kernels.softmax_xent.chunk_torch import operand_dtype
from cosup_fast.kernels.softmax_xent.engine import column_gradient, gradient, statistics, statistics_and_gradient
from cosup_fast.kernels.softmax_xent.op import once
from cosup_fast.kernels.softmax_xent.scores import Gradients, Needs, Scores, Softmax, Statistics

__all__ = ["PeerError", "Peers", "info_nce"]


@dataclass(frozen=True)
class Pool:
    """The keys of all ranks as each rank knows them before their rows have come; `Pool.of` is where the ranks meet."""

    peers: Peers
    counts: tuple[int, ...]  # keys of each rank
    queries: int  # of all ranks
    ids: Tensor | None  # (M,) int64
    wanted: bool  # some rank wants a gradient of anything
    keys_wanted: bool  # some rank wants one of its keys

    @classmethod
    def of(
        cls,
        peers: Peers,
        query: Tensor,  # (N_r, D)
        keys: Tensor,  # (M_r, D)
        others: tuple[Any, ...],
        key_ids: Tensor | None,  # (M_r,)
        same: dict[str, Any],
    ) -> Self:
        """Meets the other ranks and gathers the ids.

        Args:
            peers: the ranks.
            query, keys, key_ids: what this one brings.
            others: what else may want a gradient.
            same: what must be the same on every rank, by the name of the argument: numbers, texts, None.

        Raises:
            ValueError: another rank differs in `same`, or has ids where this one has none.
        """
        same = {**same, "width": query.shape[1], "key_ids": None if key_ids is None else "given"}
        wanted = any(isinstance(t, Tensor) and t.requires_grad for t in (query, keys, *others))
        note = {
            "same": same,
            "queries": len(query),
            "keys": len(keys),
            "wanted": torch.is_grad_enabled() and wanted,
            "keys_wanted": torch.is_grad_enabled() and keys.requires_grad,
        }
        notes = peers.meet("info_nce", note)
        for name, other in zip(peers.names, notes):
            for option, value in same.items():
                if other["same"][option] != value:
                    raise ValueError(
                        f"{option} is {value!r} on rank {peers.names[peers.rank]} and {other['same'][option]!r} on "
                        f"rank {name}; it must be the same on every rank"
                    )
        counts = tuple(one["keys"] for one in notes)
        return cls(
            peers,
            counts,
            sum(one["queries"] for one in notes),
            None if key_ids is None else peers.gather(key_ids, counts),
            any(one["wanted"] for one in notes),
            any(one["keys_wanted"] for one in notes),
        )

    @property
    def size(self) -> int:
        """M."""
        return sum(self.counts)

    @property
    def offset(self) -> int:
        """Row of this rank's first key among all keys."""
        return [0, *accumulate(self.counts)][self.peers.rank]

    @property
    def own(self) -> slice:
        """Rows of this rank's keys among all keys."""
        return slice(self.offset, self.offset + self.counts[self.peers.rank])

    def merge(self, columns: Softmax) -> Softmax:
        """Softmaxes of the columns over the rows of all ranks, given those over this rank's rows."""
        top, pos_top = self.peers.max(torch.stack([columns.max, columns.pos_max]))
        parts = [
            columns.sum * (columns.max - finite(top)).exp(),
            columns.pos_sum * (columns.pos_max - finite(pos_top)).exp(),
        ]
        if columns.total is not None and columns.count is not None:
            parts += [columns.total, columns.count.to(columns.total.dtype)]
        total, pos_total, *smoothing = self.peers.sum(torch.stack(parts))
        return Softmax(top, total, pos_top, pos_total, *smoothing)


@dataclass
class _Problem:
    """The scores of this rank's queries, and the way from them to its share of the loss and back."""

    pool: Pool
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # query, keys, scale, private
    fixed_scale: float
    normalize: bool
    product_dtype: torch.dtype
    reduction: str
    stats: bool
    key_grad: str
    impl: str
    options: dict[str, Any]  # fields of Scores
    needs: Needs = field(init=False)
    units: dict[str, tuple[Tensor, Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        grads = torch.is_grad_enabled()
        query, keys, scale, private = (t is not None and t.requires_grad and grads for t in self.inputs)
        w = self.pool.keys_wanted if self.key_grad == "global" else keys and self.pool.own
        self.needs = Needs(query, w, scale, False, private)

    def scores(self) -> Scores:
        """Gathers the keys."""
        query, keys, scale, private = self.inputs
        w = self.pool.peers.gather(self._enter("w", keys), self.pool.counts)
        x, private = self._enter("x", query), None if private is None else self._enter("private", private)
        wide = accumulator(self.product_dtype)
        if self.impl not in dispatch.KERNELS:
            dtype = operand_dtype(self.product_dtype, query.device, self.size)
            x, w, private = x.to(dtype), w.to(dtype), None if private is None else private.to(dtype)
        return Scores(
            x, w, self.fixed_scale if scale is None else scale.to(wide), private=private, key_ids=self.pool.ids,
            **self.options,
        )  # fmt: skip

    def _enter(self, name: str, t: Tensor) -> Tensor:
        """The operand as it travels: normalised if asked, rounded to the product's dtype.

        A CPU that multiplies no bf16 or fp16 itself keeps the unit vectors of such operands whole.
        """
        dtype = self.product_dtype
        if self.normalize:
            if t.dtype == dtype and self.impl not in dispatch.KERNELS:
                dtype = operand_dtype(dtype, t.device, self.size)
            t, _ = self.units[name] = unit(t.to(accumulator(dtype)))
        return t.to(dtype)

    @property
    def size(self) -> int:
        """N M D over all ranks, so that all multiply in the same dtype."""
        return self.pool.queries * sum(self.pool.counts) * self.inputs[0].shape[1]

    @property
    def count(self) -> int:
        return max(1, self.pool.queries) if self.reduction == "mean" else 1

    def loss(self, s: Scores, stats: Statistics) -> Tensor:
        loss = stats.rows.loss(s.label_smoothing)
        if stats.columns is not None and s.target is not None:
            loss = (loss + stats.columns.at(s.target).loss(s.label_smoothing)) / 2
        return loss if self.reduction == "none" else loss.sum() / self.count

    def upstream(self, s: Scores, g: Tensor) -> tuple[Tensor, Tensor | None]:
        """g (N_r,) and h (M,) of a sum of losses that each rank weights by its own g."""
        if not s.symmetric:
            return g, None
        return g / 2, self.pool.peers.sum(column_gradient(s, g / 2))

    def statistics(self, s: Scores) -> Statistics:
        if len(s.x) == 0:
            stats = _no_rows(s)
        else:
            stats = statistics(s, ranks=self.stats, kind=self._kind(s))
        return stats if stats.columns is None else stats._replace(columns=self.pool.merge(stats.columns))

    def statistics_and_gradient(self, s: Scores) -> tuple[Statistics, Gradients]:
        """Both phases at once, where the weights of all rows are known."""
        g = s.x.new_full((len(s.x),), 1 / self.count, dtype=accumulator(s.x.dtype))
        g, h = self.upstream(s, g)
        if len(s.x) == 0:
            return self.statistics(s), self._no_gradient(s)
        return statistics_and_gradient(
            s, g, self.needs, h=h, ranks=self.stats, kind=self._kind(s), merge=self.pool.merge
        )

    def gradient(self, s: Scores, stats: Statistics, g: Tensor) -> Gradients:
        g, h = self.upstream(s, g)
        if len(s.x) == 0:
            return self._no_gradient(s)
        return gradient(s, stats, g, self.needs, h=h, kind=self._kind(s))

    def _kind(self, s: Scores) -> Any:
        return dispatch.plan(self.impl, s, ranks=self.stats).kind

    def _no_gradient(self, s: Scores) -> Gradients:
        """Of a rank without queries, whose keys others may well score."""
        wide, w = accumulator(s.x.dtype), s.w[self.needs.w] if isinstance(self.needs.w, slice) else s.w
        zeros = (
            torch.zeros_like(t, dtype=wide) if need and isinstance(t, Tensor) else None
            for t, need in zip((s.x, w, s.scale, s.bias, s.private), self.needs)
        )
        return Gradients(*zeros)

    def leave(self, found: Gradients) -> list[Tensor | None]:
        """Gradients of the inputs; those of keys come from all ranks."""
        wide = accumulator(self.product_dtype)
        dw = found.w
        if dw is not None and self.key_grad == "global":
            dw = self.pool.peers.scatter_sum(dw.to(wide), self.pool.counts)
        grads = {"x": found.x, "w": dw, "scale": found.scale, "private": found.private}
        for name, (y, inverse) in self.units.items():
            if (g := grads[name]) is not None:
                grads[name] = unit_backward(g.to(wide), y, inverse)
        # fp16 cannot hold a gradient whose loss scale is still to come.
        return [
            None if g is None or t is None else g.to(torch.float32 if t.dtype == torch.float16 else t.dtype)
            for g, t in zip(grads.values(), self.inputs)
        ]


def _no_rows(s: Scores) -> Statistics:
    """What no queries say of M keys: nothing."""
    wide = accumulator(s.x.dtype)

    def softmax(n: int) -> Softmax:
        none, zero = s.x.new_full((n,), -torch.inf, dtype=wide), s.x.new_zeros(n, dtype=wide)
        smoothing = (zero, zero.long()) if s.label_smoothing else ()
        return Softmax(none, zero, none, zero, *smoothing)

    index = torch.empty(0, dtype=torch.int64, device=s.x.device)
    return Statistics(softmax(0), softmax(len(s.w)) if s.symmetric else None, index, index)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: _Problem, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        with torch.autocast(problem.inputs[0].device.type, enabled=False):
            s, grads = problem.scores(), None
            if problem.pool.wanted and problem.reduction != "none":
                stats, found = problem.statistics_and_gradient(s)
                grads = problem.leave(found)
            else:
                stats = problem.statistics(s)
            loss = problem.loss(s, stats)
        ctx.dtypes = [None if t is None else t.dtype for t in inputs]
        operands = [t for t in (s.x, s.w, s.scale, s.private) if isinstance(t, Tensor)]
        ctx.save_for_backward(*(grads or operands))
        ctx.later = None if problem.reduction != "none" else (problem, s, stats)
        by_row = (stats.rows.lse, stats.rows.positive_logit, stats.rank, stats.top1) if problem.stats else ()
        ctx.mark_non_differentiable(*(t for t in by_row if t is not None))
        return (loss, *by_row)  # pyright: ignore[reportReturnType]

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple:
        with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
            saved = ctx.saved_tensors  # of operands it raises where one was changed in place
            if ctx.later is None:
                grads = [None if t is None else t * g for t in saved]
            else:
                problem, s, stats = ctx.later
                grads = problem.leave(problem.gradient(s, stats, g))
        wanted = ctx.needs_input_grad[1:]
        with torch.no_grad():
            grads = [
                t.to(dtype) if need and t is not None else None for t, dtype, need in zip(grads, ctx.dtypes, wanted)
            ]
        return None, *once(g, grads)


@outside_graphs
def info_nce(
    peers: Peers,
    query: Tensor,  # (N_r, D)
    keys: Tensor,  # (M_r, D)
    *,
    target: Tensor | None,  # (N_r,), a row of keys
    key_ids: Tensor | None,  # (M_r,)
    positive_ids: Tensor | None,  # (N_r, P)
    scale: float | Tensor,
    private: Tensor | None,  # (N_r, K, D)
    product_dtype: torch.dtype,
    normalize: bool,
    reduction: str,
    ranks: bool,
    key_grad: str,
    impl: str,
    elsewhere: bool,
    keep_duplicates: bool,
    check: Callable[[Tensor | None, Tensor | None, Tensor | None, int], None],
    **options: Any,
) -> tuple[Tensor, ...]:
    """This rank's share of the loss and, with `ranks`, lse, positive logit, rank and top-1 of its queries.

    For users there is `functional.info_nce(group=...)`, which checks what it is given, but for positives that may be
    keys of any rank, those of ids and, where `elsewhere`, those of `target`: `check` sees them. `options` are further
    fields of `Scores`.
    """
    learnt = isinstance(scale, Tensor)
    same = {
        "dtype": str(product_dtype),
        "scale": "a tensor" if learnt else scale,
        "normalize": normalize,
        "symmetric": options["symmetric"],
        "label_smoothing": options["label_smoothing"],
        "reduction": reduction,
        "key_grad": key_grad,
        "positive_rows": "group" if elsewhere else "rank",
        "impl": impl,
    }
    pool = Pool.of(peers, query, keys, (scale, private), key_ids, same)
    if target is None or elsewhere:
        if query.device.type == "cpu":  # elsewhere `check` reads no values
            with peers.reporting("info_nce: positives"):
                check(target, pool.ids, positive_ids, pool.size)
            peers.meet("info_nce: positives")
    else:
        target = target + pool.offset
    if elsewhere and target is not None and pool.ids is not None and not keep_duplicates:
        given = options["query_ids"]
        options["query_ids"] = pool.ids[target] if given is None else given
    options |= {"target": target, "positive_ids": positive_ids}
    inputs = query, keys, scale if learnt else None, private
    problem = _Problem(
        pool, inputs, 1.0 if learnt else float(scale), normalize, product_dtype, reduction, ranks, key_grad, impl,
        options,
    )  # fmt: skip
    return _Loss.apply(problem, *inputs)  # pyright: ignore[reportReturnType]
