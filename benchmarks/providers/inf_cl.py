"""inf_cl (arXiv 2410.17243): Triton kernels on fp32 copies, one direction."""

from __future__ import annotations

from benchmarks.cases import Case
from benchmarks.check import Loss
from benchmarks.providers import Provider


def make(case: Case) -> Loss:
    from inf_cl import cal_flash_loss  # pyright: ignore

    return lambda x, w, target: cal_flash_loss(x, w, scale=case.scale).mean()


def unfit(case: Case) -> str | None:
    return f"splits D into heads of 256: D = {case.d} is not a multiple" if case.d % 256 else None


PROVIDERS = [Provider("inf_cl", "cal_flash_loss", ("info-nce",), make, "inf-cl", triton=True, unfit=unfit)]
