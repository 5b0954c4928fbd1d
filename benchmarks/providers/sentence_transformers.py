"""sentence-transformers: MultipleNegativesRankingLoss and its cached form, given the embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.check import Loss
from benchmarks.providers import Provider


def options(case: Case) -> dict:
    from sentence_transformers.util import cos_sim, dot_score

    both = case.loss == "info-nce-symmetric"
    return {
        "scale": case.scale,
        "similarity_fct": cos_sim if case.loss == "info-nce-cosine" else dot_score,
        "directions": ("query_to_doc", "doc_to_query") if both else ("query_to_doc",),
        "partition_mode": "per_direction" if both else "joint",
    }


def ranking(case: Case) -> Loss:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss  # pyright: ignore

    module = MultipleNegativesRankingLoss(torch.nn.Identity(), **options(case))  # pyright: ignore
    return lambda x, w, target: module.compute_loss_from_embeddings([x, *w.split(case.n)], target)


def cached(case: Case) -> Loss:
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss  # pyright: ignore

    module = CachedMultipleNegativesRankingLoss(torch.nn.Sequential(torch.nn.Identity()), **options(case))  # pyright: ignore

    def loss(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        return module.calculate_loss([[x], *([part] for part in w.split(case.n))], target, with_backward=True)

    return loss


def unfit(case: Case) -> str | None:
    return f"takes as many negatives for each query: M = {case.m} is not a multiple of N" if case.m % case.n else None


LOSSES = ("info-nce", "info-nce-cosine", "info-nce-symmetric")
PACKAGE = "sentence-transformers"
PROVIDERS = [
    Provider("MNRL", "MultipleNegativesRankingLoss", LOSSES, ranking, PACKAGE, unfit=unfit),
    Provider("cached MNRL", "its cached form, mini-batches of 32", LOSSES, cached, PACKAGE, unfit=unfit),
]
