"""Attention of a pack's short sequences on a CPU: one padded batch, two products with a softmax between them.

    S = scale Q K', soft-capped c tanh(S / c)    P = softmax(S + mask)    O = P V
    dV = P' dO    dS = P (dO V' - rowsum(dO V' P)) (1 - (S / c)^2)    dQ = scale dS K    dK = scale dS' Q

Sequences of similar length form a bucket, padded to its longest. The query heads that share a key head are rows of one
product: nothing is repeated, and the product itself sums dK and dV over them. One gather of (token, head) rows makes
the batch, another takes it apart. P is kept for the backward pass, L numbers per token and head, which is why only
short sequences come here.

torch's own CPU kernel keeps no P, but its backward pass in bf16 takes 8 to 15 times as long on sequences of 50 to 100.

Shapes: B sequences of a bucket, L its longest, H query heads in groups of G for each of K key heads, d and d_v head
widths, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST = {torch.bfloat16: 384, torch.float32: 128, torch.float64: 128}
"""Tokens of the longest sequence that is attended to here, by dtype: torch's kernel catches up, or P takes too much."""

SIMILAR = 0.75
"""The shortest sequence of a bucket over the longest: buckets stay few, and less than a quarter of one is padding."""


@dataclass(frozen=True)
class Bucket:
    """B sequences padded to L."""

    sequences: int
    length: int


class PackLayout:
    """Where each (token, head) row goes: from (T, H, d) into buckets of (B, K, G, L, d), and back.

    Args:
        lengths: of the sequences of the pack.
        heads: H.
        key_heads: K.
    """

    def __init__(self, lengths: Sequence[int], heads: int, key_heads: int):
        starts = list(accumulate(lengths, initial=0))
        members: list[list[int]] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if not members or lengths[i] < SIMILAR * lengths[members[-1][0]]:
                members.append([])
            members[-1].append(i)
        self.buckets = [Bucket(len(m), lengths[m[0]]) for m in members]
        self.heads, self.key_heads = heads, key_heads
        self._masks: dict[Any, Tensor] = {}
        head, key_head = torch.arange(heads).view(key_heads, -1, 1), torch.arange(key_heads)[:, None]
        rows, key_rows, real, real_keys = [], [], [], []
        for m, bucket in zip(members, self.buckets, strict=True):
            start, length = (torch.tensor([x[i] for i in m]).view(-1, 1, 1) for x in (starts, lengths))
            place = torch.arange(bucket.length)
            inside = place < length  # (B, 1, L)
            # Padding repeats the first token of its sequence, which every query sees anyway.
            token = start + place * inside
            rows.append((token[:, None] * heads + head).flatten())
            key_rows.append((token * key_heads + key_head).flatten())
            real.append(inside[:, None].expand(-1, *head.shape[:2], -1).flatten())
            real_keys.append(inside.expand(-1, key_heads, -1).flatten())
        self.rows, self.back, self.padding = _places(rows, real)
        self.key_rows, self.key_back, _ = _places(key_rows, real_keys)

    def split(self, rows: Tensor, *, keys: bool = False) -> list[Tensor]:
        """The gathered rows (., d) of each bucket as (B K, G L, d), those of keys as (B K, L, d)."""
        group = 1 if keys else self.heads // self.key_heads
        shapes = [(b.sequences * self.key_heads, group * b.length) for b in self.buckets]
        parts = rows.split([n * m for n, m in shapes])
        return [part.view(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]

    def mask(self, bucket: Bucket, window: int | None, dtype: torch.dtype) -> Tensor:
        """What is added to the scores (G L, L) of a key head: 0 where a query sees a key, -inf elsewhere."""
        n = bucket.length
        window = None if window is None or window >= n else window
        if (key := (n, window, dtype)) not in self._masks:
            seen = torch.ones(n, n, dtype=torch.bool).tril()
            if window is not None:
                seen = seen.triu(1 - window)
            mask = torch.zeros(n, n, dtype=dtype).masked_fill_(~seen, -torch.inf)
            self._masks[key] = mask.repeat(self.heads // self.key_heads, 1)
        return self._masks[key]


def batched_attention(
    query: Tensor,  # (T, H, d)
    key: Tensor,  # (T, K, d)
    value: Tensor,  # (T, K, d_v)
    layout: PackLayout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:  # (T, H, d_v)
    """Causal attention inside each sequence of a pack.

    Args:
        query, key, value: of all tokens of the pack, of one dtype.
        layout: of the pack and these numbers of heads.
        scale: of the scores.
        window: how many tokens a query sees, itself included; all before it by default.
        softcap: c; none by default.
    """
    return _BatchedAttention.apply(query, key, value, layout, scale, window, softcap)  # pyright: ignore


class _BatchedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, *options: Any) -> Tensor:
        scale, window, softcap = options
        gathered = _gather(query, layout.rows), _gather(key, layout.key_rows), _gather(value, layout.key_rows)
        out, kept = [], []
        for bucket, q, k, v in zip(layout.buckets, *_buckets(layout, gathered), strict=True):
            mask = layout.mask(bucket, window, q.dtype)
            if softcap is None:
                scores = torch.baddbmm(mask, q, k.mT, alpha=scale)
            else:
                capped = torch.bmm(q, k.mT).mul(scale / softcap).tanh_()
                kept.append(capped)
                scores = capped * softcap + mask
            weights = torch.softmax(scores, dim=-1)
            kept.append(weights)
            out.append(torch.bmm(weights, v))
        ctx.layout, ctx.scale, ctx.softcap, ctx.shapes = layout, scale, softcap, (query.shape, key.shape, value.shape)
        ctx.save_for_backward(*gathered, *kept)
        return _joined(out, layout.back).view(*query.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        saved = ctx.saved_tensors  # read once: recomputation hands each out a single time
        gathered, kept = saved[:3], iter(saved[3:])
        layout, scale = ctx.layout, ctx.scale
        upstream = layout.split(_gather(gradient, layout.rows).index_fill_(0, layout.padding, 0))
        d_query, d_key, d_value = [], [], []
        for g, q, k, v in zip(upstream, *_buckets(layout, gathered), strict=True):
            capped = None if ctx.softcap is None else next(kept)
            weights = next(kept)
            d_value.append(torch.bmm(weights.mT, g))
            d_weights = torch.bmm(g, v.mT)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            if capped is not None:
                d_scores *= 1 - capped * capped
            d_query.append(torch.bmm(d_scores, k))
            d_key.append(torch.bmm(d_scores.mT, q))
        d_query = _joined(d_query, layout.back).mul_(scale)
        d_key, d_value = _joined(d_key, layout.key_back).mul_(scale), _joined(d_value, layout.key_back)
        found = (x.view(shape) for x, shape in zip((d_query, d_key, d_value), ctx.shapes, strict=True))
        return *found, None, None, None, None


def _buckets(layout: PackLayout, gathered: Sequence[Tensor]) -> list[list[Tensor]]:
    """The gathered rows of queries, keys and values, bucket by bucket."""
    return [layout.split(x, keys=i > 0) for i, x in enumerate(gathered)]


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """The rows of (T, H, d) seen as (T H, d)."""
    return x.reshape(-1, x.shape[-1]).index_select(0, rows)


def _joined(parts: list[Tensor], back: Tensor) -> Tensor:
    """The rows of all buckets in the order of the pack, without padding."""
    rows = [part.view(-1, part.shape[-1]) for part in parts]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).index_select(0, back)


def _places(rows: list[Tensor], real: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Which row comes to each place of the buckets, at which place each row is, and which places are padding."""
    row, is_real = torch.cat(rows), torch.cat(real)
    place = torch.arange(len(row))
    back = torch.empty(int(row.max()) + 1, dtype=torch.int64)
    back[row[is_real]] = place[is_real]
    return row, back, place[~is_real]
