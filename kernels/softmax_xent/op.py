"""The loss of linear scores as an operator of torch.library: values, gradients, fake tensors, torch.compile.

A scalar reduction forms the gradients in the forward pass and saves them; backward multiplies them by what comes from
above. reduction="none" learns the rows' weights in backward: it saves the statistics and computes the scores again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..numerics import accumulator, unit, unit_backward
from . import dispatch
from .chunk_torch import operand_dtype
from .engine import column_gradient, gradient, statistics, statistics_and_gradient
from .scores import Chunk, Gradients, Needs, Scores, Softmax, Statistics

OPERANDS = "Tensor x, Tensor w, Tensor? scale, Tensor? bias, Tensor? private"
OPTIONS = """Tensor? target, Tensor? query_ids, Tensor? key_ids, Tensor? positive_ids, float fixed_scale,
    bool normalize, ScalarType product_dtype, str reduction, bool ranks, bool duplicates_are_positive, bool symmetric,
    float? softcap, float label_smoothing, float z_loss, bool ignoring, str impl"""
ALIGNMENT = 16
"""Elements: what Triton takes a multiple of for a reason to read several at once."""
NAMES = ("loss", "lse", "positive_logit", "rank", "top1", *Gradients._fields)
"""What the operator returns, then the statistics of the rows and of the columns; empty where there is none."""


class _Problem:
    """The scores of a call, the loss by row, and the way back from gradients of operands to those of inputs."""

    def __init__(self, operands: tuple[Tensor | None, ...], options: tuple):
        x, w, scale, bias, private = operands
        (
            target, query_ids, key_ids, positive_ids, fixed_scale, self.normalize, self.product_dtype, self.reduction,
            self.ranks, duplicates_are_positive, symmetric, softcap, label_smoothing, z_loss, self.ignoring, impl,
        ) = options  # fmt: skip
        assert x is not None
        assert w is not None
        self.inputs, self.impl = operands, impl
        self.units: dict[str, tuple[Tensor, Tensor]] = {}
        self.aligned = impl in dispatch.KERNELS or x.is_cuda
        self.supervised = None
        if self.ignoring:
            self.supervised, target = target >= 0, target.clamp(min=0)
        wide = accumulator(self.product_dtype)
        self.operand_dtype = operand_dtype(self.product_dtype, x.device, len(x) * len(w) * x.shape[1])
        self.scores = Scores(
            self._enter("x", x),
            self._enter("w", w),
            fixed_scale if scale is None else scale.to(wide),
            None if bias is None else bias.to(wide),
            None if private is None else self._enter("private", private),
            target,
            query_ids,
            key_ids,
            positive_ids,
            duplicates_are_positive,
            symmetric,
            softcap,
            label_smoothing,
            z_loss,
        )

    def _enter(self, name: str, t: Tensor) -> Tensor:
        """The operand of the products: normalised if asked, rounded to the product's dtype.

        A CPU that does not multiply them itself gets the rounded values in fp32; those of full precision, whole.
        A GPU gets rows that begin at multiples of 32 bytes, padded with zeros.
        """
        dtype, product_dtype = t.dtype, self.product_dtype
        wide = accumulator(product_dtype)
        if self.normalize:
            t, _ = self.units[name] = unit(t.to(wide))
        if self.aligned or self.operand_dtype == product_dtype:
            t = t.to(product_dtype)
            return _aligned(t) if self.aligned else t
        return t.to(wide) if dtype == product_dtype else t.to(product_dtype).to(wide)

    def kind(self, gradients: int) -> type[Chunk]:
        at_once = self.reduction != "none"
        return dispatch.plan(self.impl, self.scores, ranks=self.ranks, at_once=at_once, gradients=gradients).kind

    def loss(self, stats: Statistics) -> Tensor:
        s = self.scores
        loss = stats.rows.loss(s.label_smoothing, s.z_loss)
        if stats.columns is not None and s.target is not None:
            loss = (loss + stats.columns.at(s.target).loss(s.label_smoothing)) / 2
        if self.supervised is not None:
            loss = loss.where(self.supervised, 0.0)
        if self.reduction == "none":
            return loss
        return loss.sum() / self.count() if self.reduction == "mean" else loss.sum()

    def weights(self) -> Tensor:
        """What each row weighs in the reduced loss."""
        ones = self.scores.x.new_ones(len(self.scores.x), dtype=accumulator(self.product_dtype))
        return ones / self.count() if self.reduction == "mean" else ones

    def upstream(self, g: Tensor) -> tuple[Tensor, Tensor | None]:
        """g and h of a sum of losses weighted by g (N,)."""
        if self.supervised is not None:
            g = g.where(self.supervised, 0.0)
        return (g / 2, column_gradient(self.scores, g / 2)) if self.scores.symmetric else (g, None)

    def count(self) -> int | Tensor:
        return len(self.scores.x) if self.supervised is None else self.supervised.sum().clamp(min=1)

    def leave(self, grads: Gradients) -> list[Tensor | None]:
        wide, found = accumulator(self.product_dtype), []
        for name, g, t in zip(Gradients._fields, grads, self.inputs):
            if g is not None and t is not None and g.shape != t.shape:
                g = g[..., : t.shape[-1]].contiguous()
            found.append(unit_backward(g.to(wide), *self.units[name]) if g is not None and name in self.units else g)
        return found


def _aligned(t: Tensor) -> Tensor:
    """t, or a copy padded with zeros to a width, and to rows that begin at, multiples of `ALIGNMENT` elements.

    Products of GPUs read 16 bytes at a time: padding costs one copy of an operand here, and every tile of it there.
    """
    strides = (*t.stride()[:-1], t.shape[-1])
    if t.stride(-1) == 1 and all(stride % ALIGNMENT == 0 for stride in strides) and t.data_ptr() % 16 == 0:
        return t
    return torch.nn.functional.pad(t, (0, -t.shape[-1] % ALIGNMENT)).contiguous()


def _kept(dtype: torch.dtype) -> torch.dtype:
    """fp16 cannot hold a gradient whose loss scale is still to come."""
    return torch.float32 if dtype == torch.float16 else dtype


@torch.library.custom_op(
    "cosup_fast::softmax_xent", mutates_args=(), schema=f"({OPERANDS}, {OPTIONS}, bool[] needs) -> Tensor[]"
)
def _forward(*args: Any) -> list[Tensor]:
    *rest, wanted = args
    operands, needs = tuple(rest[:5]), Needs(*wanted)
    x = operands[0]
    with torch.autocast(x.device.type, enabled=False):
        problem = _Problem(operands, tuple(rest[5:]))
        s, none, saved = problem.scores, x.new_empty(0), []
        grads: list[Tensor | None] = [None] * 5
        kind = problem.kind(needs.x + bool(needs.w))
        if problem.reduction != "none" and any(needs):
            g, h = problem.upstream(problem.weights())
            stats, found = statistics_and_gradient(s, g, needs, h=h, ranks=problem.ranks, kind=kind)
            grads = problem.leave(found)
        else:
            stats = statistics(s, ranks=problem.ranks, kind=kind)
            if any(needs):
                # Clones: an operator's results may not share memory.
                saved = [t if t is None else t.clone() for t in (*stats.rows, *(stats.columns or [None] * 6))]
        by_row = (stats.rows.lse, stats.rows.positive_logit, stats.rank, stats.top1) if problem.ranks else [None] * 4
        dtypes = [None if t is None else _kept(t.dtype) for t in operands]
        grads = [None if g is None else g.to(dtype) for g, dtype in zip(grads, dtypes)]
        out = [problem.loss(stats), *by_row, *grads, *(saved or [None] * 12)]
    return [none.new_empty(0) if t is None else t for t in out]


@_forward.register_fake
def _(*args: Any) -> list[Tensor]:
    x, w, *_ = operands = args[:5]
    reduction, ranks, symmetric, label_smoothing = args[12], args[13], args[15], args[17]
    needs = args[-1]
    n, m, wide = x.shape[0], w.shape[0], accumulator(args[11])

    def make(shape: tuple, dtype: torch.dtype = wide) -> Tensor:
        return x.new_empty(shape, dtype=dtype)

    nothing = x.dtype
    loss = make((n,) if reduction == "none" else ())
    index = torch.int64
    by_row = [make((n,)), make((n,)), make((n,), index), make((n,), index)] if ranks else [make((0,), nothing)] * 4
    grads = [
        make(tuple(t.shape), _kept(t.dtype)) if need and reduction != "none" else make((0,), nothing)
        for t, need in zip(operands, needs)
    ]
    saved = []
    for there, size in ((True, n), (symmetric, m)):
        there = there and reduction == "none" and any(needs)
        kinds = [wide] * 4 + ([wide, index] if label_smoothing else [])
        saved += [make((size,), kind) for kind in kinds] if there else []
        saved += [make((0,), nothing) for _ in range(6 - len(kinds) if there else 6)]
    return [loss, *(t.clone() for t in by_row), *grads, *saved]


@torch.library.custom_op(
    "cosup_fast::softmax_xent_backward",
    mutates_args=(),
    schema=f"(Tensor g, Tensor[] stats, {OPERANDS}, {OPTIONS}, bool[] needs) -> Tensor[]",
)
def _backward(g: Tensor, stats: list[Tensor], *args: Any) -> list[Tensor]:
    *rest, wanted = args
    operands = tuple(rest[:5])
    x = operands[0]
    with torch.autocast(x.device.type, enabled=False):
        problem = _Problem(operands, tuple(rest[5:]))
        found = [t if t.numel() else None for t in stats]
        rows, columns = Softmax(*found[:6]), None if found[6] is None else Softmax(*found[6:])  # pyright: ignore
        weights, h = problem.upstream(g)
        needs = Needs(*wanted)
        kind = problem.kind(needs.x + bool(needs.w))
        grads = gradient(problem.scores, Statistics(rows, columns), weights, needs, h=h, kind=kind)
        return [
            x.new_empty(0) if d is None or t is None else d.to(t.dtype) for d, t in zip(problem.leave(grads), operands)
        ]


@_backward.register_fake
def _(g: Tensor, stats: list[Tensor], *args: Any) -> list[Tensor]:
    return [
        t.new_empty(t.shape if need else (0,)) if t is not None else g.new_empty(0)
        for t, need in zip(args[:5], args[-1])
    ]


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)  # or zeros are written as gradients of the gradients
    ctx.needs, ctx.options, ctx.at_once = inputs[-1], inputs[9:-1], inputs[12] != "none"
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:5]]
    if ctx.at_once:
        ctx.save_for_backward(*output[5:10])
    else:
        ctx.save_for_backward(*output[10:], *inputs[:9])


def _differentiate(ctx: Any, upstream: list[Tensor]) -> tuple:
    g = upstream[0]
    if g is None:
        return (None,) * (len(ctx.options) + 10)
    saved = ctx.saved_tensors
    with torch.no_grad():
        if ctx.at_once:
            grads = saved if _is_one(g) else [t * g if need else t for t, need in zip(saved, ctx.needs)]
        else:
            operands = saved[12:17]
            grads = _backward(g, list(saved[:12]), *operands, *saved[17:21], *ctx.options, ctx.needs)
        grads = [t.to(dtype) if need else None for t, dtype, need in zip(grads, ctx.dtypes, ctx.needs)]
    return *once(g, grads), *([None] * (len(ctx.options) + 5))


def once(g: Tensor, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The gradients under an upstream g, which raise where they are differentiated.

    Without a node of theirs what create_graph=True makes of them would be a constant, and its gradient 0 unnoticed.
    """
    return _Once.apply(g.detach().requires_grad_(), *grads) if torch.is_grad_enabled() else grads  # pyright: ignore


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.view_as(t) for t in grads)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError("this loss is differentiated once; pass impl='reference' for second derivatives")


def _is_one(g: Tensor) -> bool:
    """Whether a scalar is 1, where looking costs nothing: `loss.backward()` then copies no gradient."""
    return type(g) is Tensor and g.device.type == "cpu" and not torch.compiler.is_compiling() and g.item() == 1


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def softmax_xent(
    x: Tensor,  # (N, D), N > 0
    w: Tensor,  # (M, D)
    *,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,  # (M,)
    private: Tensor | None = None,  # (N, K, D)
    target: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    positive_ids: Tensor | None = None,
    normalize: bool = False,
    product_dtype: torch.dtype | None = None,
    reduction: str = "mean",
    ranks: bool = False,
    duplicates_are_positive: bool = False,
    symmetric: bool = False,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignoring: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """The loss, by row or reduced, and with `ranks` by row (lse, positive logit, rank, top-1).

    For the fields of the scores see `Scores`. `ignoring`: a negative target means a row without loss. `product_dtype`
    is what x, w and private are rounded to before they are multiplied, by default their own.
    """
    learnt = isinstance(scale, Tensor)
    operands = x, w, scale if learnt else None, bias, private
    needs = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in operands]
    loss, *by_row = _forward(
        *operands, target, query_ids, key_ids, positive_ids, 1.0 if isinstance(scale, Tensor) else float(scale),
        normalize, x.dtype if product_dtype is None else product_dtype, reduction, ranks, duplicates_are_positive,
        symmetric, softcap, float(label_smoothing), float(z_loss), ignoring, impl, needs,
    )  # fmt: skip
    return (loss, *(t.detach() for t in by_row[:4])) if ranks else (loss,)
