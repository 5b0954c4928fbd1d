"""Eager oracles: THE definition of correct, for any floating dtype, readable before fast.

Each function takes the arguments of its namesake in `cosup_fast.functional` except `impl`, trusts them, and
materialises every score. Products run in the inputs' dtype; softmaxes in fp32, or in fp64 for fp64 inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Stats(NamedTuple):
    """By-products of a loss, one entry a row, without gradient."""

    lse: Tensor
    """log-sum-exp over the row's candidates, fp32 (fp64 for fp64 inputs)."""
    positive_logit: Tensor
    """The positive's logit; log-sum-exp over the positives where there are several. Dtype as lse."""
    rank: Tensor
    """How many candidates score above the best positive, int64: 0 is a hit at 1. -1 for an ignored row."""
    top1: Tensor
    """Best candidate, int64; M + k for private negative k. -1 for an ignored row."""


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    short = norm <= 1e-12  # which a norm of NaN is not
    return torch.where(short, 0.0, x / torch.where(short, 1.0, norm))


def _softmax_xent(z: Tensor, positive: Tensor, label_smoothing: float) -> Tensor:
    """-log sum of p over each row's positives, smoothed by the mean of -log p over its candidates (z > -inf)."""
    log_p, candidate = z.log_softmax(1), z > -torch.inf
    loss = -log_p.masked_fill(~positive, -torch.inf).logsumexp(1)
    if label_smoothing:
        uniform = -log_p.masked_fill(~candidate, 0.0).sum(1) / candidate.sum(1)
        loss = (1 - label_smoothing) * loss + label_smoothing * uniform
    return loss


def _stats(z: Tensor, positive: Tensor) -> Stats:
    z_positive = z.detach().masked_fill(~positive, -torch.inf)
    rank = (z > z_positive.amax(1, keepdim=True)).sum(1)
    return Stats(z.detach().logsumexp(1), z_positive.logsumexp(1), rank, z.argmax(1))


def _reduce(loss: Tensor, count: int | Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else loss.sum() / (count if reduction == "mean" else 1)


def info_nce(
    query: Tensor,  # (N, D)
    keys: Tensor,  # (M, D)
    positive: Tensor | None = None,  # (N,)
    *,
    scale: float | Tensor = 1.0,
    normalize: bool = False,
    symmetric: bool = False,
    query_ids: Tensor | None = None,  # (N,)
    key_ids: Tensor | None = None,  # (M,)
    positive_ids: Tensor | None = None,  # (N, P)
    duplicates: str = "mask",
    private_negatives: Tensor | None = None,  # (N, K, D)
    margin: float | None = None,
    query_negatives: bool = False,
    key_negatives: bool = False,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """See `cosup_fast.functional.info_nce`."""
    n, m = len(query), len(keys)
    if positive is None and positive_ids is None:
        positive = torch.arange(n, device=query.device)
    if normalize:
        query, keys = unit(query), unit(keys)
        private_negatives = None if private_negatives is None else unit(private_negatives)

    is_positive = dropped = torch.zeros(n, m, dtype=torch.bool, device=query.device)
    if positive is not None:
        is_positive = torch.arange(m, device=query.device) == positive[:, None]
    if key_ids is not None:
        if positive_ids is not None:
            is_positive = is_positive | (key_ids[None, :, None] == positive_ids[:, None, :]).any(2)
        if query_ids is None and positive is not None:
            query_ids = key_ids[positive]
        if query_ids is not None:
            same = key_ids == query_ids[:, None]
            if duplicates == "positive":
                is_positive = is_positive | same
            elif duplicates == "mask":
                dropped = same & ~is_positive
        dropped = dropped | (key_ids < 0)
        is_positive = is_positive & ~dropped

    z = _wide(query @ keys.T) * scale  # (N, M)
    limit = None
    if margin is not None and positive is not None:
        own = (_wide(query) * _wide(keys[positive])).sum(1, keepdim=True)
        limit = ((own - margin) * scale).detach()
        dropped = dropped | ((z > limit) & ~is_positive)
    z = z.masked_fill(dropped, -torch.inf)
    z_row, row_positive = z, is_positive
    if private_negatives is not None:
        private = torch.einsum("nd,nkd->nk", query, private_negatives)
        z_private = _wide(private) * scale
        if limit is not None:
            z_private = z_private.masked_fill(z_private > limit, -torch.inf)
        z_row = torch.cat([z, z_private], 1)
        row_positive = F.pad(is_positive, (0, private.shape[1]))
    stats = _stats(z_row, row_positive)
    if positive is not None and (query_negatives or key_negatives):
        ids = torch.arange(m, device=keys.device) if key_ids is None else key_ids
        answers = ids[positive] if query_ids is None else query_ids
        blocks = []
        if query_negatives:
            blocks.append((_wide(query @ query.T) * scale, answers))
        if key_negatives:
            blocks.append((_wide(keys[positive] @ keys.T) * scale, ids))
        for z_block, block_ids in blocks:
            no_candidate = (block_ids == answers[:, None]) | (block_ids < 0)
            if limit is not None:
                no_candidate = no_candidate | (z_block > limit)
            z_row = torch.cat([z_row, z_block.masked_fill(no_candidate, -torch.inf)], 1)
            row_positive = F.pad(row_positive, (0, z_block.shape[1]))
        stats = stats._replace(lse=z_row.detach().logsumexp(1))
    loss = _softmax_xent(z_row, row_positive, label_smoothing)
    if symmetric:
        loss = (loss + _softmax_xent(z.T[positive], is_positive.T[positive], label_smoothing)) / 2
    loss = _reduce(loss, max(n, 1), reduction)
    return (loss, stats) if return_stats else loss


def linear_cross_entropy(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (T,)
    *,
    bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    scale: float | Tensor = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """See `cosup_fast.functional.linear_cross_entropy`."""
    z = _wide(hidden @ weight.T) * scale  # (T, V)
    if bias is not None:
        z = z + bias
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    supervised = target != ignore_index
    target = target.masked_fill(~supervised, 0)
    loss = F.cross_entropy(z, target, reduction="none")
    if label_smoothing:  # torch's own is infinite where a token is not a candidate, of bias -inf
        loss = _softmax_xent(z, F.one_hot(target, len(weight)).bool(), label_smoothing)
    if z_loss:
        loss = loss + z_loss * z.logsumexp(1).square()
    loss = _reduce(loss.masked_fill(~supervised, 0.0), supervised.sum().clamp(min=1), reduction)
    if not return_stats:
        return loss
    stats = _stats(z, F.one_hot(target, len(weight)).bool())
    return loss, Stats(
        *(s.masked_fill(~supervised, 0.0 if s.is_floating_point() else -1) for s in stats)  # pyright: ignore
    )


def gather_last_hidden(
    hidden: Tensor,  # (..., D)
    rows: Tensor,  # (R,)
    *,
    norm_weight: Tensor | None = None,  # (D,)
    eps: float = 1e-6,
    normalize: bool = False,
) -> Tensor:  # (R, D)
    """See `cosup_fast.functional.gather_last_hidden`."""
    y = _wide(hidden.flatten(0, -2)[rows])
    if norm_weight is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * norm_weight
    return (unit(y) if normalize else y).to(hidden.dtype)
