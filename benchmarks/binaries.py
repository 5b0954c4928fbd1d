"""Registers, spills and tensor cores of the kernels that a counted run launched, compiled without a GPU."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor

TARGET = "sm_90"
TYPES = {
    "float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64", "int32": "i32", "int64": "i64",
    "bool": "i1", "uint8": "u8", "int8": "i8", "int16": "i16", "uint16": "u16", "uint32": "u32", "uint64": "u64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


class Binary(NamedTuple):
    """One kernel as launched."""

    kernel: str
    configuration: str
    registers: int
    spills: int  # bytes
    shared: int  # bytes
    tensor_cores: str
    problem: str


def _kind(value: Any) -> str | None:
    """What Triton calls an argument; None for what it compiles in."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    if value is None or isinstance(value, bool):
        return None if value is None else "i1"
    if isinstance(value, int):
        if value == 1:
            return None
        return ("i32" if -(2**31) <= value < 2**31 else "i64") + (":16" if value % 16 == 0 else "")
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_type(value.base)}{value.block_shape}>"
    return "*" + _type(value)


def _type(t: Tensor) -> str:
    return TYPES[str(t.dtype).removeprefix("torch.")]


@contextmanager
def recorded() -> Iterator[list[dict[str, Any]]]:
    """Compile cases of the kernels launched inside, each once. Enter it within `cosup_fast.testing.count()`."""
    from triton.runtime.jit import JITFunction

    cases: list[dict[str, Any]] = []
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        options = {name: kwargs[name] for name in OPTIONS if kwargs.get(name) is not None}
        named = {name: value for name, value in kwargs.items() if name in self.arg_names}
        values = inspect.signature(self.fn).bind(*args, **named)
        values.apply_defaults()
        constexprs = {p.name for p in self.params if p.is_constexpr}
        signature, fixed = {}, {}
        for name, value in values.arguments.items():
            kind = None if name in constexprs else _kind(value)
            (fixed if kind is None else signature)[name] = value if kind is None else kind
        case = {"kernel": self, "signature": signature, "constexprs": fixed, "options": options}
        if case not in cases:
            cases.append(case)
        return launch(self, *args, grid=grid, warmup=warmup, **kwargs)

    with mock.patch.object(JITFunction, "run", run):
        yield cases


def compiled(cases: list[dict[str, Any]], target: str = TARGET) -> list[Binary]:
    """The binaries, outside of the interpreter."""
    from cosup_fast.testing import compile_case

    binaries = []
    for case in cases:
        made = compile_case(case, "", target)
        tiles = {name: value for name, value in case["constexprs"].items() if isinstance(value, int) and value > 8}
        configuration = ", ".join(f"{name} {value}" for name, value in {**tiles, **case["options"]}.items())
        cores = ", ".join(f"{number} {name}" for name, number in made.instructions.items() if "MMA" in name)
        # Spills are a figure here and no problem.
        problem = "; ".join(text for text in made.problems if "spilled" not in text)
        binaries.append(
            Binary(made.kernel, configuration, made.registers, made.spills, made.shared, cores or "none", problem)
        )
    return binaries
