"""The memory of scores is kept between losses, within the budget, and shared by nobody."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cosup_fast.functional import info_nce, release_workspace
from cosup_fast.kernels import workspace


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    monkeypatch.setattr(workspace, "SMALL", 0)
    release_workspace()
    yield
    release_workspace()


def gradients(seed: int, n: int = 64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(n, 8, generator=generator, requires_grad=True) for _ in range(2))
    return torch.autograd.grad(info_nce(x, w), (x, w))


def test_the_largest_buffer_is_kept_until_it_is_released():
    gradients(0, 64)
    (first,) = workspace.kept_buffers
    assert len(first) == 64 * 64 * 4
    gradients(0, 32)
    assert workspace.kept_buffers[0] is first
    gradients(0, 128)
    assert len(workspace.kept_buffers[0]) == 128 * 128 * 4
    release_workspace()
    assert not workspace.kept_buffers


def test_nothing_beyond_the_budget_is_kept(monkeypatch):
    gradients(0, 128)
    monkeypatch.setenv("COSUP_WORKSPACE_BYTES", "4096")
    gradients(0, 16)
    assert [len(buffer) for buffer in workspace.kept_buffers] == [16 * 16 * 4]  # what was kept before is above it


def test_of_two_buffers_the_larger_one_is_kept():
    for sizes in ((4096, 8192), (8192, 4096)):
        release_workspace()
        buffers = [workspace.take(size) for size in sizes]
        for buffer in buffers:
            workspace.give_back(buffer)
        assert [len(buffer) for buffer in workspace.kept_buffers] == [8192]


def test_results_do_not_live_in_the_workspace():
    first = gradients(1)
    copies = [t.clone() for t in first]
    gradients(2)
    assert all(torch.equal(a, b) for a, b in zip(first, copies))


def test_threads_do_not_share_a_buffer():
    alone = [gradients(seed) for seed in range(16)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(gradients, range(16)))
    assert all(torch.equal(a, b) for x, y in zip(alone, together) for a, b in zip(x, y))


def test_a_chunk_that_fails_leaves_the_workspace_usable(monkeypatch):
    from cosup_fast.kernels.softmax_xent.chunk_torch import TorchChunk

    def fail(*args, **kwargs):
        raise RuntimeError("no luck")

    with monkeypatch.context() as patch:
        patch.setattr(TorchChunk, "statistics_and_accumulate", fail)
        with pytest.raises(RuntimeError, match="no luck"):
            gradients(3)
    assert all(torch.equal(a, b) for a, b in zip(gradients(3), gradients(3)))
