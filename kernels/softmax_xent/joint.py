"""InfoNCE with joint denominators: queries among each other, and keys among each other, beside queries and keys.

    L_i = log( sum_j e^z(q_i, k_j)  +  sum_j e^z(q_i, q_j)  +  sum_j e^z(k_y(i), k_j) ) - z(q_i, k_y(i))

The second sum is over queries of another answer, the third over keys other than the answer: by ids, so that a passage
that stands twice in the batch is no negative of itself. Each sum is a loss without a positive of its own, its
log-sum-exp, by the kernels of the first one; they are joined by row, above the positive's score, so that neither value
nor weights lose digits where one sum outweighs the others:

    L_i = log( e^L'_i + e^(lse_others - z(q_i, k_y(i))) )

The rows' weights come with backward, so that every block of scores is multiplied twice: 4 products a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..numerics import accumulator
from .op import softmax_xent

FLAT = 2.0**-32
"""Scores times this are near 0, so that every candidate counts in a sum; a power of two moves none across its limit."""


def joint_softmax_xent(
    x: Tensor,  # (N, D)
    w: Tensor,  # (M, D)
    *,
    target: Tensor,  # (N,)
    queries: bool,
    keys: bool,
    unit: Any,
    answers: Tensor | None,  # (N,) ids of the keys that answer
    key_ids: Tensor | None,  # (M,)
    scale: float | Tensor,
    product_dtype: torch.dtype,
    margin: float | None,
    reduction: str,
    ranks: bool,
    checked: bool,
    impl: str,
    private: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """The loss and, with `ranks`, by row (lse of all sums, positive logit, rank and top-1 among keys).

    `unit` normalises rows, where that is asked. `options` are those of the first sum alone.
    """
    if unit is not None:
        x, w, private = unit(x), unit(w), None if private is None else unit(private)
    inside = target if checked else target.clamp(0, w.shape[0] - 1)
    own = w.index_select(0, inside)
    wide = accumulator(product_dtype)
    products = (x.to(product_dtype).to(wide) * own.to(product_dtype).to(wide)).sum(1)
    limit = None if margin is None else ((products - margin) * scale).detach()
    same = {"product_dtype": product_dtype, "reduction": "none", "impl": impl, "checked": checked}
    ids = torch.arange(w.shape[0], device=w.device) if key_ids is None else key_ids
    answers = ids[inside] if answers is None else answers
    lowest = torch.finfo(accumulator(product_dtype)).min  # a row may have nobody else; -inf would make gradients NaN

    def sums(scale: float | Tensor, limit: Tensor | None, ranks: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The loss of queries and keys, the log-sum-exp of the others, and statistics by row."""
        all_of = {**same, "scale": scale, "limit": limit}
        first, *by_row = softmax_xent(
            x, w, target=target, key_ids=key_ids, private=private, ranks=ranks, **options, **all_of
        )
        others = []
        if queries:
            others.append(softmax_xent(x, x, query_ids=answers, key_ids=answers, **all_of)[0].clamp(min=lowest))
        if keys:
            others.append(softmax_xent(own, w, query_ids=answers, key_ids=ids, **all_of)[0].clamp(min=lowest))
        return first, others[0] if len(others) == 1 else torch.logaddexp(*others), by_row

    def nobody(scale: float | Tensor, limit: Tensor | None) -> Tensor:
        """Which rows have no candidate but the positive, if scores are near 0."""
        first, other, _ = sums(scale, limit)
        return (first == 0) & (other <= lowest)

    first, other, by_row = sums(scale, limit, ranks)
    # A first sum of 0 may also be of candidates far below the positive.
    if checked and limit is not None and ((first.detach() == 0) & (other.detach() <= lowest)).any():
        with torch.no_grad():
            left_alone = nobody(scale * FLAT, limit * FLAT) & ~nobody(scale * FLAT, None)
        if left_alone.any():
            message = f"margin is {margin}, which leaves a query no candidate but its positive; pass a lower one"
            raise ValueError(message)
    loss = torch.logaddexp(first, other - products * scale)
    if ranks:
        by_row[0] = torch.logaddexp(by_row[0], other.detach())
    if reduction != "none":
        loss = loss.mean() if reduction == "mean" else loss.sum()
    return (loss, *by_row)
