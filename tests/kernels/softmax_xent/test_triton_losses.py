"""The losses by Triton kernels in the interpreter: against fp64, sanitized, counted, and behind torch's machinery."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
import triton.compiler.code_generator  # noqa: F401  (first imported while interpreting, it breaks later compilations)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cosup_fast import reference
from cosup_fast.functional import explain, info_nce, linear_cross_entropy
from cosup_fast.kernels.softmax_xent import chunk_torch
from cosup_fast.kernels.softmax_xent.call import Call
from cosup_fast.kernels.softmax_xent.chunk_product import FusedChunk
from cosup_fast.kernels.softmax_xent.dispatch import KERNELS
from cosup_fast.kernels.softmax_xent.op import softmax_xent
from cosup_fast.testing import LOGITS, count, interpret, operands, sanitize, with_gaps
from tests.comparing import compare, run, run_exactly

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = torch.arange(75) % 37
IDS[70:] = -1


@pytest.fixture(params=[*KERNELS, "levelled"])
def impl(request, monkeypatch) -> str:
    """Of an implementation; levelled: fused, its exponentials above positives where it otherwise would not pay."""
    if request.param != "levelled":
        return request.param
    monkeypatch.setattr(FusedChunk, "_row_traffic", lambda _: 0.0)
    return "fused"


def check(loss, eager, impl: str, x: Tensor, w: Tensor, well: bool = True, rounding: float = 0.0, **options) -> None:
    with sanitize():
        ours = run(loss, x, w, impl=impl, **options)
    atol = 2.0**-22 * (x.double() @ w.double().T).abs().max().item() + rounding
    compare(ours, eager, x, w, atol=atol, well=well, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LOGITS)
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
    check(info_nce, reference.info_nce, impl, x, w, well, rounding)


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
def test_info_nce_options(impl, options):
    x, w = operands(37, 75, 40)
    check(info_nce, reference.info_nce, impl, x, w, **options)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_linear_cross_entropy(impl, dtype):
    x, w = operands(21, 90, 33, dtype=dtype)
    target = torch.arange(21) * 4
    target[::5] = -100
    options = {"target": target, "z_loss": 1e-2, "label_smoothing": 0.1, "bias": torch.randn(90, dtype=dtype)}
    check(linear_cross_entropy, reference.linear_cross_entropy, impl, x, with_gaps(w), **options)
    check(linear_cross_entropy, reference.linear_cross_entropy, impl, x, w, **{**options, "label_smoothing": 0.0})
    if impl != "fused":
        check(linear_cross_entropy, reference.linear_cross_entropy, impl, x, w, softcap=2.0, **options)


def test_chunks_of_rows(impl, monkeypatch):
    monkeypatch.setenv("COSUP_WORKSPACE_BYTES", "1")
    x, w = operands(70, 75, 40)
    check(info_nce, reference.info_nce, impl, x, w)


def test_statistics_by_row(impl):
    x, w = operands(37, 75, 40)
    with sanitize():
        _, ours = info_nce(x, w, impl=impl, return_stats=True)
    _, eager = info_nce(x, w, impl="reference", return_stats=True)
    assert torch.equal(ours.rank, eager.rank)
    assert torch.equal(ours.top1, eager.top1)
    torch.testing.assert_close(ours.lse, eager.lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.positive_logit, eager.positive_logit, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("impl", "products"), [("fused", 3.0), ("rows", 3.0), ("recomputed", 4.0)])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_products_and_atomics(impl, products, dtype):
    n = 256
    x, w = operands(n, n, 64, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])
    with count() as counts:
        run(info_nce, x, w, impl=impl)
        plan = explain(n, n, 64, dtype=x.dtype, impl=impl)
    assert counts.products(n, n, 64) == products == plan.products
    assert set(counts.dots) == ({dtype} if impl != "rows" else set())
    assert not counts.atomics


@pytest.mark.parametrize(
    ("impl", "width", "times"), [("fused", 64, 2), ("fused", 32, 1), ("rows", 32, 1), ("recomputed", 32, 1)]
)
def test_how_often_a_score_is_stored(impl, width, times):
    """A fused one as an exponential and, if rows are too wide to be weighed in products, as a gradient.

    Others as a gradient alone (and by torch's product for rows).
    """
    n, m = 64, 160
    with count() as counts:
        run(info_nce, *operands(n, m, width, dtype=torch.bfloat16), impl=impl)
    assert counts.stored["levelled_bwd_kernel", "e"] == (2 * n if (impl, times) == ("fused", 1) else 0)
    small = ("merge_fwd_kernel", "weights_bwd_kernel", "positives_fwd_kernel", "levelled_bwd_kernel")
    stored = [size for (kernel, name), size in counts.stored.items() if name in ("out", "e") and kernel not in small]
    assert sum(stored) == 2 * n * m * times


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_probability_near_one_keeps_its_gradient(impl, dtype):
    """p = 0.999 at the target: p - 1 formed from a rounded p would be 0 or twice as large in bf16."""
    m = 64
    w = torch.eye(m, dtype=dtype)
    x = (math.log(0.999 / 0.001 * (m - 1)) + torch.linspace(-0.3, 0.3, m)).diag().to(dtype)
    check(info_nce, reference.info_nce, impl, x, w)
    with interpret():
        ours = run(info_nce, x, w, impl=impl)["x"].diagonal().double()
    exact = run_exactly(reference.info_nce, x, w)["x"].diagonal()
    assert ((exact * m / 1.7 + 0.001).abs() < 5e-4).all()
    # The logit's gradient, dx and its product with the upstream one are rounded once each; p is good to 8 ulp of fp32.
    torch.testing.assert_close(ours, exact, rtol=1.5 * torch.finfo(dtype).eps + 2.0**-10, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_rows_with_candidates_far_above_their_positives(impl, dtype):
    """In none, some or all of their tiles: exponentials above such a positive would be infinite."""
    x, w = operands(37, 75, 40, dtype=dtype)
    x *= torch.linspace(1, 30, 37, dtype=dtype)[:, None]
    above = (x.double() @ w.double().T - (x.double() * w[:37].double()).sum(1, keepdim=True)).view(37, 5, 15).amax(2)
    assert set((above > 40).sum(1).tolist()) >= {0, 1, 2, 5}
    check(info_nce, reference.info_nce, impl, x, w, well=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_all_rows_ignored(impl, dtype):
    x, w = operands(9, 40, 16, dtype=dtype)
    leaves = x.requires_grad_(), w.requires_grad_(), torch.randn(40).requires_grad_()
    with sanitize():
        for ignoring in (True, False):
            if ignoring:  # as under torch.compile, where rows are computed and their losses dropped
                loss, *_ = softmax_xent(x, w, bias=leaves[2], target=torch.full((9,), -1), ignoring=True, impl=impl)
            else:
                loss = linear_cross_entropy(x, w, torch.full((9,), -100), bias=leaves[2], impl=impl)
            grads = torch.autograd.grad(loss, leaves)
            assert loss == 0
            assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_whole(impl, reduction):
    def f(x, w, scale):
        return info_nce(x * 2, w, scale=scale, reduction=reduction, impl=impl).square().sum() * 3

    outcomes = []
    with interpret():
        for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
            leaves = [t.requires_grad_() for t in (*operands(20, 33, 24), torch.tensor(2.0))]
            loss = g(*leaves)
            outcomes.append([loss, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*outcomes)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(impl, reduction):
    x, w = (t.requires_grad_() for t in operands(6, 9, 5))
    call = Call(
        x, w, target=torch.arange(6), normalize=True, reduction=reduction, ranks=True, label_smoothing=0.1, impl=impl,
        needs=[True, True, False, False, False],
    )  # fmt: skip
    with interpret():
        torch.library.opcheck(torch.ops.cosup_fast.softmax_xent.default, tuple(call))


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_tensors_without_memory(impl, device):
    """Nothing runs: shapes of 2^20 by 2^20 scores. A torch without CUDA aborts on gradients of its fake tensors."""
    with contextlib.nullcontext() if device == "meta" else FakeTensorMode():
        x, w = (torch.empty(2**20, 4096, dtype=torch.bfloat16, device=device) for _ in range(2))
        leaves = [] if device == "cuda" else [x.requires_grad_(), w.requires_grad_()]
        for reduction, shape in (("mean", ()), ("none", (2**20,))):
            loss, stats = info_nce(x, w, impl=impl, reduction=reduction, return_stats=True)
            assert (loss.shape, loss.dtype, stats.rank.shape) == (shape, torch.float32, (2**20,))
            for leaf, grad in zip(leaves, torch.autograd.grad(loss.sum(), leaves) if leaves else ()):
                assert (grad.shape, grad.dtype, grad.device.type) == (leaf.shape, torch.bfloat16, device)


def test_without_a_gpu_they_are_refused(impl):
    x, w = operands(4, 4, 4)
    with pytest.raises(ValueError, match=f"impl is '{impl}', which needs a GPU, and the operands are on cpu"):
        info_nce(x, w, impl=impl)


def test_what_a_kernel_cannot_do_is_refused():
    x, w = operands(4, 4, 4, dtype=torch.float64)
    ids = {"key_ids": torch.arange(4), "positive_ids": torch.arange(4)[:, None]}
    with interpret():
        with pytest.raises(ValueError, match=r"impl is 'rows', which has no kernels for torch\.float64"):
            info_nce(x, w, impl="rows")
        with pytest.raises(ValueError, match="impl is 'recomputed', which ranks one positive, and rows have several"):
            info_nce(x.float(), w.float(), impl="recomputed", return_stats=True, **ids)
        with pytest.raises(ValueError, match="impl is 'fused', which holds exponentials"):
            linear_cross_entropy(x.float(), w.float(), torch.arange(4), softcap=1.0, impl="fused")


def test_gradients_of_scaled_scores_stay_in_the_range_of_fp16(impl):
    x, w = operands(37, 75, 40, dtype=torch.float16)
    check(info_nce, reference.info_nce, impl, x / 64, w, scale=64.0)


@pytest.mark.parametrize("contested", [False, True])
@pytest.mark.parametrize("impl", ["rows", "recomputed"])
def test_one_key_that_answers_many_queries_in_fp16(impl, contested):
    """Its column weighs as much as all of its queries, and must not leave fp16's range when gradients are scaled.

    Contested: a query that it does not answer has all of its column's probability.
    """
    x, w = operands(64, 64, 32, dtype=torch.float16)
    target = torch.zeros(64, dtype=torch.int64)
    if contested:
        target[-1], x[-1] = 1, w[0]
    exact = run_exactly(reference.info_nce, x, w, positive=target, symmetric=True)
    with interpret():
        ours = run(info_nce, x, w, impl=impl, positive=target, symmetric=True)
    for name in ("x", "w"):
        assert (ours[name].double() - exact[name]).norm() < 2e-3 * exact[name].norm()


@pytest.mark.parametrize("impl", [*KERNELS, "stored"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("wrong", [-1, 75, 2**33])
def test_a_target_that_is_no_candidate_is_not_a_number(impl, reduction, wrong):
    x, w = (t.requires_grad_() for t in operands(37, 75, 40))
    target = torch.arange(37)
    target[5] = wrong
    with sanitize():
        loss, *stats = softmax_xent(x, w, target=target, impl=impl, reduction=reduction, ranks=True)
        dx, dw = torch.autograd.grad(loss.sum(), (x, w))
    row = torch.arange(37) == 5
    if reduction == "none":
        assert torch.equal(loss.isnan(), row)
    else:
        assert loss.isnan()
    assert torch.equal(stats[1].isnan(), row)
    assert torch.equal(dx.isnan().all(1), row)
    assert dx[~row].isfinite().all()
    assert dw.isnan().all()


@pytest.mark.parametrize("impl", [*KERNELS[1:], "stored"])
def test_a_target_that_is_no_candidate_leaves_no_symmetric_loss(impl):
    """What the columns' positives are, nobody knows."""
    x, w = operands(9, 20, 16)
    with sanitize():
        loss, *_ = softmax_xent(x, w, target=torch.arange(9) - 1, symmetric=True, impl=impl, reduction="none")
    assert loss.isnan().all()


def test_wrong_targets_fail_where_they_are_asked_about(monkeypatch):
    monkeypatch.setenv("COSUP_CHECK_TARGETS", "1")
    x, w = operands(4, 6, 8)
    with pytest.raises(RuntimeError, match=r"a target is none of the rows 0\.\.5 of the candidates"):
        softmax_xent(x, w, target=torch.tensor([0, 1, 6, 2]))
    softmax_xent(x, w, target=torch.arange(4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", [*KERNELS, "stored"])
def test_a_copy_of_the_positive_does_not_rank_above_it(impl, dtype, monkeypatch):
    monkeypatch.setattr(chunk_torch, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(chunk_torch, "SMALL", 0)
    x, w = (t[:37] for t in operands(37, 37, 75, dtype=dtype))
    x, w = (x.float() + 2 * w.float()).to(dtype), torch.cat([w, w, operands(37, 9, 75, dtype=dtype, seed=1)[1]])
    _, eager = info_nce(x, w, impl="reference", return_stats=True)
    with sanitize():
        _, ours = info_nce(x, w, impl=impl, return_stats=True)
    assert (eager.rank == 0).all()
    assert torch.equal(ours.rank, eager.rank)


@pytest.mark.parametrize("impl", ["reference", *KERNELS, "stored"])
def test_a_private_copy_of_the_positive_neither_ranks_above_it_nor_is_the_best(impl, monkeypatch):
    """Whole numbers, whose products every implementation has exactly."""
    monkeypatch.setattr(FusedChunk, "_row_traffic", lambda _: 0.0)
    x, w = torch.eye(3, 16), torch.eye(4, 16)
    copies = torch.stack([w[:3], -w[:3]], dim=1)
    with sanitize():
        _, stats = info_nce(x, w, private_negatives=copies, impl=impl, return_stats=True)
        _, above = info_nce(x, w, private_negatives=2 * copies, impl=impl, return_stats=True)
        _, below = info_nce(x, w, torch.tensor([1, 2, 0]), private_negatives=copies / 2, impl=impl, return_stats=True)
    assert (stats.rank.tolist(), stats.top1.tolist()) == ([0] * 3, [0, 1, 2])
    assert (above.rank.tolist(), above.top1.tolist()) == ([1] * 3, [4] * 3)
    assert (below.rank.tolist(), below.top1.tolist()) == ([2] * 3, [0, 1, 2])


@pytest.mark.parametrize("impl", ["reference", *KERNELS, "stored"])
def test_of_equal_keys_the_first_is_the_best_whatever_tiles_they_are_in(impl):
    x, w = torch.eye(3, 16), torch.zeros(600, 16)
    for first, row in ((70, 0), (5, 1), (300, 2)):
        w[[first, 410 + row, 590 + row]] = x[row]
    with sanitize():
        _, stats = info_nce(x, w, positive=torch.tensor([1, 2, 300]), impl=impl, return_stats=True)
    assert (stats.rank.tolist(), stats.top1.tolist()) == ([3, 3, 0], [70, 5, 300])


@pytest.mark.parametrize("budget", ["2**29", "1"], ids=["one chunk", "four chunks"])
@pytest.mark.parametrize("impl", KERNELS[:2])
def test_a_symmetric_loss_is_three_products(impl, budget, monkeypatch):
    monkeypatch.setenv("COSUP_WORKSPACE_BYTES", str(eval(budget)))
    n = 128
    x, w = operands(n, n, 64, dtype=torch.bfloat16)
    with count() as counts:
        run(info_nce, x, w, impl=impl, symmetric=True)
        plan = explain(n, n, 64, dtype=x.dtype, impl=impl, symmetric=True)
    assert plan.chunks == (1 if budget != "1" else 4)
    assert counts.products(n, n, 64) == plan.products == 3.0
    assert not counts.atomics


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_columns_whose_exponentials_underflow_are_multiplied_again(dtype, kind, monkeypatch):
    """Exponentials are held above their rows' maxima: of scores near 1,800 the columns would find zeros."""
    monkeypatch.setenv("COSUP_WORKSPACE_BYTES", "1")
    x, w = operands(70, 75, 40, kind, dtype)
    well = kind not in ("near-uniform", "extreme")
    check(info_nce, reference.info_nce, "fused", x, w, well, symmetric=True, positive=torch.arange(70) // 2)
    with count() as counts:
        run(info_nce, x, w, impl="fused", symmetric=True)
    tiles = 2 * 96 * 96 * 64  # a product of whole tiles
    score = counts.dots.total() - tiles
    assert (score > 0) == (kind == "extreme")
    assert score <= tiles


@pytest.mark.parametrize(
    "options",
    [{}, {"symmetric": True}, {"key_ids": torch.arange(75) % 5, "duplicates": "positive"}],
    ids=["one way", "symmetric", "several positives"],
)
def test_scores_of_a_thousand_million(impl, options):
    """The maximum above which exponentials are held is rounded, at 10^9 by up to e^44."""
    x, w = operands(37, 75, 40)
    with sanitize():
        ours = run(info_nce, 4e8 * x, w, impl=impl, **options)
    for name, b in run_exactly(reference.info_nce, 4e8 * x, w, **options).items():
        assert (ours[name].double() - b).norm() < 2.0**-20 * b.norm(), name


def test_what_fused_cannot_hold_for_columns_is_refused():
    x, w = operands(4, 4, 4, dtype=torch.float16)
    ids = {"key_ids": torch.arange(4), "duplicates": "positive"}
    with interpret():
        with pytest.raises(ValueError, match="too narrow in fp16 for the columns"):
            info_nce(x, w, impl="fused", symmetric=True)
        with pytest.raises(ValueError, match="and columns have several positives"):
            info_nce(x.float(), w.float(), impl="fused", symmetric=True, **ids)
