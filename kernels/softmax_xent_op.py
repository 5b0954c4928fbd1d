"""The loss of linear scores as autograd and torch.compile see it: values, gradients, fake tensors, errors.

In eager mode an `autograd.Function`, under torch.compile and for tensors without memory an operator of torch.library:
the same computation, of which the Function starts in a tenth of the time.

A scalar reduction forms the gradients in the forward pass and saves them; backward multiplies them by what comes from
above. reduction="none" learns the rows' weights in backward: it keeps the statistics and computes the scores again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from . import dispatch
from .last_hidden import accumulator, unit, unit_backward
from .scores import Chunk, Gradients, Needs, Scores, Softmax, Statistics, no_rows
from .softmax_xent import Merge, column_gradient, gradient, statistics, statistics_and_gradient
from .softmax_xent_torch import operand_dtype

ALIGNMENT = 16
"""Elements: what Triton takes a multiple of for a reason to read several at once."""
FORWARD_MODE = "this loss has no forward-mode derivative; pass impl='reference', which has one"
ONCE = "this loss is differentiated once; pass impl='reference' for second derivatives"
VMAP = "this loss cannot be vmapped over its operands; loop over them, or pass impl='reference'"


class Call(NamedTuple):
    """A loss and all that it is asked: the arguments of the operator, by name and in its order.

    For fields of the scores see `Scores`.
    """

    x: Tensor  # (N, D), N > 0 in one process
    w: Tensor  # (M, D)
    scale: Tensor | None = None  # instead of fixed_scale
    bias: Tensor | None = None
    private: Tensor | None = None
    target: Tensor | None = None
    query_ids: Tensor | None = None
    key_ids: Tensor | None = None
    positive_ids: Tensor | None = None
    fixed_scale: float = 1.0
    normalize: bool = False
    product_dtype: torch.dtype = torch.float32  # what x, w and private are rounded to before they are multiplied
    reduction: str = "mean"
    ranks: bool = False  # also return lse, positive logit, rank and top-1 of each row
    duplicates_are_positive: bool = False
    symmetric: bool = False
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ignoring: bool = False  # a negative target means a row without loss
    checked: bool = False  # targets are known to be rows of w
    impl: str = "auto"
    needs: Sequence[bool] = (False,) * 5  # which operands want a gradient

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return self[: len(Needs._fields)]

    @property
    def at_once(self) -> bool:
        """Whether the weights of the rows are known in the forward pass."""
        return self.reduction != "none"

    @classmethod
    def schema(cls) -> str:
        """The arguments of an operator, for torch.library."""
        return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(cls).items())


_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    bool: "bool",
    torch.dtype: "ScalarType",
    str: "str",
    Sequence[bool]: "bool[]",
}


class ByRow(NamedTuple):
    """Statistics of each row, without gradient."""

    lse: Tensor | None = None
    positive_logit: Tensor | None = None
    rank: Tensor | None = None
    top1: Tensor | None = None


class Results(NamedTuple):
    """What the operator returns: one list of tensors in this order, empty ones where there is None."""

    loss: Tensor
    by_row: ByRow
    grads: Gradients
    rows: Softmax  # what backward needs where it computes the scores again
    columns: Softmax

    def flat(self) -> list[Tensor]:
        tensors = [self.loss, *self.by_row, *self.grads, *self.rows, *self.columns]
        return [self.loss.new_empty(0, dtype=torch.float32) if t is None else t for t in tensors]

    @classmethod
    def of(cls, flat: Sequence[Tensor]) -> Results:
        loss, *rest = flat
        parts = []
        for kind in (ByRow, Gradients, Softmax, Softmax):
            parts.append(kind._make(rest[: len(kind._fields)]))
            rest = rest[len(kind._fields) :]
        return cls(loss, *parts)


_NOTHING = Softmax(*[None] * len(Softmax._fields))  # pyright: ignore[reportArgumentType]


class Pool:
    """Where keys come from and where their gradients go: here they are those of one process.

    `cosup_fast.distributed.Pool` shares those of several.
    """

    merge: Merge | None = None
    """Completes the statistics of columns."""

    def needs(self, needs: Needs) -> Needs:
        """What this process has to compute, given what its own operands want."""
        return needs

    def wanted(self, needs: Needs) -> bool:
        """Whether anybody wants a gradient."""
        return any(needs)

    def gather(self, keys: Tensor) -> Tensor:
        """All keys (M, D), given this process's."""
        return keys

    def sizes(self, n: int, m: int) -> tuple[int, int]:
        """Queries and keys of all, given those of this process."""
        return n, m

    def sum(self, h: Tensor) -> Tensor:
        """Weights of columns, summed over all."""
        return h

    def give(self, dw: Tensor) -> Tensor:
        """The gradient of this process's keys, given that of all keys from this process's queries."""
        return dw


LOCAL = Pool()


class Problem:
    """The scores of a call, the loss by row, and the way back from gradients of operands to those of inputs."""

    def __init__(self, call: Call, pool: Pool = LOCAL):
        self.call, self.pool = call, pool
        self.needs = pool.needs(Needs(*call.needs))
        self.wanted = pool.wanted(self.needs)
        self.wide = accumulator(call.product_dtype)
        self.units: dict[str, tuple[Tensor, Tensor]] = {}
        x, w, target = call.x, call.w, call.target
        self.queries, keys = pool.sizes(len(x), len(w))
        self.aligned = call.impl in dispatch.KERNELS or x.is_cuda
        self.operand_dtype = operand_dtype(call.product_dtype, x.device, self.queries * keys * x.shape[1])
        if self.aligned:
            self.operand_dtype = call.product_dtype
        self.supervised = self.void = None
        if call.ignoring and target is not None:
            self.supervised = target >= 0
        if target is not None and not call.checked:
            inside = target.clamp(0, keys - 1)
            void = inside != target if self.supervised is None else self.supervised & (inside != target)
            if os.environ.get("COSUP_CHECK_TARGETS") == "1":
                torch._assert_async(~void.any(), f"a target is none of the rows 0..{keys - 1} of the candidates")
            # The columns of a symmetric loss do not know what their positives are.
            self.void, target = void.any().expand_as(void) if call.symmetric else void, inside
        elif self.supervised is not None and target is not None:
            target = target.clamp(min=0)
        self.scores = Scores(
            self._enter("x", x).to(self.operand_dtype),
            pool.gather(self._enter("w", w)).to(self.operand_dtype),
            call.fixed_scale if call.scale is None else call.scale.to(self.wide),
            None if call.bias is None else call.bias.to(self.wide),
            None if call.private is None else self._enter("private", call.private).to(self.operand_dtype),
            target,
            call.query_ids,
            call.key_ids,
            call.positive_ids,
            call.duplicates_are_positive,
            call.symmetric,
            call.softcap,
            call.label_smoothing,
            call.z_loss,
        )

    def _enter(self, name: str, t: Tensor) -> Tensor:
        """An operand as it travels: normalised if asked, rounded to the product's dtype.

        A CPU that multiplies no half precision itself takes what is rounded in fp32, and unit vectors whole. A GPU gets
        rows that begin at multiples of 32 bytes, padded with zeros.
        """
        dtype = self.call.product_dtype
        if self.call.normalize:
            if t.dtype == dtype:
                dtype = self.operand_dtype
            t, _ = self.units[name] = unit(t.to(self.wide))
        t = t.to(dtype)
        return _aligned(t) if self.aligned else t

    def run(self) -> tuple[Statistics, Gradients | None]:
        """The statistics and, where the weights of the rows are known and anybody asks, the gradients."""
        if self.call.at_once and self.wanted:
            g, h = self.upstream(self.weights())
            if not len(self.scores.x):
                return self._no_rows(), self._no_gradient()
            stats, grads = statistics_and_gradient(
                self.scores, g, self.needs, h=h, ranks=self.call.ranks, kind=self.kind(), merge=self.pool.merge,
                wide=self._wide_gradients,
            )  # fmt: skip
            return stats, grads
        if not len(self.scores.x):
            return self._no_rows(), None
        stats = statistics(self.scores, ranks=self.call.ranks, kind=self.kind())
        return self._merged(stats), None

    def gradient(self, stats: Statistics, g: Tensor) -> Gradients:
        """The gradients of losses that are weighted by g (N,)."""
        g, h = self.upstream(g)
        if not len(self.scores.x):
            return self._no_gradient()
        return gradient(self.scores, stats, g, self.needs, h=h, kind=self.kind(), wide=self._wide_gradients)

    @property
    def _wide_gradients(self) -> bool:
        """Whether something is done to gradients before they are rounded."""
        return bool(self.units) or self.pool is not LOCAL

    def kind(self) -> type[Chunk]:
        gradients = self.needs.x + bool(self.needs.w)
        return dispatch.kind(self.call.impl, self.scores, self.call.ranks, self.call.at_once, gradients)

    def _merged(self, stats: Statistics) -> Statistics:
        if stats.columns is None or self.pool.merge is None:
            return stats
        return stats._replace(columns=self.pool.merge(stats.columns))

    def _no_rows(self) -> Statistics:
        return self._merged(no_rows(self.scores))

    def _no_gradient(self) -> Gradients:
        """Of a process without queries, whose keys others may well score."""
        s, w = self.scores, self.needs.w
        operands = s.x, s.w[w] if isinstance(w, slice) else s.w, s.scale, s.bias, s.private
        zeros = (
            torch.zeros_like(t, dtype=self.wide) if need and isinstance(t, Tensor) else None
            for t, need in zip(operands, self.needs)
        )
        return Gradients(*zeros)

    def loss(self, stats: Statistics) -> Tensor:
        s = self.scores
        loss = stats.rows.loss(s.label_smoothing, s.z_loss)
        if stats.columns is not None and s.target is not None:
            loss = (loss + stats.columns.at(s.target).loss(s.label_smoothing)) / 2
        if self.supervised is not None:
            loss = loss.where(self.supervised, 0.0)
        loss = self._spoilt(loss)
        if self.call.reduction == "none":
            return loss
        if self.call.reduction == "mean":
            whole = self.supervised is None and self.queries == loss.shape[0] > 0
            return loss.mean() if whole else loss.sum() / self.count()
        return loss.sum()

    def by_row(self, stats: Statistics) -> ByRow:
        if not self.call.ranks:
            return ByRow()
        return ByRow(stats.rows.lse, self._spoilt(stats.rows.positive_logit), stats.rank, stats.top1)

    def _spoilt(self, t: Tensor) -> Tensor:
        """t (N,) with NaN where the target is no candidate at all."""
        return t if self.void is None else t.masked_fill(self.void, torch.nan)

    def weights(self) -> Tensor:
        """What each row weighs in the reduced loss."""
        n = len(self.scores.x)
        if self.call.reduction == "mean" and self.supervised is None:
            return self.scores.x.new_full((n,), 1 / self.count(), dtype=self.wide)
        ones = self.scores.x.new_ones(n, dtype=self.wide)
        return ones / self.count() if self.call.reduction == "mean" else ones

    def upstream(self, g: Tensor) -> tuple[Tensor, Tensor | None]:
        """g and h of a sum of losses weighted by g (N,)."""
        if self.supervised is not None:
            g = g.where(self.supervised, 0.0)
        g = self._spoilt(g)
        if not self.scores.symmetric:
            return g, None
        return g / 2, self.pool.sum(column_gradient(self.scores, g / 2))

    def count(self) -> Any:
        return max(1, self.queries) if self.supervised is None else self.supervised.sum().clamp(min=1)

    def leave(self, found: Gradients) -> list[Tensor | None]:
        """Gradients of the inputs, in their dtypes; fp16 cannot hold one whose loss scale is still to come."""
        if found.w is not None:
            found = found._replace(w=self.pool.give(found.w))
        grads = []
        for name, g, t in zip(Gradients._fields, found, self.call.operands):
            if g is None or t is None:
                grads.append(None)
                continue
            if g.shape != t.shape:
                g = g[..., : t.shape[-1]].contiguous()
            if name in self.units:
                g = unit_backward(g.to(self.wide), *self.units[name])
            grads.append(g.to(_kept(t.dtype)))
        return grads


def _aligned(t: Tensor) -> Tensor:
    """t, or a copy padded with zeros to a width, and to rows that begin at, multiples of `ALIGNMENT` elements.

    Products of GPUs read 16 bytes at a time: padding costs one copy of an operand here, and every tile of it there.
    """
    strides = (*t.stride()[:-1], t.shape[-1])
    if t.stride(-1) == 1 and all(stride % ALIGNMENT == 0 for stride in strides) and t.data_ptr() % 16 == 0:
        return t
    return torch.nn.functional.pad(t, (0, -t.shape[-1] % ALIGNMENT)).contiguous()


def _kept(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a gradient is kept in until backward."""
    return torch.float32 if dtype == torch.float16 else dtype


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Turns autocast off, and costs nothing where it is off."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


class _Loss(torch.autograd.Function):
    """A call in eager mode."""

    @staticmethod
    def forward(ctx: Any, call: Call, pool: Pool, *operands: Tensor | None) -> tuple[Tensor, ...]:
        with _no_autocast(call.x):
            problem = Problem(call, pool)
            stats, found = problem.run()
            grads = None if found is None else problem.leave(found)
            loss, by_row = problem.loss(stats), problem.by_row(stats) if call.ranks else ()
        ctx.set_materialize_grads(False)
        ctx.dtypes = [None if t is None else t.dtype for t in operands]
        ctx.later = None
        if grads is not None:
            ctx.save_for_backward(*grads)
        elif problem.wanted:
            s = problem.scores
            ctx.later = problem, stats
            operands = (s.x, s.w, s.scale, s.bias, s.private)
            ctx.save_for_backward(*(t for t in operands if isinstance(t, Tensor)))
        ctx.mark_non_differentiable(*by_row)
        return (loss, *by_row)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore
        if g is None:
            return (None,) * (2 + len(ctx.dtypes))
        saved = ctx.saved_tensors  # raises where an operand was changed in place
        with torch.no_grad(), _no_autocast(g):
            if ctx.later is None:
                grads = _times(saved, g, mine=not _graph_is_kept())
            else:
                problem, stats = ctx.later
                grads = problem.leave(problem.gradient(stats, g))
            needs = ctx.needs_input_grad[2:]
            grads = [
                t.to(dtype) if need and t is not None else None for t, dtype, need in zip(grads, ctx.dtypes, needs)
            ]
        return None, None, *once(g, grads)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(FORWARD_MODE)


class _TransformedLoss(torch.autograd.Function):
    """A call under a transform of torch.func: what backward needs is returned, as those ask."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(_run(Call._make(args)).flat())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # pyright: ignore
        ctx.mark_non_differentiable(*output[1:])
        _setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return _differentiate(ctx, upstream)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(FORWARD_MODE)

    @staticmethod
    def vmap(*_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError(VMAP)


def _run(call: Call) -> Results:
    with _no_autocast(call.x):
        problem = Problem(call)
        stats, found = problem.run()
        rows = columns = _NOTHING
        if found is None and problem.wanted:
            # Clones: an operator's results may not share memory.
            rows, columns = (
                _NOTHING if kept is None else Softmax(*(None if t is None else t.clone() for t in kept))  # pyright: ignore
                for kept in (stats.rows, stats.columns)
            )
        grads = Gradients(*[None] * 5) if found is None else Gradients(*problem.leave(found))
        by_row = ByRow(*(None if t is None else t.clone() for t in problem.by_row(stats)))
        return Results(problem.loss(stats), by_row, grads, rows, columns)


@torch.library.custom_op("cosup_fast::softmax_xent", mutates_args=(), schema=f"({Call.schema()}) -> Tensor[]")
def _forward(*args: Any) -> list[Tensor]:
    return _run(Call._make(args)).flat()


@_forward.register_fake
def _(*args: Any) -> list[Tensor]:
    call = Call._make(args)
    n, m, wide = call.x.shape[0], call.w.shape[0], accumulator(call.product_dtype)

    def make(shape: tuple[int, ...], dtype: torch.dtype = wide) -> Tensor:
        return call.x.new_empty(shape, dtype=dtype)

    def softmax(size: int) -> Softmax:
        smoothing = [make((size,)), make((size,), torch.int64)] if call.label_smoothing else [None, None]
        return Softmax(*(make((size,)) for _ in range(4)), *smoothing)

    again = not call.at_once and any(call.needs)
    index = torch.int64
    by_row = ByRow(make((n,)), make((n,)), make((n,), index), make((n,), index)) if call.ranks else ByRow()
    grads = (
        make(tuple(t.shape), _kept(t.dtype)) if need and call.at_once and t is not None else None
        for t, need in zip(call.operands, call.needs)
    )
    return Results(
        make(() if call.at_once else (n,)),
        by_row,
        Gradients(*grads),
        softmax(n) if again else _NOTHING,
        softmax(m) if again and call.symmetric else _NOTHING,
    ).flat()


@torch.library.custom_op(
    "cosup_fast::softmax_xent_backward", mutates_args=(), schema=f"(Tensor g, Tensor[] stats, {Call.schema()}) -> Tensor[]"
)
def _backward(g: Tensor, stats: list[Tensor], *args: Any) -> list[Tensor]:
    call = Call._make(args)
    with _no_autocast(call.x):
        problem = Problem(call)
        kept = [t if t.numel() else None for t in stats]
        half = len(Softmax._fields)
        rows, columns = Softmax(*kept[:half]), None if kept[half] is None else Softmax(*kept[half:])  # pyright: ignore
        grads = problem.leave(problem.gradient(Statistics(rows, columns), g))
        return [
            g.new_empty(0) if d is None or t is None else d.to(t.dtype) for d, t in zip(grads, call.operands)
        ]


@_backward.register_fake
def _(g: Tensor, stats: list[Tensor], *args: Any) -> list[Tensor]:
    call = Call._make(args)
    return [
        t.new_empty(t.shape) if t is not None and need else g.new_empty(0)
        for t, need in zip(call.operands, call.needs)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    ctx.set_materialize_grads(False)  # or zeros are written as gradients of the gradients
    call, results = Call._make(inputs), Results.of(output)
    tensors = [t for t in call if isinstance(t, Tensor)]
    ctx.call = Call._make(None if isinstance(t, Tensor) else t for t in call)
    ctx.given = [isinstance(t, Tensor) for t in call]
    ctx.dtypes = [None if t is None else t.dtype for t in call.operands]
    if call.at_once:
        ctx.save_for_backward(*results.grads)
    else:
        ctx.save_for_backward(*results.rows, *results.columns, *tensors)


def _differentiate(ctx: Any, upstream: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    g, needs = upstream[0], ctx.call.needs
    if g is None:
        return (None,) * len(Call._fields)
    saved = ctx.saved_tensors
    with torch.no_grad():
        if ctx.call.at_once:
            grads = [t * g if need else t for t, need in zip(saved, needs)]
        else:
            count = 2 * len(Softmax._fields)
            tensors = iter(saved[count:])
            call = (next(tensors) if given else value for value, given in zip(ctx.call, ctx.given))
            grads = _backward(g, list(saved[:count]), *call)
        grads = [t.to(dtype) if need else None for t, dtype, need in zip(grads, ctx.dtypes, needs)]
    return *once(g, grads), *(None,) * (len(Call._fields) - len(grads))


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _times(saved: Sequence[Tensor | None], g: Tensor, mine: bool) -> list[Tensor | None]:
    """Gradients times an upstream scalar: in place if they are `mine` alone, and not at all where it is seen to be 1."""
    if mine:
        return list(saved) if _is_one(g) else [None if t is None else t.mul_(g) for t in saved]
    return [None if t is None else t * g for t in saved]


def _is_one(g: Tensor) -> bool:
    """Whether a scalar is 1, where looking costs nothing."""
    return g.device.type == "cpu" and g.item() == 1


def _graph_is_kept() -> bool:
    """Whether this backward pass may be run again, which then needs what was saved."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


def once(g: Tensor, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The gradients under an upstream g, which raise where they are differentiated.

    Without a node of theirs what create_graph=True makes of them would be a constant, and its gradient 0 unnoticed.
    """
    return _Once.apply(g.detach().requires_grad_(), *grads) if torch.is_grad_enabled() else grads  # pyright: ignore


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(anchor: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return tuple(None if t is None else t.view_as(t) for t in grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # pyright: ignore
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError(ONCE)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(ONCE)


_TRACING = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


def _has_values(x: Tensor) -> bool:
    """Whether x is what it seems: nothing is being compiled or traced, and x has memory."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta:
        return False
    return all(torch._C._get_dispatch_mode(key) is None for key in _TRACING)


def softmax_xent(x: Tensor, w: Tensor, *, scale: float | Tensor = 1.0, pool: Pool = LOCAL, **options: Any) -> tuple[Tensor, ...]:
    """The loss, by row or reduced, and with `ranks` by row (lse, positive logit, rank, top-1).

    `options` are further fields of `Call`, without `needs`; product_dtype is by default that of x.
    """
    options.setdefault("product_dtype", x.dtype)
    if isinstance(scale, Tensor):
        options["scale"] = scale
    else:
        options["fixed_scale"] = float(scale)
    call = Call(x, w, **options)
    if torch.is_grad_enabled():
        call = call._replace(needs=[t is not None and t.requires_grad for t in call.operands])
    if not _has_values(x):
        loss, *by_row = _forward(*call)[: 1 + len(ByRow._fields)]
        return (loss, *(t.detach() for t in by_row)) if call.ranks else (loss,)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return _TransformedLoss.apply(*call)[: 1 + len(ByRow._fields) if call.ranks else 1]  # pyright: ignore
    return _Loss.apply(call, pool, *call.operands)  # pyright: ignore[reportReturnType]
