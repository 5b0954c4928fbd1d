"""What lets a machine with no GPU check GPU code: Triton kernels run, sanitized, counted and compiled on a CPU.

The names are imported on first use: importing this package imports neither torch nor triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosup_fast.testing.compile import CompileCase, Compiled, collect, compile_case, compile_matrix
    from cosup_fast.testing.counters import Counts, count
    from cosup_fast.testing.gradients import value_and_gradients
    from cosup_fast.testing.inputs import LOGITS, ODD_SHAPES, Shape, logits, operands, randn, with_gaps
    from cosup_fast.testing.interpreter import interpret
    from cosup_fast.testing.rehearsal import Rehearsal, Specialization, rehearse
    from cosup_fast.testing.sanitizer import Finding, Sanitizer, SanitizerError, sanitize
    from cosup_fast.testing.tolerance import assert_close_to_fp64

_HOME = {
    "CompileCase": "compile",
    "Compiled": "compile",
    "collect": "compile",
    "compile_case": "compile",
    "compile_matrix": "compile",
    "Counts": "counters",
    "count": "counters",
    "value_and_gradients": "gradients",
    "LOGITS": "inputs",
    "ODD_SHAPES": "inputs",
    "Shape": "inputs",
    "logits": "inputs",
    "operands": "inputs",
    "randn": "inputs",
    "with_gaps": "inputs",
    "interpret": "interpreter",
    "Rehearsal": "rehearsal",
    "Specialization": "rehearsal",
    "rehearse": "rehearsal",
    "Finding": "sanitizer",
    "Sanitizer": "sanitizer",
    "SanitizerError": "sanitizer",
    "sanitize": "sanitizer",
    "assert_close_to_fp64": "tolerance",
}

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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOME[name]}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ModuleNotFoundError(f"cosup_fast.testing.{name}: {NEEDS_TRITON}", name="triton") from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
