"""A GPU for those who ask for one: what lets peers' Triton kernels be launched in the interpreter on CPU tensors.

Only questions are answered (is this on a GPU, of which capability?) and two things emulated that the interpreter lacks:
libdevice's log1p and tanh, and the one inline instruction of inf_cl. Nothing of the peers is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

ROUND_TO_TF32 = "cvt.rna.tf32.f32 $0, $1;"
CAPABILITY = (9, 0)


def _inline_asm(self: Any, asm: str, constraints: str, values: list, types: list, is_pure: bool, pack: int) -> Any:
    from triton.runtime.interpreter import TensorHandle

    if asm != ROUND_TO_TF32:
        raise NotImplementedError(f"inline assembly {asm!r} has no emulation here")
    (value,) = values
    # To the nearest of 10 bits of mantissa, ties away from zero.
    bits = (value.data.astype(np.float32).view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return SimpleNamespace(get_result=lambda i: TensorHandle(bits.view(np.float32), value.dtype))


def _elementwise(function: Any) -> Any:
    def call(x: Any, _semantic: Any = None) -> Any:
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        return tl.tensor(TensorHandle(function(x.handle.data), x.handle.dtype), x.type)

    return call


@contextmanager
def _replaced(*replacements: tuple[Any, str, Any]) -> Iterator[None]:
    with ExitStack() as patches:
        for target, name, value in replacements:
            patches.enter_context(mock.patch.object(target, name, value))
        yield


@contextmanager
def gpu() -> Iterator[None]:
    """Within, every tensor says that it is on a GPU of CAPABILITY."""
    answers = _replaced(
        (torch.Tensor, "is_cuda", property(lambda self: True)),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_capability", lambda device=None: CAPABILITY),
    )
    # What a peer compiles around its kernels runs eagerly: a counter cannot look into compiled code.
    with answers, torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def emulation() -> Iterator[None]:
    """Within, the interpreter has what it lacks. Import peers before: what they bind by name must stay compilable."""
    # Imported within the interpreter, the compiler would keep the interpreter's min and max.
    import triton.compiler.code_generator  # noqa: F401
    from triton.language.extra import libdevice
    from triton.runtime.interpreter import InterpreterBuilder

    with _replaced(
        (libdevice, "log1p", _elementwise(np.log1p)),
        (libdevice, "tanh", _elementwise(np.tanh)),
        (InterpreterBuilder, "create_inline_asm", _inline_asm),
    ):
        yield
