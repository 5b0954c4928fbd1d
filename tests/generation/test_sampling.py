"""Sampling: the same answer for a seed, and the frequencies that temperature and top-p ask for."""

from collections import Counter

import pytest
import torch
from scipy import stats

from cosup_fast.generation import Answer, GenerationConfig, Generator, choose


def sampled(model, corpus, **config) -> Answer:
    config = GenerationConfig(ret_first=True, max_new_tokens=20, **config)
    return Generator(model, lambda query, k: [(corpus["go"], 0.0)], config).generate("?")


def test_a_seed_gives_the_same_answer(model, corpus):
    first = sampled(model, corpus, temperature=1.0, seed=3)
    torch.manual_seed(99)
    assert sampled(model, corpus, temperature=1.0, seed=3) == first
    assert len({sampled(model, corpus, temperature=1.0, seed=seed).text for seed in range(6)}) == 6
    greedy = sampled(model, corpus)
    assert sampled(model, corpus, temperature=1e-300) == sampled(model, corpus, temperature=1.0, top_p=1e-9) == greedy


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.4, 0.3, 0.2, 0.1, 0]),
        (0.5, 1.0, [16 / 30, 9 / 30, 4 / 30, 1 / 30, 0]),
        (2.0, 1.0, [2.0, 3**0.5, 2**0.5, 1, 0]),
        (1.0, 0.75, [4 / 9, 3 / 9, 2 / 9, 0, 0]),
        (1.0, 0.69, [4 / 7, 3 / 7, 0, 0, 0]),
        (1.0, 0.1, [1, 0, 0, 0, 0]),
    ],
)
def test_sampled_frequencies(temperature, top_p, expected):
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0]).log()[[3, 0, 4, 2, 1]]
    expected = torch.tensor(expected)[[3, 0, 4, 2, 1]]
    random = torch.Generator().manual_seed(0)
    config = GenerationConfig(temperature=temperature, top_p=top_p)
    counts = Counter(choose(logits, config, random) for _ in range(4000))
    assert {token for token in range(5) if expected[token] > 0} == set(counts)
    kept = sorted(counts)
    share = (expected[kept] / expected.sum()).double().numpy()
    if len(kept) > 1:
        observed = [counts[token] for token in kept]
        assert stats.chisquare(observed, share / share.sum() * sum(observed)).pvalue > 0.001


def test_top_p_stops_as_soon_as_it_is_reached():
    random = torch.Generator().manual_seed(0)
    config = GenerationConfig(temperature=1.0, top_p=0.5)
    assert {choose(torch.zeros(4), config, random) for _ in range(100)} == {0, 1}
