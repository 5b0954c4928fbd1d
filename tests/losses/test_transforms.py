"""The losses under what else torch does with a function: graphs kept and walked again, torch.func, forward mode."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from cosup_fast import reference
from cosup_fast.functional import gather_last_hidden, info_nce, linear_cross_entropy

TARGET = torch.tensor([3, 0, 2, 2, 5])


def operands() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 8, generator=generator), torch.randn(7, 8, generator=generator)


def head(x: Tensor, w: Tensor, impl: str = "auto") -> Tensor:
    return linear_cross_entropy(x, w, TARGET, impl=impl)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_kept_graph_survives_a_gradient_that_is_set_to_zero(reduction):
    x, w = (t.requires_grad_() for t in operands())
    loss = info_nce(x, w, reduction=reduction).sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone(), w.grad.clone()
    x.grad.zero_()
    w.grad.zero_()
    loss.backward()
    assert torch.equal(x.grad, first[0])
    assert torch.equal(w.grad, first[1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_weights_reach_a_kept_graph_each_time(reduction):
    x, w = (t.requires_grad_() for t in operands())
    loss = info_nce(x, w, reduction=reduction).sum()
    once = torch.autograd.grad(loss, (x, w), retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, (x, w), retain_graph=True)
    again = torch.autograd.grad(loss, (x, w))
    for a, b, c in zip(once, thrice, again):
        torch.testing.assert_close(3 * a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("loss", [info_nce, head], ids=["info_nce", "linear_cross_entropy"])
def test_gradients_of_torch_func(loss):
    x, w = operands()
    right = torch.func.grad(lambda x, w: loss(x, w, impl="reference"), argnums=(0, 1))(x, w)
    ours = torch.func.grad(loss, argnums=(0, 1))(x, w)
    value, back = torch.func.vjp(loss, x, w)
    torch.testing.assert_close(ours, right)
    torch.testing.assert_close(value, loss(x, w))
    torch.testing.assert_close(back(torch.tensor(2.0)), tuple(2 * g for g in right))


def test_gradients_of_torch_func_by_row():
    x, w = operands()
    weights = torch.arange(5.0)
    right = torch.func.grad(lambda x: weights @ reference.info_nce(x, w, reduction="none"))(x)
    torch.testing.assert_close(torch.func.grad(lambda x: weights @ info_nce(x, w, reduction="none"))(x), right)


def test_forward_mode_is_refused_rather_than_zero():
    x, w = operands()
    with pytest.raises(RuntimeError, match="no forward-mode derivative; pass impl='reference'"):
        torch.func.jvp(lambda x: info_nce(x, w), (x,), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jacfwd(lambda x: info_nce(x, w))(x)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        info_nce(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), w)
    for loss in (info_nce, lambda x, w: linear_cross_entropy(x, w, TARGET)):
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.linearize(lambda x, loss=loss: loss(x, w), x)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_batched_gradients_are_refused_by_name(reduction):
    x, w = operands()
    x.requires_grad_()
    loss = info_nce(x, w, reduction=reduction)
    upstream = torch.ones(2, *loss.shape)
    with pytest.raises(RuntimeError, match=r"no batched gradients .*; loop over them, or pass impl='reference'"):
        torch.autograd.grad(loss, x, upstream, is_grads_batched=True)


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_a_trace_computes_the_same(mode):
    x, w = operands()
    for loss, more in (
        (lambda x, w, row: linear_cross_entropy(x, w, row), TARGET),  # noqa: PLW0108 (make_fx traces every argument)
        (lambda x, w, row: info_nce(x, w, row), TARGET),  # noqa: PLW0108
        (lambda x, w, ids: info_nce(x, w, key_ids=ids), torch.arange(len(w))),
        (lambda x, w, scale: info_nce(x, w, scale=scale), torch.tensor(2.0)),
    ):
        torch.testing.assert_close(make_fx(loss, tracing_mode=mode)(x, w, more)(x, w, more), loss(x, w, more))


def slope(x: Tensor, w: Tensor, reduction: str) -> Tensor:
    return torch.func.grad(lambda x: info_nce(x, w, reduction=reduction).sum())(x).square()


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, w, row, number, impl: info_nce(x, w, row, impl=impl),
        lambda x, w, row, number, impl: linear_cross_entropy(x, w, row, impl=impl),
        lambda x, w, row, number, impl: info_nce(x, w, key_ids=torch.cat([row, row[:2]]), impl=impl),
        lambda x, w, row, number, impl: info_nce(x, w, scale=number, impl=impl),
    ],
    ids=["positive", "target", "key_ids", "scale"],
)
def test_vmap_over_indices_and_scales_is_refused_by_all_but_the_reference(loss):
    x, w = operands()
    rows, numbers = torch.stack([TARGET, TARGET.flip(0)]), torch.tensor([1.0, 2.0])
    with pytest.raises(RuntimeError, match="cannot be vmapped over its operands; loop over them, or pass"):
        torch.func.vmap(lambda row, number: loss(x, w, row, number, "auto"))(rows, numbers)
    batch = torch.func.vmap(lambda row, number: loss(x, w, row, number, "reference"))(rows, numbers)
    each = torch.stack([loss(x, w, row, number, "auto") for row, number in zip(rows, numbers)])
    torch.testing.assert_close(batch, each)


def test_what_cannot_be_transformed_says_so():
    x, w = operands()
    with pytest.raises(RuntimeError, match="cannot be vmapped over its operands"):
        torch.func.vmap(lambda x: info_nce(x, w))(x.expand(3, 5, 8))
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.hessian(lambda x: info_nce(x, w))(x)
    for reduction in ("mean", "none"):
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.func.grad(lambda x, r=reduction: slope(x, w, r).sum())(x)


@pytest.mark.parametrize("ignore_index", [-100, None])
def test_a_wrong_target_is_no_ignored_one_in_a_compiled_graph(ignore_index):
    def loss(x, w, target):
        return linear_cross_entropy(x, w, target, ignore_index=ignore_index, reduction="none")

    x, w = operands()
    target = torch.tensor([0, -1, 7, 2, 3])
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert compiled(x, w, target).isnan().tolist() == [False, True, True, False, False]


def embeddings(x: Tensor, w: Tensor, loss: bool = False, of=gather_last_hidden) -> Tensor:
    """Of rows 0 and 3 twice, whose norms have the weight `w`."""
    y = of(x, torch.tensor([0, 3, 3]), norm_weight=w, normalize=True)
    return y.cos().sum() if loss else y


def test_the_gather_is_transformed_by_reverse_mode():
    x, w = operands()[0], torch.linspace(0.5, 1.5, 8)
    right = torch.func.grad(partial(embeddings, loss=True, of=reference.gather_last_hidden), argnums=(0, 1))(x, w)
    torch.testing.assert_close(torch.func.grad(partial(embeddings, loss=True), argnums=(0, 1))(x, w), right)
    batch = torch.stack([x, x.flip(0)])
    each = torch.stack([torch.func.grad(partial(embeddings, loss=True))(one, w) for one in batch])
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(partial(embeddings, loss=True)), in_dims=(0, None))(batch, w), each
    )
    by_rows = torch.func.vmap(lambda row: gather_last_hidden(x, row))(torch.tensor([[0, 1], [4, 4]]))
    assert torch.equal(by_rows, x[torch.tensor([[0, 1], [4, 4]])])


def test_forward_mode_of_the_gather_is_refused_rather_than_zero():
    """A loss of what it gathers would see no tangent, and have none."""
    x, w = operands()[0], torch.ones(8)
    with pytest.raises(RuntimeError, match="gather_last_hidden has no forward-mode derivative"):
        torch.func.jvp(lambda x: info_nce(embeddings(x, w), x), (x,), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jacfwd(embeddings)(x, w)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        embeddings(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), w)


def test_second_derivatives_of_the_gather_are_refused_rather_than_zero():
    x, w = operands()[0].requires_grad_(), torch.ones(8)
    (dx,) = torch.autograd.grad(embeddings(2 * x, w).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(x.sum() + dx.square().sum(), x)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.func.grad(lambda x: torch.func.grad(lambda x: embeddings(x, w).sum())(x).square().sum())(x.detach())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_computes_the_gather_and_the_loss_again(reentrant):
    x, w = operands()[0], torch.ones(8)

    def loss(x: Tensor) -> Tensor:
        return info_nce(embeddings(2 * x, w), x)

    found = []
    for run in (loss, partial(checkpoint, loss, use_reentrant=reentrant)):
        leaf = x.clone().requires_grad_()
        run(leaf).backward()
        found.append(leaf.grad)
    assert torch.equal(*found)
