"""Means and differences over seeds, questions and sets: values by hand, what is resampled, how often it is right."""

from __future__ import annotations

import numpy as np
import pytest

from cosup_fast.study.estimates import average, difference

A = {"s": {0: {"a": 1.0, "b": 0.0}, 1: {"a": 1.0, "b": 1.0}}, "t": {0: {"c": 0.0}, 1: {"c": 1.0}}}
B = {"s": {0: {"a": 0.0, "b": 0.0}, 1: {"a": 1.0, "b": 0.0}}, "t": {0: {"c": 0.0}, 1: {"c": 0.0}}}


def test_every_set_counts_alike():
    found = average(A)
    assert found.mean == (0.75 + 0.5) / 2
    assert (found.seeds, found.questions, found.sets) == (2, 3, 2)


def test_differences_are_paired_on_questions_and_sets_of_both():
    found = difference(A, B)
    assert found.mean == ((0.75 - 0.25) + (0.5 - 0)) / 2
    one = {"s": {0: {"a": 1.0, "b": 0.0, "only here": 1.0}}, "only here": {0: {"x": 1.0}}}
    found = difference(one, B)
    assert found.mean == 0.5 - 0.25
    assert (found.seeds, found.questions, found.sets) == (1, 2, 1)
    assert difference({"x": A["s"]}, B) is None
    assert average({}) is None


def test_an_equal_model_differs_by_exactly_nothing():
    found = difference(A, A)
    assert (found.mean, found.low, found.high) == (0, 0, 0)
    assert not found.decided


def test_one_seed_leaves_the_interval_of_the_questions():
    values = np.random.default_rng(0).integers(0, 2, 400).astype(float)
    found = average({"s": {0: {str(i): x for i, x in enumerate(values)}}})
    error = values.std() / len(values) ** 0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_the_spread_between_seeds_is_that_of_a_sample():
    # All questions of a run are alike, so that what is left is the variance between three runs, s^2 / 3.
    runs = {0: 0.2, 1: 0.5, 2: 0.8}
    found = average({"s": {seed: dict.fromkeys("abc", value) for seed, value in runs.items()}})
    assert found.mean == pytest.approx(0.5)
    # The ten resamples of three runs: the outermost, one in 27 each, lie sqrt(3 / 2) times as far as plain ones.
    assert found.low == pytest.approx(0.5 - 0.3 * 1.5**0.5)
    assert found.high == pytest.approx(0.5 + 0.3 * 1.5**0.5)


def test_runs_of_the_same_seed_are_drawn_together_where_all_are_shared():
    good = {0: {"a": 0.9}, 1: {"a": 0.6}, 2: {"a": 0.3}}
    bad = {seed: {"a": row["a"] - 0.2} for seed, row in good.items()}
    together = difference({"s": good}, {"s": bad})
    assert together.low == pytest.approx(0.2)
    assert together.high == pytest.approx(0.2)
    apart = difference({"s": good}, {"s": {seed + 5: row for seed, row in bad.items()}})
    assert apart.mean == pytest.approx(0.2)
    assert apart.low < 0 < apart.high


def test_intervals_end_where_a_mean_of_shares_does():
    nearly = {seed: {str(i): float(i != seed) for i in range(20)} for seed in (0, 1)}
    never = {seed: {str(i): float(i == 0) for i in range(20)} for seed in (0, 1)}
    assert average({"s": nearly}).high == 1
    assert average({"s": {seed: {q: 1 - x for q, x in row.items()} for seed, row in nearly.items()}}).low == 0
    assert -1 <= difference({"s": never}, {"s": nearly}).low < 0


def _study(random, shift, sides=(3, 3)):
    """Two conditions of so many seeds on two sets of 60 questions, the first better by `shift` on the logit scale."""
    hard, made = random.normal(-0.5, 1, (2, 60)), []
    for seeds, gain in zip(sides, (shift, 0.0), strict=True):
        runs = gain + random.normal(0, 0.2, seeds)
        right = random.random((2, seeds, 60)) < 1 / (1 + np.exp(-(hard[:, None] + runs[:, None])))
        made.append({t: {s: dict(enumerate(row.astype(float))) for s, row in enumerate(right[t])} for t in (0, 1)})
    return made


@pytest.mark.parametrize("sides", [(3, 3), (3, 2)])
def test_a_detectable_difference_is_decided_about_four_times_in_five(sides):
    random = np.random.default_rng(5)
    nothing = [difference(*_study(random, 0.0, sides)) for _ in range(60)]
    assert np.mean([found.decided for found in nothing]) <= 0.05
    assert nothing[0].detectable == pytest.approx(2.80 * nothing[0].error, rel=0.01)
    detectable = np.mean([found.detectable for found in nothing])
    shift = 5 * detectable  # a share near 0.4 moves by about a fifth of the logit
    found = [difference(*_study(random, shift, sides)) for _ in range(120)]
    assert np.mean([one.mean for one in found]) == pytest.approx(detectable, rel=0.1)
    assert 0.65 <= np.mean([one.decided for one in found]) <= 0.95


def test_an_interval_covers_the_true_difference_about_as_often_as_it_says():
    random, covered, trials = np.random.default_rng(1), 0, 120
    for trial in range(trials):
        hard = random.normal(size=60)
        sides = []
        for shift in (0.5, 0.0):
            runs = random.normal(0, 0.3, 5)
            matrix = random.random((5, 60)) < 1 / (1 + np.exp(-(hard + shift + runs[:, None])))
            sides.append(
                {"s": {seed: {str(q): float(x) for q, x in enumerate(row)} for seed, row in enumerate(matrix)}}
            )
        found = difference(*sides, seed=trial)
        grid = np.random.default_rng(2).normal(size=(4000, 1)) + np.random.default_rng(3).normal(0, 0.3, 200)
        truth = (1 / (1 + np.exp(-(grid + 0.5))) - 1 / (1 + np.exp(-grid))).mean()
        covered += found.low <= truth <= found.high
    assert covered / trials > 0.85
