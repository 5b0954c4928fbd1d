"""cosup-fast: the eager reference and the chunked engine."""

from __future__ import annotations

from functools import partial

from benchmarks.cases import LOSSES, Case
from benchmarks.check import Loss
from benchmarks.providers import Provider
from cosup_fast.functional import Impl, info_nce, linear_cross_entropy


def make(impl: Impl, case: Case) -> Loss:
    if case.loss == "linear-cross-entropy":
        return partial(linear_cross_entropy, impl=impl)
    return partial(
        info_nce,
        scale=case.scale,
        normalize=case.loss == "info-nce-cosine",
        symmetric=case.loss == "info-nce-symmetric",
        impl=impl,
    )


PROVIDERS = [
    Provider("ours stored", "rows in chunks", tuple(LOSSES), partial(make, "stored"), "cosup-fast"),
    Provider("ours reference", "the definition, every score", tuple(LOSSES), partial(make, "reference"), "cosup-fast"),
]
