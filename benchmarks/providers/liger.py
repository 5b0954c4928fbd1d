"""Liger-Kernel's fused linear cross-entropy: chunked torch products, a Triton kernel for the rows."""

from __future__ import annotations

from torch import Tensor

from benchmarks.cases import Case
from benchmarks.check import Loss
from benchmarks.providers import Provider


def make(case: Case) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore

    module = LigerFusedLinearCrossEntropyLoss()

    def loss(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        return module(w, x if case.scale == 1 else x * case.scale, target)

    return loss


PROVIDERS = [
    Provider(
        "Liger",
        "LigerFusedLinearCrossEntropyLoss",
        ("info-nce", "linear-cross-entropy"),
        make,
        "liger-kernel",
        triton=True,
    )
]
