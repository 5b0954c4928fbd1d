"""Dense PyTorch as it is usually written, eager and compiled: every score, softmax in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import LOSSES, Case
from benchmarks.check import Loss
from benchmarks.providers import Provider


def dense(case: Case) -> Loss:
    def loss(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        if case.loss == "info-nce-cosine":
            x, w = F.normalize(x, dim=1), F.normalize(w, dim=1)
        z = (x @ w.T).float() * case.scale
        if case.loss == "info-nce-symmetric":
            return (F.cross_entropy(z, target) + F.cross_entropy(z.T, target)) / 2
        return F.cross_entropy(z, target)

    return loss


PROVIDERS = [
    Provider("dense", "PyTorch, every score", tuple(LOSSES), dense),
    Provider(
        "dense compiled",
        "the same through torch.compile",
        tuple(LOSSES),
        lambda case: torch.compile(dense(case), dynamic=False),
        compiled=True,
    ),
]
