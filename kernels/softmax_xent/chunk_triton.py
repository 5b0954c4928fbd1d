"""What chunks of Triton kernels have in common: arguments, partial softmaxes of tiles, and how those are merged.

    FusedChunk       (chunk_product.py) the score product writes E = exp(z - its row's positive) in the operands' dtype,
                     and products weigh its rows. Or E = exp(z - its tile's row maximum), and an elementwise kernel
                     turns E into the gradient in place. One product.
    RecomputedChunk  (chunk_product.py) the product writes statistics alone, and a second product the gradient. Any
                     loss, smallest memory.
    RowChunk         (chunk_rows.py) torch multiplies into fp32 scores, row kernels read them. Any loss and ranks.

Each tile of scores leaves partial softmaxes of its rows (and columns), which a small kernel merges: no atomics, and the
same bits on every run. Products accumulate in fp32; fp32 operands multiply in IEEE fp32 unless torch's own switch,
torch.backends.cuda.matmul.fp32_precision, allows TF32.

Legend: n rows of a chunk, M candidates, D width; T tiles along an axis, F fields of a partial, see `tile`.
"""

# triton.cdiv is typed as if it returned a constexpr.
# pyright: reportArgumentType=false

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..launch import launch
from ..tuning import Configuration, target_of
from . import configurations as shipped
from . import kernels_rows as row_kernels
from .scores import Chunk, Scores, Softmax, Statistics


class Partials(NamedTuple):
    """What a pass over tiles of scores leaves."""

    rows: Tensor  # (T, F, n)
    columns: Tensor | None  # (T, F, M)
    positive: Tensor | None  # (n,) logit of the one positive
    ranks: Tensor | None  # (T, 2, n)
    tops: Tensor | None  # (T, n) maxima, where those of `rows` are levels
    level: Tensor | None  # (n,) what exponentials are above, where it is no tile's maximum
    out: Tensor | None  # (n, M) exponentials
    height: int  # of a tile
    width: int


class TritonChunk(Chunk):
    """The arguments of kernels, partials and how they are merged."""

    @classmethod
    def unsupported(cls, scores: Scores, ranks: bool) -> str | None:
        if scores.x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"has no kernels for {scores.x.dtype}"
        return None

    @classmethod
    def prepare(cls, scores: Scores) -> Scores:
        """Ids become int32: their places among the sorted ids of the keys; -1 for padding, -2 for ids of no key."""
        keys = scores.key_ids
        if keys is None or keys.dtype == torch.int32:
            return scores
        known = torch.cat([keys.sort().values, keys.new_full((1,), -1)])

        def places(ids: Tensor | None, none: int) -> Tensor | None:
            if ids is None:
                return None
            place = torch.searchsorted(known[:-1], ids.contiguous())
            return torch.where((known[place] == ids) & (ids >= 0), place, none).int()

        return replace(
            scores,
            key_ids=places(keys, -1),
            query_ids=places(scores.query_ids, -2),
            positive_ids=places(scores.positive_ids, -2),
        )

    @classmethod
    def score_bytes(cls, scores: Scores) -> int:
        return scores.x.dtype.itemsize

    @classmethod
    def _partial_bytes(cls, scores: Scores, rows: int) -> int:
        """Partial softmaxes of the tiles of a chunk."""
        height, width = cls._tile(scores)
        m, fields = len(scores.w), 2 + 2 * scores.several_positives + 2 * (scores.label_smoothing > 0)
        over_rows = triton.cdiv(rows, height) * m if scores.symmetric else 0
        return int(4 * fields * (triton.cdiv(m, width) * rows + over_rows))

    @classmethod
    def _tile(cls, scores: Scores) -> tuple[int, int]:
        """Height and width of the tiles that leave partials, where none have been searched for."""
        config = shipped.row_tiles(target_of(scores.x.device)).constexprs
        return config["BM"], config["BN"]

    def __init__(self, scores: Scores):
        self.s = s = self.prepare(scores)
        self._check(ranks=False)
        self.x, self.w = _unit_columns(s.x), _unit_columns(s.w)
        self.n, self.m = len(s.x), len(s.w)
        self.several, self.smooth = s.several_positives, s.label_smoothing > 0
        self.single = s.target is not None and not self.several
        scale = s.scale.float() if isinstance(s.scale, Tensor) else float(s.scale)
        self.scoring: dict[str, Any] = {"scale": scale, "bias": _contiguous(s.bias), "softcap": s.softcap}
        self.masks: dict[str, Any] = {
            "target": None if s.target is None else _contiguous(s.target.int()),
            "key_ids": _contiguous(s.key_ids),
            "query_ids": _contiguous(s.query_ids),
            "positive_ids": _contiguous(s.positive_ids),
            "limit": _contiguous(s.limit),
            "P": 0 if s.positive_ids is None else s.positive_ids.shape[1],
            "SEVERAL": self.several,
            "DUPLICATES_ARE_POSITIVE": s.query_ids is not None and s.duplicates_are_positive,
        }
        self.target = target_of(self.x.device)
        self.shape: dict[str, Any] = {"N": self.n, "M": self.m}

    def _check(self, *, ranks: bool) -> None:
        if reason := self.unsupported(self.s, ranks):
            raise ValueError(f"{type(self).__name__} {reason}")

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.x.new_empty(shape, dtype=dtype)

    def _matrix(self, dtype: torch.dtype) -> Tensor:
        """An (n, M) matrix whose rows are padded to whole 16s; kernels read and write the padding, see `in_memory`."""
        return self._empty(self.n, -(-self.m // 16) * 16, dtype=dtype)

    def _partials(
        self, configuration: Configuration, *, ranks: bool = False, store: bool = False, level: Tensor | None = None
    ) -> Partials:
        """Room for those of tiles of this size."""
        tile, fields = configuration.constexprs, 2 + 2 * self.several + 2 * self.smooth
        parts = tile.get("PARTS", 1)
        tiles_m, tiles_n = triton.cdiv(self.n, tile["BM"]), triton.cdiv(self.m, tile["BN"]) * parts
        return Partials(
            self._empty(tiles_n, fields, self.n),
            self._empty(tiles_m, fields, self.m) if self.s.symmetric else None,
            self._empty(self.n) if self.single else None,
            self._empty(tiles_n, 2, self.n, dtype=torch.int32) if ranks else None,
            self._empty(tiles_n, self.n) if ranks and level is not None else None,
            level,
            self._matrix(self.x.dtype) if store else None,
            tile["BM"],
            tile["BN"] // parts,
        )

    def launch(self, kernel: Any, grid: int, configuration: Configuration, **arguments: Any) -> None:
        launch(kernel, (grid,), self.x, **arguments, **configuration.kwargs)

    def _merge(self, parts: Tensor, positive: tuple[Tensor, Tensor] | None = None) -> Softmax:
        """The softmaxes of partials (T, F, size), and of one positive its logit and 1."""
        tiles, fields, size = parts.shape
        out, config = self._empty(fields, size), shipped.MERGE
        self.launch(
            row_kernels.merge_fwd_kernel, triton.cdiv(size, config.constexprs["BR"]), config,
            parts=parts, out=out, T=tiles, N=size, SEVERAL=self.several, SMOOTHING=self.smooth,
        )  # fmt: skip
        top, total, *rest = out.unbind(0)
        if self.smooth:
            rest[-1] = rest[-1].long()
        return Softmax(top, total, *(positive or ()), *rest)

    def _summary(self, partials: Partials) -> Statistics:
        """The statistics that partials sum up to."""
        positive = partials.positive
        rows = self._merge(partials.rows, None if positive is None else (positive, torch.ones_like(positive)))
        columns, found = None, ()
        if partials.columns is not None:
            columns = self._merge(partials.columns, None if self.several else self.s.column_positives(rows))
        if partials.ranks is not None:
            tops = partials.rows[:, 0] if partials.tops is None else partials.tops
            best = tops.argmax(0, keepdim=True)
            above, top1 = partials.ranks.unbind(1)
            found = above.sum(0), top1.gather(0, best).squeeze(0).long()
        return Statistics(rows, columns, *found)

    def _weights(self, softmax: Softmax, g: Tensor, z_loss: float) -> Tensor:
        """What a softmax of the given weights contributes to the gradient; see `weights_bwd_kernel`."""
        size, config = len(softmax.max), shipped.WEIGHTS
        out = self._empty(5, size)
        names = ("max", "sum", "pos_max", "pos_sum", "count")
        self.launch(
            row_kernels.weights_bwd_kernel, triton.cdiv(size, config.constexprs["BR"]), config,
            **{name: _contiguous(getattr(softmax, name)) for name in names if name != "count" or self.smooth},
            **({} if self.smooth else {"count": None}),
            g=_contiguous(g), scale=self.scoring["scale"], out=out, N=size,
            smoothing=self.s.label_smoothing if self.smooth else None, z_loss=z_loss or None,
        )  # fmt: skip
        return out

    def _both_weights(
        self, rows: Softmax, columns: Softmax | None, g: Tensor, h: Tensor | None
    ) -> dict[str, Tensor | None]:
        return {
            "rows": self._weights(rows, g, self.s.z_loss),
            "columns": None if columns is None or h is None else self._weights(columns, h, 0.0),
        }


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _unit_columns(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()
