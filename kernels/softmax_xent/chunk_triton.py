"""Logits, statistics and logit gradients by Triton kernels: the scores fused into their product, or of torch's product.

    FusedChunk       the score product writes E = exp(z - its tile's row maximum) in the operands' dtype; an elementwise
                     kernel turns E into the gradient in place. One product, one read and one write of E.
    RecomputedChunk  the product writes statistics alone, and a second product the gradient. Any loss, smallest memory.
    RowChunk         torch multiplies into fp32 scores, row kernels read them. Any loss and ranks.

Each tile of scores leaves partial softmaxes of its rows (and columns), which a small kernel merges: no atomics, and the
same bits on every run. Products accumulate in fp32; fp32 operands multiply in IEEE fp32 unless torch's own switch,
torch.backends.cuda.matmul.fp32_precision, allows TF32.

Legend: n rows of a chunk, M candidates, D width; T tiles along an axis, F fields of a partial, see `logit_tile`.
"""

# triton.cdiv is typed as if it returned a constexpr.
# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launch import launch
from ..tuning import Configuration, choose, target_of
from . import configurations as shipped
from . import kernels_product as product_kernels
from . import kernels_rows as row_kernels
from .chunk_torch import rounds_late
from .scores import Chunk, Scores, Softmax, Statistics

DESCRIPTORS = (*shipped.DESCRIPTORS, "interpreter")
INTERPRETER_PROGRAMS = 3
"""Programs of a persistent kernel in Triton's interpreter; a GPU runs one on each multiprocessor."""


class _Partials(NamedTuple):
    """What a pass over tiles of scores leaves."""

    rows: Tensor  # (T, F, n)
    columns: Tensor | None  # (T, F, M)
    positive: Tensor | None  # (n,) logit of the one positive
    ranks: Tensor | None  # (T, 2, n)
    out: Tensor | None  # (n, M) exponentials
    height: int  # of a tile
    width: int


class _TritonChunk(Chunk):
    """What the three have in common: the arguments of kernels, partials and how they are merged."""

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

    def _partials(self, configuration: Configuration, *, ranks: bool = False, store: bool = False) -> _Partials:
        """Room for those of tiles of this size."""
        tile, fields = configuration.constexprs, 2 + 2 * self.several + 2 * self.smooth
        parts = tile.get("PARTS", 1)
        tiles_m, tiles_n = triton.cdiv(self.n, tile["BM"]), triton.cdiv(self.m, tile["BN"]) * parts
        return _Partials(
            self._empty(tiles_n, fields, self.n),
            self._empty(tiles_m, fields, self.m) if self.s.symmetric else None,
            self._empty(self.n) if self.single else None,
            self._empty(tiles_n, 2, self.n, dtype=torch.int32) if ranks else None,
            self._matrix(self.x.dtype) if store else None,
            tile["BM"],
            tile["BN"] // parts,
        )

    def _launch(self, kernel: Any, grid: int, configuration: Configuration, **arguments: Any) -> None:
        launch(kernel, (grid,), self.x, **arguments, **configuration.kwargs)

    def _merge(self, parts: Tensor, positive: tuple[Tensor, Tensor] | None = None) -> Softmax:
        """The softmaxes of partials (T, F, size), and of one positive its logit and 1."""
        tiles, fields, size = parts.shape
        out, config = self._empty(fields, size), shipped.MERGE
        self._launch(
            row_kernels.merge_fwd_kernel, triton.cdiv(size, config.constexprs["BR"]), config,
            parts=parts, out=out, T=tiles, N=size, SEVERAL=self.several, SMOOTHING=self.smooth,
        )  # fmt: skip
        top, total, *rest = out.unbind(0)
        if self.smooth:
            rest[-1] = rest[-1].long()
        return Softmax(top, total, *(positive or ()), *rest)

    def _summary(self, partials: _Partials) -> Statistics:
        """The statistics that partials sum up to."""
        positive = partials.positive
        rows = self._merge(partials.rows, None if positive is None else (positive, torch.ones_like(positive)))
        columns, found = None, ()
        if partials.columns is not None:
            columns = self._merge(partials.columns, None if self.several else self.s.column_positives(rows))
        if partials.ranks is not None:
            best = partials.rows[:, 0].argmax(0, keepdim=True)
            above, top1 = partials.ranks.unbind(1)
            found = above.sum(0), top1.gather(0, best).squeeze(0).long()
        return Statistics(rows, columns, *found)

    def _weights(self, softmax: Softmax, g: Tensor, z_loss: float) -> Tensor:
        """What a softmax of the given weights contributes to the gradient; see `weights_bwd_kernel`."""
        size, config = len(softmax.max), shipped.WEIGHTS
        out = self._empty(5, size)
        names = ("max", "sum", "pos_max", "pos_sum", "count")
        self._launch(
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


class _ProductChunk(_TritonChunk):
    """Scores that only tiles of a product hold."""

    multiplies = True

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
        options |= {"out"} if cls is FusedChunk else set()
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
        self._launch(
            kernel, min(tiles, _programs(self.x.device)), configuration,
            x=x, w=w, out=out, D=self.x.shape[1], **strides, TMA=tma, PRECISION=_precision(), SMOOTHING=self.smooth,
            **self.shape, **self.scoring, **self.masks, **arguments,
        )  # fmt: skip

    def _score(self, *, store: bool, ranks: bool) -> _Partials:
        extra = {name for name, on in (("out", store), ("ranks", ranks)) if on}
        configuration = self._configuration(
            product_kernels.scores_fwd_kernel, extra, lambda c: self._score_with(c, store, ranks)
        )
        return self._score_with(configuration, store, ranks)

    def _score_with(self, configuration: Configuration, store: bool, ranks: bool) -> _Partials:
        made = self._partials(configuration, ranks=ranks, store=store)
        self._product(
            product_kernels.scores_fwd_kernel, configuration, made.out, rows=made.rows, columns=made.columns,
            positive=made.positive, ranks=made.ranks, reference=self._positives(configuration) if ranks else None,
        )  # fmt: skip
        return made

    def _positives(self, configuration: Configuration) -> Tensor:
        """The logits of the rows' targets, as a score product of this configuration sums them."""
        out, tile = self._empty(self.n), configuration.constexprs
        config = replace(configuration, constexprs={name: tile[name] for name in ("BM", "BN", "BK")})
        self._launch(
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
    """Exponentials of the scores, made in their product's epilogue and held until the gradient takes their place."""

    partials: _Partials | None = None

    @classmethod
    def traffic(cls, scores: Scores, again: float, gradients: int) -> float:
        return scores.x.dtype.itemsize * (1 + again + (2 + gradients if gradients else 0))

    @classmethod
    def peaks(cls, scores: Scores, rows: int, again: bool) -> tuple[int, int]:
        held = scores.x.dtype.itemsize * rows * len(scores.w)
        return held + cls._partial_bytes(scores, rows), held

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

    def logit_gradient(self, rows: Softmax, columns: Softmax | None, g: Tensor, h: Tensor | None) -> Tensor:
        held = self.partials or self._score(store=True, ranks=False)
        self.partials, e = None, held.out
        assert e is not None
        weights = self._both_weights(rows, columns, g, h)
        config = shipped.stored_tiles(self.target, held.width)
        tiles = triton.cdiv(self.n, config.constexprs["BM"]) * triton.cdiv(self.m, held.width)
        self._launch(
            row_kernels.stored_bwd_logits_kernel, tiles, config,
            e=e, stride_e=e.stride(0), parts=held.rows, bias=self.scoring["bias"], SMOOTHING=self.smooth, **weights,
            **self.shape, **{name: mask for name, mask in self.masks.items() if name != "limit"},
        )  # fmt: skip
        if weights["columns"] is not None:
            kernel = product_kernels.scores_bwd_logits_kernel
            configuration = self._configuration(kernel, {"out", "again"}, lambda c: self._mend(c, held, weights))
            self._mend(configuration, held, weights)
        return e[:, : self.m]

    def _mend(self, configuration: Configuration, held: _Partials, weights: dict[str, Tensor | None]) -> None:
        """Multiplies those tiles again whose exponentials are too small for their columns."""
        tile = configuration.constexprs
        tiles = triton.cdiv(self.n, tile["BM"]) * triton.cdiv(self.m, tile["BN"])
        again = self._empty(tiles, dtype=torch.int32)
        config = Configuration(
            {"BM": tile["BM"], "BN": tile["BN"], "HEIGHT": held.height, "WIDTH": held.width}, num_warps=4
        )
        self._launch(
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


class RowChunk(_TritonChunk):
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
        self._launch(
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


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _unit_columns(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _describable(t: Tensor) -> bool:
    """Whether a tensor descriptor can hold a matrix: its rows start at multiples of 16 bytes."""
    return t.data_ptr() % 16 == 0 and t.stride(0) > 0 and t.stride(0) * t.itemsize % 16 == 0


def _descriptor(t: Tensor, rows: int, columns: int) -> Any:
    return TensorDescriptor(t, list(t.shape), [t.stride(0), 1], [rows, columns])


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETER_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _precision() -> str:
    """How fp32 operands multiply, as torch's own switch has it now."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
