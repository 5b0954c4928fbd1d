"""Semiparametric token-sequence co-supervision (Lee et al. 2024, arXiv 2403.09024), fast.

The public names are imported on first use: importing the package imports neither torch nor transformers nor triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cosup_fast.lazy import attach

if TYPE_CHECKING:
    __version__: str

    from cosup_fast.errors import CosupError
    from cosup_fast.functional import Stats, gather_last_hidden, info_nce, linear_cross_entropy
    from cosup_fast.losses import CoSupervisionLoss, CoSupervisionOutput, InfoNCELoss, LinearCrossEntropyLoss

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

_get, __dir__ = attach(
    __name__,
    {
        "errors": ("CosupError",),
        "functional": ("Stats", "gather_last_hidden", "info_nce", "linear_cross_entropy"),
        "losses": ("CoSupervisionLoss", "CoSupervisionOutput", "InfoNCELoss", "LinearCrossEntropyLoss"),
    },
)


def __getattr__(name: str) -> Any:
    return _version() if name == "__version__" else _get(name)


def _version() -> str:
    """The installed version, which the build took from the git tag."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("cosup-fast")
    except PackageNotFoundError:  # a source tree on the path that was never installed
        return "0+unknown"
