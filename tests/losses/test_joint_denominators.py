"""Joint denominators: queries among each other, and keys among each other, beside queries and keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cosup_fast import reference
from cosup_fast.functional import info_nce
from cosup_fast.losses import InfoNCELoss
from cosup_fast.testing import operands, sanitize

BOTH = {"query_negatives": True, "key_negatives": True}
OPTIONS = [
    {"query_negatives": True},
    {"key_negatives": True},
    BOTH | {"key_ids": torch.arange(75) % 30, "positive": torch.arange(37) + 3},
    BOTH | {"key_ids": torch.arange(75) % 30 - 1, "positive": torch.arange(37) % 20 + 1, "duplicates": "keep"},
    BOTH | {"normalize": True, "scale": torch.tensor(5.0)},
    BOTH | {"margin": -0.5, "reduction": "none"},
    BOTH | {"private_negatives": torch.randn(37, 2, 40, generator=torch.Generator().manual_seed(3))},
]


def run(loss, x: Tensor, w: Tensor, **options) -> list[Tensor]:
    leaves = {"x": x, "w": w, **{k: v for k, v in options.items() if isinstance(v, Tensor) and v.is_floating_point()}}
    leaves = {name: t.detach().to(x.dtype).requires_grad_() for name, t in leaves.items()}
    rest = {**options, **{name: t for name, t in leaves.items() if name not in ("x", "w")}}
    value, stats = loss(leaves["x"], leaves["w"], return_stats=True, **rest)
    return [value.detach(), stats.lse, stats.rank.double(), *torch.autograd.grad(value.sum(), [*leaves.values()])]


@pytest.mark.parametrize("options", OPTIONS, ids=", ".join)
@pytest.mark.parametrize("impl", ["stored", "fused", "rows", "recomputed"])
def test_equal_to_the_reference(impl, options):
    if impl != "stored":
        pytest.importorskip("triton", reason="Triton's wheels are for Linux")
    x, w = operands(37, 75, 40)
    exact = run(reference.info_nce, x.double(), w.double(), **options)
    with sanitize():
        ours = run(info_nce, x, w, impl=impl, **options)
    for a, b in zip(ours, exact):
        assert (a.double() - b).norm() <= 2.0**-20 * b.norm()


def test_the_reference_is_the_equation():
    x, w = (t.double() for t in operands(5, 9, 4))
    z, qq, kk = x @ w.T, x @ x.T, w[:5] @ w.T
    for i in range(5):
        others = [j for j in range(5) if j != i], [j for j in range(9) if j != i]
        total = z[i].exp().sum() + qq[i, others[0]].exp().sum() + kk[i, others[1]].exp().sum()
        loss = reference.info_nce(x, w, reduction="none", **BOTH)[i]
        torch.testing.assert_close(loss, total.log() - z[i, i])


def test_a_single_query_and_key_have_no_loss():
    x, w = (t[:1].clone().requires_grad_() for t in operands(2, 2, 8))
    loss = InfoNCELoss(**BOTH)(x, w)
    assert loss == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(loss, (x, w)))


@pytest.mark.parametrize(
    "options",
    [
        {"symmetric": True},
        {"label_smoothing": 0.1},
        {"duplicates": "positive", "key_ids": torch.arange(9)},
        {"positive_ids": torch.arange(6)[:, None], "key_ids": torch.arange(9)},
    ],
    ids=lambda o: next(iter(o)),
)
@pytest.mark.parametrize("name", BOTH)
def test_what_leaves_the_denominators_open_is_refused(name, options):
    x, w = operands(6, 9, 8)
    with pytest.raises(ValueError, match=f"{name} is True and so is {next(iter(options))}"):
        info_nce(x, w, **{name: True}, **options)


def test_a_margin_that_leaves_nothing_is_refused():
    x, w = operands(6, 9, 8)
    with pytest.raises(ValueError, match="margin is 1000"):
        info_nce(x, w, margin=1000.0, **BOTH)


@pytest.mark.parametrize("scale", [1.0, torch.tensor(2.0)], ids=["number", "tensor"])
def test_candidates_far_below_the_positive_are_left(scale):
    """Their share of the sum is 0 in fp32, and so is the loss; nothing was left out."""
    x, w = torch.tensor([[20.0, 0], [0, 30]]), torch.tensor([[20.0, 0], [0, 30], [1, 1]])
    ids = torch.tensor([5, 5, 6])  # of one answer, so that the queries are none of one another's negatives
    assert info_nce(x, w, key_ids=ids, margin=0.1, query_negatives=True, scale=scale) == 0
    with pytest.raises(ValueError, match="margin is 500"):
        info_nce(x, w, key_ids=ids, margin=500.0, query_negatives=True, scale=scale)


def test_a_single_query_and_key_lose_nothing_to_a_margin():
    x, w = (t[:1] for t in operands(2, 2, 8))
    assert info_nce(x, w, margin=1e3, **BOTH) == 0
