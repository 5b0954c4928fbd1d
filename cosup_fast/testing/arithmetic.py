"""bf16 and tf32 as a GPU computes them, for Triton's interpreter, which holds bf16 as bare 16-bit patterns.

Uncorrected, the interpreter adds, compares and multiplies those patterns as integers, cuts fp32 off to bf16 instead of
rounding it, and runs tf32 products in fp32. Here bf16 operations run in fp32 and round once to nearest even, dots
multiply in fp32 and lose the 13 low bits of tf32 operands: Triton emits no conversion to tf32, so hardware drops them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.language.extra import libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

Replace = Callable[[Any, str, Callable[..., Any]], None]


def bf16_to_float(bits: np.ndarray) -> np.ndarray:
    """The fp32 values of bf16 patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float_to_bf16(x: np.ndarray, truncate: bool = False) -> np.ndarray:
    """The bf16 patterns nearest to fp32 values, ties to even; NaN stays NaN."""
    x = np.asarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    if not truncate:
        bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(x), np.uint32(0x7FC0), bits >> np.uint32(16)).astype(np.uint16)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """fp32 values without the 13 bits that a tf32 operand lacks."""
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def round_to_tf32(x: np.ndarray) -> np.ndarray:
    """fp32 values rounded to tf32, ties away from zero: cvt.rna.tf32.f32."""
    bits = x.view(np.uint32)
    return np.where(np.isfinite(x), to_tf32((bits + np.uint32(0x1000)).view(np.float32)), x)


INLINE_ASSEMBLY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "cvt.rna.tf32.f32 $0, $1;": round_to_tf32,
    "tanh.approx.f32 $0, $1;": np.tanh,
}
"""Inline PTX that runs in the interpreter, by its text; add what your kernels use."""


LIBDEVICE: dict[str, Callable[..., np.ndarray]] = {
    **{name: getattr(np, name) for name in ("ceil", "cos", "exp", "exp2", "expm1", "fabs", "floor", "fmod", "hypot")},
    **{name: getattr(np, name) for name in ("log", "log10", "log1p", "log2", "rint", "sin", "sqrt", "tan", "tanh")},
    "atan2": np.arctan2,
    "erf": np.vectorize(math.erf, otypes=[np.float64]),
    "pow": np.power,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}
"""What of libdevice runs in the interpreter, by the name without __nv_ and the f of fp32."""


def is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _wide(handle: TensorHandle) -> np.ndarray:
    return bf16_to_float(handle.data) if is_bf16(handle) else handle.data


def _narrow(data: np.ndarray) -> TensorHandle:
    if data.dtype == np.bool_:
        return TensorHandle(data, tl.int1)
    return TensorHandle(float_to_bf16(data), tl.bfloat16)


def dot_precision(a: TensorHandle, input_precision: Any) -> str:
    """What a dot multiplies in: bf16, fp16, tf32, tf32x3, fp32 (IEEE), fp64, fp8 or an integer type."""
    dtype = a.dtype.scalar
    if dtype == tl.float32:
        name = getattr(input_precision, "name", str(input_precision)).lower()
        return "fp32" if name == "ieee" else name
    return "fp8" if dtype.is_fp8() else str(dtype)


def _operand(handle: TensorHandle) -> np.ndarray:
    if handle.dtype.scalar.is_fp8():
        half = interpreter._convert_float(handle.data, handle.dtype, tl.float16, None)  # pyright: ignore
        return half.view(np.float16).astype(np.float32)
    data = _wide(handle)
    return data.astype(np.float32) if data.dtype == np.float16 else data


def dot(a: TensorHandle, b: TensorHandle, d: TensorHandle, input_precision: Any) -> TensorHandle:
    """a @ b + d with the operands' precision, fp32 products and sums, rounded once to the type of d."""
    x, y = _operand(a), _operand(b)
    precision = dot_precision(a, input_precision)
    if precision == "tf32":
        z = np.matmul(to_tf32(x), to_tf32(y))
    elif precision == "tf32x3":
        x_high, y_high = to_tf32(x), to_tf32(y)
        x_low, y_low = to_tf32(x - x_high), to_tf32(y - y_high)
        z = (np.matmul(x_low, y_high) + np.matmul(x_high, y_low)) + np.matmul(x_high, y_high)
    else:
        z = np.matmul(x, y, dtype=d.data.dtype if x.dtype.kind in "iu" else None)
    z = z + _wide(d)
    return _narrow(z) if is_bf16(d) else TensorHandle(z.astype(d.data.dtype), d.dtype.scalar)


def correct(replace: Replace) -> None:
    """Replaces what is wrong for bf16 or for NaN in Triton's interpreter, and adds what is missing."""
    builder = InterpreterBuilder
    binary_op, unary_op, ternary_op = builder.binary_op, builder.unary_op, builder.ternary_op
    cast_impl, fp_to_fp, fma = builder.cast_impl, builder.create_fp_to_fp, builder.create_fma
    rsqrt, erf, load_by_descriptor = builder.create_rsqrt, builder.create_erf, builder.create_descriptor_load

    def binary(self, lhs, rhs, op):
        if is_bf16(lhs):
            return _narrow(op(_wide(lhs), _wide(rhs)))
        return binary_op(self, lhs, rhs, op)

    def unary(self, arg, op):
        return _narrow(op(_wide(arg))) if is_bf16(arg) else unary_op(self, arg, op)

    def ternary(self, lhs, rhs, other, op):
        if is_bf16(lhs):  # a select has a mask here, and its patterns need no arithmetic
            return _narrow(op(_wide(lhs), _wide(rhs), _wide(other)))
        return ternary_op(self, lhs, rhs, other, op)

    def cast(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return cast_impl(self, src, dst_type)
        if source.is_fp8() or target.is_fp8():
            return fp_to_fp_right(self, src, dst_type, None)
        if target == tl.bfloat16:
            return TensorHandle(float_to_bf16(src.data.astype(np.float32)), tl.bfloat16)
        wide = TensorHandle(_wide(src), tl.float32)
        return wide if target == tl.float32 else cast_impl(self, wide, dst_type)

    def fp_to_fp_right(self, src, dst_type, rounding_mode):
        source, target, wide = src.dtype.scalar, dst_type.scalar, src
        if is_bf16(src):
            wide = TensorHandle(_wide(src), tl.float32)
        elif source.is_fp8() and target == tl.bfloat16:
            wide = fp_to_fp(self, src, tl.float32, rounding_mode)
        truncate = rounding_mode == ir.ROUNDING_MODE.RTZ
        if target == tl.bfloat16:
            return TensorHandle(float_to_bf16(wide.data.astype(np.float32), truncate), tl.bfloat16)
        if truncate or source.is_fp8() or target.is_fp8():
            return fp_to_fp(self, wide, dst_type, rounding_mode)
        # Triton's own rounding to nearest loses the carry into the exponent; numpy's does not.
        return cast_impl(self, wide, dst_type)

    def fma_right(self, x, y, z):
        if z.dtype.scalar == tl.float32:  # in fp64 the product is whole, as in an fma
            return TensorHandle((x.data.astype(np.float64) * y.data + z.data).astype(np.float32), tl.float32)
        return _narrow(_wide(x) * _wide(y) + _wide(z)) if is_bf16(z) else fma(self, x, y, z)

    def inline_assembly(self, text, constraints, values, types, is_pure, pack):
        function = INLINE_ASSEMBLY.get(" ".join(text.split()))
        if function is None:
            raise NotImplementedError(f"inline assembly {text!r}; add it to cosup_fast.testing.arithmetic")
        (value,) = values
        result = TensorHandle(function(value.data), value.dtype.scalar)
        return SimpleNamespace(get_result=lambda _: result)

    def extern_elementwise(self, library, path, symbol, values, dtype, is_pure):
        name = symbol.removeprefix("__nv_")
        function = LIBDEVICE.get(name) or LIBDEVICE.get(name.removesuffix("f"))
        if function is None:
            raise NotImplementedError(f"libdevice's {symbol}; add it to cosup_fast.testing.arithmetic")
        result = function(*(value.data for value in values))
        return TensorHandle(result.astype(values[0].data.dtype), values[0].dtype.scalar)

    def descriptor_load(self, desc, indices, *args, **kwargs):
        out = load_by_descriptor(self, desc, indices, *args, **kwargs)
        if is_bf16(out) and desc.padding == ir.PADDING_OPTION.PAD_NAN:
            _, mask = desc.materialize_pointers(indices)
            out.data[~np.asarray(mask.data)] = 0x7FC0
        return out

    def through_fp32(function):
        def right(self, arg):
            if not is_bf16(arg):
                return function(self, arg)
            return _narrow(function(self, TensorHandle(_wide(arg), tl.float32)).data)

        return right

    replace(builder, "binary_op", binary)
    replace(builder, "unary_op", unary)
    replace(builder, "ternary_op", ternary)
    replace(builder, "cast_impl", cast)
    replace(builder, "create_fp_to_fp", fp_to_fp_right)
    replace(builder, "create_fma", fma_right)
    replace(builder, "create_rsqrt", through_fp32(rsqrt))
    replace(builder, "create_erf", through_fp32(erf))
    replace(builder, "create_dot", lambda self, a, b, d, input_precision, _: dot(a, b, d, input_precision))
    replace(builder, "create_descriptor_load", descriptor_load)
    replace(builder, "create_inline_asm", inline_assembly)
    replace(builder, "create_extern_elementwise", extern_elementwise)
    for name, function in vars(cuda_libdevice).items():
        if callable(function) and name in vars(libdevice):  # there they are empty, for the compiler to fill in
            replace(libdevice, name, partial(function, _semantic=interpreter.interpreter_semantic))
    replace(
        builder, "get_bf16", lambda self, value: TensorHandle(float_to_bf16(np.array([value], np.float32)), tl.bfloat16)
    )
    # A GPU's default maximum and minimum take the number where the other operand is NaN.
    replace(builder, "create_maxnumf", lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax))
    replace(builder, "create_minnumf", lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin))
    replace(ReduceOps, "apply_impl", _in_fp32(ReduceOps.apply_impl))
    replace(ScanOps, "apply_impl", _in_fp32(ScanOps.apply_impl))


def _in_fp32(apply):
    """Reductions and scans of bf16 accumulate in fp32 and round once."""

    def retyped(x, data, dtype):
        shape = [int(n) for n in x.type.shape] if x.type.is_block() else None
        return tl.core.tensor(TensorHandle(data, dtype), dtype if shape is None else tl.block_type(dtype, shape))

    def right(self, inputs):
        if not any(is_bf16(x.handle) for x in inputs):
            return apply(self, inputs)
        wide = tuple(retyped(x, _wide(x.handle), tl.float32) if is_bf16(x.handle) else x for x in inputs)
        out = apply(self, wide)
        several = out if isinstance(out, (list, tuple)) else [out]
        back = [retyped(x, float_to_bf16(x.handle.data), tl.bfloat16) if x.dtype == tl.float32 else x for x in several]
        return back if isinstance(out, (list, tuple)) else back[0]

    return right
