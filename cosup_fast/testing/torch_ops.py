"""A dispatch mode that sees every operation torch runs, those inside custom operators too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

CPU_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class TorchOps(TorchDispatchMode):
    """Calls `see(op, args, kwargs, run)`; `run()` executes the operation and returns what it returns.

    Modes are off while an operation runs, so products inside a custom operator would go unseen. Its CPU implementation
    is therefore entered directly, below the dispatcher's Python key, with this mode on again.
    """

    supports_higher_order_operators = True

    def __init__(self, see: Callable[[OpOverload, tuple, dict, Callable[[], Any]], Any]):
        super().__init__()
        self.see = see

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):
            return func(*args, **kwargs)
        if func.overloadpacket not in flop_registry and func is not torch.ops.prim.device.default:
            with self:
                if func.namespace not in ("aten", "prim", "prims") and _on_cpu(args, kwargs):
                    return func.redispatch(CPU_KEY, *args, **kwargs)
                # Inference mode leaves composite operations whole; everywhere else this does nothing.
                if (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return out
        return self.see(func, args, kwargs, lambda: func(*args, **kwargs))


def is_plain(tensor: object) -> bool:
    """A tensor with CPU memory of its own: neither fake nor any other subclass."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"  # pyright: ignore


def _on_cpu(args: tuple, kwargs: dict) -> bool:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    return bool(tensors) and all(map(is_plain, tensors))
