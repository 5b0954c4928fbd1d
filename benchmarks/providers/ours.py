"""cosup-fast: the eager reference, the chunked engine, and the Triton kernels."""

from __future__ import annotations

from functools import partial

from benchmarks.cases import LOSSES, Case
from benchmarks.check import Loss
from benchmarks.pretend import tiles
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


ONE_DIRECTION = tuple(loss for loss in LOSSES if loss != "info-nce-symmetric")

KERNELS: tuple[tuple[Impl, str, tuple[str, ...]], ...] = (
    ("fused", "a product that stores exponentials", ONE_DIRECTION),
    ("rows", "torch's product, row kernels", tuple(LOSSES)),
    ("recomputed", "products for statistics and for gradients", tuple(LOSSES)),
)

PROVIDERS = [
    Provider("ours stored", "rows in chunks", tuple(LOSSES), partial(make, "stored"), "cosup-fast"),
    Provider("ours reference", "the definition, every score", tuple(LOSSES), partial(make, "reference"), "cosup-fast"),
    *(
        Provider(f"ours {impl}", what, losses, partial(make, impl), "cosup-fast", triton=True, pretence=tiles)
        for impl, what, losses in KERNELS
    ),
]
