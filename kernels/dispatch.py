"""Which implementation computes a loss, and what it will cost.

An implementation's cost is its products and the memory it moves beside them, in FLOPs by the machine's balance:

    cost = G * products + balance * (bytes per score * N M + 8 M D * (chunks - 1))        G = 2 N M D

- stored: library products, a chunk of scores turned into its own gradient. Any device, any option.
- fused: the score product writes exponentials and statistics itself; Triton. One direction, gradients known at once.
- recomputed: statistics first, then the score product again straight into the gradient; Triton. Smallest chunks.

`auto` is the cheapest that can compute what is asked. Balances are vendors' dense peaks over memory bandwidth: NVIDIA
A100 80 GB, H100 SXM and B200 data sheets, AMD Instinct MI300X data sheet. They predict and have not been measured.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from functools import cache

import torch

from . import softmax_xent
from .last_hidden import accumulator
from .scores import Chunk, Scores
from .softmax_xent_torch import TorchChunk

IMPLEMENTATIONS = ("stored", "fused", "recomputed")

BALANCE = {  # half precision, fp32 in FLOP per byte
    "sm_80": (312e12 / 2.039e12, 19.5e12 / 2.039e12),
    "sm_90": (989e12 / 3.35e12, 67e12 / 3.35e12),
    "sm_100": (2250e12 / 8e12, 80e12 / 8e12),
    "sm_120": (209e12 / 1.79e12, 105e12 / 1.79e12),
    "gfx942": (1307e12 / 5.3e12, 163e12 / 5.3e12),
}


@dataclass(frozen=True)
class Plan:
    """An implementation and what it costs, exactly except for the predicted `cost`."""

    impl: str
    reason: str
    products: int
    """Products of N x M x D, forward and backward, by how often the scores are multiplied."""
    flops: int
    """Of these products."""
    bytes: int
    """Moved beside the operands and gradients of the products: scores, exponentials, logit gradients, sums of dw."""
    workspace: int
    """Bytes beside operands and gradients at the peak."""
    chunks: int
    """Runs of rows whose scores are held one after the other."""
    rows: int
    """Rows of the largest chunk."""
    cost: float
    """FLOPs of the products plus what the bytes cost in the same coin, by the balance of the device. A prediction."""
    kind: type[Chunk] = field(repr=False)


@cache
def _triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _runs_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on tensors of this device: a GPU's, or any under Triton's interpreter."""
    if not _triton():
        return False
    if device.type == "cuda":
        return True
    from triton import knobs

    return knobs.runtime.interpret


def _kind(impl: str, s: Scores, ranks: bool, at_once: bool) -> type[Chunk] | str:
    """What runs, or why nothing can."""
    device, triton = s.x.device, _runs_triton(s.x.device)
    if impl == "stored":
        if device.type != "cuda" or not triton or s.x.dtype == torch.float64:
            return TorchChunk
        from .softmax_xent_triton import RowChunk

        return TorchChunk if RowChunk.unsupported(s, ranks) else RowChunk
    if not triton:
        return f"needs Triton and a GPU, and the tensors are on {device}"
    if s.x.dtype == torch.float64:
        return "has no fp64 kernels"
    from .softmax_xent_triton import FusedChunk, RecomputedChunk

    if impl == "fused" and not at_once:
        return "forms the gradient with the loss, and reduction='none' knows its weights only afterwards"
    kind = FusedChunk if impl == "fused" else RecomputedChunk
    return kind.unsupported(s, ranks) or kind


def _balance(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a device multiplies in the time it moves a byte."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 10.0
    from .tuning import target_of

    half, single = BALANCE[target_of(device)]
    return half if dtype.itemsize == 2 else single


def _plan(impl: str, kind: type[Chunk], s: Scores, at_once: bool, gradients: bool) -> Plan:
    (n, d), m, size, wide = s.x.shape, len(s.w), s.x.dtype.itemsize, accumulator(s.x.dtype).itemsize
    parts = softmax_xent.chunks(s, kind)
    rows = max((p.stop - p.start for p in parts), default=0)
    twice = not at_once or impl == "recomputed" or (s.symmetric and len(parts) > 1)
    products = 1 + (2 + twice if gradients else 0)
    # Written and read again, by score: see `IMPLEMENTATIONS`. A CPU's blocks of scores stay in its cache.
    passes = {"stored": 2 * wide + size, "fused": 3 * size, "recomputed": size}[impl] + 2 * size
    if impl == "stored" and twice:
        passes += 2 * wide
    if not gradients:
        passes = 0 if impl != "stored" else 2 * wide
    moved = passes * n * m + (2 * wide * m * d * (len(parts) - 1) if gradients else 0)
    flops = 2 * n * m * d * products
    held = kind.score_bytes(s) * rows * m + (wide * m * d if gradients and len(parts) > 1 and size < wide else 0)
    reason = f"{products} products and {moved / 2**30:.2f} GiB moved in {len(parts)} chunk{'s'[: len(parts) != 1]}"
    cost = flops + _balance(s.x.device, s.x.dtype) * moved
    return Plan(impl, reason, products, flops, moved, held, len(parts), rows, cost, kind)


def plan(impl: str, s: Scores, *, ranks: bool = False, at_once: bool = True, gradients: bool = True) -> Plan:
    """The plan of the implementation asked for, or of the cheapest.

    `at_once`: the weights of the rows are known in the forward pass. Raises ValueError where the implementation that is
    asked for cannot compute this.
    """
    if impl != "auto":
        kind = _kind(impl, s, ranks, at_once or not gradients)
        if isinstance(kind, str):
            raise ValueError(f"impl={impl!r} {kind}; pass impl='auto' or 'stored'")
        return _plan(impl, kind, s, at_once, gradients)
    kinds = {name: _kind(name, s, ranks, at_once or not gradients) for name in IMPLEMENTATIONS}
    if s.x.device.type != "cuda":
        kinds = {"stored": kinds["stored"]}
    plans = [_plan(name, kind, s, at_once, gradients) for name, kind in kinds.items() if not isinstance(kind, str)]
    return min(plans, key=lambda p: p.cost)
