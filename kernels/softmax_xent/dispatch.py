"""Which implementation computes a loss, and what it will cost: products, bytes, workspace.

- stored: library products; a chunk of scores is turned into its own gradient by torch. Any device, any option.
- fused: a Triton product writes exponentials and statistics itself, an elementwise kernel makes them the gradient.
- rows: library products in fp32, read by Triton kernels. Any option, and three times the workspace of fused in bf16.
- recomputed: a Triton product for the statistics, a second one for the gradient. The least traffic, one product more.

    G = 2 N M D FLOP      forward and backward 3 G, 4 G where the scores are multiplied again: recomputed,
    reduction="none", whose weights come later, and a symmetric loss whose columns span several chunks

`auto` is stored except on CUDA devices, where it is the implementation of least modelled cost among those that can
compute the loss, each with the chunks that the workspace allows it:

    cost = FLOP / BALANCE + bytes of scores, of gradients and of sums of dw + chunks x bytes of w that products read

in bytes of memory traffic. It assumes that every product runs equally fast, that nothing overlaps, and that a GPU does
BALANCE operations while it moves a byte: a data sheet's ratio, no measurement. None of this has been timed on a GPU.

Gradients that nobody needs are not multiplied: 1 G each.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

from ..numerics import accumulator
from . import engine
from .chunk_torch import TorchChunk
from .scores import Chunk, Scores

KERNELS = ("fused", "rows", "recomputed")
"""Implementations by Triton kernels: for a GPU, or for tensors of any device under Triton's interpreter."""
BALANCE = {2: 256, 4: 16, 8: 8}
"""FLOP in the time of a byte, by bytes of an operand: between those of A100 (156, 10, 10) and H100 (295, 20, 20)."""


def _kind(impl: str) -> type[Chunk]:
    if impl == "stored":
        return TorchChunk
    from . import chunk_triton as kernels

    return {"fused": kernels.FusedChunk, "rows": kernels.RowChunk, "recomputed": kernels.RecomputedChunk}[impl]


def _unsupported(impl: str, s: Scores, ranks: bool) -> str | None:
    """Why an implementation cannot compute a loss."""
    if impl not in KERNELS:
        return None
    if importlib.util.find_spec("triton") is None:
        return "needs Triton (its wheels are for Linux)"
    from triton import knobs

    if s.x.device.type != "cuda" and not knobs.runtime.interpret:
        return f"needs a GPU, and the operands are on {s.x.device}"
    return _kind(impl).unsupported(s, ranks)


@dataclass(frozen=True)
class Plan:
    """An implementation and what it costs."""

    impl: str
    reason: str
    products: int
    """Products of N x M x D, forward and backward, by how often the scores are multiplied."""
    flops: int
    """Of these products."""
    bytes: int
    """Of scores and logit gradients written and read, and of sums of dw over chunks, beside operands and results.

    What an elementwise pass reads again from its cache is not counted.
    """
    workspace: int
    """Bytes beside operands and gradients at the peak."""
    chunks: int
    """Runs of rows whose scores are held one after the other."""
    rows: int
    """Rows of the largest chunk."""
    cost: int
    """By the model of this module, in bytes of memory traffic: to compare implementations by, and no time."""
    kind: type[Chunk] = field(repr=False)


def plan(impl: str, s: Scores, *, ranks: bool = False, at_once: bool = True, gradients: int = 2) -> Plan:
    """The plan of the implementation asked for, or of the cheapest.

    `ranks`: rank and top-1 are asked for. `at_once`: the weights of the rows are known in the forward pass.
    `gradients`: how many of dx and dw are needed.

    Raises:
        ValueError: the implementation asked for cannot compute this loss; the message says why.
    """
    if impl != "auto":
        if reason := _unsupported(impl, s, ranks):
            raise ValueError(f"impl is {impl!r}, which {reason}; pass 'auto' or 'stored'")
        return _plan(impl, "asked for", s, at_once, gradients)
    if s.x.device.type != "cuda":
        return _plan("stored", f"the one for {s.x.device.type} devices", s, at_once, gradients)
    able = [name for name in (*KERNELS, "stored") if _unsupported(name, s, ranks) is None]
    plans = [_plan(name, "", s, at_once, gradients) for name in able]
    best = min(plans, key=lambda p: p.cost)
    costs = ", ".join(f"{p.impl} {p.cost / best.cost:.2f}" for p in sorted(plans, key=lambda p: p.cost))
    return _plan(best.impl, f"least modelled cost: {costs}", s, at_once, gradients)


def _plan(impl: str, reason: str, s: Scores, at_once: bool, gradients: int) -> Plan:
    kind = _kind(impl)
    (n, d), m, size, wide = s.x.shape, len(s.w), s.x.dtype.itemsize, accumulator(s.x.dtype).itemsize
    parts = engine.chunks(s, kind)
    rows = max((p.stop - p.start for p in parts), default=0)
    again = bool(gradients) and (impl == "recomputed" or not at_once or (s.symmetric and len(parts) > 1))
    products = 1 + gradients + again
    flops = 2 * n * m * d * products
    several = gradients > 0 and len(parts) > 1
    moved = kind.traffic(s, again, gradients) * n * m + (2 * wide * m * d * (len(parts) - 1) if several else 0)
    held = kind.score_bytes(s) * rows * m + (wide * m * d if several and size < wide else 0)
    read = len(parts) * size * m * d * (1 + again + (gradients > 0))
    cost = flops // BALANCE[size] + moved + read
    return Plan(impl, reason, products, flops, moved, held, len(parts), rows, cost, kind)
