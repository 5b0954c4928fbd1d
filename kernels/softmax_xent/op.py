"""The loss of linear scores as autograd and torch.compile see it: values, gradients, fake tensors, errors.

In eager mode an `autograd.Function`, under torch.compile and for tensors without memory an operator of torch.library:
the same computation, of which the Function starts in a tenth of the time.

A scalar reduction forms the gradients in the forward pass and saves them; backward multiplies them by what comes from
above. reduction="none" learns the rows' weights in backward: it keeps the statistics and computes the scores again.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..autograd import has_values, once, place
from ..numerics import accumulator, cast
from .call import LOCAL, NOTHING, ByRow, Call, Pool, Results
from .problem import Problem, kept
from .scores import Gradients, Softmax, Statistics

FORWARD_MODE = "this loss has no forward-mode derivative; pass impl='reference', which has one"
ONCE = "this loss is differentiated once; pass impl='reference' for second derivatives"
BATCHED = "this loss has no batched gradients (is_grads_batched, vectorize); loop over them, or pass impl='reference'"
VMAP = "this loss cannot be vmapped over its operands; loop over them, or pass impl='reference'"


_NOTHING = nullcontext()


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Turns autocast off, and costs nothing where it is off."""
    kind = x.device.type
    known = kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if known and torch.is_autocast_enabled(kind) else _NOTHING


@contextmanager
def _naming_batches() -> Iterator[None]:
    """Upstream gradients that is_grads_batched makes of several are told by what torch cannot do with them."""
    try:
        yield
    except RuntimeError as error:
        if "Batching rule" in str(error) or "vmap" in str(error):
            raise RuntimeError(BATCHED) from error
        raise


class _Loss(torch.autograd.Function):
    """A call in eager mode."""

    @staticmethod
    def forward(ctx: Any, call: Call, pool: Pool, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        operands, places = inputs[: len(call.operands)], inputs[len(call.operands) :]
        with _no_autocast(call.x):
            problem = Problem(call, pool)
            stats, found = problem.run()
            grads = None if found is None else problem.leave(found)
            loss, by_row = problem.loss(stats), problem.by_row(stats) if call.ranks else ()
        ctx.set_materialize_grads(False)
        ctx.dtypes = [None if t is None else t.dtype for t in operands]
        ctx.places, ctx.later = len(places), None
        if grads is not None:
            ctx.save_for_backward(*places, *grads)
        elif problem.wanted:
            ctx.later = problem, stats
            ctx.save_for_backward(*places, *(t for t in vars(problem.scores).values() if isinstance(t, Tensor)))
        ctx.mark_non_differentiable(*by_row)
        return (loss, *by_row)  # pyright: ignore[reportReturnType]

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors  # raises where one was changed in place
        places, saved = saved[: ctx.places], saved[ctx.places :]
        with torch.no_grad(), _no_autocast(g), _naming_batches():
            if ctx.later is None:
                grads = _times(saved, g, mine=not _graph_is_kept())
            else:
                problem, stats = ctx.later
                grads = problem.leave(problem.gradient(stats, g))
            needs = ctx.needs_input_grad[2:]
            grads = [
                cast(t, dtype) if need and t is not None else None for t, dtype, need in zip(grads, ctx.dtypes, needs)
            ]
        return None, None, *once(ctx, g, grads, ONCE, places), *(None for _ in places)

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
        results = Results.of(output)
        ctx.mark_non_differentiable(*results.by_row, *results.rows, *results.columns)
        _setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        if any(t is not None for t in upstream):  # of the gradients that are returned beside the loss
            raise RuntimeError(ONCE)
        return _differentiate(ctx, g, _TransformedGradient.apply)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(FORWARD_MODE)

    @staticmethod
    def vmap(*_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError(VMAP)


class _TransformedGradient(torch.autograd.Function):
    """Its gradients, where the rows' weights come with backward."""

    @staticmethod
    def forward(g: Tensor, count: int, *args: Any) -> tuple[Tensor, ...]:  # pyright: ignore
        return tuple(_gradient(g, args[:count], Call._make(args[count:])))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # pyright: ignore
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError(ONCE)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(ONCE)

    @staticmethod
    def vmap(*_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError(VMAP)


def _run(call: Call) -> Results:
    with _no_autocast(call.x):
        problem = Problem(call)
        stats, found = problem.run()
        rows = columns = NOTHING
        if found is None and problem.wanted:
            # Clones: an operator's results may not share memory.
            rows, columns = (
                NOTHING if kept is None else Softmax(*(None if t is None else t.clone() for t in kept))  # pyright: ignore
                for kept in (stats.rows, stats.columns)
            )
        grads = Gradients(*[None] * 5) if found is None else Gradients(*problem.leave(found))
        by_row = ByRow(*(None if t is None else t.clone() for t in problem.by_row(stats)))
        return Results(problem.loss(stats), by_row, grads, rows, columns)


def _gradient(g: Tensor, stats: Sequence[Tensor], call: Call) -> list[Tensor]:
    """Gradients of the operands, empty where not needed, given the statistics as `Results` holds them."""
    with _no_autocast(call.x):
        problem = Problem(call)
        found = [t if t.numel() else None for t in stats]
        half = len(Softmax._fields)
        rows, columns = Softmax(*found[:half]), None if found[half] is None else Softmax(*found[half:])  # pyright: ignore
        grads = problem.leave(problem.gradient(Statistics(rows, columns), g))
        return [g.new_empty(0) if d is None or t is None else d.to(t.dtype) for d, t in zip(grads, call.operands)]


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
        make(tuple(t.shape), kept(t.dtype)) if need and call.at_once and t is not None else None
        for t, need in zip(call.operands, call.needs)
    )
    return Results(
        make(() if call.at_once else (n,)),
        by_row,
        Gradients(*grads),
        softmax(n) if again else NOTHING,
        softmax(m) if again and call.symmetric else NOTHING,
    ).flat()


@torch.library.custom_op(
    "cosup_fast::softmax_xent_backward",
    mutates_args=(),
    schema=f"(Tensor g, Tensor[] stats, {Call.schema()}) -> Tensor[]",
)
def _backward(g: Tensor, stats: list[Tensor], *args: Any) -> list[Tensor]:
    return _gradient(g, stats, Call._make(args))


@_backward.register_fake
def _(g: Tensor, stats: list[Tensor], *args: Any) -> list[Tensor]:
    call = Call._make(args)
    return [
        t.new_empty(t.shape) if t is not None and need else g.new_empty(0) for t, need in zip(call.operands, call.needs)
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


def _differentiate(ctx: Any, g: Tensor | None, gradient: Any) -> tuple[Tensor | None, ...]:
    """Gradients of a call's arguments; `gradient(g, number of statistics, *statistics, *call)` computes them late."""
    needs = ctx.call.needs
    if g is None:
        return (None,) * len(Call._fields)
    saved = ctx.saved_tensors
    if ctx.call.at_once:
        grads = [t * g if need else t for t, need in zip(saved, needs)]
    else:
        count = 2 * len(Softmax._fields)
        tensors = iter(saved[count:])
        call = (next(tensors) if given else value for value, given in zip(ctx.call, ctx.given))
        grads = gradient(g, count, *saved[:count], *call)
    grads = [t.to(dtype) if need else None for t, dtype, need in zip(grads, ctx.dtypes, needs)]
    return *grads, *(None,) * (len(Call._fields) - len(grads))


def _compiled_backward(ctx: Any, upstream: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    g = upstream[0]
    with torch.no_grad():
        found = _differentiate(ctx, g, lambda g, n, *rest: _backward(g, list(rest[:n]), *rest[n:]))
    count = len(Gradients._fields)
    return found if g is None else (*once(ctx, g, found[:count], ONCE), *found[count:])


_forward.register_autograd(_compiled_backward, setup_context=_setup_context)


def _times(saved: Sequence[Tensor | None], g: Tensor, mine: bool) -> list[Tensor | None]:
    """Gradients times an upstream scalar: in place if `mine` alone, and then without a pass over them where it is 1."""
    if not mine:
        return [None if t is None else t * g for t in saved]
    if _is_one(g):
        return list(saved)
    return [None if t is None else _scale(t, g) for t in saved]


def _scale(t: Tensor, g: Tensor) -> Tensor:
    """t *= g."""
    if g.device.type == "cuda" and _has_triton():
        from ..scaling import scale_

        return scale_(t, g)
    return t.mul_(g)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _is_one(g: Tensor) -> bool:
    """Whether a scalar is 1, where looking costs nothing: a GPU looks for itself, see `scale_`."""
    return g.device.type == "cpu" and g.item() == 1


def _graph_is_kept() -> bool:
    """Whether this backward pass may be run again, which then needs what was saved."""
    ask = getattr(getattr(torch._C, "_autograd", None), "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


def _has_tangents(operands: Sequence[Tensor | None]) -> bool:
    """Whether forward mode differentiates a trace, whose operator would drop the tangents without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in operands)


def softmax_xent(
    x: Tensor, w: Tensor, *, scale: float | Tensor = 1.0, pool: Pool = LOCAL, **options: Any
) -> tuple[Tensor, ...]:
    """The loss, by row or reduced, and with `ranks` by row (lse, positive logit, rank, top-1).

    `options` are further fields of `Call`, without `needs`; product_dtype is by default that of x.
    """
    options.setdefault("product_dtype", x.dtype)
    if isinstance(scale, Tensor):
        options["scale"] = scale
    else:
        options["fixed_scale"] = float(scale)
    if torch.is_grad_enabled():
        operands = x, w, options.get("scale"), options.get("bias"), options.get("private")
        options["needs"] = [t is not None and t.requires_grad for t in operands]
    call = Call(x, w, **options)
    if not has_values(x):
        if _has_tangents(call.operands):
            raise RuntimeError(FORWARD_MODE)
        loss, *by_row = _forward(*call)[: 1 + len(ByRow._fields)]
        return (loss, *(t.detach() for t in by_row)) if call.ranks else (loss,)
    if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return _TransformedLoss.apply(*call)[: 1 + len(ByRow._fields) if call.ranks else 1]  # pyright: ignore
    places = (place(t) for t in call.operands if t is not None and t.grad_fn is not None)
    return _Loss.apply(call, pool, *call.operands, *places)  # pyright: ignore[reportReturnType]
