"""Scores in fp32 by torch's own product, read by row kernels: any loss and ranks, on a GPU."""

# triton.cdiv is typed as if it returned a constexpr.
# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..tuning import Configuration
from . import configurations as shipped
from . import kernels_rows as row_kernels
from .chunk_torch import rounds_late
from .chunk_triton import TritonChunk
from .scores import Scores, Softmax, Statistics


class RowChunk(TritonChunk):
    """Scores in fp32 from a product of torch's, and kernels over tiles of them."""

    products: Tensor | None = None

    @classmethod
    def score_bytes(cls, scores: Scores) -> int:
        size = scores.x.dtype.itemsize
        return 4 if size == 4 else 4 + size

    @classmethod
    def held_bytes(cls, scores: Scores, rows: int) -> int:
        return 4 * rows * len(scores.w)

    @classmethod
    def peaks(cls, scores: Scores, rows: int, again: bool) -> tuple[int, int]:
        count = rows * len(scores.w)
        partials = 0 if again else cls._partial_bytes(scores, rows)
        formed = max(cls.score_bytes(scores) * count, 4 * count + partials)
        return formed, scores.x.dtype.itemsize * count

    @classmethod
    def traffic(cls, scores: Scores, again: float, gradients: int) -> float:
        # Each product is written and read in fp32, and where it becomes a gradient read once more.
        return 8 * (1 + again) + (4 * (1 - again) + scores.x.dtype.itemsize * (1 + gradients) if gradients else 0)

    def _rows(self, kernel: Any, **arguments: Any) -> None:
        a, config = self._multiplied(), self.tiles
        tiles = triton.cdiv(self.n, config.constexprs["BM"]) * triton.cdiv(self.m, config.constexprs["BN"])
        self.launch(
            kernel, tiles, config, a=a, stride_a=a.stride(0), **self.shape, **self.scoring, **self.masks, **arguments
        )  # fmt: skip

    @property
    def tiles(self) -> Configuration:
        return shipped.row_tiles(self.target)

    def _multiplied(self) -> Tensor:
        if self.products is None:
            x, w, matrix = self.x, self.w.t(), self._matrix(torch.float32)
            matrix[:, self.m :] = 0.0
            if rounds_late(x.device) and x.dtype != torch.float32:
                torch.mm(x, w, out_dtype=torch.float32, out=matrix[:, : self.m])
            else:
                torch.mm(x.float(), w.float(), out=matrix[:, : self.m])
            self.products = matrix
        return self.products

    def statistics(self, *, ranks: bool) -> Statistics:
        self._check(ranks=ranks)
        made = self._partials(self.tiles, ranks=ranks)
        self._rows(
            row_kernels.rows_fwd_kernel, rows=made.rows, columns=made.columns, positive=made.positive,
            SMOOTHING=self.smooth,
        )  # fmt: skip
        if made.ranks is None:
            return self._summary(made)
        best = self._summary(made._replace(ranks=None)).rows.pos_max
        self._rows(row_kernels.ranks_fwd_kernel, ranks=made.ranks, reference=best)
        return self._summary(made)

    def logit_gradient(self, rows: Softmax, columns: Softmax | None, g: Tensor, h: Tensor | None) -> Tensor:
        a = self._multiplied()
        out = a if self.x.dtype == a.dtype else self._matrix(self.x.dtype)
        self._rows(
            row_kernels.rows_bwd_logits_kernel, out=out, stride_out=out.stride(0), SMOOTHING=self.smooth,
            **self._both_weights(rows, columns, g, h),
        )  # fmt: skip
        self.products = None
        return out[:, : self.m]
