"""Apple's cut-cross-entropy (arXiv 2411.09009): torch_compile anywhere, its Triton kernels on a GPU."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from benchmarks.cases import Case
from benchmarks.check import Loss
from benchmarks.providers import Provider


def make(impl: str, filter_eps: str | None, case: Case) -> Loss:
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore

    def loss(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        x = x if case.scale == 1 else x * case.scale
        return linear_cross_entropy(x, w, target, filter_eps=filter_eps, impl=impl)

    return loss


def unfit_kernels(case: Case) -> str | None:
    return "its Triton kernels take no fp32" if case.dtype == "fp32" else None


LOSSES = ("info-nce", "linear-cross-entropy")
PACKAGE = "cut-cross-entropy"
PROVIDERS = [
    Provider(
        "CCE torch_compile",
        "cut-cross-entropy's torch.compile form, every score",
        LOSSES,
        partial(make, "torch_compile", "high"),
        PACKAGE,
        compiled=True,
    ),
    Provider(
        "CCE kernels",
        "cut-cross-entropy, small gradients dropped (its default)",
        LOSSES,
        partial(make, "cce", "high"),
        PACKAGE,
        triton=True,
        unfit=unfit_kernels,
    ),
    Provider(
        "CCE kernels exact",
        "cut-cross-entropy, nothing dropped",
        LOSSES,
        partial(make, "cce", None),
        PACKAGE,
        triton=True,
        unfit=unfit_kernels,
    ),
]
