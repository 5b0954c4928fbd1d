"""The pytest plugin: fixtures `interpreted`, `sanitized`, `counted`, and a marker that compiles a matrix.

    @pytest.mark.compile_matrix("my_package.kernels")
    def test_binaries(compiled):
        compiled.check()

runs once a combination of kernel, dtype and target that the modules declare, and skips where a target is not a gate and
has problems, with them as the reason. `targets=["sm_90"]` narrows it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from cosup_fast import testing

if TYPE_CHECKING:
    from cosup_fast.testing import Compiled, Counts, Sanitizer


def _need_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip(testing.NEEDS_TRITON)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "compile_matrix(*modules, targets=None): runs the test on each binary the modules declare"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "compiled" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("compile_matrix")
    if marker is None:
        raise pytest.UsageError(f"{metafunc.definition.nodeid} takes `compiled` but has no compile_matrix marker")
    if importlib.util.find_spec("triton") is None:
        metafunc.parametrize("compiled", [pytest.param(None, marks=pytest.mark.skip(testing.NEEDS_TRITON))])
        return
    from cosup_fast.testing.compile import collect, combinations

    found = list(combinations(collect(marker.args or "cosup_fast.kernels"), marker.kwargs.get("targets")))
    ids = [f"{case.name}-{dtype}-{target}" for case, dtype, target in found]
    metafunc.parametrize("compiled", found, ids=ids, indirect=True)


@pytest.fixture
def compiled(request: pytest.FixtureRequest) -> Compiled:
    """The binary of one combination of a `compile_matrix`."""
    made = testing.compile_case(*request.param)
    if made.problems and not made.gate:
        pytest.skip(f"{made.target} is reported only: {'; '.join(made.problems)}")
    return made


@pytest.fixture
def interpreted() -> Iterator[None]:
    """The test's Triton kernels run on CPU tensors, as `cosup_fast.testing.interpret` has them."""
    _need_triton()
    with testing.interpret():
        yield


@pytest.fixture
def sanitized() -> Iterator[Sanitizer]:
    """The test's Triton kernels run under `cosup_fast.testing.sanitize`; a finding fails the test."""
    _need_triton()
    with testing.sanitize() as sanitizer:
        yield sanitizer


@pytest.fixture
def counted() -> Iterator[Counts]:
    """The cost of what the test runs, as `cosup_fast.testing.count` has it."""
    _need_triton()
    with testing.count() as counts:
        yield counts
