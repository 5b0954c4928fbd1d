"""A GPU for those who ask for one: what lets Triton kernels be launched in the interpreter on CPU tensors as on a GPU.

Only questions are answered: is this on a GPU, of which capability? No kernel is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from unittest import mock

import torch

from cosup_fast.environment import no_downloaded_kernels

CAPABILITY = (9, 0)


@contextmanager
def tiles() -> Iterator[None]:
    """Within, our kernels, which the interpreter runs anyway, have the tiles that are shipped for CAPABILITY."""
    from cosup_fast.kernels import tuning
    from cosup_fast.kernels.softmax_xent import chunk_product, chunk_triton

    with ExitStack() as stack:
        for module in (tuning, chunk_triton, chunk_product):
            stack.enter_context(mock.patch.object(module, "target_of", return_value=tuning.nearest(CAPABILITY)))
        yield


@contextmanager
def gpu() -> Iterator[None]:
    """Within, every tensor says that it is on a GPU of CAPABILITY."""
    # Imported within the interpreter, the compiler would keep the interpreter's min and max.
    import triton.compiler.code_generator  # noqa: F401

    # And this, which peers import through peft, would look for the functions of a build for GPUs.
    with suppress(ImportError), no_downloaded_kernels():
        import bitsandbytes  # noqa: F401  # pyright: ignore

    with ExitStack() as stack:
        for target, name, answer in (
            (torch.Tensor, "is_cuda", property(lambda self: True)),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "get_device_capability", lambda device=None: CAPABILITY),
        ):
            stack.enter_context(mock.patch.object(target, name, answer))
        # What a peer compiles around its kernels runs eagerly: a counter cannot look into compiled code.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
