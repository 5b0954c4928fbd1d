"""Intervals, averages and paired gains: they cover what they say, and degenerate samples have none."""

import itertools

import numpy as np
import pytest
from scipy import stats

from cosup_fast.evaluation.estimates import bootstrap_mean, compare_values, macro_average, paired_gain


def test_interval_covers_the_mean_as_often_as_it_says():
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        estimate = bootstrap_mean(random.normal(3, 2, size=60))
        inside += estimate.low <= 3 <= estimate.high
        assert estimate.low < estimate.mean < estimate.high
    assert stats.binomtest(inside, 200, 0.95).pvalue > 0.001
    assert inside < 200


def test_interval_is_close_to_the_normal_one_and_reproducible():
    values = np.random.default_rng(1).random(400)
    estimate = bootstrap_mean(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert estimate.mean == pytest.approx(values.mean())
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.1)
    assert bootstrap_mean(values) == estimate
    assert bootstrap_mean(values, seed=1) != estimate


def test_degenerate_samples():
    one, equal = bootstrap_mean([0.5]), bootstrap_mean([1, 1, 1])
    assert (one.mean, one.low, one.high, one.count) == (0.5, None, None, 1)
    assert (equal.mean, equal.low, equal.high, equal.count) == (1, 1, 1, 3)
    for nothing in ([[]], [], [[1.0], []]):
        with pytest.raises(ValueError, match="at least one value"):
            macro_average(nothing)


def test_an_average_over_data_sets_counts_them_alike():
    random = np.random.default_rng(2)
    small, large = random.random(30), random.random(3000) + 4
    estimate = macro_average([small, large])
    assert estimate.mean == pytest.approx((small.mean() + large.mean()) / 2)
    assert estimate.count == 3030
    # Resampled within the data sets: the difference between them is not a variance.
    half = 1.96 * np.sqrt(small.var(ddof=1) / 30 + large.var(ddof=1) / 3000) / 2
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.1)
    assert macro_average([small]) == bootstrap_mean(small)
    mixed = macro_average([[1.0], [0.0, 1.0, 1.0]])
    assert mixed.low < mixed.mean < mixed.high


def test_paired_gain_sees_what_unpaired_intervals_hide():
    random = np.random.default_rng(0)
    before = {f"q{i}": float(v) for i, v in enumerate(random.random(100))}
    after = {name: value + 0.05 + 0.02 * random.standard_normal() for name, value in before.items()}
    gain = paired_gain(before, dict(reversed(after.items())))
    assert 0.03 < gain.low < gain.mean < gain.high < 0.07
    assert bootstrap_mean(list(before.values())).high > bootstrap_mean(list(after.values())).low
    assert compare_values(before, after).p_value < 0.001
    part = paired_gain(before, {"q3": before["q3"] + 1, "q4": before["q4"], "new": 5.0})
    assert (part.mean, part.count) == (pytest.approx(0.5), 2)
    assert paired_gain(after, before).mean == pytest.approx(-gain.mean)
    with pytest.raises(ValueError, match="no question in common between 100 before and 1 after"):
        paired_gain(before, {"new": 1.0})


def test_p_value_is_that_of_all_swaps():
    differences = np.array([0.5, -0.1, 0.3, 0.4, -0.2, 0.6])
    before = {str(i): 0.0 for i in range(6)}
    after = {str(i): float(x) for i, x in enumerate(differences)}
    gain = compare_values(before, after)
    swapped = [abs(np.mean(differences * signs)) for signs in itertools.product((1, -1), repeat=6)]
    assert gain.p_value == pytest.approx(np.mean(np.array(swapped) >= abs(differences.mean()) - 1e-12))
    assert (gain.before, gain.after) == (0, pytest.approx(0.25))
    assert compare_values({"a": 1.0}, {"a": 0.0}).p_value is None


def test_p_values_of_no_difference_are_uniform():
    random = np.random.default_rng(3)
    p_values = []
    for _ in range(60):
        noise = random.standard_normal(12)
        p_values.append(compare_values({str(i): 0.0 for i in range(12)}, dict(zip(map(str, range(12)), noise))).p_value)
    assert stats.kstest(p_values, "uniform").pvalue > 0.001
