"""Who computes a loss: ours and the peers, one adapter a file, each skipped with its reason where it cannot run.

An adapter imports its peer inside `make`, so that listing costs nothing and one broken peer stops none of the others.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from benchmarks.cases import Case
from benchmarks.check import Loss
from benchmarks.pretend import gpu

PEERS = "pip install --no-deps -r benchmarks/requirements-peers.txt"


@dataclass(frozen=True)
class Provider:
    """One way to compute losses."""

    name: str
    what: str
    losses: tuple[str, ...]
    make: Callable[[Case], Loss]
    package: str | None = None  # the distribution it needs
    triton: bool = False  # Triton kernels: a CUDA device, or the interpreter with nothing but counters
    pretence: Callable[[], AbstractContextManager[None]] = gpu  # in which they are counted
    compiled: bool = False  # by Inductor, whose kernels hide their bytes and buffers from the counters
    unfit: Callable[[Case], str | None] = lambda case: None

    def reason(self, case: Case, counting: bool = False) -> str | None:
        """Why it cannot run this case here, or only be counted, or None."""
        if case.loss not in self.losses:
            return f"has no {case.loss}"
        if self.package is not None:
            try:
                importlib.metadata.version(self.package)
            except importlib.metadata.PackageNotFoundError:
                return f"{self.package} is not installed: {PEERS}"
        if self.triton and case.device != "cuda" and not counting:
            return "Triton kernels and no GPU: only counted"
        if self.triton and counting and importlib.util.find_spec("triton") is None:
            return "triton is not installed (its wheels are for Linux)"
        return self.unfit(case)

    @property
    def version(self) -> str:
        if self.package is None:
            return f"torch {torch.__version__}"
        try:
            return f"{self.package} {importlib.metadata.version(self.package)}"
        except importlib.metadata.PackageNotFoundError:
            return self.package


ADAPTERS = (
    "ours",
    "dense",
    "torch_chunked",
    "sentence_transformers",
    "cut_cross_entropy",
    "info_nce_pytorch",
    "open_clip",
    "inf_cl",
    "memeff",
    "liger",
)


def every() -> list[Provider]:
    """All providers, ours first."""
    modules = [importlib.import_module(f"benchmarks.providers.{name}") for name in ADAPTERS]
    return [provider for module in modules for provider in module.PROVIDERS]


def chosen(names: list[str] | None) -> list[Provider]:
    """The named providers in the order of the list; what is not a whole name may be the beginning of several."""
    known = every()
    whole = {provider.name for provider in known}
    for name in names or []:
        if not any(provider.name.startswith(name) for provider in known):
            raise ValueError(f"provider is {name!r}; choose from {', '.join(repr(p.name) for p in known)}")

    def wanted(provider: Provider, name: str) -> bool:
        return provider.name == name if name in whole else provider.name.startswith(name)

    return [p for p in known if not names or any(wanted(p, name) for name in names)]
