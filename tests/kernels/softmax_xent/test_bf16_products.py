"""bf16 products of a CPU: rounded scores where they can be trusted, compensated or fp32 ones where they cannot.

torch multiplies bf16 on every CPU, with instructions for it or, slowly, without: the route is taken here on any.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cosup_fast import reference
from cosup_fast.functional import info_nce, linear_cross_entropy
from cosup_fast.kernels.softmax_xent import chunk_torch
from cosup_fast.testing import LOGITS, count, operands
from tests.comparing import compare, run

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def bf16_instructions(monkeypatch):
    monkeypatch.setattr(chunk_torch, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(chunk_torch, "SMALL", 0)


def check(loss, eager, x: Tensor, w: Tensor, well: bool = True, **options) -> None:
    atol = 2.0**-18 * (x.double() @ w.double().T).abs().max().item()
    compare(run(loss, x, w, **options), eager, x, w, atol=atol, well=well, **options)


@pytest.mark.parametrize("block", [2**20, 2**12], ids=["one block", "blocks"])
@pytest.mark.parametrize("kind", LOGITS)
def test_gradients_are_those_of_exact_scores(kind, block, monkeypatch):
    monkeypatch.setattr(chunk_torch, "BLOCK_BYTES", block)
    x, w = operands(40, 72, 64, kind, HALF)
    check(info_nce, reference.info_nce, x, w, well=kind != "near-uniform")


@pytest.mark.parametrize(
    "options",
    [
        {"symmetric": True},
        {"symmetric": True, "reduction": "none"},
        {"label_smoothing": 0.1, "reduction": "none"},
        {"key_ids": torch.arange(72) % 30, "duplicates": "positive"},
        {"key_ids": torch.arange(72) % 30, "symmetric": True},
    ],
    ids=", ".join,
)
@pytest.mark.parametrize("size", [1.0, 20.0], ids=["trusted", "compensated"])
def test_options(options, size, monkeypatch):
    monkeypatch.setattr(chunk_torch, "BLOCK_BYTES", 2**12)
    x, w = operands(40, 72, 64, "normal", HALF)
    check(info_nce, reference.info_nce, size * x, w, **options)


@pytest.mark.parametrize("size", [1.0, 20.0], ids=["trusted", "compensated"])
def test_language_model_head(size):
    x, w = operands(24, 300, 64, "normal", HALF)
    options = {"target": torch.arange(24) * 7, "softcap": 30.0, "z_loss": 1e-3}
    check(linear_cross_entropy, reference.linear_cross_entropy, size * x, w, **options)


@pytest.mark.parametrize(
    ("kind", "products"),
    [("tiny", {"bf16": 3}), ("extreme", {"bf16": 3, "fp32": 1})],
    ids=["trusted", "exact"],
)
def test_products(kind, products):
    x, w = operands(64, 64, 64, kind, HALF)
    with count() as counts:
        run(info_nce, x, w)
    assert {name: flops / (2 * 64**3) for name, flops in counts.torch_products.items()} == products


def test_large_scores_are_compensated_by_one_bf16_product():
    x, w = operands(64, 64, 64, "normal", HALF)
    with count() as counts:
        run(info_nce, 20 * x, w)
    assert dict(counts.torch_products) == {"bf16": 4 * 2 * 64**3}


def test_a_row_that_cannot_be_trusted_leaves_those_before_it_alone():
    x, w = operands(64, 64, 64, "tiny", HALF)
    x[40:] *= 2.0**15
    check(info_nce, reference.info_nce, x, w)


@pytest.mark.parametrize("spread", [10.0, 100.0])
def test_private_negatives_are_scored_as_exactly_as_shared_ones(spread):
    """Scores up to 100 or 1,000, whose bf16 step of 0.5 or 4 would be the whole probability."""
    x, w = operands(128, 128, 128, "normal", HALF)
    private = operands(128 * 4, 128, 128, "normal", HALF, seed=3)[0].view(128, 4, 128)
    leaves = [t.clone().requires_grad_() for t in (x, w, private)]
    exact = [t.double().detach().requires_grad_() for t in leaves]
    outcomes = []
    for (q, k, p), loss in ((leaves, info_nce), (exact, reference.info_nce)):
        value = loss(q, k, scale=spread / 40, private_negatives=p)
        outcomes.append([value.detach(), *torch.autograd.grad(value, (q, k, p))])
    (loss, *grads), (right, *rights) = outcomes
    assert loss.item() == pytest.approx(right.item(), rel=1e-3)
    for ours, truth in zip(grads, rights):
        assert (ours.double() - truth).norm() < 0.02 * truth.norm()


def test_a_positive_far_below_the_rest_keeps_its_logit():
    """It is a row dot in fp32 in any case; the others are near 20, too large for rounded products."""
    x, w = operands(40, 72, 64, "normal", HALF)
    x, w = 8 * x, w.clone()
    x[:, 0], w[:, 0] = 16, 0
    w[:40, 0] = -24
    assert (x.float() @ w.float().T)[:, 40:].max() > 10
    exact = reference.info_nce(x.double(), w.double(), reduction="none")
    assert exact.min() > 350
    assert (info_nce(x, w, reduction="none") - exact).abs().max() < 5e-4


def test_the_gradient_of_a_bias_is_not_rounded_to_bf16():
    x, w = operands(512, 40, 64, "normal", HALF)
    bias, target = torch.zeros(40, requires_grad=True), torch.zeros(512, dtype=torch.int64)
    (ours,) = torch.autograd.grad(linear_cross_entropy(x, w, target, bias=bias), bias)
    wide = bias.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(reference.linear_cross_entropy(x.double(), w.double(), target, bias=wide), wide)
    assert (ours - exact)[1:].norm() < 2.0**-12 * exact[1:].norm()


@pytest.mark.parametrize("symmetric", [False, True], ids=["one way", "symmetric"])
def test_ranks_change_no_loss_and_no_gradient(symmetric):
    """They are those of rounded scores, the target's among them."""
    x, w = (t.requires_grad_() for t in operands(40, 72, 64, "normal", HALF))
    plain = info_nce(x, w, symmetric=symmetric)
    ranked, _ = info_nce(x, w, symmetric=symmetric, return_stats=True)
    assert torch.equal(ranked, plain)
    for a, b in zip(torch.autograd.grad(ranked, (x, w)), torch.autograd.grad(plain, (x, w))):
        assert torch.equal(a, b)


def test_a_bias_counts_where_a_target_is_ranked():
    x, w = operands(40, 72, 64, "normal", HALF)
    bias = torch.zeros(72)
    bias[0] = 10
    _, stats = linear_cross_entropy(x, w, torch.zeros(40, dtype=torch.int64), bias=bias, return_stats=True)
    assert (stats.rank == 0).all()
    assert (stats.top1 == 0).all()
