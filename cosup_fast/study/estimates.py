"""Means and differences over seeds, questions and test sets, with intervals of a bootstrap that resamples both.

A metric of a condition is a matrix x[s, q] for each test set t, of S seeds and Q_t questions. The average over sets is

    m = 1/T sum_t 1/Q_t sum_q 1/S sum_s x_t[s, q]

and the difference of two conditions is that of their m on the questions that both have. Seeds and questions are
crossed: every model is asked every question. A draw resamples the questions within each set, alike for both
conditions, and the seeds of each condition; of two conditions with the same seeds, seeds are drawn together, since
those runs read the same batches from the same start. This is the pigeonhole bootstrap (Owen 2007, arXiv 0712.1111).
Deviations of S drawn seeds from their mean are scaled by sqrt(S / (S - 1)), without which the variance between runs
would be too small by a third with three seeds. One seed says nothing of other runs: its interval is over questions.

Of a standard error e, the draws' standard deviation, a true difference of (z_0.975 + z_0.8) e = 2.8 e is one whose
interval leaves out 0 in four studies of five: the smallest that a study can be expected to see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cosup_fast.data.strict import Strict

DRAWS = 4000
DETECTABLE = 1.960 + 0.842
"""Standard errors in a difference that a two-sided test at 5% sees with a power of 80%."""

Matrix = NDArray[np.float64]
Values = Mapping[int, Mapping[str, float]]
"""Of one condition on one test set: by seed, the metric of every question for which it is defined."""


class Interval(Strict):
    """A mean of shares, or a difference of two, with its 95% interval, which is cut to what such a mean can be."""

    mean: float
    low: float
    high: float
    error: float
    """Standard error: the standard deviation of the draws."""
    seeds: int
    """Of the condition, or of the one of both that has fewer: with 1 the interval is over questions alone."""
    questions: int
    sets: int

    @property
    def decided(self) -> bool:
        """Whether 0 lies outside."""
        return self.low > 0 or self.high < 0

    @property
    def detectable(self) -> float:
        """The smallest true difference of which 0 would lie outside four times in five."""
        return DETECTABLE * self.error


def average(values: Mapping[str, Values], *, seed: int = 0) -> Interval | None:
    """The mean over sets of a condition's metric; None where it is defined nowhere.

    Args:
        values: by test set.
        seed: of the draws.
    """
    return _estimate([(matrix, None) for matrix in map(_matrix, values.values()) if matrix.size], False, seed)


def difference(after: Mapping[str, Values], before: Mapping[str, Values], *, seed: int = 0) -> Interval | None:
    """after - before over the sets and questions of both; None where they have none in common."""
    pairs, together = [], True
    for name in after:
        if name not in before:
            continue
        a, b = after[name], before[name]
        common = set.intersection(*(set(row) for side in (a, b) for row in side.values())) if a and b else set()
        if not common:
            continue
        together = together and a.keys() == b.keys()
        order = sorted(common)
        pairs.append(tuple(np.array([[side[s][q] for q in order] for s in sorted(side)]) for side in (a, b)))
    return _estimate(pairs, together, seed)


def _estimate(pairs: Sequence[tuple[Matrix, Matrix | None]], together: bool, seed: int) -> Interval | None:
    if not pairs:
        return None
    draws = _draws(pairs, together, seed)
    least = 0 if all(b is None for _, b in pairs) else -1
    mean = float(np.mean([a.mean() - (0 if b is None else b.mean()) for a, b in pairs]))
    low, high = (float(x) for x in np.clip(np.percentile(draws, (2.5, 97.5)), least, 1))
    return Interval(
        mean=mean,
        low=low,
        high=high,
        error=float(draws.std()),
        seeds=min(len(side) for pair in pairs for side in pair if side is not None),
        questions=sum(a.shape[1] for a, _ in pairs),
        sets=len(pairs),
    )


def _draws(pairs: Sequence[tuple[Matrix, Matrix | None]], together: bool, seed: int) -> Matrix:
    """Resampled values of the statistic, (DRAWS,)."""
    total = np.zeros(DRAWS)
    for place, pair in enumerate(pairs):
        questions = _question_weights(pair[0].shape[1], place, seed)
        for side, matrix in enumerate(pair):
            if matrix is not None:
                runs = _seed_weights(len(matrix), 0 if together else side, seed)  # the same runs in every set
                total += (-1) ** side * np.einsum("rs,rs->r", questions @ matrix.T, runs)
    return total / len(pairs)


@lru_cache(maxsize=64)
def _question_weights(count: int, place: int, seed: int) -> Matrix:
    """How often each question of a set is drawn, (DRAWS, count), as shares."""
    random = np.random.default_rng((seed, 0, place))
    return random.multinomial(count, np.full(count, 1 / count), size=DRAWS) / count


@lru_cache(maxsize=64)
def _seed_weights(seeds: int, side: int, seed: int) -> Matrix:
    """Weights of the runs, (DRAWS, seeds), that sum to 1 in each draw."""
    even = 1 / seeds
    if seeds == 1:
        return np.ones((DRAWS, 1))
    random = np.random.default_rng((seed, 1, side))
    drawn = random.multinomial(seeds, np.full(seeds, even), size=DRAWS) / seeds
    return even + np.sqrt(seeds / (seeds - 1)) * (drawn - even)


def _matrix(values: Values) -> Matrix:
    """(seeds, questions) of the questions that every seed has."""
    if not values:
        return np.zeros((0, 0))
    order = sorted(set.intersection(*(set(row) for row in values.values())))
    return np.array([[values[s][q] for q in order] for s in sorted(values)])
