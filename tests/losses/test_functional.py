"""The stored engine against the reference in fp64, budgeted by the error that eager code makes on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from cosup_fast import functional, reference
from cosup_fast.functional import gather_last_hidden, info_nce, linear_cross_entropy
from cosup_fast.kernels.softmax_xent import engine
from cosup_fast.kernels.softmax_xent.scores import Needs, Scores, Statistics
from cosup_fast.testing import assert_close_to_fp64, randn
from cosup_fast.testing import value_and_gradients as run

DOUBLE, HALF = torch.float64, torch.bfloat16
rand = partial(randn, dtype=DOUBLE)


@pytest.fixture
def small_chunks(monkeypatch):
    """A budget that no chunk of more than three rows fits."""
    monkeypatch.setenv("COSUP_WORKSPACE_BYTES", "1")
    monkeypatch.setattr(engine, "MIN_ROWS", 3)


def error(a: Tensor, truth: Tensor) -> float:
    """Largest error relative to the largest entry; absolute where the truth is 0."""
    largest = truth.abs().max().item()
    return (a.to(DOUBLE) - truth).abs().max().item() / (largest or 1.0)


def assert_as_close_as_eager(ours: Callable, eager: Callable, tensors: dict[str, Tensor], well=True, **options) -> None:
    """Value and gradients are within twice eager's own error of the fp64 result."""
    dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
    wide = {name: t.to(DOUBLE) if t.is_floating_point() else t for name, t in tensors.items()}
    ours, plain, exact = run(ours, tensors, **options), run(eager, tensors, **options), run(eager, wide, **options)
    for name, x in exact.items():
        # A single number may happen to need no rounding, or be 0: then fp32 arithmetic on the way there may round.
        atol = 0.0 if well else 2.0**-21 * (x.norm().item() or 1.0)
        assert_close_to_fp64(ours[name], plain[name], x, dtype=dtype, atol=atol, well_conditioned=well, name=name)


SHAPES = [(1, 1, 1), (1, 7, 5), (7, 7, 33), (123, 257, 64), (257, 257, 7)]
IDS = torch.tensor([3, 1, 4, 1, 5, -1, 2, 6, 5, 3, 5])


def problem(n: int, m: int, d: int, dtype: torch.dtype, scale: float = 1.0) -> dict[str, Tensor]:
    return {"query": rand(n, d, dtype=dtype) * scale, "keys": rand(m, d, seed=1, dtype=dtype) * scale}


@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize": True, "scale": 20.0, "symmetric": True},
        {"label_smoothing": 0.1, "reduction": "sum"},
        {"symmetric": True, "reduction": "none", "scale": 0.4},
    ],
    ids=["plain", "cosine, symmetric", "smoothing, sum", "symmetric, none"],
)
def test_info_nce_error(options, shape, dtype, small_chunks):
    n, m, d = shape
    tensors = problem(n, m, d, dtype, d**-0.25)
    upstream = {"upstream": torch.linspace(0.5, 2, n)} if options.get("reduction") == "none" else {}
    # Where p is near 1 the loss is a small difference of scores, and bf16 scores cannot be well conditioned.
    assert_as_close_as_eager(info_nce, reference.info_nce, tensors, well=min(shape) > 1, **options, **upstream)


@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 2.0, "z_loss": 1e-2}, {"label_smoothing": 0.1, "reduction": "none"}],
    ids=["plain", "softcap, z-loss", "smoothing, none"],
)
def test_linear_cross_entropy_error(options, shape, dtype, small_chunks):
    t, v, d = shape
    target = torch.randint(v, (t,), generator=torch.Generator().manual_seed(t))
    target[1::3] = -100
    tensors = {
        "hidden": rand(t, d, dtype=dtype) * d**-0.25,
        "weight": rand(v, d, seed=1, dtype=dtype) * d**-0.25,
        "bias": rand(v, dtype=dtype),
        "target": target,
    }
    assert_as_close_as_eager(
        linear_cross_entropy, reference.linear_cross_entropy, tensors, well=min(shape) > 1, **options
    )


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("case", ["raw dots near 1800", "p = 0.999", "near-uniform", "scale 0.01"])
def test_extreme_logits(case, dtype, small_chunks):
    n, m, d = 33, 129, 64
    q, k = rand(n, d), rand(m, d, seed=1)
    scale = 1.0
    if case == "raw dots near 1800":
        common = rand(1, d, seed=2)
        common *= math.sqrt(1800) / common.norm()
        q, k = common + 0.3 * q, common + 0.3 * k
    elif case == "p = 0.999":
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        k[:n] = q
        scale = 11.5
    elif case == "near-uniform":
        q, k = 1e-3 * q, 1e-3 * k
    else:
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        scale = 100.0
    tensors = {"query": q.to(dtype), "keys": k.to(dtype)}
    loss, stats = info_nce(**tensors, scale=scale, return_stats=True, reduction="none")
    p = (-loss).exp()
    if case == "raw dots near 1800":
        assert 1700 < stats.lse.median() < 2100
    elif case == "p = 0.999":
        assert 0.99 < p.median() < 0.9999
    elif case == "near-uniform":
        assert (p * m - 1).abs().max() < 1e-2
    assert_as_close_as_eager(info_nce, reference.info_nce, tensors, well=case == "near-uniform", scale=scale)
    assert_as_close_as_eager(info_nce, reference.info_nce, tensors, well=False, scale=scale, symmetric=True)


def test_large_raw_scores_in_bf16_are_exact():
    """Eager bf16 scores near 1,800 come in steps of 8; the engine's products have fp32 results."""
    common = rand(1, 64, seed=2)
    common *= math.sqrt(1800) / common.norm()
    tensors = {"query": (common + 0.3 * rand(33, 64)).to(HALF), "keys": (common + 0.3 * rand(99, 64, seed=1)).to(HALF)}
    truth = run(reference.info_nce, {name: t.to(DOUBLE) for name, t in tensors.items()})
    ours, eager = run(info_nce, tensors), run(reference.info_nce, tensors)
    assert error(ours["query"], truth["query"]) < 2**-7 < 0.1 < error(eager["query"], truth["query"])


@pytest.mark.parametrize("impl", ["stored", "reference"])
def test_very_negative_scores_in_bf16_lose_nothing(impl):
    """All near -100, in chunks: a running maximum that begins at 0 would lose every one of them."""
    common = rand(1, 64, seed=2)
    common *= 10 / common.norm()
    q, k = (common + 0.1 * rand(33, 64)).to(HALF), (-common + 0.1 * rand(99, 64, seed=1)).to(HALF)
    if impl == "reference":
        q, k = q.float(), k.float()  # eager bf16 scores come in steps of 0.5 there
    for function, named in (
        (info_nce, {"query": q, "keys": k}),
        (linear_cross_entropy, {"hidden": q, "weight": k}),
    ):
        options = {"target": torch.arange(33) * 2} if function is linear_cross_entropy else {}
        truth = run(function, {name: t.to(DOUBLE) for name, t in named.items()}, impl="reference", **options)
        ours = run(function, named, impl=impl, **options)
        assert ours["loss"].item() == pytest.approx(truth["loss"].item(), abs=1e-5)
        for name in named:
            assert error(ours[name], truth[name]) < 0.01, name


class Draw:
    """A random problem: sizes, options and tensors."""

    def __init__(self, draw, sizes):
        self.n, self.d = draw(sizes), draw(sizes)
        self.m = self.n + draw(st.integers(0, 9))
        seed = draw(st.integers(0, 2**16))
        g = torch.Generator().manual_seed(seed)
        n, m, d = self.n, self.m, self.d
        self.tensors = {
            "query": torch.randn(n, d, generator=g, dtype=DOUBLE),
            "keys": torch.randn(m, d, generator=g, dtype=DOUBLE),
        }
        options = {
            # In one dimension unit vectors tie, and a rank among ties is a matter of rounding.
            "normalize": draw(st.booleans()) and d > 1,
            "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
            "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
            "duplicates": draw(st.sampled_from(["mask", "positive", "keep"])),
        }
        positive = torch.randint(m, (n,), generator=g) if draw(st.booleans()) else None
        if draw(st.booleans()):
            self.tensors["scale"] = torch.rand((), generator=g, dtype=DOUBLE) + 0.2
        if draw(st.booleans()):
            self.tensors["private_negatives"] = torch.randn(n, draw(st.integers(0, 3)), d, generator=g, dtype=DOUBLE)
        if draw(st.booleans()):
            key_ids = torch.randint(-1, max(2, m // 2), (m,), generator=g)
            if draw(st.booleans()):
                p = draw(st.integers(1, 3))
                ids = torch.randint(-1, max(2, m // 2), (n, p), generator=g)
                key_ids[-1] = 0
                ids[:, 0] = 0
                options["positive_ids"] = ids
                if draw(st.booleans()):
                    positive = torch.randint(m, (n,), generator=g)
            if positive is None and "positive_ids" not in options:
                positive = torch.arange(n)
            if positive is not None:
                key_ids[positive] = key_ids[positive].clamp(min=0)
            if draw(st.booleans()):
                options["query_ids"] = torch.randint(0, max(2, m // 2), (n,), generator=g)
            options["key_ids"] = key_ids
        options["positive"] = positive
        options["symmetric"] = draw(st.booleans()) and (positive is not None or "positive_ids" not in options)
        self.options = options
        self.upstream = torch.rand(n, generator=g, dtype=DOUBLE) if options["reduction"] == "none" else -2.5


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_info_nce_equals_reference_for_any_options(data):
    p = Draw(data.draw, st.sampled_from([1, 2, 3, 7, 8, 31]))
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):
            patch.setenv("COSUP_WORKSPACE_BYTES", "1")
            patch.setattr(engine, "MIN_ROWS", data.draw(st.integers(1, 4)))
        ours = run(info_nce, p.tensors, p.upstream, **p.options)
    assert_close(ours, run(reference.info_nce, p.tensors, p.upstream, **p.options), rtol=1e-9, atol=1e-9)
    _, a = info_nce(**p.tensors, **p.options, return_stats=True)
    _, b = reference.info_nce(**p.tensors, **p.options, return_stats=True)
    assert_close(a._asdict(), b._asdict(), rtol=1e-9, atol=1e-9)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_linear_cross_entropy_equals_reference_for_any_options(data):
    sizes = st.sampled_from([1, 2, 3, 7, 8, 31])
    t, v, d = data.draw(sizes), data.draw(sizes), data.draw(sizes)
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    tensors = {
        "hidden": torch.randn(t, d, generator=g, dtype=DOUBLE),
        "weight": torch.randn(v, d, generator=g, dtype=DOUBLE),
    }
    if data.draw(st.booleans()):
        tensors["bias"] = torch.randn(v, generator=g, dtype=DOUBLE)
    if data.draw(st.booleans()):
        tensors["scale"] = torch.rand((), generator=g, dtype=DOUBLE) + 0.2
    ignore_index = data.draw(st.sampled_from([-100, -1, 0, 10**6]))
    target = torch.randint(v, (t,), generator=g)
    target[torch.rand(t, generator=g) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))] = ignore_index
    options = {
        "target": target,
        "ignore_index": ignore_index,
        "softcap": data.draw(st.sampled_from([None, 0.7])),
        "z_loss": data.draw(st.sampled_from([0.0, 0.3])),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.2])),
        "reduction": data.draw(st.sampled_from(["none", "mean", "sum"])),
    }
    upstream = torch.rand(t, generator=g, dtype=DOUBLE) if options["reduction"] == "none" else 3.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COSUP_WORKSPACE_BYTES", "1")
        patch.setattr(engine, "MIN_ROWS", data.draw(st.integers(1, 9)))
        if data.draw(st.booleans(), label="rows cannot be gathered"):
            patch.setattr(functional, "readable", lambda t: False)
        ours = run(linear_cross_entropy, tensors, upstream, **options)
        _, a = linear_cross_entropy(**tensors, **options, return_stats=True)
    assert_close(ours, run(reference.linear_cross_entropy, tensors, upstream, **options), rtol=1e-9, atol=1e-9)
    _, b = reference.linear_cross_entropy(**tensors, **options, return_stats=True)
    assert_close(a._asdict(), b._asdict(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["one way", "symmetric"])
def test_info_nce_gradcheck(symmetric, reduction, small_chunks):
    inputs = (rand(5, 3), rand(8, 3), torch.tensor(1.3, dtype=DOUBLE), rand(5, 2, 3))
    ids = torch.tensor([1, 2, 1, 3, 4, -1, 2, 9])

    def f(query, keys, scale, private_negatives):
        options = {"private_negatives": private_negatives, "key_ids": ids, "duplicates": "positive", "normalize": True}
        return info_nce(
            query, keys, scale=scale, symmetric=symmetric, label_smoothing=0.1, reduction=reduction, **options
        )

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_linear_cross_entropy_gradcheck(reduction, small_chunks):
    inputs = (rand(5, 3), rand(6, 3), rand(6), torch.tensor(0.7, dtype=DOUBLE))
    target = torch.tensor([0, 5, -100, 2, 2])

    def f(hidden, weight, bias, scale):
        options = {"softcap": 1.1, "z_loss": 0.2, "label_smoothing": 0.1, "reduction": reduction}
        return linear_cross_entropy(hidden, weight, target, bias=bias, scale=scale, **options)

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in inputs])


def test_chunks_and_runs_agree_bit_for_bit(monkeypatch):
    q, k = rand(40, 8, dtype=torch.float32), rand(60, 8, dtype=torch.float32)
    positive = torch.arange(40) // 3
    one = run(info_nce, {"query": q, "keys": k}, positive=positive, symmetric=True)
    two = run(info_nce, {"query": q, "keys": k}, positive=positive, symmetric=True)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_fp16_keeps_gradients_that_its_loss_scale_will_lift():
    n, d = 256, 16
    tensors = {"query": 2e-4 * rand(n, d), "keys": 2e-4 * rand(4 * n, d)}
    tensors = {name: t.to(torch.float16) for name, t in tensors.items()}
    exact = run(reference.info_nce, {name: t.to(DOUBLE) for name, t in tensors.items()}, 2.0**16)
    ours = run(info_nce, tensors, 2.0**16)
    assert error(ours["keys"], exact["keys"]) < 2**-9
    assert error(ours["query"], exact["query"]) < 2**-9


@pytest.mark.parametrize("kind", ["info_nce", "linear_cross_entropy"])
def test_autocast_rounds_operands_like_matmul_and_nothing_else(kind):
    x, w = rand(33, 16, dtype=torch.float32), rand(65, 16, dtype=torch.float32)
    if kind == "info_nce":
        names, ours, eager, options = ("query", "keys"), info_nce, reference.info_nce, {"scale": 0.5}
    else:
        names, ours, eager = ("hidden", "weight"), linear_cross_entropy, reference.linear_cross_entropy
        options = {"target": torch.arange(33), "scale": 0.5}
    with torch.autocast("cpu", dtype=HALF):
        a = run(ours, dict(zip(names, (x, w))), **options)
        # A bf16 hidden state against an fp32 weight, as a model under autocast meets its head.
        mixed = run(ours, dict(zip(names, (x.to(HALF), w))), **options)
    rounded = {name: t.to(HALF).to(DOUBLE) for name, t in zip(names, (x, w))}
    truth = run(eager, rounded, **options)
    assert a["loss"].dtype == torch.float32
    for name, value in truth.items():
        assert error(a[name], value) < 2**-18, name
        assert error(mixed[name], value) < 2**-7, name
    with torch.autocast("cpu", dtype=HALF):
        wide = run(ours, {name: t.to(DOUBLE) for name, t in zip(names, (x, w))}, **options)
    exact = run(eager, {name: t.to(DOUBLE) for name, t in zip(names, (x, w))}, **options)
    assert_close(wide, exact, rtol=1e-11, atol=1e-11)


def test_a_vector_of_zeros_has_no_direction_and_no_gradient():
    q, k = rand(3, 4, dtype=torch.float32), rand(5, 4, dtype=torch.float32)
    q[1], k[4] = 0, 0
    out = run(info_nce, {"query": q, "keys": k}, normalize=True, scale=20.0)
    exact = run(reference.info_nce, {"query": q.to(DOUBLE), "keys": k.to(DOUBLE)}, normalize=True, scale=20.0)
    for name, value in exact.items():
        assert error(out[name], value) < 2**-18, name
    assert (out["query"][1] == 0).all()
    assert (out["keys"][4] == 0).all()


def test_two_phases_apart_equal_one_call():
    """Candidates split over two holders, each with its own keys, merged statistics and a column share."""
    q, k = rand(6, 4), rand(10, 4)
    positive = torch.tensor([0, 3, 4, 1, 2, 0])
    whole = run(info_nce, {"query": q, "keys": k}, 1.0, positive=positive, symmetric=True, reduction="sum")
    parts = [Scores(q[i : i + 3], k, target=positive[i : i + 3], symmetric=True) for i in (0, 3)]
    stats = [engine.statistics(s) for s in parts]
    columns = stats[0].columns.merge(stats[1].columns)
    half = torch.full((3,), 0.5, dtype=DOUBLE)
    h = sum(engine.column_gradient(s, half) for s in parts)
    needs = Needs(True, True, False, False, False)
    grads = [engine.gradient(s, Statistics(one.rows, columns), half, needs, h=h) for s, one in zip(parts, stats)]
    assert_close(torch.cat([g.x for g in grads]), whole["query"], rtol=1e-12, atol=1e-12)
    assert_close(grads[0].w + grads[1].w, whole["keys"], rtol=1e-12, atol=1e-12)


def test_statistics_of_split_candidates_merge():
    q, k = 30 * rand(6, 4), 30 * rand(10, 4)
    ids, mine = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, -1, 2]), torch.arange(6)
    options = {"query_ids": mine, "duplicates_are_positive": True, "label_smoothing": 0.1}

    def rows(part):
        scores = Scores(q, k[part], key_ids=ids[part], positive_ids=mine[:, None], **options)
        return engine.statistics(scores).rows

    merged, whole = rows(slice(0, 4)).merge(rows(slice(4, 10))), rows(slice(0, 10))
    assert_close(merged.loss(0.1), whole.loss(0.1), rtol=1e-12, atol=1e-12)
    assert_close(merged.lse, whole.lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["stored", "auto"])
def test_named_implementation_is_the_one_that_runs(impl, monkeypatch):
    monkeypatch.setattr(reference, "info_nce", lambda *a, **k: pytest.fail("fell back to the reference"))
    info_nce(rand(3, 2), rand(3, 2), impl=impl)
    monkeypatch.setattr(functional, "softmax_xent", lambda *a, **k: (torch.tensor(42.0),))
    assert info_nce(rand(3, 2), rand(3, 2), impl=impl) == 42
    monkeypatch.undo()
    monkeypatch.setattr(functional, "softmax_xent", lambda *a, **k: pytest.fail("fell back to the engine"))
    info_nce(rand(3, 2), rand(3, 2), impl="reference")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
@pytest.mark.parametrize("options", [{}, {"symmetric": True, "reduction": "none"}], ids=str)
def test_cuda_error(options, shape, dtype, small_chunks):
    n, m, d = shape
    tensors = {name: t.cuda() for name, t in problem(n, m, d, dtype, d**-0.25).items()}
    assert_as_close_as_eager(info_nce, reference.info_nce, tensors, **options)
    target = torch.arange(n, device="cuda") % m
    target[::3] = -100
    tensors = {"hidden": tensors["query"], "weight": tensors["keys"]}
    options = {"reduction": options.get("reduction", "mean"), "target": target}
    assert_as_close_as_eager(linear_cross_entropy, reference.linear_cross_entropy, tensors, **options)


ROWS = torch.tensor([9, 0, 3, 9, 7])


@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.float16], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["", "rms"])
@pytest.mark.parametrize("normalize", [False, True], ids=["", "l2"])
def test_gather_last_hidden_error(normalize, norm, dtype):
    tensors = {"hidden": rand(2, 5, 33, dtype=dtype)} | ({"norm_weight": rand(33, dtype=dtype)} if norm else {})
    assert_as_close_as_eager(
        gather_last_hidden, reference.gather_last_hidden, tensors, upstream=rand(5, 33), rows=ROWS, normalize=normalize
    )


@pytest.mark.parametrize("impl", ["stored", "reference"])
def test_nothing_is_ignored_where_every_row_is_supervised(impl):
    hidden, weight = torch.randn(7, 5, dtype=DOUBLE, requires_grad=True), torch.randn(11, 5, dtype=DOUBLE)
    target = torch.randint(11, (7,))
    ours, stats = linear_cross_entropy(hidden, weight, target, ignore_index=None, return_stats=True, impl=impl)
    expected, others = linear_cross_entropy(hidden, weight, target, return_stats=True, impl=impl)
    assert torch.equal(ours, expected)
    assert all(torch.equal(a, b) for a, b in zip(stats, others, strict=True))
    assert torch.equal(*(torch.autograd.grad(loss, hidden)[0] for loss in (ours, expected)))
    with pytest.raises(ValueError, match="target holds -100"):
        linear_cross_entropy(hidden, weight, target.index_fill(0, torch.tensor([2]), -100), ignore_index=None)
