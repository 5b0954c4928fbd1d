"""Semiparametric token-sequence co-supervision (Lee et al. 2024, arXiv 2403.09024), fast.

The public names are imported on first use: importing the package imports neither torch nor transformers nor triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from cosup_fast.errors import CosupError
    from cosup_fast.functional import Stats, gather_last_hidden, info_nce, linear_cross_entropy
    from cosup_fast.losses import CoSupervisionLoss, CoSupervisionOutput, InfoNCELoss, LinearCrossEntropyLoss

_HOME = {
    "CosupError": "errors",
    "Stats": "functional",
    "gather_last_hidden": "functional",
    "info_nce": "functional",
    "linear_cross_entropy": "functional",
    "CoSupervisionLoss": "losses",
    "CoSupervisionOutput": "losses",
    "InfoNCELoss": "losses",
    "LinearCrossEntropyLoss": "losses",
}

__all__ = [
    "CoSupervisionLoss",
    "CoSupervisionOutput",
    "CosupError",
    "InfoNCELoss",
    "LinearCrossEntropyLoss",
    "Stats",
    "gather_last_hidden",
    "info_nce",
    "linear_cross_entropy",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _version()
    elif name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _version() -> str:
    """The installed version, which the build took from the git tag."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("cosup-fast")
    except PackageNotFoundError:  # a source tree on the path that was never installed
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
