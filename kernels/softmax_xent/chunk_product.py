"""Scores that only the tiles of their product hold, on a GPU: kept as exponentials, or multiplied again."""

# triton.cdiv is typed as if it returned a constexpr.
# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..tuning import Configuration, choose, target_of
from . import configurations as shipped
from . import kernels_product as product_kernels
from . import kernels_rows as row_kernels
from .chunk_triton import Partials, TritonChunk
from .scores import Scores, Softmax, Statistics

if TYPE_CHECKING:
    from .engine import Sums

DESCRIPTORS = (*shipped.DESCRIPTORS, "interpreter")
INTERPRETER_PROGRAMS = 3
"""Programs of a persistent kernel in Triton's interpreter; a GPU has those of `programs`."""


class _ProductChunk(TritonChunk):
    """Scores that only tiles of a product hold."""

    multiplies = True
    levelled = False
    """Whether exponentials are above their rows' positives, and so need no tile's maximum to become a gradient."""

    @classmethod
    def unsupported(cls, scores: Scores, ranks: bool) -> str | None:
        if ranks and scores.several_positives:
            return "ranks one positive, and rows have several"
        return super().unsupported(scores, ranks)

    @classmethod
    def _tile(cls, scores: Scores) -> tuple[int, int]:
        options = {name for name, on in (("SEVERAL", scores.several_positives), ("columns", scores.symmetric)) if on}
        options |= {"SMOOTHING"} if scores.label_smoothing else set()
        options |= {"key_ids"} if scores.key_ids is not None else set()
        options |= {"out"} if issubclass(cls, FusedChunk) else set()
        ours, _ = shipped.product_tiles(product_kernels.scores_fwd_kernel, scores.x.dtype, options)
        config = ours[target_of(scores.x.device)]
        return config.constexprs["BM"], shipped.part_width(config)

    def _configuration(self, kernel: Any, extra: set[str], launch: Callable[[Configuration], Any]) -> Configuration:
        """Of a kernel with the options of this loss and `extra`."""
        given = {**self.scoring, **self.masks, "SMOOTHING": self.smooth, "columns": self.s.symmetric}
        options = {name for name, value in given.items() if value is not None and value is not False} | extra
        ours, candidates = shipped.product_tiles(kernel, self.x.dtype, options)
        name = "-".join([kernel.fn.__name__, *sorted(options - {"P", "scale", "target"})])
        sizes = self.n, self.m, self.x.shape[1]
        return choose(name, self.x.dtype, sizes, ours, candidates, launch, self.x.device)

    def _product(self, kernel: Any, configuration: Configuration, out: Tensor | None, **arguments: Any) -> None:
        """Runs a persistent kernel over the tiles of x w', whose result, if any is stored, is `out` (n, M)."""
        x, w, tile = self.x, self.w, configuration.constexprs
        strides = {"stride_x": x.stride(0), "stride_w": w.stride(0), "stride_out": 0 if out is None else out.stride(0)}
        tma = self._described(out)
        if tma:
            x, w = _descriptor(x, tile["BM"], tile["BK"]), _descriptor(w, tile["BN"], tile["BK"])
            out = None if out is None else _descriptor(out, tile["BM"], tile["BN"] // tile["PARTS"])
        tiles = triton.cdiv(self.n, tile["BM"]) * triton.cdiv(self.m, tile["BN"])
        self.launch(
            kernel, min(tiles, configuration.programs * programs(self.x.device)), configuration,
            x=x, w=w, out=out, D=self.x.shape[1], **strides, TMA=tma, PRECISION=_precision(), SMOOTHING=self.smooth,
            **self.shape, **self.scoring, **self.masks, **arguments,
        )  # fmt: skip

    def _score(self, *, store: bool, ranks: bool) -> Partials:
        extra = {name for name, on in (("out", store), ("ranks", ranks), ("LEVEL", store and self.levelled)) if on}
        configuration = self._configuration(
            product_kernels.scores_fwd_kernel, extra, lambda c: self._score_with(c, store, ranks)
        )
        return self._score_with(configuration, store, ranks)

    def _score_with(self, configuration: Configuration, store: bool, ranks: bool) -> Partials:
        level = store and self.levelled
        reference = self._positives(configuration) if ranks or level else None
        made = self._partials(configuration, ranks=ranks, store=store, level=reference if level else None)
        self._product(
            product_kernels.scores_fwd_kernel, configuration, made.out, rows=made.rows, columns=made.columns,
            positive=made.positive, ranks=made.ranks, tops=made.tops, reference=reference, LEVEL=level,
        )  # fmt: skip
        return made

    def _positives(self, configuration: Configuration) -> Tensor:
        """The logits of the rows' targets, as a score product of this configuration sums them."""
        out, tile = self._empty(self.n), configuration.constexprs
        config = replace(configuration, constexprs={name: tile[name] for name in ("BM", "BN", "BK")})
        self.launch(
            product_kernels.positives_fwd_kernel, triton.cdiv(self.n, min(tile["BM"], tile["BN"])), config,
            x=self.x, w=self.w, out=out, D=self.x.shape[1], stride_x=self.x.stride(0), stride_w=self.w.stride(0),
            target=self.masks["target"], TRANSPOSED=self._described(), PRECISION=_precision(), **self.shape,
            **self.scoring,
        )  # fmt: skip
        return out

    def _described(self, *more: Tensor | None) -> bool:
        """Whether products load, and store `more`, through tensor descriptors."""
        return self.target in DESCRIPTORS and all(_describable(t) for t in (self.x, self.w, *more) if t is not None)


class FusedChunk(_ProductChunk):
    """Exponentials of the scores, made in their product's epilogue and held for the gradient.

    A kernel turns them into it, in place. With one positive a row they need not be turned: above the positive's logit,
    which stands for the maximum, E_ij = exp(z_ij - z_iy) is dz but for a weight of the row and the positive's entry.

        dx_i = r_i sum_j E_ij w_j      dw_j = sum_i E_ij (r_i x_i)      r_i = g_i exp(z_iy - lse_i)

    That moves 4 bytes a score less in bf16, and 18 more an element of x; so the shape decides.
    """

    partials: Partials | None = None

    def __init__(self, scores: Scores):
        super().__init__(scores)
        self.levelled = self.levels(scores)

    @classmethod
    def levels(cls, scores: Scores) -> bool:
        """Whether exponentials are above their rows' positives: where that is exact, and moves less."""
        s, size = scores, scores.x.dtype.itemsize
        others = s.several_positives or s.symmetric or s.private is not None or s.label_smoothing or s.z_loss
        return not others and s.x.dtype != torch.float16 and 2 * size > cls._row_traffic(s)

    @classmethod
    def _row_traffic(cls, scores: Scores) -> float:
        """Bytes for each score of what weights of rows take.

        Weighted x is written and read, dx weighted in fp32, and the positives' logits take both operands of a row, and
        products of as many columns as a tile has, which count as one more.
        """
        return (5 * scores.x.dtype.itemsize + 8) * scores.x.shape[1] / max(1, len(scores.w))

    @classmethod
    def traffic(cls, scores: Scores, again: float, gradients: int) -> float:
        size, turned = scores.x.dtype.itemsize, 2 * scores.x.dtype.itemsize
        if cls.levels(scores):
            turned = cls._row_traffic(scores)
        return size * (1 + again) + (turned + size * gradients if gradients else 0)

    @classmethod
    def peaks(cls, scores: Scores, rows: int, again: bool) -> tuple[int, int]:
        (n, d), m, size = scores.x.shape, len(scores.w), scores.x.dtype.itemsize
        held = size * rows * m
        weighing = 0
        if cls.levels(scores):  # dx of a single chunk comes before there is a dw
            weighing = max((4 * rows * d if size < 4 else 0) - (size * m * d if rows == n else 0), size * rows * d)
        return held + cls._partial_bytes(scores, rows), held + weighing

    @classmethod
    def held_bytes(cls, scores: Scores, rows: int) -> int:
        return scores.x.dtype.itemsize * rows * len(scores.w) + cls._partial_bytes(scores, rows)

    @classmethod
    def unsupported(cls, scores: Scores, ranks: bool) -> str | None:
        if scores.softcap is not None:
            return "holds exponentials, which do not tell the derivative of a softcap"
        if scores.limit is not None and scores.label_smoothing:
            return "holds exponentials, which do not tell label smoothing what a margin left out"
        if scores.symmetric and scores.several_positives:
            return "holds exponentials above a tile's rows, and columns have several positives"
        if scores.symmetric and scores.x.dtype == torch.float16:
            return "holds exponentials above a tile's rows, too narrow in fp16 for the columns of a symmetric loss"
        return super().unsupported(scores, ranks)

    def statistics(self, *, ranks: bool) -> Statistics:
        self._check(ranks=ranks)
        self.partials = self._score(store=True, ranks=ranks)
        return self._summary(self.partials)

    def accumulate(self, stats: Statistics, g: Tensor, h: Tensor | None, sums: Sums) -> None:
        if not self.levelled:
            super().accumulate(stats, g, h, sums)
            return
        held = self.partials or self._score(store=True, ranks=False)
        self.partials, e, weights = None, held.out, self._empty(self.n)
        assert e is not None
        config = shipped.levelled_rows(self.target, held.width)
        self.launch(
            row_kernels.levelled_bwd_kernel, triton.cdiv(self.n, config.constexprs["BM"]), config,
            e=e, stride_e=e.stride(0), parts=held.rows, rows=self._weights(stats.rows, g, 0.0), reference=held.level,
            target=self.masks["target"], out=weights, **self.shape,
        )  # fmt: skip
        del held  # partials have been read
        sums.add(e[:, : self.m], weights)

    def logit_gradient(self, rows: Softmax, columns: Softmax | None, g: Tensor, h: Tensor | None) -> Tensor:
        held = self.partials or self._score(store=True, ranks=False)
        self.partials, e = None, held.out
        assert e is not None
        weights = self._both_weights(rows, columns, g, h)
        config = shipped.stored_tiles(self.target, held.width)
        tiles = triton.cdiv(self.n, config.constexprs["BM"]) * triton.cdiv(self.m, held.width)
        self.launch(
            row_kernels.stored_bwd_logits_kernel, tiles, config,
            e=e, stride_e=e.stride(0), parts=held.rows, bias=self.scoring["bias"], SMOOTHING=self.smooth, **weights,
            **self.shape, **{name: mask for name, mask in self.masks.items() if name != "limit"},
        )  # fmt: skip
        if weights["columns"] is not None:
            kernel = product_kernels.scores_bwd_logits_kernel
            configuration = self._configuration(kernel, {"out", "again"}, lambda c: self._mend(c, held, weights))
            self._mend(configuration, held, weights)
        return e[:, : self.m]

    def _mend(self, configuration: Configuration, held: Partials, weights: dict[str, Tensor | None]) -> None:
        """Multiplies those tiles again whose exponentials are too small for their columns."""
        tile = configuration.constexprs
        tiles = triton.cdiv(self.n, tile["BM"]) * triton.cdiv(self.m, tile["BN"])
        again = self._empty(tiles, dtype=torch.int32)
        config = Configuration(
            {"BM": tile["BM"], "BN": tile["BN"], "HEIGHT": held.height, "WIDTH": held.width}, num_warps=4
        )
        self.launch(
            row_kernels.underflow_bwd_kernel, tiles, config, rows=held.rows, columns=held.columns,
            weights=weights["columns"], again=again, F=held.rows.shape[1], **self.shape,
        )  # fmt: skip
        self._product(product_kernels.scores_bwd_logits_kernel, configuration, held.out, again=again, **weights)


class RecomputedChunk(_ProductChunk):
    """Scores that are multiplied once for their statistics and once more for their gradient."""

    holds = False

    @classmethod
    def traffic(cls, scores: Scores, again: float, gradients: int) -> float:
        return scores.x.dtype.itemsize * (1 + gradients if gradients else 0)

    @classmethod
    def peaks(cls, scores: Scores, rows: int, again: bool) -> tuple[int, int]:
        held = scores.x.dtype.itemsize * rows * len(scores.w)
        return max(held, cls._partial_bytes(scores, rows)), held

    def statistics(self, *, ranks: bool) -> Statistics:
        self._check(ranks=ranks)
        return self._summary(self._score(store=False, ranks=ranks))

    def logit_gradient(self, rows: Softmax, columns: Softmax | None, g: Tensor, h: Tensor | None) -> Tensor:
        out, kernel = self._matrix(self.x.dtype), product_kernels.scores_bwd_logits_kernel
        weights = self._both_weights(rows, columns, g, h)
        weights["again"] = None
        configuration = self._configuration(kernel, {"out"}, lambda c: self._product(kernel, c, out, **weights))
        self._product(kernel, configuration, out, **weights)
        return out[:, : self.m]


def _describable(t: Tensor) -> bool:
    """Whether a tensor descriptor can hold a matrix: its rows start at multiples of 16 bytes."""
    return t.data_ptr() % 16 == 0 and t.stride(0) > 0 and t.stride(0) * t.itemsize % 16 == 0


def _descriptor(t: Tensor, rows: int, columns: int) -> Any:
    return TensorDescriptor(t, list(t.shape), [t.stride(0), 1], [rows, columns])


def programs(device: torch.device) -> int:
    """How many programs a persistent kernel has, if a multiprocessor runs one at a time."""
    if device.type != "cuda":
        return INTERPRETER_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _precision() -> str:
    """How fp32 operands multiply, as torch's own switch has it now."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
