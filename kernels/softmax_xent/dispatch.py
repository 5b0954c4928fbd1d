"""Which implementation computes a loss, and what it will cost: products, bytes, workspace.

- stored: library products; a chunk of scores is turned into its own gradient by torch. Any device, any option.
- fused: a Triton product writes exponentials and statistics itself; the products of the gradient weigh their rows, or
  an elementwise kernel makes them the gradient.
- rows: library products in fp32, read by Triton kernels. Any option, and three times the workspace of fused in bf16.
- recomputed: a Triton product for the statistics, a second one for the gradient. The least traffic, one product more.

    G = 2 N M D FLOP      forward and backward 3 G, 4 G where the scores are multiplied again: recomputed,
    reduction="none", whose weights come later; 3 G and the share of scores that are not held where the columns of a
    symmetric loss span several chunks, and for fused the tiles whose exponentials underflow, which only values tell

`auto` is stored except on CUDA devices, where it is the implementation of least modelled cost among those that can
compute the loss, each with the chunks that the workspace allows it:

    cost = FLOP / BALANCE + EPILOGUE x scores of our own products
         + bytes of scores, of gradients and of sums of dw + chunks x bytes of w that products read

in bytes of memory traffic. A GPU does BALANCE operations of a library's product while it moves a byte: a data sheet's
ratio. Our own fp32 products run at FP32_RATE of a library's. Nothing overlaps. None of this has been timed on a GPU.

Gradients that nobody needs are not multiplied: 1 G each.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

from . import engine
from .chunk_torch import TorchChunk
from .scores import Chunk, Scores

KERNELS = ("fused", "rows", "recomputed")
"""Implementations by Triton kernels: for a GPU, or for tensors of any device under Triton's interpreter."""
BALANCE = {2: 256, 4: 16, 8: 8}
"""FLOP in the time of a byte, by bytes of an operand: between those of A100 (156, 10, 10) and H100 (295, 20, 20)."""
FP32_RATE = 0.5
"""Of a library's: without tensor cores a tile of 64 x 64 x 32 reads shared memory for half of its time."""
EPILOGUE = 1
"""Bytes in the time of one score's epilogue: 8 instructions an element, which nothing hides behind another tile."""
TANH = 3
"""The same of a softcap: some 30 instructions more."""


def chunks_of(impl: str) -> type[Chunk]:
    """The chunks of an implementation."""
    if impl == "stored":
        return TorchChunk
    from .chunk_product import FusedChunk, RecomputedChunk
    from .chunk_rows import RowChunk

    return {"fused": FusedChunk, "rows": RowChunk, "recomputed": RecomputedChunk}[impl]


def unsupported(impl: str, s: Scores, ranks: bool) -> str | None:
    """Why an implementation cannot compute a loss."""
    if impl not in KERNELS:
        return None
    if importlib.util.find_spec("triton") is None:
        return "needs Triton (its wheels are for Linux)"
    from triton import knobs

    if s.x.device.type != "cuda" and not knobs.runtime.interpret:
        return f"needs a GPU, and the operands are on {s.x.device}"
    return chunks_of(impl).unsupported(s, ranks)


@dataclass(frozen=True)
class Plan:
    """An implementation and what it costs."""

    impl: str
    reason: str
    products: float
    """Products of N x M x D, forward and backward, by how often the scores are multiplied."""
    flops: int
    """Of these products."""
    bytes: int
    """Of scores and logit gradients written and read, and of sums of dw over chunks, beside operands and results.

    What an elementwise pass reads again from its cache is not counted.
    """
    workspace: int
    """Bytes at the peak beyond operands and gradients, where nothing is normalised and a CPU's scores are trusted."""
    chunks: int
    """Runs of rows whose scores are held one after the other."""
    rows: int
    """Rows of the largest chunk."""
    cost: int
    """By the model of this module, in bytes of memory traffic: to compare implementations by, and no time."""
    kind: type[Chunk] = field(repr=False)


def kind(impl: str, s: Scores, ranks: bool, at_once: bool, gradients: int) -> type[Chunk]:
    """The implementation of `plan`, without its figures where there is nothing to compare."""
    if impl in ("auto", "stored") and s.x.device.type != "cuda":
        return TorchChunk
    return plan(impl, s, ranks=ranks, at_once=at_once, gradients=gradients).kind


def plan(impl: str, s: Scores, *, ranks: bool = False, at_once: bool = True, gradients: int = 2) -> Plan:
    """The plan of the implementation asked for, or of the cheapest.

    `ranks`: rank and top-1 are asked for. `at_once`: the weights of the rows are known in the forward pass.
    `gradients`: how many of dx and dw are needed.

    Raises:
        ValueError: the implementation asked for cannot compute this loss; the message says why.
    """
    if impl != "auto":
        if reason := unsupported(impl, s, ranks):
            raise ValueError(f"impl is {impl!r}, which {reason}; pass 'auto' or 'stored'")
        return _plan(impl, "asked for", s, at_once, gradients)
    if s.x.device.type != "cuda":
        return _plan("stored", f"the one for {s.x.device.type} devices", s, at_once, gradients)
    able = [name for name in (*KERNELS, "stored") if unsupported(name, s, ranks) is None]
    plans = [_plan(name, "", s, at_once, gradients) for name in able]
    best = min(plans, key=lambda p: p.cost)
    costs = ", ".join(f"{p.impl} {p.cost / best.cost:.2f}" for p in sorted(plans, key=lambda p: p.cost))
    return _plan(best.impl, f"least modelled cost: {costs}", s, at_once, gradients)


def _plan(impl: str, reason: str, s: Scores, at_once: bool, gradients: int) -> Plan:
    kind = chunks_of(impl)
    (n, d), m, size = s.x.shape, len(s.w), s.x.dtype.itemsize
    parts = engine.chunks(s, kind, gradients > 0)
    rows = max((p.stop - p.start for p in parts), default=0)
    kept = 1
    again = float(gradients > 0 and (not kind.holds or not at_once))
    if gradients and at_once and kind.holds and s.symmetric and len(parts) > 1:
        kept = min(len(parts), engine.HELD)
        again = 1 - parts[kept - 1].stop / n
    products = 1 + gradients + again
    flops = round(2 * n * m * d * products)
    several = gradients > 0 and len(parts) > 1
    sums = engine.Sums.traffic(s) * (len(parts) - 1) if several else 0
    moved = round(kind.traffic(s, again, gradients) * n * m) + sums
    formed, read = kind.peaks(s, rows, again > 0 or kept > 1)
    first, later, during, end = engine.Sums.workspace(s, gradients, several)
    waiting = [max(0, count) * kind.held_bytes(s, rows) for count in (kept - 1, kept - 2)]
    held = max(formed + first + waiting[0], formed + later + waiting[1], read + during + waiting[0], end)
    operands = round(len(parts) * size * m * d * (1 + again + (gradients > 0)))
    own = round((1 + again) * n * m) * kind.multiplies
    slowed = flops + (own * 2 * d * (1 / FP32_RATE - 1) if size == 4 else 0)
    epilogue = EPILOGUE + TANH * (s.softcap is not None)
    cost = round(slowed / BALANCE[size]) + epilogue * own + moved + operands
    return Plan(impl, reason, products, flops, moved, held, len(parts), rows, cost, kind)
