"""The modules: what they add to the operators, and that they can replace the losses people use."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from info_nce import InfoNCE
from torch import Tensor, nn

import cosup_fast
from cosup_fast import functional
from cosup_fast.losses import CoSupervisionLoss, InfoNCELoss, LinearCrossEntropyLoss
from cosup_fast.testing import randn

DOUBLE = torch.float64

rand = partial(randn, dtype=DOUBLE, requires_grad=True)


def assert_same(ours: Tensor, theirs: Tensor, *inputs: Tensor, tolerance: float = 1e-11) -> None:
    """Equal values and, under an upstream gradient other than 1, equal gradients."""
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    g = torch.linspace(0.5, 2, ours.numel(), dtype=DOUBLE).view(ours.shape)
    a, b = (torch.autograd.grad((loss * g).sum(), inputs, retain_graph=True) for loss in (ours, theirs))
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


IMPLS = ["reference", "auto"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("mode", ["in-batch", "unpaired", "paired"])
def test_replaces_info_nce_pytorch(mode, reduction, impl):
    n, d = 7, 5
    query, positive = rand(n, d), rand(n, d, seed=1)
    ours = InfoNCELoss(temperature=0.07, normalize=True, reduction=reduction, impl=impl)
    theirs = InfoNCE(temperature=0.07, reduction=reduction, negative_mode="paired" if mode == "paired" else "unpaired")
    if mode == "in-batch":
        assert_same(ours(query, positive), theirs(query, positive), query, positive)
        return
    # Given negatives, that library has no in-batch ones: here all positives share an id, which takes them out.
    same = torch.zeros(n, dtype=torch.int64)
    if mode == "unpaired":
        negatives = rand(11, d)
        ids = torch.cat([same, torch.arange(1, 12)])
        a = ours(query, torch.cat([positive, negatives]), query_ids=same, key_ids=ids)
    else:
        negatives = rand(n, 3, d)
        a = ours(query, positive, query_ids=same, key_ids=same, private_negatives=negatives)
    assert_same(a, theirs(query, positive, negatives), query, positive, negatives)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("hard", [0, 1, 3], ids=lambda n: f"{n} hard negatives")
@pytest.mark.parametrize("symmetric", [False, True], ids=["one way", "symmetric"])
def test_replaces_multiple_negatives_ranking_loss(symmetric, hard, impl, lookup):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    columns = [rand(9, 6, seed=i) for i in range(2 + hard)]
    both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    theirs = losses.MultipleNegativesRankingLoss(lookup, scale=20.0, **(both if symmetric else {}))
    b = theirs.compute_loss_from_embeddings(columns, torch.empty(0))
    ours = InfoNCELoss(scale=20.0, normalize=True, symmetric=symmetric, impl=impl)
    assert_same(ours(columns[0], torch.cat(columns[1:])), b, *columns, tolerance=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_replaces_cross_entropy_of_a_linear_head(smoothing, reduction, impl):
    hidden, head = rand(123, 33), nn.Linear(33, 257, dtype=DOUBLE)
    target = torch.arange(123) * 2
    target[::4] = -100
    inputs = hidden, head.weight, head.bias
    options = {"reduction": reduction, "label_smoothing": smoothing}
    ours = LinearCrossEntropyLoss(impl=impl, **options)(hidden, head.weight, target, bias=head.bias)
    assert_same(ours, nn.CrossEntropyLoss(**options)(head(hidden), target), *inputs)
    if hasattr(F, "linear_cross_entropy"):
        theirs = F.linear_cross_entropy(hidden, head.weight, target, linear_bias=head.bias, **options)
        assert_same(ours, theirs, *inputs)


def test_options_reach_the_operators(monkeypatch):
    seen = {}
    for name in ("info_nce", "linear_cross_entropy"):

        def record(*args, name=name, **kwargs):
            seen[name] = kwargs
            return torch.zeros(())

        monkeypatch.setattr(f"cosup_fast.losses.{name}", record)
    nce = {"normalize": True, "symmetric": True, "label_smoothing": 0.1, "duplicates": "keep", "reduction": "sum"}
    nce |= {"key_grad": "local", "margin": 0.1, "query_negatives": False, "key_negatives": False}
    ids = {name: torch.zeros(1) for name in ("query_ids", "key_ids", "positive_ids", "private_negatives")}
    given = {"group": object(), "positive_rows": "group", "return_stats": True}
    InfoNCELoss(scale=2.0, impl="stored", **nce)(rand(1, 1), rand(1, 1), **ids, **given)
    assert seen["info_nce"] == {**nce, **ids, "scale": 2.0, "impl": "stored", **given}
    lce = {"ignore_index": 3, "scale": 2.0, "softcap": 5.0, "z_loss": 0.1, "label_smoothing": 0.1, "reduction": "none"}
    bias = torch.zeros(1)
    LinearCrossEntropyLoss(impl="reference", **lce)(rand(1, 1), rand(1, 1), torch.zeros(1), bias=bias)
    assert seen["linear_cross_entropy"] == {**lce, "impl": "reference", "bias": bias, "return_stats": False}


def test_the_default_is_the_papers_plain_dot_product():
    query, keys = 3 * rand(5, 4), 3 * rand(8, 4)
    assert_same(InfoNCELoss()(query, keys), F.cross_entropy(query @ keys.T, torch.arange(5)), query, keys)


def test_learnable_scale_is_trained_and_clamped():
    torch.manual_seed(0)
    loss = InfoNCELoss(temperature=0.05, learnable_scale=True, max_scale=25.0, normalize=True)
    query = rand(16, 8)
    # Every query finds another's key perfect, so the scale wants to fall, and the bound must not hold it up.
    keys = query.detach().flip(0)
    assert [name for name, _ in loss.named_parameters()] == ["log_scale"]
    assert loss.scale.item() == pytest.approx(20)
    log_scale = torch.tensor(math.log(20), requires_grad=True)
    cosine = F.normalize(query) @ F.normalize(keys).T
    expected = torch.autograd.grad(F.cross_entropy(cosine * log_scale.exp(), torch.arange(16)), log_scale)
    actual = torch.autograd.grad(loss(query, keys), loss.log_scale)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)

    with torch.no_grad():
        loss.log_scale.fill_(9.0)
    at_bound = loss(query, keys)
    assert loss.scale.item() == pytest.approx(25)
    torch.testing.assert_close(at_bound, F.cross_entropy(cosine * 25, torch.arange(16)), rtol=1e-6, atol=0)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss(query, keys).backward()
        optimizer.step()
    assert loss.scale.item() < 24.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.1, "scale": 10.0}, "temperature is 0.1 and scale is 10.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"scale": 200.0, "learnable_scale": True}, "scale is 200.0, above max_scale 100.0"),
    ],
)
def test_info_nce_loss_errors(options, message):
    with pytest.raises(ValueError, match=message):
        InfoNCELoss(**options)


def test_a_count_is_one_number():
    query = torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"count has shape \(2,\); pass a number or a 0-d tensor"):
        InfoNCELoss()(query, query, count=torch.tensor([3, 4]))
    with pytest.raises(TypeError, match="count is a str; pass a number or a 0-d tensor"):
        InfoNCELoss()(query, query, count="4")


def test_counts_replace_the_mean():
    query, keys, target = rand(5, 4), rand(8, 4), torch.tensor([0, 1, -100, 3, 4])
    for count in (50, torch.tensor(50)):
        assert_same(InfoNCELoss()(query, keys, count=count), InfoNCELoss()(query, keys) / 10, query, keys)
        ours = LinearCrossEntropyLoss()(query, keys, target, count=count)
        assert_same(ours, LinearCrossEntropyLoss()(query, keys, target) * 4 / 50, query, keys)
    loss, stats = InfoNCELoss()(query, keys, count=50, return_stats=True)
    torch.testing.assert_close(loss, (stats.lse - stats.positive_logit).sum() / 50)
    for nothing in (0, torch.tensor(0)):
        assert LinearCrossEntropyLoss()(query[:0], keys, target[:0], count=nothing) == 0


def step(loss: CoSupervisionLoss, hidden: Tensor, weight: Tensor, keys: Tensor, rows: slice, at: Tensor, **counts):
    """One micro-batch: some rows of hidden states, of which the rows `at` are queries, against keys of its own."""
    target = (torch.arange(len(hidden)) * 5) % len(weight)
    target[::4] = -100
    inside = at[(at >= rows.start) & (at < rows.stop)]
    positive = torch.searchsorted(at, inside)
    query = functional.gather_last_hidden(hidden[rows], inside - rows.start)
    return loss(hidden[rows], weight, target[rows], query=query, keys=keys, positive=positive, **counts)


def test_co_supervision_is_ntp_plus_lambda_nsp():
    hidden, weight, keys = rand(11, 6), rand(17, 6), rand(5, 6)
    at = torch.tensor([1, 6, 7])
    out = step(CoSupervisionLoss(nsp_weight=0.3), hidden, weight, keys, slice(0, 11), at)
    target = (torch.arange(11) * 5) % 17
    target[::4] = -100
    ntp = F.cross_entropy(hidden @ weight.T, target)
    scores = hidden[at] @ keys.T
    nsp = F.cross_entropy(scores, torch.arange(3))
    assert_same(out.loss, ntp + 0.3 * nsp, hidden, weight, keys)
    torch.testing.assert_close(out.ntp, ntp)
    torch.testing.assert_close(out.nsp, nsp)
    assert torch.equal(out.stats.top1, scores.argmax(1))
    assert CoSupervisionLoss().nsp_weight == 0.01


def test_private_negatives_reach_nsp():
    hidden, weight, keys, private = rand(4, 6), rand(17, 6), rand(3, 6, seed=1), rand(2, 5, 6, seed=2)
    loss = CoSupervisionLoss(nsp_weight=0.3)
    query = hidden[:2]
    out = loss(hidden, weight, torch.arange(4), query=query, keys=keys, private_negatives=private)
    scores = torch.cat([query @ keys.T, (private @ query[:, :, None]).squeeze(2)], 1)
    nsp = F.cross_entropy(scores, torch.arange(2))
    assert_same(out.loss, F.cross_entropy(hidden @ weight.T, torch.arange(4)) + 0.3 * nsp, hidden, keys, private)


def test_unequal_micro_batches_add_up_to_the_whole_batch():
    hidden, weight, keys = rand(23, 6), rand(17, 6), rand(5, 6)
    at = torch.tensor([1, 6, 7, 20])
    loss = CoSupervisionLoss(nsp_weight=0.5)
    whole = step(loss, hidden, weight, keys, slice(0, 23), at)
    expected = torch.autograd.grad(whole.loss, (hidden, weight, keys))
    supervised = 23 - len(range(0, 23, 4))
    # 9 + 1 + 13 rows with 3, 0 and 1 queries; the second has no supervised token either.
    parts = [
        step(loss, hidden, weight, keys, rows, at, ntp_count=supervised, nsp_count=torch.tensor(4))
        for rows in (slice(0, 8), slice(8, 9), slice(9, 23))
    ]
    total = sum(p.loss for p in parts)
    torch.testing.assert_close(total, whole.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(p.nsp for p in parts), whole.nsp, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(total, (hidden, weight, keys)), expected):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("empty", ["None", "no rows"])
def test_no_queries(empty):
    hidden, weight, keys = rand(4, 6), rand(17, 6), rand(5, 6)
    query = None if empty == "None" else hidden[:0]
    out = CoSupervisionLoss()(hidden, weight, torch.arange(4), query=query, keys=keys, nsp_count=7)
    assert (out.nsp, out.stats) == (0, None)
    assert not out.nsp.requires_grad
    assert torch.equal(out.loss, out.ntp)
    out.loss.backward()
    assert keys.grad is None


def test_weight_zero_reports_nsp_without_gradient():
    hidden, weight, keys = rand(4, 6), rand(17, 6), rand(5, 6)
    out = CoSupervisionLoss(nsp_weight=0)(hidden, weight, torch.arange(4), query=hidden[:2], keys=keys)
    torch.testing.assert_close(out.nsp, F.cross_entropy(hidden[:2] @ keys.T, torch.arange(2)))
    assert not out.nsp.requires_grad
    assert out.stats.rank.shape == (2,)
    assert_same(out.loss, F.cross_entropy(hidden @ weight.T, torch.arange(4)), hidden, weight)


def test_no_loss_has_a_graph_where_gradients_are_off():
    hidden, weight, keys = rand(4, 6), rand(17, 6), rand(5, 6)
    with torch.no_grad():
        out = CoSupervisionLoss()(hidden, weight, torch.arange(4), query=hidden[:2], keys=keys)
    assert not any(loss.requires_grad for loss in out[:3])


def test_a_loss_of_weight_zero_may_be_anything():
    ntp, nothing = torch.tensor(2.0), torch.tensor(math.nan)
    assert CoSupervisionLoss(nsp_weight=0).combine(ntp, nothing) == 2
    assert CoSupervisionLoss(nsp_weight=3.0).combine(ntp, nothing, 0.0) == 2
    assert CoSupervisionLoss(nsp_weight=3.0, ntp_weight=0).combine(nothing, ntp) == 6


def test_nsp_alone_needs_no_head():
    hidden, keys = rand(4, 6), rand(5, 6)
    loss = CoSupervisionLoss(nsp_weight=0.3, ntp_weight=0)
    out = loss(None, None, None, query=hidden[:2], keys=keys)
    nsp = F.cross_entropy(hidden[:2] @ keys.T, torch.arange(2))
    assert out.ntp == 0
    assert_same(out.loss, 0.3 * nsp, hidden, keys)
    with pytest.raises(ValueError, match="query is None and ntp_weight is 0"):
        loss(None, None, None, query=None, keys=None)
    with pytest.raises(ValueError, match=r"lm_head_weight is None, and ntp_weight is 1\.0"):
        CoSupervisionLoss()(hidden, None, torch.arange(4), query=None, keys=None)


def test_both_losses_have_a_weight():
    hidden, weight, keys = rand(4, 6), rand(17, 6), rand(5, 6)
    out = CoSupervisionLoss(0.3, ntp_weight=0.2)(hidden, weight, torch.arange(4), query=hidden[:2], keys=keys)
    ntp = F.cross_entropy(hidden @ weight.T, torch.arange(4))
    nsp = F.cross_entropy(hidden[:2] @ keys.T, torch.arange(2))
    torch.testing.assert_close(out.ntp, ntp)
    assert_same(out.loss, 0.2 * ntp + 0.3 * nsp, hidden, weight, keys)


def test_a_passage_twice_in_the_batch_is_no_negative_of_its_query():
    hidden, weight, keys = rand(3, 6), rand(17, 6), rand(3, 6)
    ids = torch.tensor([7, 8, 7])
    out = CoSupervisionLoss(1.0)(hidden, weight, torch.full((3,), -100), query=hidden, keys=keys, key_ids=ids)
    masked = (hidden @ keys.T).masked_fill((ids[:, None] == ids) & ~torch.eye(3, dtype=torch.bool), -torch.inf)
    assert_same(out.loss, F.cross_entropy(masked, torch.arange(3)), hidden, keys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nsp_weight": -0.1}, "nsp_weight is -0.1"),
        ({"nsp_weight": math.nan}, "nsp_weight is nan"),
        ({"ntp_weight": -1.0}, "ntp_weight is -1.0"),
        ({"ntp_weight": 0, "nsp_weight": 0}, "nsp_weight and ntp_weight are both 0"),
        ({"ntp": LinearCrossEntropyLoss(reduction="sum")}, "ntp has reduction 'sum'"),
        ({"nsp": InfoNCELoss(reduction="none")}, "nsp has reduction 'none'"),
    ],
)
def test_co_supervision_errors(options, message):
    with pytest.raises(ValueError, match=message):
        CoSupervisionLoss(**options)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (InfoNCELoss, {"impl": "triton"}, ValueError, "impl is 'triton'; pass one of"),
        (InfoNCELoss, {"duplicates": "drop"}, ValueError, "duplicates is 'drop'"),
        (InfoNCELoss, {"reduction": "avg"}, ValueError, "reduction is 'avg'"),
        (InfoNCELoss, {"key_grad": "own"}, ValueError, "key_grad is 'own'"),
        (InfoNCELoss, {"label_smoothing": 2}, ValueError, "label_smoothing is 2"),
        (InfoNCELoss, {"temperature": torch.tensor(0.05)}, TypeError, "temperature is a Tensor; pass a number, with"),
        (InfoNCELoss, {"scale": "20"}, TypeError, "scale is a str"),
        (InfoNCELoss, {"temperature": True}, TypeError, "temperature is a bool"),
        (InfoNCELoss, {"learnable_scale": True, "max_scale": math.nan}, ValueError, "max_scale is nan"),
        (CoSupervisionLoss, {"nsp_weight": "0.1"}, TypeError, "nsp_weight is a str; pass a number"),
        (LinearCrossEntropyLoss, {"impl": "triton"}, ValueError, "impl is 'triton'"),
        (LinearCrossEntropyLoss, {"z_loss": -1}, ValueError, "z_loss is -1"),
        (LinearCrossEntropyLoss, {"softcap": 0}, ValueError, "softcap is 0"),
    ],
)
def test_an_option_out_of_its_range_is_refused_when_the_module_is_made(make, options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_a_learnt_scale_is_fp32_whatever_a_model_is_made_in():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        loss = InfoNCELoss(temperature=0.05, learnable_scale=True)
    finally:
        torch.set_default_dtype(before)
    assert loss.log_scale is not None
    assert loss.log_scale.dtype == torch.float32
    assert float(loss.scale) == pytest.approx(20, rel=1e-6)


def test_a_printed_model_shows_the_options_of_its_loss():
    loss = CoSupervisionLoss(0.5, LinearCrossEntropyLoss(softcap=30.0), InfoNCELoss(learnable_scale=True))
    shown = str(loss)
    assert "nsp_weight=0.5" in shown
    assert "(ntp): LinearCrossEntropyLoss(ignore_index=-100, softcap=30.0, reduction=mean, impl=auto)" in shown
    assert "(nsp): InfoNCELoss(scale=exp(log_scale), at most 100, duplicates=mask, reduction=mean, impl=auto)" in shown
    assert str(InfoNCELoss(temperature=0.05, normalize=True)).startswith("InfoNCELoss(scale=20, normalize=True, ")


def test_half_precision_models_get_fp32_losses():
    hidden, weight, keys = (
        t.detach().to(torch.bfloat16).requires_grad_() for t in (rand(4, 6), rand(17, 6), rand(5, 6))
    )
    out = CoSupervisionLoss()(hidden, weight, torch.arange(4), query=hidden[:2], keys=keys)
    assert {out.loss.dtype, out.ntp.dtype, out.nsp.dtype} == {torch.float32}
    out.loss.backward()
    assert {t.grad.dtype for t in (hidden, weight, keys)} == {torch.bfloat16}


def test_every_public_name_resolves():
    for name in cosup_fast.__all__:
        assert getattr(cosup_fast, name).__name__ == name
        assert name in dir(cosup_fast)
    assert cosup_fast.InfoNCELoss is InfoNCELoss
    with pytest.raises(AttributeError, match="no attribute 'info_mce'"):
        _ = cosup_fast.info_mce


def test_a_rank_without_queries_still_brings_its_empty_tensors():
    hidden, head, target = rand(2, 4), rand(5, 4), torch.tensor([0, 1])
    group = object()
    with pytest.raises(ValueError, match="query is None and group is given"):
        CoSupervisionLoss()(hidden, head, target, query=None, keys=rand(0, 4), group=group)
    with pytest.raises(ValueError, match="keys is None and group is given"):
        CoSupervisionLoss()(hidden, head, target, query=rand(0, 4), keys=None, group=group)
