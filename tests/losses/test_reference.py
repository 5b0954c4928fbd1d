"""The oracles against what they claim to be: plain loops over the equations; `test_losses.py` has other libraries."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosup_fast import reference
from cosup_fast.testing import randn

DOUBLE = torch.float64

assert_same = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
rand = partial(randn, dtype=DOUBLE, requires_grad=True)


def grads(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, retain_graph=True)


def log_sum_exp(values: list[float]) -> float:
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def loops(
    query, keys, positive, *, scale=1.0, normalize=False, symmetric=False, query_ids=None, key_ids=None,
    positive_ids=None, duplicates="mask", private_negatives=None, label_smoothing=0.0,
) -> list[float]:  # fmt: skip
    """The definition of InfoNCE by row, one score at a time and without tensors."""

    def unit(v):
        length = math.sqrt(math.fsum(a * a for a in v))
        return [a / length for a in v] if normalize else v

    query, keys = [unit(v) for v in query.tolist()], [unit(v) for v in keys.tolist()]
    n, m = len(query), len(keys)
    private = (
        [[unit(v) for v in of] for of in private_negatives.tolist()] if private_negatives is not None else [[]] * n
    )
    answers = list(range(n)) if positive is None and positive_ids is None else positive
    answers = answers.tolist() if isinstance(answers, Tensor) else answers

    def score(a, b):
        return scale * math.fsum(p * q for p, q in zip(a, b))

    def role(i, j):
        if key_ids is not None and key_ids[j] < 0:
            return "none"
        if answers is not None and answers[i] == j:
            return "positive"
        if positive_ids is not None and key_ids[j] in positive_ids[i].tolist():
            return "positive"
        answer = None
        if query_ids is not None:
            answer = query_ids[i]
        elif key_ids is not None and answers is not None:
            answer = key_ids[answers[i]]
        if answer is not None and key_ids[j] == answer:
            return {"mask": "none", "positive": "positive", "keep": "negative"}[duplicates]
        return "negative"

    def loss(scores, roles):
        candidates = [z for z, r in zip(scores, roles) if r != "none"]
        lse = log_sum_exp(candidates)
        likely = lse - log_sum_exp([z for z, r in zip(scores, roles) if r == "positive"])
        uniform = lse - math.fsum(candidates) / len(candidates)
        return (1 - label_smoothing) * likely + label_smoothing * uniform

    losses = []
    for i in range(n):
        row = [score(query[i], k) for k in keys] + [score(query[i], k) for k in private[i]]
        value = loss(row, [role(i, j) for j in range(m)] + ["negative"] * len(private[i]))
        if symmetric:
            j = answers[i]
            column = [score(q, keys[j]) for q in query]
            value = (value + loss(column, [role(k, j) for k in range(n)])) / 2
        losses.append(value)
    return losses


IDS = torch.tensor([4, 9, 4, 7, -1, 9, 5])
SHARED = torch.tensor([1, 5, 0, 1])
OPTIONS = {
    "plain": {},
    "positive": {"positive": SHARED},
    "scale": {"scale": 3.5},
    "normalize": {"normalize": True, "scale": 20.0},
    "smoothing": {"label_smoothing": 0.2},
    "mask": {"key_ids": IDS},
    "keep": {"key_ids": IDS, "duplicates": "keep"},
    "several": {"key_ids": IDS, "duplicates": "positive"},
    "query ids": {"key_ids": IDS, "query_ids": torch.tensor([4, 9, 4, 5])},
    "positive ids": {"key_ids": IDS, "positive_ids": torch.tensor([[4, -1], [7, 9], [5, 5], [-1, 7]])},
    "positive and ids": {"key_ids": IDS, "positive": SHARED, "positive_ids": torch.tensor([[4], [-1], [5], [7]])},
    "private": {"private_negatives": randn(4, 2, 3, dtype=DOUBLE)},
    "symmetric": {"symmetric": True},
    "symmetric, shared keys": {"symmetric": True, "positive": SHARED},
    "symmetric, mask": {"symmetric": True, "positive": SHARED, "key_ids": IDS, "label_smoothing": 0.1},
    "symmetric, several": {"symmetric": True, "key_ids": IDS, "duplicates": "positive", "scale": 0.3},
    "symmetric, private": {"symmetric": True, "private_negatives": randn(4, 2, 3, dtype=DOUBLE), "normalize": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_info_nce_is_its_definition(options):
    query, keys = rand(4, 3), rand(7, 3)
    options = dict(options)
    positive = options.pop("positive", None)
    expected = torch.tensor(loops(query, keys, positive, **options), dtype=DOUBLE)
    for reduction, value in (("none", expected), ("sum", expected.sum()), ("mean", expected.mean())):
        ours = reference.info_nce(query, keys, positive, reduction=reduction, **options)
        torch.testing.assert_close(ours, value, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda q, k: reference.info_nce(q, k, positive, **options), (query, keys))


def test_info_nce_statistics():
    query, keys = rand(4, 3), rand(7, 3)
    loss, stats = reference.info_nce(
        query, keys, key_ids=IDS, duplicates="positive", reduction="none", return_stats=True
    )
    z = (query @ keys.T).tolist()
    for i in range(4):
        candidates = {j: z[i][j] for j in range(7) if IDS[j] >= 0}
        positives = [z[i][j] for j in candidates if IDS[j] == IDS[i]]
        assert stats.lse[i].item() == pytest.approx(log_sum_exp(list(candidates.values())), abs=1e-12)
        assert stats.positive_logit[i].item() == pytest.approx(log_sum_exp(positives), abs=1e-12)
        assert stats.rank[i].item() == sum(value > max(positives) for value in candidates.values())
        assert stats.top1[i].item() == max(candidates, key=lambda j: candidates[j])
    torch.testing.assert_close(stats.lse - stats.positive_logit, loss.detach(), rtol=0, atol=1e-12)
    assert not any(s.requires_grad for s in stats)


def test_linear_cross_entropy_softcap_z_loss_and_scale():
    hidden, weight, bias = rand(3, 4), rand(5, 4), rand(5)
    target, scale = torch.tensor([2, -100, 0]), torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)
    options = {"softcap": 1.5, "z_loss": 0.1, "bias": bias, "scale": scale, "reduction": "none"}
    expected = []
    for t, y in enumerate(target.tolist()):
        z = [1.5 * math.tanh(a / 1.5) for a in (0.7 * hidden[t] @ weight.T + bias).tolist()]
        expected.append(0.0 if y == -100 else log_sum_exp(z) - z[y] + 0.1 * log_sum_exp(z) ** 2)
    ours = reference.linear_cross_entropy(hidden, weight, target, **options)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=DOUBLE), rtol=1e-12, atol=1e-12)
    _, stats = reference.linear_cross_entropy(hidden, weight, target, return_stats=True, **options)
    assert (stats.lse[1], stats.positive_logit[1], stats.rank[1], stats.top1[1]) == (0, 0, -1, -1)
    assert stats.lse[0].item() == pytest.approx(
        log_sum_exp([1.5 * math.tanh(a / 1.5) for a in (0.7 * hidden[0] @ weight.T + bias).tolist()]), abs=1e-12
    )


def test_gather_last_hidden_is_rms_norm_and_normalize():
    hidden, weight = rand(2, 5, 8), rand(8)
    rows = torch.tensor([9, 0, 3, 9])
    norm = nn.RMSNorm(8, eps=1e-5, dtype=DOUBLE)
    norm.weight = nn.Parameter(weight.detach().clone())
    theirs = F.normalize(norm(hidden)[[1, 0, 0, 1], [4, 0, 3, 4]], dim=-1)
    ours = reference.gather_last_hidden(hidden, rows, norm_weight=weight, eps=1e-5, normalize=True)
    g = randn(4, 8, dtype=DOUBLE)
    assert_same(
        (ours, *grads((ours * g).sum(), hidden, weight)), (theirs, *grads((theirs * g).sum(), hidden, norm.weight))
    )
