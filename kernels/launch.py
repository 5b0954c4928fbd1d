"""How kernels are launched: on the device of their tensors, and never to be compiled within a CUDA graph.

Triton compiles an integer argument's value in where it is 1, and apart where it is a multiple of 16. Kernels name what
varies from call to call (rows, candidates, tiles, ids) as `do_not_specialize`, so that one binary serves every size:
a size seen first during training compiles nothing, and a graph can be captured after a warm-up of another one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from .tuning import capturing

_HOOK = threading.Lock()


def launch(kernel: Any, grid: tuple[int, ...], near: Tensor, *args: Any, **kwargs: Any) -> None:
    """Launches a kernel on the device of `near`.

    Raises:
        RuntimeError: a CUDA graph is being captured, and the kernel has no binary for these arguments yet.
    """
    with torch.cuda.device_of(near):
        if capturing(near.device):
            with _compiling_nothing():
                kernel[grid](*args, **kwargs)
        else:
            kernel[grid](*args, **kwargs)


@contextmanager
def _compiling_nothing() -> Iterator[None]:
    """For this thread: the hook is one of the process, in which other threads may compile."""
    with _HOOK:
        before, capturing_thread = knobs.runtime.jit_cache_hook, threading.get_ident()

        def refuse(*, fn: Any, **options: Any) -> Any:
            if threading.get_ident() != capturing_thread:
                return None if before is None else before(fn=fn, **options)
            raise RuntimeError(
                f"{fn.name} would be compiled while a CUDA graph is captured, which cannot load it: run the step once "
                "before the capture, with the same dtypes and options"
            )

        knobs.runtime.jit_cache_hook = refuse  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            knobs.runtime.jit_cache_hook = before
