"""Logits, statistics and logit gradients in plain torch: library products, elementwise work a cache-full at a time.

The chunk holds raw products <x_i, w_j> in the dtype of the operands and turns them into the gradient in place,
some rows at a time. What is done to such a block is done in fp32 and rounded once. A wide copy of the
chunk is never materialised.

bf16 products of a CPU come rounded to bf16, z~ = z (1 + 2^-9). That is trusted while the best wrong candidate of every
row is in TRUSTED; the positive's logit is a row dot in fp32. From the first row where it is not, the products of the
rest of the chunk get a second term, the rounding error itself: r = bf16(<x_i, w_j> - z~), the sum formed in fp32 inside
the product, so that z~ + r is good to 2^-17; above COMPENSATED the scores (not the gradients) are multiplied in fp32.

Legend: n rows of a chunk, r rows of a block, M candidates.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import workspace
from ..numerics import accumulator, finite, ratio
from .scores import Chunk, Scores, Softmax, Statistics

if TYPE_CHECKING:
    from .engine import Sums

BLOCK_BYTES = 2**23
"""fp32 bytes of a block of rows: the last-level cache holds it with its temporaries, and waking threads for it pays."""
TRUSTED, COMPENSATED = (4.0, 8.0), 512.0
"""Largest |z| beside the positive's for which rounded, and compensated, bf16 products are exact enough: 2^-7 of p.

Between 4 and 8 p is off by up to 2^-6, which is much in a row that one candidate dominates. Exponentials of scores of
mean 0 sum up to M or more, so that a candidate holds at most a quarter of the row where z < log(M / 4).
"""
SMALL = 2**22
"""N M D below which a CPU multiplies bf16 in fp32: exact, and done in a fraction of a millisecond."""


@cache
def multiplies_bf16() -> bool:
    """Whether this CPU multiplies bf16 faster than fp32: AVX-512 BF16, AMX, or Arm's BF16 instructions."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    return torch.backends.mkldnn.is_available() and any(getattr(torch.cpu, name, bool)() for name in names)


def operand_dtype(dtype: torch.dtype, device: torch.device, size: int) -> torch.dtype:
    """What operands of this dtype are multiplied in, for a product of N M D = size: their own, or wider.

    fp32 on a CPU without instructions for their dtype, or where a product is too small for them to matter.
    """
    native = device.type != "cpu" or (dtype == torch.bfloat16 and size >= SMALL and multiplies_bf16())
    return dtype if native else accumulator(dtype)


def rounds_late(device: torch.device) -> bool:
    """Whether products of half precision can be had in the fp32 that they are summed in; meta stands for a GPU."""
    return device.type in ("cuda", "meta")


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, 2-D or batched; of half-precision operands the result is fp32 where the device can, else theirs."""
    wide, late = accumulator(a.dtype), rounds_late(a.device)
    if a.dtype == torch.float16 and not late:
        return a.to(wide) @ b.to(wide)
    if a.dtype == wide or not late:
        return a @ b
    return (torch.mm if a.ndim == 2 else torch.bmm)(a, b, out_dtype=wide)


class TorchChunk(Chunk):
    @classmethod
    def score_bytes(cls, scores: Scores) -> int:
        dtype = scores.x.dtype
        if scores.x.device.type != "cpu":  # no blocks: scores, exponentials, and the masks and copies of the options
            extra = scores.softcap is not None or scores.label_smoothing > 0
            copies = 2 + 2 * extra + 2 * scores.several_positives + scores.symmetric
            wide = accumulator(dtype)
            return copies * wide.itemsize + (dtype.itemsize if dtype != wide else 0)
        return dtype.itemsize if dtype == accumulator(dtype) else 2 * dtype.itemsize

    @classmethod
    def peaks(cls, scores: Scores, rows: int, again: bool) -> tuple[int, int]:
        held = cls.score_bytes(scores) * rows * len(scores.w)
        if scores.x.device.type == "cpu" or not again:
            return held, held
        dtype = scores.x.dtype
        return held, (4 + dtype.itemsize if dtype.itemsize == 2 else dtype.itemsize) * rows * len(scores.w)

    def __init__(self, scores: Scores):
        self.s = s = scores
        self.n, self.m = s.x.shape[0], s.w.shape[0]
        self.wide = accumulator(s.x.dtype)
        self.buffer: Tensor | None = None
        nbytes = self.n * self.m * s.x.dtype.itemsize
        if s.x.device.type == "cpu" and nbytes >= workspace.SMALL:
            self.buffer = workspace.take(nbytes)
            self.z = torch.mm(s.x, s.w.t(), out=workspace.matrix(self.buffer, (self.n, self.m), s.x.dtype))
        else:
            self.z = torch.mm(s.x, s.w.t()) if s.x.device.type == "cpu" else product(s.x, s.w.t())
        self.rounded = self.z.dtype != self.wide
        self.second: tuple[int, Tensor] | None = None  # from this row on, what the product's rounding left out
        self.scratch: dict[str, Tensor] = {}
        self.final = False  # self.z holds logits rather than products

    @classmethod
    def held_bytes(cls, scores: Scores, rows: int) -> int:
        dtype, wide = scores.x.dtype, accumulator(scores.x.dtype)
        one = dtype.itemsize if scores.x.device.type == "cpu" else wide.itemsize
        return one * rows * len(scores.w)

    def hold(self) -> None:
        self.scratch.clear()

    def close(self) -> None:
        if self.buffer is not None:
            workspace.give_back(self.buffer)

    def _blocks(self) -> list[slice]:
        rows = self.n
        if self.z.device.type == "cpu":
            rows = max(1, BLOCK_BYTES // (self.wide.itemsize * max(1, self.m)))
        return [slice(0, self.n)] if rows >= self.n else _slices(self.n, rows)

    def _scratch(self, name: str, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Memory of a block's shape that the blocks share: fresh pages cost as much as what is done to them."""
        if name not in self.scratch or len(self.scratch[name]) < len(like):
            self.scratch[name] = torch.empty_like(like, dtype=dtype or self.wide)
        return self.scratch[name][: len(like)]

    def _products(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """s <x_i, w_j> of a block, wide; and (r, 1) what the product gave the target, where a row dot replaces it."""
        z, s = _part(self.z, rows), self.s
        if not self.rounded:
            return _times(z, s.scale), None
        start, second = self.second or (self.n, z)
        target = None if s.target is None else s.target[rows, None]
        if rows.start < start:
            z = _times(self._scratch("z", z).copy_(z), s.scale)
            own = None if target is None else z.gather(1, target)
            if not self._trusted(z, rows):
                self._refine(rows.start, z)
                return self._products(rows)
        else:
            second = second[rows.start - start : rows.stop - start]
            z = second * s.scale if second.dtype == self.wide else _times(z.to(self.wide).add_(second), s.scale)
            own = None if target is None else z.gather(1, target)
        if target is not None:
            z.scatter_(1, target, self._target_logit(rows))
        return z, own

    def _target_logit(self, rows: slice) -> Tensor:
        s = self.s
        assert s.target is not None
        x = s.x[rows]
        w = torch.index_select(s.w, 0, s.target[rows], out=self._scratch("target", x, x.dtype))
        products = self._scratch("wide x", x).copy_(x).mul_(self._scratch("wide w", x).copy_(w))
        return products.sum(1, keepdim=True).mul_(s.scale)

    def _trusted(self, z: Tensor, rows: slice) -> bool:
        if self.s.target is not None:
            z.scatter_(1, self.s.target[rows, None], -torch.inf)
        top, bound = z.amax(1), min(max(TRUSTED[0], math.log(self.m / 4)), TRUSTED[1])
        return bool(((top.abs() < bound) | (top == -torch.inf)).all())

    def _refine(self, start: int, z: Tensor) -> None:
        """The second term of the products from row `start` on; z holds the first of those rows."""
        x, w = self.s.x[start:], self.s.w.t()
        if bool(finite(z).abs().amax() < COMPENSATED):
            self.second = start, torch.addmm(self.z[start:], x, w, beta=-1)
        else:
            self.second = start, x.to(self.wide) @ w.to(self.wide)

    def _logits(self, rows: slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """z (r, M) of a block, which are positives where a row can have several, and the target's rounded z (r, 1)."""
        s, own = self.s, None
        if self.final:
            z = _part(self.z, rows)
        else:
            z, own = self._products(rows)
            if s.bias is not None:
                z += s.bias
                own = own if own is None or s.target is None else own + s.bias[s.target[rows, None]]
            if s.softcap is not None:
                for scores in (z,) if own is None else (z, own):
                    scores.div_(s.softcap).tanh_().mul_(s.softcap)
        if s.key_ids is None:
            return self._limited(z, None, rows), None, own
        drop, positives = s.key_ids < 0, None
        target = None if s.target is None else s.target[rows, None]
        duplicate = None if s.query_ids is None else s.key_ids == s.query_ids[rows, None]
        if s.several_positives:
            positives = torch.zeros_like(z, dtype=torch.bool)
            if duplicate is not None and s.duplicates_are_positive:
                positives |= duplicate
            if s.positive_ids is not None:
                for ids in s.positive_ids[rows].unbind(1):
                    positives |= s.key_ids == ids[:, None]
            if target is not None:
                positives.scatter_(1, target, True)
        if duplicate is not None and not s.duplicates_are_positive:
            if positives is not None:
                duplicate &= ~positives
            elif target is not None:
                duplicate.scatter_(1, target, False)
            drop = drop | duplicate
        z.masked_fill_(drop, -torch.inf)
        return self._limited(z, positives, rows), positives, own

    def _limited(self, z: Tensor, positives: Tensor | None, rows: slice) -> Tensor:
        """z without the candidates above the rows' limits."""
        s = self.s
        if s.limit is None or self.final:
            return z
        above = z > _part(s.limit, rows).unsqueeze(1)
        if positives is not None:
            above &= ~positives
        elif s.target is not None:
            above.scatter_(1, _part(s.target, rows).unsqueeze(1), False)
        z.masked_fill_(above, -torch.inf)
        if z.device.type == "cpu" and s.alone is not False:
            alone = (z > -torch.inf).sum(1).le(1)
            alone &= above.any(1) if s.alone is True else _part(s.alone, rows)
            if alone.any():
                raise ValueError(
                    f"margin leaves a query no candidate but its positive, of logit {z[alone][0].amax():.4g}; lower "
                    "it, below 0 to leave out only keys that score above the positive"
                )
        return z

    def _ranks(self, z: Tensor, positives: Tensor | None, own: Tensor | None, rows: slice) -> tuple[Tensor, Tensor]:
        """Rank and top1 of a block, by scores of one summation: a copy of the positive does not lie above it."""
        target, exact = None if self.s.target is None else self.s.target[rows, None], None
        if own is not None and target is not None:
            exact = z.gather(1, target)
            z.scatter_(1, target, own.where(exact > -torch.inf, -torch.inf))
        if positives is not None:
            best = z.masked_fill(~positives, -torch.inf).amax(1, keepdim=True)
        else:
            assert target is not None
            best = z.gather(1, target)
        found = (z > best).sum(1), z.argmax(1)
        if exact is not None and target is not None:
            z.scatter_(1, target, exact)
        return found

    def _softmax(self, z: Tensor, dim: int, positive: tuple[Tensor, Tensor], out: Tensor) -> tuple[Softmax, Tensor]:
        """The softmax, as its sums and as probabilities, which may take the place of z."""
        top = z.amax(dim)
        total = count = None
        if self.s.label_smoothing:
            total, count = finite(z).sum(dim), (z > -torch.inf).sum(dim)
        p = torch.softmax(z, dim, out=out)
        total_e = p.amax(dim).reciprocal_()  # the largest is exp(0) over the sum
        s = self.s
        if not (s.key_ids is None and s.bias is None and s.limit is None):  # there may be no candidate
            none = top == -torch.inf
            if z.device.type != "cpu" or none.any():
                p.masked_fill_(none.unsqueeze(dim), 0.0)
                total_e = total_e.masked_fill(none, 0.0)
        return Softmax(top, total_e, *positive, total, count), p

    def _rows(self, z: Tensor, positives: Tensor | None, rows: slice, *, keep: bool = True) -> tuple[Softmax, Tensor]:
        out = self._scratch("p", z) if keep else z
        if positives is not None:
            return self._softmax(z, 1, _positive(z, positives, 1), out)
        assert self.s.target is not None
        logit = z.gather(1, _part(self.s.target, rows).unsqueeze(1)).squeeze(1)
        return self._softmax(z, 1, (logit, torch.ones_like(logit)), out)

    def _columns(self, z: Tensor, positives: Tensor | None, rows: slice, stats: Softmax) -> Softmax:
        positive = self.s.rows(rows).column_positives(stats) if positives is None else _positive(z, positives, 0)
        return self._softmax(z, 0, positive, self._scratch("p", z))[0]

    def statistics(self, *, ranks: bool) -> Statistics:
        parts, columns, rank = [], None, []
        for rows in self._blocks():
            z, positives, own = self._logits(rows)
            part, _ = self._rows(z, positives, rows)
            parts.append(part)
            if ranks:
                rank.append(self._ranks(z, positives, own, rows))
            if self.s.symmetric:
                seen = self._columns(z, positives, rows, part)
                columns = seen if columns is None else columns.merge(seen)
        self.final = not self.rounded
        return Statistics(_join(parts), columns, *(torch.cat(t) for t in zip(*rank)))

    def logit_gradient(self, rows: Softmax, columns: Softmax | None, g: Tensor, h: Tensor | None) -> Tensor:
        out = self._destination()
        for part in self._blocks():
            z, positives, _ = self._logits(part)
            out[part] = self._gradient(z, None, positives, part, rows.at(part), columns, g[part], h)
        return out

    def statistics_and_accumulate(self, g: Tensor, sums: Sums, *, ranks: bool) -> Statistics:
        parts, rank, blocks = [], [], self._blocks()
        out = None if len(blocks) == 1 and self.s.x.dtype == self.wide else self._destination()
        for rows in blocks:
            z, positives, own = self._logits(rows)
            keep = ranks or positives is not None or self.s.label_smoothing > 0 or self.s.softcap is not None
            keep = keep or z.device.type != "cpu"  # nobody promises a softmax in place
            stats, p = self._rows(z, positives, rows, keep=keep)
            parts.append(stats)
            if ranks:
                rank.append(self._ranks(z, positives, own, rows))
            dz = self._gradient(z, p, positives, rows, stats, None, _part(g, rows), None)
            if out is None:
                sums.add(dz)
            else:
                out[rows] = dz
        if out is not None:
            sums.add(out)
        return Statistics(_join(parts), None, *(torch.cat(t) for t in zip(*rank)))

    def _destination(self) -> Tensor:
        return self.z if self.z.dtype == self.s.x.dtype else torch.empty_like(self.z, dtype=self.s.x.dtype)

    def _gradient(
        self,
        z: Tensor,
        p: Tensor | None,
        positives: Tensor | None,
        block: slice,
        rows: Softmax,
        columns: Softmax | None,
        g: Tensor,
        h: Tensor | None,
    ) -> Tensor:
        """s dL/da (r, M), from the probabilities p where they are at hand. p - t is formed in fp32."""
        s, target = self.s, None if self.s.target is None else _part(self.s.target, block)
        share, g = 1 - s.label_smoothing, g if _is_unit(s.scale) else g * s.scale
        weight = g * (1 + 2 * s.z_loss * finite(rows.lse)) if s.z_loss else g
        if p is None:
            p, weight = (z - finite(rows.max)[:, None]).exp_(), ratio(weight, rows.sum)
        dz = p.mul_(weight.unsqueeze(1))
        on_target = g if share == 1 else share * g
        if rows.count is not None:
            dz -= (z > -torch.inf) * (s.label_smoothing * g / rows.count)[:, None]
        if positives is not None:
            t = (z.masked_fill(~positives, -torch.inf) - finite(rows.pos_max)[:, None]).exp_()
            dz -= t.mul_(ratio(on_target, rows.pos_sum)[:, None])
        if columns is not None and h is not None:
            h = h * s.scale
            dz += (z - finite(columns.max)).exp_().mul_(ratio(h, columns.sum))
            h_pos = share * ratio(h, columns.pos_sum)
            if columns.count is not None:
                dz -= (z > -torch.inf) * (s.label_smoothing * ratio(h, columns.count))
            if positives is not None:
                dz -= (z.masked_fill(~positives, -torch.inf) - finite(columns.pos_max)).exp_().mul_(h_pos)
            else:
                on_target = on_target + h_pos[target] * (rows.pos_max - columns.pos_max[target]).exp()
        if positives is None:
            assert target is not None
            dz.scatter_add_(1, target.unsqueeze(1), on_target.neg().unsqueeze(1))
        if s.softcap is not None:
            dz *= 1 - (z / s.softcap).square_()
        return dz


def _slices(n: int, rows: int) -> list[slice]:
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]


def _part(t: Tensor, rows: slice) -> Tensor:
    """t[rows], without a view of its own where that is all of t."""
    return t if rows.stop - rows.start == t.shape[0] else t[rows]


def _times(z: Tensor, scale: float | Tensor) -> Tensor:
    return z if _is_unit(scale) else z.mul_(scale)


def _is_unit(scale: float | Tensor) -> bool:
    return isinstance(scale, float) and scale == 1.0


def _positive(z: Tensor, positives: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    z = z.masked_fill(~positives, -torch.inf)
    top = z.amax(dim, keepdim=True)
    return top.squeeze(dim), (z - finite(top)).exp_().sum(dim)


def _join(parts: list[Softmax]) -> Softmax:
    if len(parts) == 1:
        return parts[0]
    return Softmax(*(None if t[0] is None else torch.cat(t) for t in zip(*parts)))  # pyright: ignore
