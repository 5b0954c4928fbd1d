"""Triton's interpreter, corrected: arithmetic against torch's, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton's wheels are for Linux")
tl = pytest.importorskip("triton.language")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.language.extra import libdevice  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from cosup_fast.testing import examples, interpret  # noqa: E402
from cosup_fast.testing.launch import OutOfBoundsError  # noqa: E402

BF16 = torch.bfloat16


@triton.jit
def arithmetic_kernel(x, y, out, OP: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    a, b = tl.load(x + o), tl.load(y + o)
    if OP == "add":
        c = a + b
    elif OP == "subtract":
        c = a - b
    elif OP == "multiply":
        c = a * b
    elif OP == "divide":
        c = (a / b).to(out.dtype.element_ty)
    elif OP == "negate":
        c = -a
    elif OP == "maximum":
        c = tl.maximum(a, b)
    elif OP == "greater":
        c = tl.where(a > b, a, b)
    elif OP == "abs":
        c = tl.abs(a)
    elif OP == "fma":
        c = tl.fma(a, b, a)
    elif OP == "scalar":
        c = a * 3 + tl.full((N,), 0.1, x.dtype.element_ty)
    else:
        c = tl.clamp(a, -0.5, 0.25)
    tl.store(out + o, c)


def rounded(kernel_out: Tensor, fp32: Tensor) -> None:
    torch.testing.assert_close(kernel_out, fp32.to(kernel_out.dtype), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("add", lambda a, b: a + b),
        ("subtract", lambda a, b: a - b),
        ("multiply", lambda a, b: a * b),
        ("divide", lambda a, b: a / b),
        ("negate", lambda a, b: -a),
        ("maximum", torch.maximum),
        ("greater", torch.maximum),
        ("abs", lambda a, b: a.abs()),
        ("fma", lambda a, b: a * b + a),
        ("scalar", lambda a, b: (a * 3).to(BF16).float() + torch.tensor(0.1, dtype=BF16).float()),
        ("clamp", lambda a, b: a.clamp(-0.5, 0.25)),
    ],
)
def test_bf16_arithmetic_is_fp32_rounded_once(op, expected):
    torch.manual_seed(0)
    x, y = torch.randn(2, 256).to(BF16)
    out = torch.empty_like(x)
    with interpret():
        arithmetic_kernel[(1,)](x, y, out, OP=op, N=256)
    rounded(out, expected(x.float(), y.float()))


@triton.jit
def cast_kernel(x, out, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(out + o, tl.load(x + o).to(out.dtype.element_ty))


EDGES = torch.tensor(
    [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -torch.inf, torch.inf, 3.4e38, 1e-40]
)


@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.float16, torch.int32, BF16], ids=str)
@pytest.mark.parametrize("target", [BF16, torch.float32, torch.float16, torch.float64, torch.int32], ids=str)
def test_casts_round_to_nearest_even(source, target):
    torch.manual_seed(0)
    x = 100 * torch.randn(1024)
    if torch.int32 not in (source, target):
        x[: len(EDGES)] = EDGES
    x = x.to(source)
    out = torch.empty(1024, dtype=target)
    with interpret():
        cast_kernel[(1,)](x, out, N=1024)
    torch.testing.assert_close(out, x.to(target), rtol=0, atol=0)


@triton.jit
def downcast_kernel(x, out, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(out + o, tl.load(x + o).to(out.dtype.element_ty, fp_downcast_rounding="rtne"))
    tl.store(out + N + o, tl.load(x + o).to(out.dtype.element_ty, fp_downcast_rounding="rtz"))


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_the_rounding_a_kernel_asks_for(dtype):
    torch.manual_seed(0)
    x = torch.cat([torch.randn(1020), torch.tensor([1.9999, -1.9999, 1 + 2**-8, 1 + 2**-11])])
    out = torch.empty(2048, dtype=dtype)
    with interpret():
        downcast_kernel[(1,)](x, out, N=1024)
    assert out[:1024].equal(x.to(dtype))
    cut = (x.view(torch.int32) & (~0xFFFF if dtype == BF16 else ~0x1FFF)).view(torch.float32)
    assert out[1024:].equal(cut.to(dtype))


def test_nan_stays_nan():
    x, out = torch.full((4,), torch.nan), torch.empty(4, dtype=BF16)
    with interpret():
        cast_kernel[(1,)](x, out, N=4)
    assert out.isnan().all()


@triton.jit
def reduce_kernel(x, out, R: tl.constexpr, C: tl.constexpr):
    o = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    b_x = tl.load(x + o)
    tl.store(out + tl.arange(0, R), tl.sum(b_x, 1))
    tl.store(out + R + tl.arange(0, R), tl.max(b_x, 1).to(x.dtype.element_ty))
    tl.store(out + 2 * R + o, tl.cumsum(b_x, 1).to(x.dtype.element_ty))


def test_bf16_reductions_and_scans():
    torch.manual_seed(0)
    x = torch.randn(8, 64).to(BF16)
    out = torch.empty(16 + 512, dtype=BF16)
    with interpret():
        reduce_kernel[(1,)](x, out, R=8, C=64)
    torch.testing.assert_close(out[:8], x.float().sum(1).to(BF16), rtol=2**-8, atol=0)
    assert out[8:16].equal(x.amax(1))
    torch.testing.assert_close(out[16:].view(8, 64).float(), x.float().cumsum(1), rtol=2**-7, atol=2**-5)


@triton.jit
def scatter_add_kernel(x, index, out, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.atomic_add(out + tl.load(index + o), tl.load(x + o))


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_atomic_addition(dtype):
    x, index = torch.arange(8.0).to(dtype), torch.tensor([0, 1, 0, 1, 2, 2, 2, 0])
    out = torch.ones(4, dtype=dtype)
    with interpret():
        scatter_add_kernel[(1,)](x, index, out, N=8)
    assert out.tolist() == [1 + 0 + 2 + 7, 1 + 1 + 3, 1 + 4 + 5 + 6, 1]


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_dots(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(33, 70).to(dtype), torch.randn(70, 20).to(dtype)
    with interpret():
        c = examples.matmul(a, b)
    exact = a.double() @ b.double()
    ideal = (exact.to(dtype).double() - exact).norm()
    assert (c.double() - exact).norm() <= 1.1 * ideal + 1e-6 * exact.norm()


def test_tf32_drops_thirteen_bits_of_the_operands():
    torch.manual_seed(0)
    a, b = torch.randn(16, 32), torch.randn(32, 16)
    with interpret():
        tf32, x3, ieee = (examples.matmul(a, b, precision) for precision in ("tf32", "tf32x3", "ieee"))
    cut_a, cut_b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    torch.testing.assert_close(tf32, cut_a @ cut_b, rtol=1e-6, atol=1e-5)
    exact = a.double() @ b.double()
    errors = [(c.double() - exact).norm() / exact.norm() for c in (tf32, x3, ieee)]
    assert errors[0] > 1e-4
    assert errors[1] < 2e-6
    assert errors[2] < 2e-6


@triton.jit
def padding_kernel(d, out, B: tl.constexpr):
    o = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    tl.store(out + o, d.load([B // 2, 0]))


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_a_descriptor_pads_with_nan_where_asked(dtype):
    d, out = TensorDescriptor(torch.ones(8, 8, dtype=dtype), [8, 8], [8, 1], [8, 8], "nan"), torch.empty(8, 8)
    with interpret():
        padding_kernel[(1,)](d, out, B=8)
    assert out[:4].equal(torch.ones(4, 8))
    assert out[4:].isnan().all()


@triton.jit
def scaled_kernel(x, scale, out, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(out + o, (tl.load(x + o) * scale).to(tl.float32))


def test_a_float_argument_is_an_fp32_scalar_that_widens_bf16():
    x, out = torch.randn(8).to(BF16), torch.empty(8)
    with interpret():
        scaled_kernel[(1,)](x, 0.3, out, N=8)
    assert out.equal(x.float() * torch.tensor(0.3))


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing compiles")
def test_the_compiler_widens_bf16_by_a_float_argument():
    signature = {"x": "*bf16", "scale": "fp32", "out": "*fp32", "N": "constexpr"}
    source = triton.compiler.ASTSource(scaled_kernel, signature, {"N": 8})
    ttir = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
    assert "arith.extf" in ttir
    assert "arith.truncf" not in ttir


@triton.jit
def assembly_kernel(x, out, ASM: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    b_x = tl.load(x + o)
    tl.store(out + o, tl.inline_asm_elementwise(ASM, "=r, r", [b_x], dtype=tl.float32, is_pure=True, pack=1))


def test_known_inline_assembly():
    x, out = torch.tensor([1.0, 1 + 2**-11, -1 - 2**-11, 1 + 2**-12, torch.inf, -3.0, 0.0, 1e30]), torch.empty(8)
    with interpret():
        assembly_kernel[(1,)](x, out, ASM="cvt.rna.tf32.f32 $0, $1;", N=8)
        assert out[:7].tolist() == [1, 1 + 2**-10, -1 - 2**-10, 1, torch.inf, -3, 0]
        with pytest.raises(NotImplementedError, match=r"inline assembly 'ex2\.approx\.f32"):
            assembly_kernel[(1,)](x, out, ASM="ex2.approx.f32 $0, $1;", N=8)


@triton.jit
def libdevice_kernel(x, out, NAME: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    b_x = tl.load(x + o)
    if NAME == "tanh":
        b_y = libdevice.tanh(b_x)
    elif NAME == "erf":
        b_y = libdevice.erf(b_x)
    elif NAME == "pow":
        b_y = libdevice.pow(tl.abs(b_x), b_x)
    else:
        b_y = libdevice.acosh(b_x)
    tl.store(out + o, b_y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_libdevice(dtype):
    torch.manual_seed(0)
    x, out = torch.randn(64, dtype=dtype), torch.empty(64, dtype=dtype)
    with interpret():
        for name, expected in (("tanh", x.tanh()), ("erf", x.erf()), ("pow", x.abs() ** x)):
            libdevice_kernel[(1,)](x, out, NAME=name, N=64)
            torch.testing.assert_close(out, expected)
        with pytest.raises(NotImplementedError, match="libdevice's __nv_acosh"):
            libdevice_kernel[(1,)](x, out, NAME="acosh", N=64)


@triton.jit
def scalars_kernel(out, flag, alpha, n, none, N: tl.constexpr):
    o = tl.arange(0, N)
    b_out = tl.zeros((N,), dtype=tl.float32)
    if flag:
        b_out += alpha
    for i in range(n):
        b_out += i
    if none is not None:
        b_out += 100
    tl.store(out + o, b_out)


def test_scalar_arguments_are_what_a_gpu_gets():
    out = torch.empty(4)
    with interpret():
        scalars_kernel[(1,)](out, True, 0.1, 4, None, N=4)
        assert out.equal(torch.full((4,), 0.1) + 0 + 1 + 2 + 3)
        scalars_kernel[lambda meta: (meta["n"],)](out, False, 0.1, 1, None, N=4)
    assert out.tolist() == [0] * 4


@triton.autotune([triton.Config({"N": 8}), triton.Config({"N": 4})], key=[])
@triton.heuristics({"TWICE": lambda args: args["x"].numel() > 2})
@triton.jit
def tuned_kernel(x, out, N: tl.constexpr, TWICE: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(out + o, tl.load(x + o) * (2 if TWICE else 1))


def test_autotuned_kernels_run_their_first_configuration():
    x, out = torch.arange(8.0), torch.zeros(8)
    with interpret():
        tuned_kernel[(1,)](x, out)
    assert out.equal(2 * x)
    assert len(tuned_kernel.configs) == 2


@triton.jit
def past_the_end_kernel(x, out, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(out + o, tl.load(x + o))


def test_an_address_out_of_bounds_is_an_error_not_a_crash():
    with interpret(), pytest.raises(OutOfBoundsError, match=r"load by program \(0, 0, 0\) .* outside x \(6,\): index"):
        past_the_end_kernel[(1,)](torch.ones(6), torch.empty(8), N=8)


def test_meta_tensors_take_part_without_memory():
    x = torch.empty(2**33, device="meta")
    out = torch.ones(8)
    with interpret():
        past_the_end_kernel[(1,)](x, out, N=8)
    assert out.equal(torch.zeros(8))


@triton.jit
def programs_kernel(out, WIDTH: tl.constexpr):
    tl.store(out + tl.program_id(0) * WIDTH + tl.program_id(1), 1)


def test_programs_can_be_chosen():
    out = torch.zeros(5, 7, dtype=torch.int32)
    with interpret(programs="corners"):
        programs_kernel[(5, 7)](out, WIDTH=7)
    assert out.nonzero().tolist() == [[0, 0], [0, 6], [4, 0], [4, 6]]
    out.zero_()
    with interpret(), interpret(programs=lambda program: program[0] == 2):
        programs_kernel[(5, 7)](out, WIDTH=7)
    assert out.sum(1).tolist() == [0, 0, 7, 0, 0]


def test_errors_name_the_program():
    with interpret(), pytest.raises(ValueError) as error:
        past_the_end_kernel[(1, 1, 1, 1)](torch.ones(8), torch.empty(8), N=8)
    assert "at most 3 dimensions" in str(error.value)
    with interpret(), pytest.raises(Exception) as error:
        past_the_end_kernel[(2,)](torch.ones(8), None, N=8)
    assert any("in program (0, 0, 0) of past_the_end_kernel" in note for note in error.value.__notes__)


def test_nothing_is_left_behind():
    def state():
        kinds = (tl, tl.core, tl.tensor, tl.math, tl.dtype, triton.runtime.interpreter.InterpreterBuilder)
        kinds += (triton.runtime.jit.JITFunction, triton.runtime.interpreter, triton.runtime.autotuner.Autotuner)
        return [dict(vars(kind)) for kind in kinds], os.environ.get("TRITON_INTERPRET"), triton.knobs.runtime.interpret

    before, names = state(), set(globals())
    with interpret():
        assert triton.knobs.runtime.interpret
        examples.logsumexp(torch.randn(5, 9))
        reduce_kernel[(1,)](torch.ones(4, 4), torch.empty(24), R=4, C=4)
        with pytest.raises(OutOfBoundsError):
            past_the_end_kernel[(1,)](torch.ones(6), torch.empty(8), N=8)
    assert state() == before
    assert set(globals()) - names <= {"interpreter_semantic", "_InterpreterComparison"}
    assert not hasattr(examples, "np")


FRESH = """
import json, sys
import torch
from cosup_fast.testing import interpret, sanitize
from cosup_fast.testing import examples
torch.manual_seed(0)
x = torch.randn(20, 30)
with sanitize():
    out = [examples.matmul(x.bfloat16(), x.T.bfloat16().contiguous()), examples.softmax(x), examples.logsumexp(x)]
print(json.dumps([t.double().sum().item() for t in out]))
"""


def test_the_same_bits_whether_or_not_the_flag_was_set_at_import():
    results = []
    for flag in ("0", "1"):
        env = os.environ | {"TRITON_INTERPRET": flag}
        done = subprocess.run([sys.executable, "-c", FRESH], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    assert results[0] == results[1]
    assert np.isfinite(results[0]).all()


def test_importing_the_kit_imports_neither_torch_nor_triton():
    code = "import sys, cosup_fast.testing, cosup_fast.testing.plugin; print({'torch', 'triton'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_without_triton_the_message_says_so():
    code = """
import sys
sys.modules["triton"] = None
import cosup_fast.testing as t
t.assert_close_to_fp64
try:
    t.interpret
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "interpret: Triton is not installed" in done.stdout, done.stderr


def test_a_launch_keyword_that_no_gpu_knows_raises():
    """As the compiler does: a misspelt option, or a tile size that the kernel does not take."""
    x = torch.ones(16)
    with interpret():
        scaled_kernel[(1,)](x, 2.0, x.clone(), N=16, num_warps=2, num_stages=2, maxnreg=128, waves_per_eu=1)
        with pytest.raises(KeyError, match="Keyword argument num_warp was specified but unrecognised"):
            scaled_kernel[(1,)](x, 2.0, x.clone(), N=16, num_warp=2)
