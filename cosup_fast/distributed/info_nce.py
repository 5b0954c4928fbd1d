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
every rank must go back from the same multiple of its share. With reduction="none" any weights will do; where keys are
trained with key_grad="global", or the loss is symmetric, backward is then a collective, and each rank needs a gradient.

Before each loss the ranks meet (`peers.py`): they compare what they are about to do and learn each other's counts. A
rank that does not come is a `PeerError` that names it.

Legend: N_r queries and M_r keys of this rank, N and M of all, D width, K private negatives, P positive ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

from cosup_fast.distributed.peers import PeerError, Peers, outside_graphs
from cosup_fast.kernels.autograd import has_values
from cosup_fast.kernels.numerics import finite
from cosup_fast.kernels.softmax_xent import call
from cosup_fast.kernels.softmax_xent.op import softmax_xent
from cosup_fast.kernels.softmax_xent.scores import Needs, Softmax

__all__ = ["PeerError", "Peers", "info_nce"]


@dataclass(frozen=True)
class Pool(call.Pool):
    """The keys of all ranks as each rank knows them before their rows have come; `Pool.of` is where the ranks meet."""

    peers: Peers
    counts: tuple[int, ...]  # keys of each rank
    queries: int  # of all ranks
    ids: Tensor | None  # (M,) int64
    any_wanted: bool  # some rank wants a gradient of anything
    keys_wanted: bool  # some rank wants one of its keys
    key_grad: str
    late: bool  # some rank's positives are checked beside the keys of all

    @classmethod
    def of(
        cls,
        peers: Peers,
        query: Tensor,  # (N_r, D)
        keys: Tensor,  # (M_r, D)
        others: tuple[Any, ...],
        key_ids: Tensor | None,  # (M_r,)
        same: dict[str, Any],
        *,
        late: bool,
    ) -> Self:
        """Meets the other ranks and gathers the ids.

        Args:
            peers: the ranks.
            query, keys, key_ids: what this one brings.
            others: what else may want a gradient.
            same: what must be the same on every rank, by the name of the argument: numbers, texts, None.
            late: this rank's positives can be checked only beside the keys of all ranks.

        Raises:
            ValueError: another rank differs in `same`, has ids where this one has none, or has nothing to train where
                `reduction` leaves the gradients to a backward pass of all ranks.
        """
        same = {**same, "width": query.shape[1], "key_ids": None if key_ids is None else "given"}
        wanted = any(isinstance(t, Tensor) and t.requires_grad for t in (query, keys, *others))
        note = {
            "same": same,
            "queries": len(query),
            "keys": len(keys),
            "wanted": torch.is_grad_enabled() and wanted,
            "keys_wanted": torch.is_grad_enabled() and keys.requires_grad,
            "late": late,
        }
        notes = peers.meet("info_nce", note)
        for option in same:
            # Who has no query need not say whose rows answer it.
            asked = [one["queries"] > 0 or option != "positive_rows" for one in notes]
            said = [(one["same"][option], name) for one, name, ask in zip(notes, peers.names, asked) if ask]
            for value, name in said[1:]:
                if value != said[0][0]:
                    raise ValueError(
                        f"{option} is {said[0][0]!r} on rank {said[0][1]} and {value!r} on rank {name}; it must be the "
                        "same on every rank"
                    )
        idle = [name for name, one in zip(peers.names, notes) if not one["wanted"]]
        keys_trained = same["key_grad"] == "global" and any(one["keys_wanted"] for one in notes)
        if same["reduction"] == "none" and (same["symmetric"] or keys_trained) and 0 < len(idle) < len(notes):
            raise ValueError(
                f"reduction is 'none', so that backward is a collective, but rank {idle[0]} has nothing that needs a "
                "gradient and will not go back; let query or keys need one on every rank, or pass reduction='sum'"
            )
        counts = tuple(one["keys"] for one in notes)
        return cls(
            peers,
            counts,
            sum(one["queries"] for one in notes),
            None if key_ids is None else peers.gather(key_ids, counts),
            any(one["wanted"] for one in notes),
            any(one["keys_wanted"] for one in notes),
            same["key_grad"],
            any(one["late"] for one in notes),
        )

    @property
    def offset(self) -> int:
        """Row of this rank's first key among all keys."""
        return [0, *accumulate(self.counts)][self.peers.rank]

    @property
    def own(self) -> slice:
        """Rows of this rank's keys among all keys."""
        return slice(self.offset, self.offset + self.counts[self.peers.rank])

    def needs(self, needs: Needs) -> Needs:
        """Every key that some rank trains, and all if any is to be scored again; or this rank's own."""
        w = self.keys_wanted if self.key_grad == "global" else needs.w and self.own
        return needs._replace(w=w)

    def wanted(self, needs: Needs) -> bool:
        return self.any_wanted

    def gather(self, keys: Tensor) -> Tensor:
        return self.peers.gather(keys, self.counts)

    def sizes(self, n: int, m: int) -> tuple[int, int]:
        return self.queries, sum(self.counts)

    def sum(self, h: Tensor) -> Tensor:
        return self.peers.sum(h)

    def give(self, dw: Tensor) -> Tensor:
        return self.peers.scatter_sum(dw, self.counts) if self.key_grad == "global" else dw

    def merge(self, columns: Softmax) -> Softmax:  # pyright: ignore[reportIncompatibleVariableOverride]
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
    same = {
        "dtype": str(product_dtype),
        "scale": _comparable(scale),
        "normalize": normalize,
        "symmetric": options["symmetric"],
        "margin": options["margin"],
        "label_smoothing": options["label_smoothing"],
        "duplicates": "keep" if keep_duplicates else "positive" if options["duplicates_are_positive"] else "mask",
        "reduction": reduction,
        "key_grad": key_grad,
        "positive_rows": "group" if elsewhere else "rank",
        "impl": impl,
    }
    late = target is None or elsewhere  # what answers a query may be any rank's
    pool = Pool.of(peers, query, keys, (scale, private), key_ids, same, late=late)
    size = sum(pool.counts)
    if pool.late and query.device.type == "cpu":  # elsewhere `check` reads no values
        with peers.reporting("info_nce: positives"):
            if late:
                check(target, pool.ids, positive_ids, size)
        peers.meet("info_nce: positives")
    if target is not None and not elsewhere:
        # On a GPU a wrong one must not become a key of another rank.
        mine = target + pool.offset
        target = mine if mine.device.type == "cpu" else mine.where((target >= 0) & (target < len(keys)), -1)
    if elsewhere and target is not None and pool.ids is not None and not keep_duplicates:
        given = options["query_ids"]
        options["query_ids"] = pool.ids[target.clamp(0, size - 1)] if given is None else given
    return softmax_xent(
        query, keys, scale=scale, pool=pool, private=private, target=target, key_ids=pool.ids,
        positive_ids=positive_ids, normalize=normalize, product_dtype=product_dtype, reduction=reduction, ranks=ranks,
        checked=query.device.type == "cpu", impl=impl, **options,
    )  # fmt: skip


def _comparable(scale: float | Tensor) -> float | str:
    """What ranks compare of a scale: on a GPU its value would have to be waited for."""
    if not isinstance(scale, Tensor):
        return scale
    return scale.item() if scale.device.type == "cpu" and has_values(scale) else "a tensor"
