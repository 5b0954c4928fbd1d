"""What operators with gradients of their own owe torch: computed or traced, and an error where nothing is derived."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_TRACING = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


def has_values(x: Tensor) -> bool:
    """Whether x is what it seems: nothing is being compiled or traced, and x has memory."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta:
        return False
    return all(torch._C._get_dispatch_mode(key) is None for key in _TRACING)


def place(t: Tensor) -> Tensor:
    """An empty tensor where t is in the graph, which keeps no memory of t: what a node hangs on to be passed."""
    return (t[:0] if t.ndim else t.expand(0)).clone()


def once(
    ctx: Any, g: Tensor, grads: Sequence[Tensor | None], message: str, places: Sequence[Tensor] = ()
) -> Sequence[Tensor | None]:
    """The gradients of the node `ctx` under an upstream g, which raise `message` where they are differentiated.

    Without a node of theirs what create_graph=True makes of them would be a constant, and its gradient 0 unnoticed.
    torch passes that node only on its way to what it hangs on: g, operands that are leaves, and others by `place`.
    """
    if not torch.is_grad_enabled():
        return grads
    leaves = [node.variable for node, _ in ctx.next_functions if hasattr(node, "variable")]
    anchors = (g if g.requires_grad else g.detach().requires_grad_(), *leaves, *places)
    return _Once.apply(message, len(anchors), *anchors, *grads)  # pyright: ignore[reportReturnType]


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, message: str, anchors: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.message = message
        return tuple(None if t is None else t.view_as(t) for t in tensors[anchors:])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError(ctx.message)
