"""PyTorch's own chunked loss: torch.nn.functional.linear_cross_entropy(options=...), torch >= 2.13."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.check import Loss
from benchmarks.providers import Provider


def make(whole: bool, case: Case) -> Loss:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=case.n if whole else None)

    def loss(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        if case.loss == "info-nce-cosine":
            x, w = F.normalize(x, dim=1), F.normalize(w, dim=1)
        return F.linear_cross_entropy(x if case.scale == 1 else x * case.scale, w, target, options=options)

    return loss


def unfit(case: Case) -> str | None:
    return None if hasattr(torch.nn, "LinearCrossEntropyOptions") else f"torch {torch.__version__} has none, 2.13 has"


LOSSES = ("info-nce", "info-nce-cosine", "linear-cross-entropy")
PROVIDERS = [
    Provider("torch chunked", "F.linear_cross_entropy, its own options", LOSSES, partial(make, False), unfit=unfit),
    Provider("torch one chunk", "F.linear_cross_entropy, all rows at once", LOSSES, partial(make, True), unfit=unfit),
]
