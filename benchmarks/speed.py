"""The same as pytest-benchmark entry points, to notice when something became slower.

    python -m pytest benchmarks/speed.py --benchmark-autosave
    python -m pytest benchmarks/speed.py --benchmark-compare --benchmark-compare-fail=median:15%

Runs are kept in .benchmarks/, by machine; only runs of one quiet machine compare.
"""

from __future__ import annotations

from functools import partial

import pytest

from benchmarks.cases import Case
from benchmarks.check import errors, refusal, step, truth
from benchmarks.providers import chosen
from benchmarks.timing import PRODUCTS, limits

CASES = [
    Case("info-nce", 1024, 1024, 1024),
    Case("info-nce", 1024, 1024, 1024, "bf16"),
    Case("info-nce-symmetric", 1024, 1024, 256),
    Case("linear-cross-entropy", 256, 8192, 256),
    Case("linear-cross-entropy", 256, 8192, 256, "bf16"),
]
NAMES = ["ours stored", "dense", PRODUCTS]


@pytest.fixture(scope="module", params=CASES, ids=str)
def problem(request):
    """A case, its inputs, and what is right."""
    inputs = request.param.inputs()
    return request.param, inputs, truth(request.param, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_speed(benchmark, problem, name):
    case, inputs, right = problem
    if name == PRODUCTS:
        call = limits(case, inputs)[PRODUCTS]
    else:
        (provider,) = chosen([name])
        call = partial(step, provider.make(case), inputs)
        assert refusal(case, errors(call(), right.exact), right.eager) is None
    benchmark.group = str(case)
    benchmark.pedantic(call, rounds=15, warmup_rounds=2)
