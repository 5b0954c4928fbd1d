"""A dispatch mode that sees every operation torch runs, those inside custom operators too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

KEYS = {"cpu": torch._C.DispatchKey.CPU, "cuda": torch._C.DispatchKey.CUDA}
PLAIN = (torch.Tensor, torch.nn.Parameter)


class TorchOps(TorchDispatchMode):
    """Calls `see(op, args, kwargs, run)`; `run()` executes the operation and returns what it returns.

    Modes are off while an operation runs, so products inside a custom operator would go unseen. Its implementation for
    the device is therefore entered directly, below the dispatcher's Python key, with this mode on again.
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
                if func.namespace not in ("aten", "prim", "prims") and (device := _device(args, kwargs)):
                    return func.redispatch(torch._C.DispatchKeySet(KEYS[device]), *args, **kwargs)
                # Inference mode leaves composite operations whole; everywhere else this does nothing.
                if (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return out
        return self.see(func, args, kwargs, lambda: func(*args, **kwargs))


def is_plain(tensor: object) -> bool:
    """A tensor with CPU memory of its own: neither fake nor any other subclass."""
    return type(tensor) in PLAIN and tensor.device.type == "cpu"  # pyright: ignore


def _device(args: tuple, kwargs: dict) -> str | None:
    """Where an operation on plain tensors runs; None of other ones, or of no tensor."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    kinds = {t.device.type if type(t) in PLAIN else None for t in tensors}
    return "cuda" if kinds in ({"cuda"}, {"cuda", "cpu"}) else "cpu" if kinds == {"cpu"} else None
