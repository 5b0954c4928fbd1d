"""Which implementation computes a loss, and what it will cost: products, bytes, workspace.

- stored: library products; a chunk of scores is turned into its own gradient. Any device, any option.
- fused: a Triton product writes exponentials and statistics itself, an elementwise kernel makes them the gradient.
- recomputed: a Triton product for the statistics, a second one for the gradient. The smallest chunks.

    G = 2 N M D FLOP      forward and backward 3 G, 4 G where the scores are multiplied again: recomputed,
    reduction="none", whose weights come later, and a symmetric loss whose columns span several chunks

`auto` is stored everywhere: fused and recomputed have been run by Triton's interpreter and compiled for GPUs, and have
yet to be timed on one.

Gradients that nobody needs are not multiplied: 1 G each.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

from . import softmax_xent
from .last_hidden import accumulator
from .scores import Chunk, Scores
from .softmax_xent_torch import TorchChunk

KERNELS = ("fused", "recomputed")
"""Implementations by Triton kernels: for a GPU, or for tensors of any device under Triton's interpreter."""


def _kind(impl: str, s: Scores, ranks: bool) -> type[Chunk]:
    if impl not in KERNELS:
        return TorchChunk
    if importlib.util.find_spec("triton") is None:
        raise ValueError(f"impl is {impl!r}, which needs Triton (its wheels are for Linux); pass 'auto' or 'stored'")
    from triton import knobs

    if s.x.device.type != "cuda" and not knobs.runtime.interpret:
        raise ValueError(
            f"impl is {impl!r}, which needs a GPU, and the operands are on {s.x.device}; pass 'auto' or 'stored'"
        )
    from .softmax_xent_triton import FusedChunk, RecomputedChunk

    kind = FusedChunk if impl == "fused" else RecomputedChunk
    if reason := kind.unsupported(s, ranks):
        raise ValueError(f"impl is {impl!r}, which {reason}; pass 'auto' or 'stored'")
    return kind


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
    kind: type[Chunk] = field(repr=False)


def plan(impl: str, s: Scores, *, ranks: bool = False, at_once: bool = True, gradients: int = 2) -> Plan:
    """The plan of the implementation asked for, or of the cheapest.

    `ranks`: rank and top-1 are asked for. `at_once`: the weights of the rows are known in the forward pass.
    `gradients`: how many of dx and dw are needed.
    """
    name = "stored" if impl == "auto" else impl
    kind = _kind(name, s, ranks)
    (n, d), m, size, wide = s.x.shape, len(s.w), s.x.dtype.itemsize, accumulator(s.x.dtype).itemsize
    parts = softmax_xent.chunks(s, kind)
    rows = max((p.stop - p.start for p in parts), default=0)
    again = bool(gradients) and (name == "recomputed" or not at_once or (s.symmetric and len(parts) > 1))
    products = 1 + gradients + again
    # A score is written by its product, read and written by the pass that makes it a gradient, read by each product.
    passes = size * ((1 + again) * 2 + (1 + gradients if gradients else 0))
    several = gradients > 0 and len(parts) > 1
    moved = passes * n * m + (2 * wide * m * d * (len(parts) - 1) if several else 0)
    held = kind.score_bytes(s) * rows * m + (wide * m * d if several and size < wide else 0)
    reason = "runs everywhere and with every option" if impl == "auto" else "asked for"
    return Plan(name, reason, products, 2 * n * m * d * products, moved, held, len(parts), rows, kind)
