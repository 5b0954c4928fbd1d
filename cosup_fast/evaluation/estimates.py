"""Means with bootstrap intervals, averages over data sets, and what one run gains over another on the same questions.

Intervals are 95% percentile bootstrap intervals over questions (Efron 1979), p-values those of a paired permutation
test (Fisher 1935), both by scipy. An average over data sets resamples the questions within each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cosup_fast.data.strict import Strict
from cosup_fast.evaluation.metrics import require

RESAMPLES = 2000
PERMUTATIONS = 9999


class Estimate(Strict):
    """A mean with its 95% bootstrap interval; no interval from fewer than two values."""

    mean: float
    low: float | None
    high: float | None
    count: int  # values that the mean is taken over


class Gain(Strict):
    """The mean difference between two runs on the same questions."""

    before: float
    after: float
    gain: Estimate
    p_value: float | None  # two-sided; none from fewer than two questions


def bootstrap_mean(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """A mean with its interval.

    Raises:
        ValueError: no value.
        ImportError: scipy is not installed.
    """
    return macro_average([values], seed=seed)


def macro_average(groups: Sequence[Sequence[float]], *, seed: int = 0) -> Estimate:
    """The mean of the means of groups, each group counting alike; its interval resamples within each group.

    Raises:
        ValueError: no group, or a group without a value.
        ImportError: scipy is not installed.
    """
    samples = [np.asarray(values, dtype=float) for values in groups]
    if not samples or not all(sample.size for sample in samples):
        raise ValueError("a mean needs at least one value, got none")
    mean, count = float(np.mean([sample.mean() for sample in samples])), sum(sample.size for sample in samples)
    if all(sample.size == 1 for sample in samples):
        return Estimate(mean=mean, low=None, high=None, count=count)
    if all((sample == sample[0]).all() for sample in samples):
        return Estimate(mean=mean, low=mean, high=mean, count=count)
    low, high = _interval(samples, seed)
    return Estimate(mean=mean, low=low, high=high, count=count)


def paired_gain(before: Mapping[str, float], after: Mapping[str, float], *, seed: int = 0) -> Estimate:
    """The mean difference after - before over the questions of both, with its 95% paired bootstrap interval.

    Args:
        before: a metric by question, as `Report.values` gives it.
        after: the same metric of another run.
        seed: of the resamples.

    Raises:
        ValueError: no question in common.
    """
    return bootstrap_mean(_differences(before, after), seed=seed)


def compare_values(before: Mapping[str, float], after: Mapping[str, float], *, seed: int = 0) -> Gain:
    """`paired_gain` with the means of both runs and the p-value of the paired permutation test.

    The test swaps the two runs on each question at random: the p-value is the probability of a mean difference at
    least as large, of either sign, if it made no difference which run is which.

    Raises:
        ValueError: no question in common.
    """
    differences = np.asarray(_differences(before, after))
    common = [name for name in before if name in after]
    p_value = None
    if differences.size > 1:
        zeros = np.zeros_like(differences)
        test = require("scipy.stats", "scipy").permutation_test(
            (differences, zeros),
            lambda x, y, axis: np.mean(x - y, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=PERMUTATIONS,
            batch=max(1, 10_000_000 // differences.size),
            rng=np.random.default_rng(seed),
        )
        p_value = float(test.pvalue)
    return Gain(
        before=float(np.mean([before[name] for name in common])),
        after=float(np.mean([after[name] for name in common])),
        gain=bootstrap_mean(differences.tolist(), seed=seed),
        p_value=p_value,
    )


def _differences(before: Mapping[str, float], after: Mapping[str, float]) -> list[float]:
    common = [name for name in before if name in after]
    if not common:
        raise ValueError(f"no question in common between {len(before)} before and {len(after)} after")
    return [after[name] - before[name] for name in common]


def _interval(samples: Sequence[Any], seed: int) -> tuple[float, float]:
    """Of the mean of means; a sample of one value, which scipy does not resample, is a constant."""
    several = [sample for sample in samples if sample.size > 1]
    constant = sum(float(sample[0]) for sample in samples if sample.size == 1)

    def mean_of_means(*resampled: Any, axis: int = -1) -> Any:
        return (constant + sum(np.mean(sample, axis=axis) for sample in resampled)) / len(samples)

    interval = (
        require("scipy.stats", "scipy")
        .bootstrap(
            several,
            mean_of_means,
            n_resamples=RESAMPLES,
            batch=100,
            method="percentile",
            vectorized=True,
            rng=np.random.default_rng(seed),
        )
        .confidence_interval
    )
    return float(interval.low), float(interval.high)
