"""Search: FAISS, torch and brute force in fp64 agree on ids, scores and ties; approximate kinds give exact scores."""

from __future__ import annotations

import sys
from itertools import pairwise

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosup_fast.data.records import Passage
from cosup_fast.data.template import TextConfig
from cosup_fast.index import Origin, SequenceIndex
from cosup_fast.index.search import (
    Approximate,
    FaissFlat,
    TorchFlat,
    make_approximate,
    search,
    set_parameters,
    train_approximate,
)

ORIGIN = Origin(text=TextConfig(), similarity="dot", fingerprint="f")


def _oracle(queries, keys, k):
    """Scores in fp64, rounded to fp32; equal ones by row."""
    scores = (queries.double() @ keys.double().T).numpy().astype(np.float32)
    order = np.stack([np.lexsort((np.arange(len(keys)), -row)) for row in scores])[:, :k]
    return torch.from_numpy(np.take_along_axis(scores, order, 1)), torch.from_numpy(order)


def _blocks(keys, cuts):
    edges = [0, *sorted({cut % len(keys) for cut in cuts} - {0}), len(keys)]
    return [keys[a:b].numpy() for a, b in pairwise(edges)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    queries=st.integers(0, 7),
    keys=st.integers(1, 400),
    width=st.sampled_from([1, 3, 33, 128]),
    k=st.integers(1, 450),
    cuts=st.lists(st.integers(0, 399), max_size=4),
    kind=st.sampled_from(["random", "unit", "duplicates", "integers", "alike"]),
)
def test_engines_agree_with_brute_force(seed, queries, keys, width, k, cuts, kind):
    random = torch.Generator().manual_seed(seed)
    asked, stored = (torch.randn(n, width, generator=random) for n in (queries, keys))
    if kind == "unit":
        stored = torch.nn.functional.normalize(stored, dim=-1)
    elif kind == "duplicates":
        stored = stored[torch.randint(keys, (keys,), generator=random) // 3]
    elif kind == "integers":
        asked, stored = asked.round(), stored.round()
    elif kind == "alike":  # an untrained model: everything is the same but for a trifle
        stored = stored[:1] + 1e-7 * stored
    expected = _oracle(asked, stored, min(k, keys)) if queries else (torch.empty(0, min(k, keys)),) * 2
    for engine in (FaissFlat, TorchFlat):
        scores, rows = search(
            engine(_blocks(stored, cuts)), lambda rows: stored.numpy()[rows], asked, min(k, keys), keys, exact=True
        )
        assert torch.equal(rows, expected[1].long()), engine
        torch.testing.assert_close(scores, expected[0], rtol=1e-6, atol=1e-12)


def test_more_candidates_are_taken_where_many_are_alike():
    """A thousand equal passages before the best ones of a searcher that keeps few: the first rows must win."""
    stored = torch.ones(3000, 16)
    stored[2000:] *= -1
    calls = []

    class Backwards(TorchFlat):
        def __call__(self, queries, count):
            calls.append(count)
            scores = (queries @ stored.T + torch.linspace(0, 1e-6, 3000)).numpy()  # rounding that favours late rows
            return np.argsort(-scores, axis=1, kind="stable")[:, :count]

    scores, rows = search(
        Backwards([stored.numpy()]), lambda rows: stored.numpy()[rows], torch.ones(2, 16), 3, 3000, exact=True
    )
    assert rows.tolist() == [[0, 1, 2]] * 2
    assert scores.tolist() == [[16.0] * 3] * 2
    assert calls == [38, 152, 608, 2432]


def test_queries_are_searched_in_parts(monkeypatch):
    monkeypatch.setattr("cosup_fast.index.search.NUMBERS_AT_ONCE", 1)
    asked, stored = torch.randn(5, 8), torch.randn(60, 8)
    for engine in (FaissFlat, TorchFlat):
        _, rows = search(engine(_blocks(stored, [20, 41])), lambda rows: stored.numpy()[rows], asked, 4, 60, exact=True)
        assert torch.equal(rows, _oracle(asked, stored, 4)[1])


def test_autocast_and_low_precision_around_a_search_change_nothing():
    asked, stored = torch.randn(5, 64), torch.randn(500, 64)
    passages = [Passage(id=str(i), title="", text="x") for i in range(500)]
    index = SequenceIndex(passages, stored, ORIGIN, engine="torch")
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            scores, rows = index.search(asked, 10)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    expected = _oracle(asked, stored, 10)
    assert torch.equal(rows, expected[1])
    torch.testing.assert_close(scores, expected[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("factory", ["IVF8,Flat", "HNSW16", "IVF4,PQ8x4", "SQ8", "Flat"])
def test_approximate_kinds_find_most_and_score_exactly(factory):
    random = torch.Generator().manual_seed(0)
    stored = torch.nn.functional.normalize(torch.randn(2000, 16, generator=random), dim=-1)
    asked = stored[::40] + 0.1 * torch.randn(50, 16, generator=random)
    index = make_approximate(factory, 16, 2000)
    blocks = _blocks(stored, [700, 1300])
    train_approximate(index, blocks, 1000)
    for block in blocks:
        index.add(block)
    if "IVF" in factory:
        set_parameters(index, "nprobe=4")
    scores, rows = search(Approximate(index), lambda rows: stored.numpy()[rows], asked, 10, 2000, exact=False)
    expected = _oracle(asked, stored, 10)[1]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows.tolist(), expected.tolist())])
    assert recall > 0.6, recall
    torch.testing.assert_close(scores, (asked[:, None] * stored[rows]).sum(-1))
    assert (scores.diff(dim=1) <= 0).all()


def test_an_approximate_index_may_find_fewer():
    stored = torch.eye(8)
    index = make_approximate("IVF8,Flat", 8, 8)
    train_approximate(index, [stored.numpy()], 8)
    index.add(stored.numpy())
    scores, rows = search(Approximate(index), lambda rows: stored.numpy()[rows], torch.eye(8)[:1], 3, 8, exact=False)
    assert rows[0].tolist() == [0, -1, -1]
    assert scores[0].tolist() == [1.0, -np.inf, -np.inf]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_approximate("IVFx,Flat", 8), r"factory='IVFx,Flat' makes no FAISS index .*'IVF1024,Flat'"),
        (lambda: make_approximate("IVF64,Flat", 8, 63), "has 64 clusters for 63 passages"),
        (lambda: train_approximate(make_approximate("PQ4x8", 8), [np.ones((9, 8), "f")], 9), "cannot be trained on 9"),
        (lambda: set_parameters(make_approximate("HNSW8", 8), "nprobes=3"), "parameters='nprobes=3' are not those"),
        (lambda: SequenceIndex([Passage(id="a", title="", text="b")], torch.ones(1, 2), ORIGIN, engine="annoy"),
         "engine='annoy': choose from auto, faiss, torch, approximate"),
        (lambda: SequenceIndex([Passage(id="a", title="", text="b")], torch.ones(1, 2), ORIGIN, engine="approximate"),
         "no approximate FAISS index, build it with a factory"),
        (lambda: SequenceIndex([Passage(id="a", title="", text="b")], torch.ones(1, 2), ORIGIN, engine="faiss",
                               device="cuda"), "engine='faiss' searches on the CPU, not on device='cuda'"),
    ],
)  # fmt: skip
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_faiss_auto_is_torch_and_an_explicit_wish_is_an_error(monkeypatch):
    passages = [Passage(id=str(i), title="", text="x") for i in range(20)]
    stored = torch.randn(20, 4)
    with_faiss = SequenceIndex(passages, stored, ORIGIN, engine="faiss").search(stored, 5)
    monkeypatch.setitem(sys.modules, "faiss", None)
    found = SequenceIndex(passages, stored, ORIGIN).search(stored, 5)
    assert all(map(torch.equal, found, with_faiss))
    with pytest.raises(ImportError, match=r"pip install 'cosup-fast\[index\]'"):
        SequenceIndex(passages, stored, ORIGIN, engine="faiss")


def test_faiss_flat_is_index_flat_ip():
    asked, stored = np.random.default_rng(0).standard_normal((2, 50, 24), dtype=np.float32)
    plain = faiss.IndexFlatIP(24)
    plain.add(stored)
    _, rows = plain.search(asked, 7)
    found = search(FaissFlat([stored]), lambda rows: stored[rows], torch.from_numpy(asked), 7, 50, exact=True)
    assert torch.equal(found[1], torch.from_numpy(rows))


@pytest.mark.parametrize("factory", ["IVF16,Flat", "PCA4,IVF16,Flat"])
def test_an_approximate_index_over_duplicates_finds_something_for_every_query(factory):
    """Of 16 clusters of 12 distinct vectors some are empty, and FAISS probes one by default."""
    distinct = torch.nn.functional.normalize(torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    vectors = distinct.repeat(60, 1)
    index = make_approximate(factory, 8, len(vectors))
    train_approximate(index, [vectors.numpy()], 10_000)
    index.add(vectors.numpy())
    queries = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    plain = index.search(queries.numpy(), 3)[1]
    assert (plain < 0).all(axis=1).any()
    assert (Approximate(index)(queries, 3)[:, 0] >= 0).all()
    assert (index.search(queries.numpy(), 3)[1] == plain).all()  # its own setting is as it was
