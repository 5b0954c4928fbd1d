"""Where and when losses run on a CUDA device: another than the current one, streams, ranks, graphs; bad targets, ties.

A rehearsal (see conftest.py) runs what it can on the CPU.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cosup_fast.functional import gather_last_hidden, info_nce, linear_cross_entropy
from cosup_fast.kernels.softmax_xent.dispatch import KERNELS

REHEARSED = os.environ.get("COSUP_REHEARSE_GPU") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not REHEARSED and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
real = pytest.mark.skipif(REHEARSED, reason="needs a CUDA device, also in a rehearsal")
DEVICE = "cpu" if REHEARSED else "cuda"
N, M, D = (9, 20, 32) if REHEARSED else (1000, 3001, 576)
HALF = torch.bfloat16


def tensors(device: str = DEVICE, n: int = N, m: int = M, d: int = D, dtype: torch.dtype = HALF) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(size, d, generator=generator) / d**0.5).to(device, dtype).requires_grad_() for size in (n, m)]


def step(impl: str, x: Tensor, w: Tensor, **options) -> list[Tensor]:
    """A loss and its gradients."""
    loss = info_nce(x, w, scale=8.0, impl=impl, **options)
    return [loss, *torch.autograd.grad(loss.sum(), (x, w))]


@real
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("impl", KERNELS)
def test_a_device_that_is_not_the_current_one(impl):
    first = step(impl, *tensors("cuda:0"))
    with torch.cuda.device(0):
        other = step(impl, *tensors("cuda:1"))
        hidden = torch.randn(8, 64, device="cuda:1", requires_grad=True)
        gather_last_hidden(hidden, torch.tensor([1, 5], device="cuda:1")).sum().backward()
    assert torch.cuda.current_device() == 0
    for a, b in zip(first, other, strict=True):
        assert b.device == torch.device("cuda:1")
        torch.testing.assert_close(a, b.to("cuda:0"))


@real
@pytest.mark.parametrize("impl", [*KERNELS, "stored"])
def test_two_streams_at_once(impl):
    """Each waits for its own work alone, and neither disturbs the other's memory."""
    alone = [step(impl, *tensors(n=n)) for n in (500, 1000)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in alone]
    found = []
    for n, stream in zip((500, 1000), streams, strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            x, w = tensors(n=n)
            for _ in range(5):
                last = step(impl, x, w)
            found.append(last)
    torch.cuda.synchronize()
    for ours, right in zip(found, alone, strict=True):
        torch.testing.assert_close(ours, right)


@pytest.fixture
def one_rank(tmp_path):
    """A group of one rank, by NCCL on a GPU."""
    if dist.is_initialized():
        pytest.skip("a process group is there already")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    backend = "gloo" if REHEARSED else "nccl"
    if not dist.is_backend_available(backend):
        pytest.skip(f"this torch has no {backend}")
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("impl", [*KERNELS, "stored"])
def test_a_group_of_one_rank(impl, one_rank):
    ids = torch.arange(M, device=DEVICE) % (M - 3)
    alone = step(impl, *tensors(), key_ids=ids)
    grouped = step(impl, *tensors(), key_ids=ids, group=one_rank)
    for a, b in zip(alone, grouped, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-2, atol=1e-4)


@real
@pytest.mark.parametrize("impl", KERNELS)
def test_a_target_that_is_no_candidate_makes_its_row_nan(impl):
    x, w = tensors()
    target = torch.arange(N, device=DEVICE)
    target[3], target[5], target[7] = -1, M, 2**31 - 1
    loss = info_nce(x, w, target, scale=8.0, reduction="none", impl=impl)
    wrong = torch.zeros(N, dtype=torch.bool, device=DEVICE)
    wrong[[3, 5, 7]] = True
    assert torch.equal(loss.isnan(), wrong)
    right = info_nce(x, w, torch.arange(N, device=DEVICE), scale=8.0, reduction="none", impl=impl)
    assert torch.equal(loss[~wrong], right[~wrong])


@pytest.mark.parametrize("impl", [*KERNELS, "stored"])
def test_a_duplicate_of_the_positive_is_no_better_than_it(impl):
    """Every positive is there twice: whatever sums its logit, the copy ties and every rank is 0."""
    x, w = tensors(m=N)
    _, stats = info_nce(x, torch.cat([w, w]), scale=8.0, impl=impl, return_stats=True)
    x, w = x.double(), w.double()
    z = 8.0 * x @ w.T
    above = (z > z.diagonal()[:, None] + 2.0**-18 * z.abs().amax(1, keepdim=True)).sum(1)
    near = (z > z.diagonal()[:, None] - 2.0**-18 * z.abs().amax(1, keepdim=True)).sum(1) - 1
    assert ((stats.rank >= 2 * above) & (stats.rank <= 2 * near)).all()  # exact but for what fp32 cannot tell
    assert torch.equal(stats.rank[near == above], 2 * above[near == above])


@real
@pytest.mark.parametrize("impl", KERNELS)
def test_a_graph_of_a_size_that_was_never_seen(impl):
    """A warm-up of another number of rows is enough."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(impl, *tensors(n=333, m=3008))
    torch.cuda.current_stream().wait_stream(side)
    x, w = tensors(n=17, m=4096)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(impl, x, w)
    graph.replay()
    for a, b in zip(captured, step(impl, x, w), strict=True):
        torch.testing.assert_close(a, b)


@real
def test_a_graph_before_any_warm_up_says_what_to_do():
    """An option that nothing else here has, so that no earlier test compiled it."""
    x, w = tensors(n=64, m=4096, d=48, dtype=torch.float16)
    target = torch.arange(64, device=DEVICE)
    with (
        pytest.raises(RuntimeError, match="would be compiled while a CUDA graph is captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        linear_cross_entropy(x, w, target, z_loss=0.125, label_smoothing=0.25, impl="fused")
    torch.cuda.synchronize()
    linear_cross_entropy(x, w, target, z_loss=0.125, label_smoothing=0.25, impl="fused")
