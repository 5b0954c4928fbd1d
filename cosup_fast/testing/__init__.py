"""What lets a machine with no GPU check GPU code: Triton kernels run, sanitized, counted and compiled on a CPU.

The names are imported on first use: importing this package imports neither torch nor triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cosup_fast.lazy import attach

if TYPE_CHECKING:
    from cosup_fast.testing.compile import CompileCase, Compiled, collect, compile_case, compile_matrix
    from cosup_fast.testing.counters import Counts, count
    from cosup_fast.testing.gradients import value_and_gradients
    from cosup_fast.testing.inputs import LOGITS, ODD_SHAPES, Shape, logits, operands, randn, with_gaps
    from cosup_fast.testing.interpreter import interpret
    from cosup_fast.testing.rehearsal import Rehearsal, Specialization, rehearse
    from cosup_fast.testing.sanitizer import Finding, Sanitizer, SanitizerError, sanitize
    from cosup_fast.testing.tolerance import assert_close_to_fp64

__all__ = [
    "LOGITS",
    "ODD_SHAPES",
    "CompileCase",
    "Compiled",
    "Counts",
    "Finding",
    "Rehearsal",
    "Sanitizer",
    "SanitizerError",
    "Shape",
    "Specialization",
    "assert_close_to_fp64",
    "collect",
    "compile_case",
    "compile_matrix",
    "count",
    "interpret",
    "logits",
    "operands",
    "randn",
    "rehearse",
    "sanitize",
    "value_and_gradients",
    "with_gaps",
]

NEEDS_TRITON = "Triton is not installed (its wheels are for Linux): pip install triton"

_get, __dir__ = attach(
    __name__,
    {
        "compile": ("CompileCase", "Compiled", "collect", "compile_case", "compile_matrix"),
        "counters": ("Counts", "count"),
        "gradients": ("value_and_gradients",),
        "inputs": ("LOGITS", "ODD_SHAPES", "Shape", "logits", "operands", "randn", "with_gaps"),
        "interpreter": ("interpret",),
        "rehearsal": ("Rehearsal", "Specialization", "rehearse"),
        "sanitizer": ("Finding", "Sanitizer", "SanitizerError", "sanitize"),
        "tolerance": ("assert_close_to_fp64",),
    },
)


def __getattr__(name: str) -> Any:
    try:
        return _get(name)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ModuleNotFoundError(f"cosup_fast.testing.{name}: {NEEDS_TRITON}", name="triton") from error
