"""Counts against arithmetic done by hand and against FlopCounterMode."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

triton = pytest.importorskip("triton", reason="Triton's wheels are for Linux")
tl = pytest.importorskip("triton.language")

from cosup_fast.testing import count, examples, interpret, sanitize  # noqa: E402


def test_a_matmul_costs_its_tiles():
    # 3 x 2 tiles of 32 x 32, 3 steps of 32: padding is multiplied too, but not loaded.
    a, b = torch.ones(70, 90, dtype=torch.bfloat16), torch.ones(90, 40, dtype=torch.bfloat16)
    with count() as counts:
        examples.matmul(a, b, blocks=(32, 32, 32))
    kernel = "matmul_fwd_kernel"
    assert counts.dots == {"bf16": 2 * 96 * 64 * 96}
    assert counts.loaded == {(kernel, "a"): 2 * 70 * 90 * 2, (kernel, "b"): 3 * 90 * 40 * 2}
    assert counts.stored == {(kernel, "c"): 70 * 40 * 2}
    assert counts.launches == {kernel: 1}
    assert counts.programs == {kernel: 6}
    assert counts.products(96, 64, 96) == 1
    assert not counts.atomics
    assert not counts.torch_products


@pytest.mark.parametrize(
    ("dtype", "precision", "name"),
    [
        (torch.bfloat16, "ieee", "bf16"),
        (torch.float16, "ieee", "fp16"),
        (torch.float32, "ieee", "fp32"),
        (torch.float32, "tf32", "tf32"),
        (torch.float32, "tf32x3", "tf32x3"),
    ],
)
def test_dots_are_counted_by_precision(dtype, precision, name):
    a = torch.ones(32, 32, dtype=dtype)
    with count() as counts:
        examples.matmul(a, a, precision=precision)
    assert counts.dots == {name: 2 * 32**3}


def test_descriptors_count_what_lies_within_their_shape():
    with count() as counts:
        examples.descriptor_matmul(torch.ones(40, 24), torch.ones(33, 24))
    kernel = "descriptor_matmul_fwd_kernel"
    assert counts.loaded == {(kernel, "a"): 2 * 40 * 24 * 4, (kernel, "b"): 2 * 33 * 24 * 4}
    assert counts.stored == {(kernel, "c"): 40 * 33 * 4}


@triton.jit
def histogram_kernel(x, out, N, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.atomic_add(out + tl.load(x + o, mask=o < N, other=0), 1, mask=o < N)


def test_atomics_are_counted_by_lane():
    out = torch.zeros(3, dtype=torch.int32)
    with count() as counts:
        histogram_kernel[(2,)](torch.arange(20) % 3, out, 20, B=16)
    assert counts.atomics == {("histogram_kernel", "out"): 20}
    assert out.tolist() == [7, 7, 6]


def test_torch_products_are_those_of_flop_counter_mode():
    torch.manual_seed(0)
    x, w = torch.randn(8, 16, requires_grad=True), torch.randn(5, 16, requires_grad=True)

    def run():
        torch.nn.functional.linear(x, w).square().sum().backward()
        with torch.inference_mode():
            torch.matmul(torch.ones(2, 3, 4), torch.ones(2, 4, 5))

    with FlopCounterMode(display=False) as mode:
        run()
    with count() as counts:
        run()
    assert counts.torch_products == {"fp32": mode.get_total_flops()}
    assert counts.torch_products["fp32"] == 3 * 2 * 8 * 16 * 5 + 2 * 2 * 3 * 4 * 5


@torch.library.custom_op("cosup_fast_tests::product", mutates_args=())
def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return examples.matmul(x, w) + x @ w


@product.register_fake
def _(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w


def _backward(ctx, g):
    x, w = ctx.saved_tensors
    return g @ w.T, x.T @ g


product.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def test_products_inside_custom_operators_are_seen():
    x = torch.ones(32, 32, dtype=torch.bfloat16, requires_grad=True)
    with count() as counts:
        product(x, torch.ones(32, 32, dtype=torch.bfloat16)).sum().backward()
    # FlopCounterMode alone sees the two of the backward pass.
    assert counts.torch_products == {"bf16": 3 * 2 * 32**3}
    assert counts.dots == {"bf16": 2 * 32**3}
    assert counts.flops == 4 * 2 * 32**3


def test_fake_tensors_stay_fake():
    with sanitize(), count() as counts, FakeTensorMode():
        x = torch.empty(32, 32)
        assert isinstance(product(x, x) + x @ x, FakeTensor)
    assert not counts.launches


def test_counts_repeat_and_do_not_depend_on_a_sanitizer_or_what_ran_before():
    def run():
        with count() as counts:
            examples.logsumexp(torch.randn(33, 70))
            examples.softmax(torch.randn(5, 9))
        return counts

    first = run()
    with interpret():
        examples.softmax(torch.randn(5, 9))
        second = run()
    with sanitize(shuffles=3):
        third = run()
    assert first == second == third
    assert first.loaded["softmax_fwd_kernel", "x"] == 5 * 9 * 4


def test_the_table_lists_every_figure():
    with count() as counts:
        a = torch.ones(32, 32)
        examples.matmul(a, a)
        a @ a
    assert counts.table().splitlines() == [
        "| what | where | how much |",
        "|---|---|--:|",
        "| product | fp32 dot | 65,536 FLOP |",
        "| product | fp32 by torch | 65,536 FLOP |",
        "| load | matmul_fwd_kernel.a | 4,096 bytes |",
        "| load | matmul_fwd_kernel.b | 4,096 bytes |",
        "| store | matmul_fwd_kernel.c | 4,096 bytes |",
        "| launch | matmul_fwd_kernel | 1 x 1 programs |",
    ]
