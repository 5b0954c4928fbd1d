"""How tests/gpu runs where there is no GPU, and how several processes share one.

COSUP_REHEARSE_GPU=1     tests that need no real GPU run at small sizes on CPU tensors, kernels in the interpreter, one
                         or two of each: a typo then waits for no GPU
COSUP_TEST_SHARD=i/n     the i-th of n processes: most of the time goes into compiling kernels
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

REHEARSED = os.environ.get("COSUP_REHEARSE_GPU") == "1"


@pytest.fixture(autouse=True)
def _rehearsed() -> Iterator[None]:
    if not REHEARSED:
        yield
        return
    from cosup_fast.testing import interpret

    with interpret():
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if Path(item.fspath).parent == Path(__file__).parent]
    kept = ours
    if REHEARSED:
        by_function: dict[str, list[pytest.Item]] = defaultdict(list)
        for item in ours:
            by_function[item.nodeid.partition("[")[0]].append(item)
        kept = [item for group in by_function.values() for item in dict.fromkeys((group[0], group[-1]))]
    if shard := os.environ.get("COSUP_TEST_SHARD"):
        i, n = map(int, shard.split("/"))
        kept = kept[i::n]
    gone = [item for item in ours if item not in set(kept)]
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in set(gone)]
