"""Triton's interpreter made right: kernels run on CPU tensors with a GPU's rounding, and no address goes unchecked.

`interpret()` works whether or not TRITON_INTERPRET was set when the kernels were imported: for its duration a
`@triton.jit` function, launched or called from a kernel, runs as an interpreted one, and everything is put back after.

Each tensor of a launch gets a range of addresses of its own, so far from the others that whatever a kernel adds to a
pointer, the address still tells which argument it came from. A tensor on the meta device takes part without memory: it
reads as zero and drops what is stored, so that offsets beyond 2^31 can be run. `Observer`s see every access.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from math import prod
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import triton
import triton.knobs
import triton.language as tl
from triton.runtime import interpreter, jit
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

from cosup_fast.testing import arithmetic
from cosup_fast.testing.launch import (
    REGION_BITS,
    Access,
    Launch,
    Observer,
    OutOfBoundsError,
    Region,
    describe_out_of_bounds,
)

Programs = Literal["all", "corners"] | Callable[[tuple[int, int, int]], bool]


class _Session:
    def __init__(self, programs: Programs):
        self.programs = programs
        self.observers: list[Observer] = []
        self.launch: Launch | None = None
        self.silent = False

    @property
    def listeners(self) -> list[Observer]:
        return [] if self.silent else self.observers

    def translate(
        self, kind: Literal["load", "store", "atomic"], ptrs: TensorHandle, mask: Any, values: Any = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Addresses of memory, and which lanes touch it, lie out of bounds, belong to a virtual tensor."""
        assert self.launch is not None
        address = ptrs.data
        active = np.broadcast_to(np.asarray(mask), address.shape)
        real = np.zeros(address.shape, np.uint64)
        live, bad, virtual = (np.zeros(address.shape, bool) for _ in range(3))
        lanes = np.flatnonzero(active)
        if not lanes.size:
            return real, live, bad, virtual
        flat = address.reshape(-1)[lanes]
        stored = None if values is None else np.broadcast_to(values, address.shape).reshape(-1)[lanes]
        itemsize = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        owners = flat >> np.uint64(REGION_BITS)
        first = owners[0]
        for owner in [first] if (owners == first).all() else np.unique(owners):
            here = slice(None) if owner == first and (owners == first).all() else owners == owner
            where, number = lanes[here], int(owner) - 1
            region = self.launch.regions[number] if 0 <= number < len(self.launch.regions) else None
            base = 0 if region is None else region.base
            offsets = (flat[here] - np.uint64(base)).astype(np.int64)
            access = Access(kind, self.launch, region, offsets, itemsize, None if stored is None else stored[here])
            good = np.zeros(len(offsets), bool) if region is None else region.inside(offsets, itemsize)
            if not good.all():
                bad.reshape(-1)[where[~good]] = True
                self._out_of_bounds(access.at(~good))
                access = access.at(good)
            if region is None or not len(access.offsets):
                continue
            if region.virtual:
                virtual.reshape(-1)[where[good]] = True
            else:
                live.reshape(-1)[where[good]] = True
                real.reshape(-1)[where[good]] = access.offsets.astype(np.uint64) + np.uint64(region.tensor.data_ptr())
            for observer in self.listeners:
                observer.access(access)
        return real, live, bad, virtual

    def _out_of_bounds(self, access: Access) -> None:
        handled = [observer.out_of_bounds(access) for observer in self.listeners]
        if self.silent or any(handled):
            return
        raise OutOfBoundsError(describe_out_of_bounds(access))

    def execute(self, kernel: str, fn: Callable, constexprs: set[str], grid: Any, args: tuple, kwargs: dict) -> None:
        spec = inspect.getfullargspec(fn)
        taken = {*spec.args, *spec.kwonlyargs}
        if unknown := kwargs.keys() - taken - _launch_options():
            raise KeyError(f"Keyword argument {min(unknown)} was specified but unrecognised")  # in a GPU's words
        kwargs = {k: v for k, v in kwargs.items() if k in taken}
        named = inspect.getcallargs(fn, *args, **kwargs)
        sizes: list[int] = list(map(int, grid(named) if callable(grid) else grid))  # pyright: ignore
        if len(sizes) > 3:
            raise ValueError(f"grid of {kernel} is {tuple(sizes)}; a grid has at most 3 dimensions")
        nx, ny, nz = (*sizes, 1, 1, 1)[:3]
        shape = (nx, ny, nz)
        if self.launch is not None:
            raise RuntimeError(f"{kernel} is launched from within {self.launch.kernel}")
        self.launch = launch = Launch(kernel, shape, [])
        undo, language = Patches(), None
        try:
            # All of the language at once: Triton patches it again at each call of a device function, and leaves it so.
            language = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
            undo.set(tl.tensor, "__index__", lambda self: int(self.handle.data.squeeze()))
            undo.set(interpreter, "_implicit_cvt", self._convert(interpreter._implicit_cvt))
            converted = {}
            for name, value in named.items():
                self.argument = name
                converted[name] = value if name in constexprs else interpreter._implicit_cvt(value)
            interpreter.interpreter_builder.set_grid_dim(*shape)

            def run(seed: int | None = None) -> None:
                self.silent = seed is not None
                try:
                    with np.errstate(all="ignore"), warnings.catch_warnings():
                        warnings.simplefilter(
                            "ignore", RuntimeWarning
                        )  # numpy's, on NaN that a GPU passes on in silence
                        for program in self._order(shape, seed):
                            launch.program = program
                            interpreter.interpreter_builder.set_grid_idx(*program)
                            fn(**converted)
                except Exception as error:
                    error.add_note(f"in program {launch.program} of {kernel}, grid {shape}")
                    raise
                finally:
                    self.silent = False

            for observer in self.observers:
                observer.start(launch)
            run()
            for observer in self.observers:
                observer.finish(launch, run)
        finally:
            undo.restore()
            if language is not None:
                language.restore()
            self.launch = None

    def _order(self, grid: tuple[int, int, int], seed: int | None) -> Iterable[tuple[int, int, int]]:
        xs, ys, zs = (sorted({0, n - 1} if n else ()) if self.programs == "corners" else range(n) for n in grid)
        order: Iterable[tuple[int, int, int]] = itertools.product(xs, ys, zs)
        if callable(self.programs):
            order = filter(self.programs, order)
        if seed is not None:
            order = list(order)[::-1]
            if seed:
                random.Random(seed).shuffle(order)
        return order

    def _convert(self, convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Arguments as a GPU gets them: floats are fp32 scalars, pointers lie in ranges of their own."""

        def right(arg: Any) -> Any:
            if isinstance(arg, bool):
                return tl.tensor(TensorHandle(np.array([arg]), tl.int1), tl.int1)
            if isinstance(arg, float):
                return tl.tensor(TensorHandle(np.array([arg], np.float32), tl.float32), tl.float32)
            if not hasattr(arg, "data_ptr"):
                return convert(arg)
            assert self.launch is not None
            tensor = arg.base if isinstance(arg, jit.TensorWrapper) else arg
            if tensor.device.type not in ("cpu", "meta"):
                raise ValueError(
                    f"{self.argument} of {self.launch.kernel} is on {tensor.device}; the interpreter takes CPU tensors"
                )
            regions = self.launch.regions
            count = sum(region.argument.partition("[")[0] == self.argument for region in regions)
            base = ((len(regions) + 1) << REGION_BITS) + (1 << (REGION_BITS - 1)) + tensor.data_ptr() % 4096
            regions.append(Region(f"{self.argument}[{count}]" if count else self.argument, tensor, base))
            pointer = convert(arg)
            pointer.handle.data = np.array([base], np.uint64)
            return pointer

        return right


_sessions: list[_Session] = []
"""The open session, if any."""


class Patches:
    """Attributes replaced for a while."""

    def __init__(self) -> None:
        self.saved: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        missing = name not in vars(owner)
        self.saved.append((owner, name, self if missing else vars(owner)[name]))
        setattr(owner, name, value)

    def restore(self) -> None:
        while self.saved:
            owner, name, value = self.saved.pop()
            if value is self:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


_interpreted: dict[Callable, Callable] = {}


def _rewritten(function: Any) -> Callable:
    """A jitted function's Python, made runnable by Triton's interpreter without leaving names in its module."""
    fn = function.fn
    if fn not in _interpreted:
        before = set(fn.__globals__)
        _interpreted[fn] = InterpretedFunction(fn).rewrite()
        for name in set(fn.__globals__) - before - {"interpreter_semantic", "_InterpreterComparison"}:
            del fn.__globals__[name]
    return _interpreted[fn]


def _constexprs(fn: Callable) -> set[str]:
    annotations = inspect.get_annotations(fn)
    return {name for name, kind in annotations.items() if "constexpr" in (kind if isinstance(kind, str) else str(kind))}


@functools.cache
def _launch_options() -> frozenset[str]:
    """Keywords that a launch takes beside the kernel's arguments."""
    from triton.backends.amd.compiler import HIPOptions
    from triton.backends.nvidia.compiler import CUDAOptions

    return frozenset(option.name for kind in (CUDAOptions, HIPOptions) for option in fields(kind))


def _run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
    """Launches a jitted kernel in the interpreter."""
    if warmup:
        return
    for hook in self.pre_run_hooks:
        hook(*args, **kwargs)
    _sessions[-1].execute(self.fn.__name__, _rewritten(self), _constexprs(self.fn), grid, args, kwargs)


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a device function from a kernel."""
    if _sessions[-1].launch is None:
        raise RuntimeError(f"{self.fn.__name__} is a device function: it can be called from a kernel only")
    return _rewritten(self)(*args, **kwargs)


def _first_config(run: Callable) -> Callable:
    def first(self: Any, *args: Any, **kwargs: Any) -> Any:
        configs = self.configs
        self.configs = configs[:1]
        try:
            return run(self, *args, **kwargs)
        finally:
            self.configs = configs

    return first


def _poison(dtype: np.dtype) -> Any:
    if dtype.kind == "f":
        return np.nan
    return dtype.kind == "b" or (0x7FC0 if dtype == np.uint16 else np.iinfo(dtype).max // 2)


def _correct_memory(patches: Patches) -> None:
    builder = InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    atomic_rmw, atomic_cas = builder.create_atomic_rmw, builder.create_atomic_cas

    def handles(ptrs: TensorHandle, real: np.ndarray, live: np.ndarray) -> tuple[TensorHandle, TensorHandle]:
        return TensorHandle(real, ptrs.dtype), TensorHandle(live, tl.int1)

    def right_load(self, ptrs, mask, other, *args, **kwargs):
        real, live, bad, virtual = _sessions[-1].translate("load", ptrs, mask.data)
        out = load(self, *handles(ptrs, real, live), other, *args, **kwargs)
        out.data[bad] = _poison(out.data.dtype)
        out.data[virtual] = 0
        return out

    def right_store(self, ptrs, value, mask, *args, **kwargs):
        real, live, _, _ = _sessions[-1].translate("store", ptrs, mask.data, value.data)
        return store(self, TensorHandle(real, ptrs.dtype), value, TensorHandle(live, tl.int1), *args, **kwargs)

    def right_rmw(self, op, ptr, val, mask, sem, scope):
        real, live, _, _ = _sessions[-1].translate("atomic", ptr, mask.data)
        pointers, mask = handles(ptr, real, live)
        if not arithmetic.is_bf16(val):
            return atomic_rmw(self, op, pointers, val, mask, sem, scope)
        if not op.name.endswith("ADD"):
            raise NotImplementedError(f"atomic {op.name} of bf16: the interpreter only adds it")
        out = np.zeros_like(val.data)
        for lane in zip(*np.nonzero(mask.data)):  # one after the other: two lanes may name one element
            one = TensorHandle(real[lane].reshape(1), ptr.dtype), TensorHandle(np.ones(1, bool), tl.int1)
            old = interpreter._interpreter.load(one[0].data, one[1].data, np.zeros(1, np.uint16), np.dtype(np.uint16))
            out[lane] = old[0]
            total = arithmetic.bf16_to_float(old) + arithmetic.bf16_to_float(val.data[lane].reshape(1))
            interpreter._interpreter.store(one[0].data, arithmetic.float_to_bf16(total), one[1].data)
        return TensorHandle(out, tl.bfloat16)

    def right_cas(self, ptr, cmp, val, sem, scope):
        real, live, _, _ = _sessions[-1].translate("atomic", ptr, np.ones(ptr.data.shape, bool))
        if not live.all():
            return TensorHandle(np.zeros_like(cmp.data), cmp.dtype.scalar)
        return atomic_cas(self, TensorHandle(real, ptr.dtype), cmp, val, sem, scope)

    patches.set(builder, "create_masked_load", right_load)
    patches.set(builder, "create_masked_store", right_store)
    patches.set(builder, "create_atomic_rmw", right_rmw)
    patches.set(builder, "create_atomic_cas", right_cas)


def _announce(patches: Patches) -> None:
    """Tells observers of dots and of int32 overflow."""
    builder = InterpreterBuilder
    dot, binary_op = builder.create_dot, builder.binary_op
    signs = {np.add: "+", np.subtract: "-", np.multiply: "*"}

    def told_dot(self, a, b, d, input_precision, *args):
        session = _sessions[-1]
        assert session.launch is not None
        for observer in session.listeners:
            flops = 2 * prod(a.data.shape) * b.data.shape[-1]
            observer.dot(session.launch, arithmetic.dot_precision(a, input_precision), flops)
        return dot(self, a, b, d, input_precision, *args)

    def told_binary_op(self, lhs, rhs, op):
        session = _sessions[-1]
        if op in signs and session.launch and session.listeners and lhs.dtype.scalar == tl.int32:
            left, right = lhs.data.astype(np.int64), rhs.data.astype(np.int64)
            exact = op(left, right)
            wrong = (exact < -(2**31)) | (exact >= 2**31)
            if wrong.any():
                left, right = (np.broadcast_to(x, exact.shape)[wrong].flat[0] for x in (left, right))
                for observer in session.listeners:
                    observer.overflow(session.launch, signs[op], int(left), int(right))
        return binary_op(self, lhs, rhs, op)

    patches.set(builder, "create_dot", told_dot)
    patches.set(builder, "binary_op", told_binary_op)


@contextmanager
def interpret(*, programs: Programs = "all") -> Iterator[None]:
    """Runs the Triton kernels launched inside on CPU tensors, in Triton's interpreter made right.

    An unmasked lane outside the tensor its pointer came from raises `OutOfBoundsError`. Within, TRITON_INTERPRET reads
    as set. Autotuned kernels run their first configuration. Contexts nest, `sanitize` and `count` open one of their
    own; one process-wide, so keep it to one thread.

    Args:
        programs: "all"; "corners", the programs at both ends of each grid dimension, for grids too large to run; or a
            function of the program id that says whether to run it.
    """
    if _sessions:
        session, outer = _sessions[-1], _sessions[-1].programs
        session.programs = outer if programs == "all" else programs
        try:
            yield
        finally:
            session.programs = outer
        return
    patches, interpreting = Patches(), triton.knobs.runtime.interpret
    _sessions.append(_Session(programs))
    with triton.knobs.runtime.scope():
        try:
            arithmetic.correct(patches.set)
            _correct_memory(patches)
            _announce(patches)
            for function in (jit.JITFunction, InterpretedFunction):
                patches.set(function, "run", _run)
                patches.set(function, "__call__", _call)
            patches.set(Autotuner, "run", _first_config(Autotuner.run))
            if not interpreting:
                # What is jitted meanwhile stays compilable.
                patches.set(interpreter, "InterpretedFunction", jit.JITFunction)
                triton.knobs.runtime.interpret = True
            yield
        finally:
            _sessions.pop()
            patches.restore()


@contextmanager
def observe(observer: Observer, *, programs: Programs = "all") -> Iterator[None]:
    """`interpret`, with an observer."""
    with interpret(programs=programs):
        observers = _sessions[-1].observers
        observers.append(observer)
        try:
            yield
        finally:
            observers.remove(observer)
