"""What operators owe torch beside right values: frozen inputs, views, kept graphs, no rows, rows that hold anything."""

from __future__ import annotations

import itertools
import math
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from cosup_fast import reference
from cosup_fast.functional import info_nce, linear_cross_entropy
from cosup_fast.kernels.softmax_xent.dispatch import KERNELS
from cosup_fast.testing import interpret, randn
from cosup_fast.testing import value_and_gradients as run

DOUBLE, HALF = torch.float64, torch.bfloat16
rand = partial(randn, dtype=DOUBLE)


@pytest.mark.parametrize("frozen", list(itertools.product([False, True], repeat=4)), ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_inputs(frozen, reduction):
    tensors = {"query": rand(5, 3), "keys": rand(8, 3), "private_negatives": rand(5, 2, 3), "scale": rand().exp()}
    whole = run(info_nce, tensors, reduction=reduction)
    for t, freeze in zip(tensors.values(), frozen):
        t.requires_grad_(not freeze)
    loss = info_nce(**tensors, reduction=reduction)
    assert loss.requires_grad == (not all(frozen))
    if loss.requires_grad:
        (loss * 1.7).sum().backward()
    for (name, t), freeze in zip(tensors.items(), frozen):
        if freeze:
            assert t.grad is None
        else:
            assert_close(t.grad, whole[name], rtol=1e-12, atol=1e-12)


def test_views_and_expanded_inputs():
    wide, tall = rand(9, 14), rand(7, 22)
    views = {"query": wide[:, ::2], "keys": tall.t()[:11]}
    copies = {name: t.contiguous() for name, t in views.items()}

    def gradient(tensors):
        tensors = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        return torch.autograd.grad(info_nce(**tensors, symmetric=True), tuple(tensors.values()))

    for a, b in zip(gradient(views), gradient(copies)):
        assert_close(a, b, rtol=1e-12, atol=1e-12)

    row = rand(1, 7).requires_grad_()
    keys = rand(5, 7)
    (dq,) = torch.autograd.grad(info_nce(row.expand(4, 7), keys), row)
    (expected,) = torch.autograd.grad(reference.info_nce(row.expand(4, 7).contiguous(), keys), row)
    assert_close(dq, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["stored", "reference"])
def test_label_smoothing_passes_over_tokens_of_bias_minus_infinity(impl):
    hidden, weight = rand(4, 8).requires_grad_(), rand(10, 8, seed=1).requires_grad_()
    target, bias = torch.tensor([1, 2, 3, 4]), torch.zeros(10, dtype=DOUBLE)
    bias[7:] = -torch.inf
    loss = linear_cross_entropy(hidden, weight, target, bias=bias, label_smoothing=0.1, impl=impl)
    expected = F.cross_entropy(hidden @ weight[:7].T, target, label_smoothing=0.1)
    assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (loss, expected))):
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"query_negatives": True}], ids=["plain", "joint"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_penalty_is_refused_rather_than_dropped(reduction, options):
    q, k = rand(5, 3).requires_grad_(), rand(8, 3).requires_grad_()
    loss = info_nce(q, k, reduction=reduction, **options).sum()
    expected = torch.autograd.grad(loss, (q, k), retain_graph=True)
    grads = torch.autograd.grad(loss, (q, k), create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected))
    penalty = q.sum() + grads[0].square().sum()
    with pytest.raises(RuntimeError, match="differentiated once; pass impl='reference'"):
        torch.autograd.grad(penalty, q, retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once; pass impl='reference'"):
        penalty.backward()


@pytest.mark.parametrize("of", ["weights before the loss", "a weight of the loss"])
def test_a_gradient_of_a_step_is_refused_rather_than_dropped(of):
    """As meta-learning asks for it, through a loss whose operands are no leaves."""
    weight, factor, x = rand(3, 3).requires_grad_(), torch.ones((), dtype=DOUBLE, requires_grad=True), rand(5, 3)
    loss = factor * info_nce(x @ weight, rand(8, 3))
    (step,) = torch.autograd.grad(loss, weight, create_graph=True)
    moved = (x @ (weight - 0.1 * step)).square().sum() + factor
    with pytest.raises(RuntimeError, match="differentiated once; pass impl='reference'"):
        torch.autograd.grad(moved, weight if of.startswith("weights") else factor)


def test_an_operand_is_not_kept_for_an_error_that_few_see():
    x = rand(5, 3).requires_grad_()
    hidden = 2 * x
    gone = weakref.ref(hidden)
    loss = info_nce(hidden, rand(8, 3))
    del hidden
    assert gone() is None
    loss.backward()


def test_a_shape_of_other_dimensions_is_told_how_many_to_pass():
    q, k = rand(2, 5, 3), rand(8, 3)
    with pytest.raises(ValueError, match=r"query has shape \(2, 5, 3\); reshape it: it has 2 dimension"):
        info_nce(q, k)
    with pytest.raises(ValueError, match="positive holds 0; there is none to choose among"):
        info_nce(q[0], k[:0], torch.zeros(5, dtype=torch.int64))


def test_inputs_changed_before_backward_are_noticed():
    q, k = rand(5, 3).requires_grad_(), rand(8, 3).requires_grad_()
    loss = info_nce(q, k, reduction="none").sum()
    with torch.no_grad():
        k += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["positive", "query_ids", "key_ids", "positive_ids"])
def test_ids_changed_before_backward_are_noticed(name):
    ids = {
        "positive": torch.arange(5), "query_ids": torch.arange(5), "key_ids": torch.arange(8),
        "positive_ids": torch.arange(5)[:, None],
    }  # fmt: skip
    loss = info_nce(rand(5, 3).requires_grad_(), rand(8, 3), reduction="none", duplicates="positive", **ids).sum()
    ids[name] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inputs_are_left_alone():
    q, k, p = rand(5, 3).requires_grad_(), rand(8, 3).requires_grad_(), rand(5, 2, 3).requires_grad_()
    before = [t.detach().clone() for t in (q, k, p)]
    info_nce(q, k, private_negatives=p, symmetric=True, scale=2.0).backward()
    assert all(torch.equal(a, b) for a, b in zip((q, k, p), before))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_grad(context):
    q, k = rand(5, 3).requires_grad_(), rand(8, 3)
    expected = info_nce(q, k)
    with context():
        loss = info_nce(q, k)
    assert not loss.requires_grad
    assert_close(loss, expected.detach(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("impl", ["reference", "stored"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 5], ids=["no rows", "all ignored"])
def test_nothing_to_predict_costs_nothing(rows, reduction, impl):
    hidden, weight, bias = (t.requires_grad_() for t in (rand(rows, 3), rand(7, 3), rand(7)))
    target = torch.full((rows,), -100)
    options = {"bias": bias, "reduction": reduction, "impl": impl, "label_smoothing": 0.1, "z_loss": 0.1}
    loss, stats = linear_cross_entropy(hidden, weight, target, return_stats=True, **options)
    assert_close(loss, torch.zeros((rows,) if reduction == "none" else (), dtype=DOUBLE))
    assert [s.tolist() for s in stats] == [[0] * rows, [0] * rows, [-1] * rows, [-1] * rows]
    for g in torch.autograd.grad(loss.sum(), (hidden, weight, bias)):
        assert (g == 0).all()


@pytest.mark.parametrize("impl", ["reference", "stored"])
@pytest.mark.parametrize("keys", [0, 4])
def test_no_queries(keys, impl):
    q, k = rand(0, 3).requires_grad_(), rand(keys, 3).requires_grad_()
    for reduction, shape in (("mean", ()), ("sum", ()), ("none", (0,))):
        loss, stats = info_nce(q, k, reduction=reduction, impl=impl, return_stats=True)
        assert_close(loss, torch.zeros(shape, dtype=DOUBLE))
        assert all(len(s) == 0 for s in stats)
        assert (torch.autograd.grad(loss.sum(), k)[0] == 0).all()


def test_ignored_rows_may_hold_anything():
    hidden, weight, target = rand(6, 3), rand(5, 3), torch.tensor([1, 99, 2, 99, 0, 4])
    clean = run(linear_cross_entropy, {"hidden": hidden[[0, 2, 4, 5]], "weight": weight}, target=target[[0, 2, 4, 5]])
    hidden[[1, 3]] = torch.tensor([[math.nan], [math.inf]], dtype=DOUBLE)
    dirty = run(linear_cross_entropy, {"hidden": hidden, "weight": weight}, target=target, ignore_index=99)
    assert_close(dirty["loss"], clean["loss"])
    assert_close(dirty["weight"], clean["weight"])
    assert_close(dirty["hidden"][[0, 2, 4, 5]], clean["hidden"])
    assert (dirty["hidden"][[1, 3]] == 0).all()


@pytest.mark.parametrize("impl", ["reference", "stored", *KERNELS])
@pytest.mark.parametrize("symmetric", [False, True], ids=["one way", "symmetric"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["query", "keys"])
def test_not_a_number_is_never_hidden(name, value, symmetric, impl):
    """Every gradient that depends on it is none, not just those of the row that holds it."""
    if impl in KERNELS:
        pytest.importorskip("triton", reason="Triton's wheels are for Linux")
    tensors = {"query": randn(4, 16).abs(), "keys": randn(5, 16).abs()}
    tensors[name][2, 0] = value
    with interpret() if impl in KERNELS else nullcontext():
        out = run(info_nce, tensors, symmetric=symmetric, impl=impl)
    assert not out["loss"].isfinite()
    everywhere = symmetric or name == "keys"
    assert out["query"].isnan().all() if everywhere else out["query"][2].isnan().all()
    assert out["keys"].isnan().all()


@pytest.mark.parametrize("options", [{}, {"query_negatives": True}, {"key_negatives": True}, {"impl": "reference"}])
def test_a_direction_that_is_not_a_number_is_never_hidden(options):
    query, keys = randn(4, 16), randn(5, 16)
    assert info_nce(query * math.nan, keys, normalize=True, **options).isnan()
    assert info_nce(query, keys * math.nan, normalize=True, **options).isnan()
