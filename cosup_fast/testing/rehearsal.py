"""Launches rehearsed without a GPU: through Triton's own binder, specialiser and compiler, up to the driver.

`rehearse("sm_90")` pretends that the tensors of a launch, which may be on any device, are on such a GPU. Arguments are
bound, their values and addresses specialised, the kernel is compiled and kept under its key. Nothing runs: results hold
what their memory held.

It finds what the interpreter cannot: arguments that the compiler refuses, misspelt launch keywords, values whose
specialisation makes another binary, and what the host code passes rather than what a compile matrix declares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from triton import knobs
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from cosup_fast.testing.compile import TARGETS, Compiled, compile_source
from cosup_fast.testing.interpreter import Patches


@dataclass
class Specialization:
    """What one binary is compiled from."""

    kernel: JITFunction
    signature: dict[str, str]
    """Triton's type by argument; "constexpr" for values that are compiled in, such as None and 1."""
    constexprs: dict[str, Any]
    aligned: frozenset[str]
    """Integers that are multiples of 16 and pointers to such addresses."""
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def dtype(self) -> str:
        """The narrowest floating dtype behind a pointer or descriptor."""
        kinds = [kind.lstrip("*").removeprefix("tensordesc<").partition("[")[0] for kind in self.signature.values()]
        return next((dtype for dtype in ("fp16", "bf16", "fp32", "fp64") if dtype in kinds), "")

    def __str__(self) -> str:
        values = {name: value for name, value in self.constexprs.items() if value not in (None, False)}
        given = [f"{name} {kind}" for name, kind in self.signature.items() if kind != "constexpr"]
        return f"{self.name}({', '.join(given)}; {', '.join(f'{k}={v}' for k, v in values.items())})"


@dataclass
class Rehearsal:
    """What was launched, in order, and what was compiled for it."""

    target: str
    compiles: bool
    capturing: bool = False
    """Answers torch.cuda.is_current_stream_capturing()."""
    launches: list[str] = field(default_factory=list)
    specializations: list[Specialization] = field(default_factory=list)
    binaries: list[Compiled] = field(default_factory=list)

    def count(self) -> int:
        """Binaries that a GPU would hold by now."""
        return len(self.specializations)

    def made_by(self, run: Callable[[], Any]) -> list[Specialization]:
        """What a call compiles that was not there."""
        before = self.count()
        run()
        return self.specializations[before:]


@contextmanager
def rehearse(target: str = "sm_90", *, compile: bool = True) -> Iterator[Rehearsal]:
    """Within, Triton believes in a GPU of this kind, and launches end before its driver.

    Args:
        target: a key of `testing.compile.TARGETS`.
        compile: False binds and specialises only, which takes a millisecond a launch where compiling takes a second.

    Raises:
        ValueError: the target is unknown.
        RuntimeError: a rehearsal is open already, or kernels were imported for the interpreter.
    """
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}; choose from {', '.join(TARGETS)}")
    if knobs.runtime.interpret:
        raise RuntimeError("kernels were imported for the interpreter; unset TRITON_INTERPRET and leave interpret()")
    if isinstance(driver._active, _Driver):
        raise RuntimeError(f"a rehearsal on {driver._active.target} is open; leave it first")
    rehearsal = Rehearsal(target, compile)
    used: set[JITFunction] = set()
    fake = _Driver(target)

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        used.add(self)
        rehearsal.launches.append(self.fn.__name__)
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel is not None:
            sizes: Any = tuple(grid(kwargs)) if callable(grid) else grid  # pyright: ignore[reportArgumentType]
            if not 1 <= len(sizes) <= 3 or min(sizes) < 1 or sizes[0] >= 2**31 or max(sizes[1:], default=1) > 65535:
                raise ValueError(f"grid of {self.fn.__name__} is {sizes}, which no GPU launches")
        return kernel

    def specialise(self: JITFunction, key: Any, signature: dict, device: Any, *rest: Any) -> Any:
        constexprs, options, attrs, _ = rest
        cache, hook = self.device_caches[device][0], knobs.runtime.jit_cache_hook
        info: Any = SimpleNamespace(module=self.fn.__module__, name=self.fn.__qualname__, jit_function=self)
        given: Any = {"key": key, "signature": signature, "device": device}
        if hook is not None and hook(
            key=key, repr=info.name, fn=info, compile=given, is_manual_warmup=False, already_compiled=False
        ):
            return None
        names = list(signature)
        made = Specialization(
            self,
            signature,
            {names[path[0]]: value for path, value in constexprs.items()},
            frozenset(names[path[0]] for path, value in attrs.items() if value),
            dict(options.__dict__),
        )
        kernel: Any = object()
        if compile:
            source = ASTSource(self, signature, constexprs, attrs)
            kernel, figures = compile_source(source, made.name, made.dtype, target, made.options)
            rehearsal.binaries.append(figures)
        rehearsal.specializations.append(made)
        cache[key] = kernel
        return kernel

    launch, patches = JITFunction.run, Patches()
    patches.set(torch.cuda, "is_current_stream_capturing", lambda: rehearsal.capturing)
    patches.set(JITFunction, "run", run)
    patches.set(JITFunction, "_do_compile", specialise)
    patches.set(driver, "_active", fake)
    try:
        yield rehearsal
    finally:
        patches.restore()
        for kernel in used:
            kernel.device_caches.pop(fake, None)


class _Driver:
    """What Triton asks of a driver before a launch. It is its own device, so that no binary of another one is found."""

    def __init__(self, target: str):
        self.target = target

    def get_current_target(self) -> Any:
        return TARGETS[self.target].gpu()

    def get_current_device(self) -> _Driver:
        return self

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)
