"""Makes `import benchmarks` mean the clone's."""

import pytest

from cosup_fast.cli.bench import load_benchmarks

load_benchmarks()


@pytest.fixture
def small_copy(monkeypatch):
    """Copies and timings of no length."""
    from benchmarks import timing

    monkeypatch.setattr(timing, "COPY_BYTES", 2**16)
    monkeypatch.setattr(timing, "SHORTEST", 1e-4)
