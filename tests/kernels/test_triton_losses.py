"""The losses by Triton kernels in the interpreter: against fp64, sanitized, and counted."""

from __future__ import annotations

import pytest
import torch
import triton.compiler.code_generator  # noqa: F401  (first imported while interpreting, it breaks later compilations)
from torch import Tensor

from cosup_fast import reference
from cosup_fast.functional import explain, info_nce, linear_cross_entropy
from cosup_fast.testing import LOGITS, assert_close_to_fp64, count, operands, sanitize, with_gaps

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNELS = ["fused", "recomputed"]
IDS = torch.arange(75) % 37
IDS[70:] = -1


def run(loss, x: Tensor, w: Tensor, upstream: float = 1.7, **options):
    leaves = {"x": x, "w": w, **{k: v for k, v in options.items() if isinstance(v, Tensor) and v.is_floating_point()}}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    rest = {name: t for name, t in leaves.items() if name not in ("x", "w")}
    value = loss(leaves["x"], leaves["w"], **{**options, **rest})
    return {
        "loss": value.detach(),
        **dict(zip(leaves, torch.autograd.grad(upstream * value.sum(), (*leaves.values(),)))),
    }


def compare(loss, eager, impl: str, x: Tensor, w: Tensor, well: bool = True, rounding: float = 0.0, **options) -> None:
    def wide(value):
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    exact = run(eager, x.double(), w.double(), **{name: wide(value) for name, value in options.items()})
    atol = 2.0**-22 * (x.double() @ w.double().T).abs().max().item() + rounding
    plain = run(eager, x, w, **options)
    with sanitize():
        ours = run(loss, x, w, impl=impl, **options)
    assert_close_to_fp64(ours, plain, exact, dtype=x.dtype, atol=atol, well_conditioned=well)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("impl", KERNELS)
def test_info_nce(impl, kind, dtype):
    x, w = operands(37, 75, 40, kind, dtype)
    rounding = 0.0
    if kind == "near-uniform":
        # Rows of dL/dz sum to 0 and keys are nearly alike: dx is what rounding dL/dz to its dtype leaves.
        d = torch.softmax(x.double() @ w.double().T, 1)
        d[torch.arange(37), torch.arange(37)] -= 1
        rounding = torch.finfo(dtype).eps / 2 * 1.7 / 37 * (d.abs() @ w.double().abs()).norm().item()
    # fp16 cannot hold gradients of 1e-5 to its usual precision.
    well = kind not in ("near-uniform", "extreme") and (kind, dtype) != ("tiny", torch.float16)
    compare(info_nce, reference.info_nce, impl, x, w, well, rounding)


@pytest.mark.parametrize(
    "options",
    [
        {"key_ids": IDS, "positive": torch.arange(37) + 1},
        {"key_ids": IDS, "positive": torch.arange(37) + 31, "duplicates": "positive"},
        {"key_ids": IDS, "positive_ids": torch.stack([torch.arange(37) % 29, torch.full((37,), -1)], 1)},
        {"reduction": "none"},
        {"reduction": "sum", "scale": torch.tensor(3.0)},
        {"label_smoothing": 0.1, "normalize": True, "scale": 10.0},
        {"private_negatives": torch.randn(37, 2, 40)},
        {"symmetric": True},
    ],
    ids=", ".join,
)
@pytest.mark.parametrize("impl", KERNELS)
def test_info_nce_options(impl, options):
    x, w = operands(37, 75, 40)
    if impl == "fused" and "symmetric" in options:
        with sanitize(), pytest.raises(ValueError, match="impl is 'fused', which normalises rows alone"):
            info_nce(x, w, impl=impl, **options)
    else:
        compare(info_nce, reference.info_nce, impl, x, w, **options)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("impl", KERNELS)
def test_linear_cross_entropy(impl, dtype):
    x, w = operands(21, 90, 33, dtype=dtype)
    target = torch.arange(21) * 4
    target[::5] = -100
    options = {"target": target, "z_loss": 1e-2, "label_smoothing": 0.1, "bias": torch.randn(90, dtype=dtype)}
    compare(linear_cross_entropy, reference.linear_cross_entropy, impl, x, with_gaps(w), **options)
    if impl == "recomputed":
        compare(linear_cross_entropy, reference.linear_cross_entropy, impl, x, w, softcap=2.0, **options)


@pytest.mark.parametrize("impl", KERNELS)
def test_chunks_of_rows(impl, monkeypatch):
    monkeypatch.setenv("COSUP_FAST_WORKSPACE_BYTES", "1")
    x, w = operands(70, 75, 40)
    compare(info_nce, reference.info_nce, impl, x, w)


@pytest.mark.parametrize("impl", KERNELS)
def test_statistics_by_row(impl):
    x, w = operands(37, 75, 40)
    with sanitize():
        _, ours = info_nce(x, w, impl=impl, return_stats=True)
    _, eager = info_nce(x, w, impl="reference", return_stats=True)
    assert torch.equal(ours.rank, eager.rank)
    assert torch.equal(ours.top1, eager.top1)
    torch.testing.assert_close(ours.lse, eager.lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.positive_logit, eager.positive_logit, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("impl", "products"), [("fused", 3.0), ("recomputed", 4.0)])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_products_and_atomics(impl, products, dtype):
    n = 256
    x, w = operands(n, n, 64, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])
    with count() as counts:
        run(info_nce, x, w, impl=impl)
        plan = explain(n, n, 64, dtype=x.dtype, impl=impl)
    assert counts.products(n, n, 64) == products == plan.products
    assert set(counts.dots) == {dtype}
    assert not counts.atomics


def test_without_a_gpu_they_are_refused():
    x, w = operands(4, 4, 4)
    with pytest.raises(ValueError, match="impl is 'fused', which needs a GPU, and the operands are on cpu"):
        info_nce(x, w, impl="fused")
