"""info-nce-pytorch: cosine only, every score."""

from __future__ import annotations

from benchmarks.cases import Case
from benchmarks.check import Loss
from benchmarks.providers import Provider


def make(case: Case) -> Loss:
    from info_nce import InfoNCE

    module = InfoNCE(temperature=1 / case.scale)
    return lambda x, w, target: module(x, w)


def unfit(case: Case) -> str | None:
    return "keys beyond the positives replace the in-batch negatives: needs M = N" if case.m != case.n else None


PROVIDERS = [
    Provider("info-nce-pytorch", "InfoNCE", ("info-nce-cosine",), make, "info-nce-pytorch", unfit=unfit),
]
