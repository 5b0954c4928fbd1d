"""Row gather, RMSNorm and L2 norm of hidden states: the operator, its choice of implementation, and plain torch.

    x_r = hidden[rows_r]      u = x rsqrt(mean(x^2) + eps)      h = u * w      y = h / |h|  (0 where |h| <= TINY)
    dh = (dy - y <y, dy>) / |h|      dw = sum_r dh * u      dx = rsqrt(...) (v - u <u, v> / D),  v = dh * w

`kernels.py` does it on CUDA and HIP devices in fp32, bf16 and fp16, torch elsewhere and in fp64.
Never materialised: the norm of a row that nobody asked for. Kept for backward: the gathered rows and two inverse norms.
Backward writes the dense gradient once; a row gathered twice receives a sum in fixed order, rounded once.

Legend: T rows of hidden states, R gathered rows, D width. Arithmetic is fp32 (fp64 for fp64), rounded once at the end.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from ..autograd import has_values, place
from ..numerics import accumulator, unit, unit_backward

TWICE = "gather_last_hidden cannot be differentiated twice; cosup_fast.reference.gather_last_hidden can"
FORWARD_MODE = "gather_last_hidden has no forward-mode derivative; cosup_fast.reference.gather_last_hidden has one"


def takes_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels serve hidden states of this device and dtype."""
    wanted = device.type == "cuda" and dtype in (torch.float32, torch.bfloat16, torch.float16)
    return wanted and importlib.util.find_spec("triton") is not None


def forward(
    hidden: Tensor, rows: Tensor, norm_weight: Tensor | None, eps: float, normalize: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gather_last_hidden_op` in torch."""
    wide = accumulator(hidden.dtype)
    y = x = hidden[rows]
    inverse_rms = inverse_norm = hidden.new_empty(len(rows), 1, dtype=wide)
    if norm_weight is not None:
        y = y.to(wide)
        inverse_rms = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        y = y * inverse_rms * norm_weight.to(wide)
    if normalize:
        y, inverse_norm = unit(y.to(wide))
    saved = [
        (x, norm_weight is not None or normalize),
        (inverse_rms, norm_weight is not None),
        (inverse_norm, normalize),
    ]
    x, inverse_rms, inverse_norm = (t if save and used else t[:0].clone() for t, used in saved)
    return y.to(hidden.dtype), x, inverse_rms.flatten(), inverse_norm.flatten()


def backward(
    dy: Tensor,
    rows: Tensor,
    norm_weight: Tensor | None,
    x: Tensor,
    inverse_rms: Tensor,
    inverse_norm: Tensor,
    height: int,
    normalize: bool,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """`gather_last_hidden_backward_op` in torch."""
    dtype, wide = dy.dtype, accumulator(dy.dtype)
    g, u, w, rms, inverse = dy.to(wide), x.to(wide), None, inverse_rms[:, None], inverse_norm[:, None]
    dhidden, dw = dy.new_empty(0, dy.shape[1]), dy.new_empty(0)
    if norm_weight is not None:
        u, w, dw = u * rms, norm_weight.to(wide), norm_weight.new_empty(0)
    if normalize:
        g = unit_backward(g, (u if w is None else u * w) * inverse, inverse)
    if norm_weight is not None and need_weight:
        dw = (g * u).sum(0).to(norm_weight.dtype)
    if not need_hidden:
        return dhidden, dw
    if w is not None:
        g = g * w
        g = (g - u * (u * g).mean(-1, keepdim=True)) * rms
    # Rows that are the same share the first of their places in sorted order: summed there, each is rounded once.
    # Accumulating index_put sorts its indices, so the sums are the same on every run.
    place = torch.searchsorted(torch.sort(rows).values, rows)
    sums = torch.zeros_like(g).index_put_((place,), g, accumulate=True).to(dtype)
    return dy.new_zeros(height, dy.shape[1]).index_put_((rows,), sums[place]), dw


@torch.library.custom_op("cosup_fast::gather_last_hidden", mutates_args=())
def gather_last_hidden_op(
    hidden: Tensor,  # (T, D)
    rows: Tensor,  # (R,) int64
    norm_weight: Tensor | None,  # (D,)
    eps: float,
    normalize: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (R, D), and if `save` what backward needs: x (R, D), inverse rms (R,), inverse norm (R,), else empty."""
    return _implementation(hidden).forward(hidden, rows, norm_weight, eps, normalize, save)


@gather_last_hidden_op.register_fake
def _(hidden, rows, norm_weight, eps, normalize, save):
    R, norm, wide = rows.shape[0], norm_weight is not None, accumulator(hidden.dtype)
    return (
        hidden.new_empty(R, hidden.shape[1]),
        hidden.new_empty(R if save and (norm or normalize) else 0, hidden.shape[1]),
        hidden.new_empty(R if save and norm else 0, dtype=wide),
        hidden.new_empty(R if save and normalize else 0, dtype=wide),
    )


@torch.library.custom_op("cosup_fast::gather_last_hidden_backward", mutates_args=())
def gather_last_hidden_backward_op(
    dy: Tensor,  # (R, D)
    rows: Tensor,  # (R,) int64
    norm_weight: Tensor | None,  # (D,)
    x: Tensor,  # (R, D), as saved; so are the inverses
    inverse_rms: Tensor,  # (R,)
    inverse_norm: Tensor,  # (R,)
    height: int,  # T
    normalize: bool,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The dense gradient of hidden (T, D) and that of norm_weight (D,), empty where not needed."""
    return _implementation(dy).backward(
        dy, rows, norm_weight, x, inverse_rms, inverse_norm, height, normalize, need_hidden, need_weight
    )


@gather_last_hidden_backward_op.register_fake
def _(dy, rows, norm_weight, x, inverse_rms, inverse_norm, height, normalize, need_hidden, need_weight):
    like = dy if norm_weight is None else norm_weight
    weight = norm_weight is not None and need_weight
    return dy.new_empty(height if need_hidden else 0, dy.shape[1]), like.new_empty(dy.shape[1] if weight else 0)


def _implementation(t: Tensor) -> Any:
    name = "kernels" if takes_triton(t.device, t.dtype) else "op"
    return importlib.import_module(f"{__package__}.{name}")


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, rows, norm_weight, _, ctx.normalize, _, *places = inputs
    ctx.height = hidden.shape[0]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(rows, norm_weight, *output[1:], *places)


def _backward(ctx: Any, dy: Tensor | None, gradient: Any = gather_last_hidden_backward_op) -> tuple:
    dhidden = dw = None
    need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    saved = ctx.saved_tensors
    if dy is not None:
        dhidden, dw = gradient(dy, *saved[:5], ctx.height, ctx.normalize, need_hidden, need_weight, *saved[5:])
    rest = ctx.needs_input_grad[3:]
    return dhidden if need_hidden else None, None, dw if need_weight else None, *(None for _ in rest)


gather_last_hidden_op.register_autograd(lambda ctx, dy, *_: _backward(ctx, dy), setup_context=_setup_context)


def _twice(ctx: Any, *grads: Tensor) -> tuple:
    raise RuntimeError(TWICE)


gather_last_hidden_backward_op.register_autograd(_twice)


class _Transformed(torch.autograd.Function):
    """What torch.func maps over a batch call by call, and has no forward-mode derivative."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple, *args: Any) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        batches = [
            [arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims)]
            for i in range(info.batch_size)
        ]
        outputs = [torch.stack(t) for t in zip(*(cls.apply(*batch) for batch in batches))]  # pyright: ignore
        return tuple(outputs), (0,) * len(outputs)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(FORWARD_MODE)


class _Gather(_Transformed):
    """A call in eager mode, where torch.func transforms it; an operator of torch.library it does not."""

    @staticmethod
    def forward(hidden: Tensor, *args: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _implementation(hidden).forward(hidden, *args[:-1])

    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _backward(ctx, dy, _Gradient.apply)


class _Gradient(_Transformed):
    """Its gradients. They depend on hidden states that were saved as results: `place` says so to torch."""

    @staticmethod
    def forward(dy: Tensor, *args: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _implementation(dy).backward(dy, *args[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:  # pyright: ignore
        pass

    backward = staticmethod(_twice)  # pyright: ignore[reportAssignmentType]


def gather_last_hidden(
    hidden: Tensor,  # (T, D)
    rows: Tensor,  # (R,) int64
    norm_weight: Tensor | None = None,  # (D,)
    eps: float = 1e-6,
    normalize: bool = False,
) -> Tensor:  # (R, D)
    trained = hidden.requires_grad or (norm_weight is not None and norm_weight.requires_grad)
    save = trained and torch.is_grad_enabled()
    arguments = hidden, rows, norm_weight, eps, normalize, save
    if not has_values(hidden):
        return gather_last_hidden_op(*arguments)[0]
    return _Gather.apply(*arguments, place(hidden) if save else None)[0]  # pyright: ignore[reportReturnType]


def last_rows(cu_seqlens: Tensor) -> Tensor:
    """Where packed sequences end: cu_seqlens[1:] - 1 (S,) int64 of cu_seqlens (S + 1,), without a synchronisation.

    Raises:
        ValueError: cu_seqlens is not a vector of integers; on CPU also one that starts above 0, or an empty sequence
            (elsewhere an empty sequence gets the row before it).
    """
    if cu_seqlens.ndim != 1 or not len(cu_seqlens) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}; "
            "pass the int32 or int64 vector of one more boundaries than sequences"
        )
    readable = type(cu_seqlens) is Tensor and cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable:
        if cu_seqlens[0] != 0:
            raise ValueError(f"cu_seqlens starts with {int(cu_seqlens[0])}; the first sequence starts at 0")
        empty = (cu_seqlens.diff() <= 0).nonzero()
        if len(empty):
            i = int(empty[0])
            raise ValueError(
                f"cu_seqlens[{i}:{i + 2}] is {cu_seqlens[i : i + 2].tolist()}, a sequence of no rows; leave it out"
            )
    return cu_seqlens[1:].long() - 1
