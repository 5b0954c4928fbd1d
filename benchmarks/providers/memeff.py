"""memeff: Triton kernels, both directions; gradients in registers (flash) or by atomics."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from benchmarks.cases import Case
from benchmarks.check import Loss
from benchmarks.providers import Provider


def make(flash: bool, case: Case) -> Loss:
    from memeff import MemoryEfficientCLIPLoss, clip_loss  # pyright: ignore

    module = MemoryEfficientCLIPLoss(temperature=1 / case.scale, normalized_inputs=True, stable=False)

    def loss(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        value = module(x, w)
        # Read in the backward pass, which runs before anybody else's forward.
        clip_loss._FORCE_FA = flash
        return value

    return loss


LOSSES = ("info-nce-symmetric",)
PROVIDERS = [
    Provider("memeff flash", "MemoryEfficientCLIPLoss, gradients in registers", LOSSES, partial(make, True), "memeff",
             triton=True, unfit=lambda case: "keeps D in registers: D <= 1024" if case.d > 1024 else None),
    Provider("memeff atomic", "MemoryEfficientCLIPLoss, gradients by atomics", LOSSES, partial(make, False), "memeff",
             triton=True),
]  # fmt: skip
