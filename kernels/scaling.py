"""Tensors times a number of the device that is nearly always 1: a pass over memory only where it is not."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

BLOCK = 4096
PROGRAMS = 2048
"""At most; each walks over blocks, so that a launch that has nothing to do is over at once."""
MULTIPLE = 16
"""Elements that a tensor is a multiple of, so that 16 bytes move at a time whatever their number."""


@triton.jit(do_not_specialize=["multiples"])
def scale_kernel(t, g, multiples, MULTIPLE: tl.constexpr, BLOCK: tl.constexpr):
    """A program owns every so many-th block of t, and leaves it alone if g is 1."""
    b_g = tl.load(g)
    if b_g != 1.0:
        size = tl.cast(multiples, tl.int64) * MULTIPLE
        for first in range(tl.program_id(0).to(tl.int64) * BLOCK, size, tl.num_programs(0).to(tl.int64) * BLOCK):
            o = first + tl.arange(0, BLOCK)
            b = tl.load(t + o, mask=o < size, other=0.0).to(tl.float32)
            tl.store(t + o, (b * b_g).to(t.dtype.element_ty), mask=o < size)


def scale_(t: Tensor, g: Tensor) -> Tensor:
    """t *= g in place, without asking the device for g; with a g of 1, t is neither read nor written.

    Shapes: g is a scalar, fp32 to take the kernel. What is no dense multiple of 16 elements of 16, or 32, bits is
    multiplied by torch.
    """
    half_or_single = t.dtype in (torch.float32, torch.bfloat16, torch.float16) and g.dtype == torch.float32
    dense = t.is_contiguous() and t.numel() % MULTIPLE == 0 < t.numel() and t.data_ptr() % 16 == 0
    if not (half_or_single and dense):
        return t.mul_(g)
    grid = (min(triton.cdiv(t.numel(), BLOCK), PROGRAMS),)
    launch(scale_kernel, grid, t, t=t, g=g, multiples=t.numel() // MULTIPLE, MULTIPLE=MULTIPLE, BLOCK=BLOCK)
    return t


COMPILE_CASES = [
    {
        "kernel": scale_kernel,
        "signature": {"t": "*{dtype}", "g": "*fp32", "multiples": "i32"},
        "dtypes": ["bf16", "fp16", "fp32"],
        "constexprs": {"MULTIPLE": MULTIPLE, "BLOCK": BLOCK},
    }
]
