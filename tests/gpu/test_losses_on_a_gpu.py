"""The losses on a CUDA device at real sizes: values, gradients, memory, graphs, compilation. They wait for one.

A rehearsal (see conftest.py) runs what it can at small sizes on the CPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from cosup_fast import reference
from cosup_fast.functional import explain, info_nce, linear_cross_entropy
from cosup_fast.kernels import tuning
from cosup_fast.kernels.softmax_xent.dispatch import KERNELS
from cosup_fast.testing import operands
from tests.comparing import compare, run, run_exactly

REHEARSED = os.environ.get("COSUP_REHEARSE_GPU") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not REHEARSED and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
real = pytest.mark.skipif(REHEARSED, reason="needs a CUDA device, also in a rehearsal")
DEVICE, SHRINK = ("cpu", 64) if REHEARSED else ("cuda", 1)
HALF = torch.bfloat16
IMPLS = [*KERNELS, "stored", "auto"]
GIB = 2**30


def check(loss, eager, impl: str, x: Tensor, w: Tensor, **options) -> None:
    ours, again = (run(loss, x, w, impl=impl, **options) for _ in range(2))
    for name in ours:
        assert torch.equal(ours[name], again[name]), name
    atol = 2.0**-22 * (x.double().norm(dim=1).max() * w.double().norm(dim=1).max()).item()
    compare(ours, eager, x, w, atol=atol, **options)


def cuda(n: int, m: int, d: int, kind: str = "normal", dtype: torch.dtype = HALF) -> tuple[Tensor, Tensor]:
    x, w = operands(shrunk(n), shrunk(m), -(-d // (16 if REHEARSED else 1)), kind, dtype)
    return x.to(DEVICE), w.to(DEVICE)


def shrunk(size: int) -> int:
    return -(-size // SHRINK)


def at(value: object) -> object:
    """On the device, if it is a tensor."""
    return value.to(DEVICE) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("dtype", [HALF, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(4096, 8192, 1024), (1000, 3001, 577), (65, 50, 4096)], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_info_nce(impl, sizes, dtype):
    x, w = cuda(*sizes, dtype=dtype)
    check(info_nce, reference.info_nce, impl, x, w, positive=torch.arange(len(x), device=DEVICE) % min(40, len(w)))


@pytest.mark.parametrize("kind", ["extreme", "confident", "tiny"])
@pytest.mark.parametrize("impl", IMPLS)
def test_sizes_of_scores(impl, kind):
    check(info_nce, reference.info_nce, impl, *cuda(512, 1024, 576, kind, torch.float32))


@pytest.mark.parametrize(
    "options",
    [
        {"duplicates": "mask"},
        {"duplicates": "positive"},
        {"positive_ids": (torch.arange(shrunk(2048))[:, None] + torch.tensor([0, 5, -4000])) % shrunk(1500)},
        {"label_smoothing": 0.1, "normalize": True, "scale": torch.tensor(10.0)},
        {"symmetric": True},
        {
            "symmetric": True,
            "positive_ids": torch.arange(shrunk(2048))[:, None] % shrunk(1500),
            "positive": torch.arange(shrunk(2048)),
        },
        {"reduction": "none"},
    ],
    ids=", ".join,
)
@pytest.mark.parametrize("impl", IMPLS)
def test_info_nce_options(impl, options):
    if impl == "fused" and "symmetric" in options and "positive_ids" in options:
        pytest.skip("fused holds no columns of several positives")
    x, w = cuda(2048, 4096, 768)
    key_ids = torch.arange(len(w)) % shrunk(1500)
    key_ids[shrunk(4000) :] = -1
    options = {name: at(value) for name, value in options.items()}
    check(info_nce, reference.info_nce, impl, x, w, key_ids=at(key_ids), **options)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("impl", IMPLS)
def test_linear_cross_entropy(impl, softcap):
    if impl == "fused" and softcap:
        pytest.skip("fused holds exponentials, which do not tell the derivative of a softcap")
    x, w = cuda(2048, 49152, 576)
    target = torch.randint(len(w), (len(x),), generator=torch.Generator().manual_seed(0))
    target[::3] = -100
    options = {"target": at(target), "bias": torch.randn(len(w), device=DEVICE).to(HALF), "softcap": softcap}
    check(linear_cross_entropy, reference.linear_cross_entropy, impl, x, w, **options, z_loss=1e-4, label_smoothing=0.1)


@pytest.mark.parametrize("impl", IMPLS)
def test_statistics(impl):
    x, w = cuda(2048, 4096, 768, dtype=torch.float32)
    _, ours = info_nce(x, w, impl=impl, return_stats=True)
    _, exact = info_nce(x.double(), w.double(), impl="reference", return_stats=True)
    assert torch.equal(ours.rank, exact.rank)
    assert torch.equal(ours.top1, exact.top1)
    torch.testing.assert_close(ours.lse.double(), exact.lse, rtol=1e-6, atol=1e-6)


def peak(step) -> int:
    """Bytes allocated at the peak of a step beyond what is there before it."""
    step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@real
@pytest.mark.parametrize("impl", [*KERNELS, "auto"])
def test_memory(impl):
    """65536 x 65536 scores of bf16 are 8 GiB: never more is there than the plan says, gradients and partials."""
    n, m, d = 65536, 65536, 1024
    x, w = (torch.randn(size, d, device="cuda", dtype=HALF, requires_grad=True) for size in (n, m))
    plan = explain(n, m, d, dtype=HALF, device="cuda", impl=impl)
    gradients = 2 * (n + m) * d + 4 * n * d  # dx is gathered in fp32
    used = peak(lambda: torch.autograd.grad(info_nce(x, w, scale=0.03, impl=impl), (x, w)))
    assert used < 1.25 * plan.workspace + gradients + 0.25 * GIB
    assert used < 2.5 * GIB


@real
@pytest.mark.parametrize("impl", [*KERNELS, "auto"])
def test_memory_of_the_vocabulary(impl):
    n, v, d = 16384, 128256, 2048
    x, w = (torch.randn(size, d, device="cuda", dtype=HALF, requires_grad=True) for size in (n, v))
    target = torch.randint(v, (n,), device="cuda")
    plan = explain(n, v, d, dtype=HALF, device="cuda", impl=impl)
    used = peak(lambda: torch.autograd.grad(linear_cross_entropy(x, w, target, scale=0.02, impl=impl), (x, w)))
    assert used < 1.25 * plan.workspace + 2 * (n + v) * d + 4 * n * d + 2 * n * d + 0.25 * GIB


@real
@pytest.mark.parametrize("impl", KERNELS)
def test_offsets_beyond_int32(impl):
    n, d = 2**20 + 70, 2048
    if torch.cuda.mem_get_info()[1] < 40 * GIB:
        pytest.skip("needs 40 GiB of GPU memory")
    x = torch.randn(n, d, device="cuda", dtype=HALF).requires_grad_()
    w = torch.randn(64, d, device="cuda", dtype=HALF)
    target = torch.arange(n, device="cuda") % 64
    (dx,) = torch.autograd.grad(info_nce(x, w, target, scale=0.02, reduction="sum", impl=impl), x)
    tail = x[-100:].detach().double().requires_grad_()
    loss = reference.info_nce(tail, w.double(), target[-100:], scale=0.02, reduction="sum")
    (exact,) = torch.autograd.grad(loss, tail)
    assert ((dx[-100:].double() - exact).norm() < 2.0**-7 * exact.norm()).item()


@real
@pytest.mark.parametrize("symmetric", [False, True], ids=["one way", "symmetric"])
@pytest.mark.parametrize("impl", [*KERNELS, "auto"])
def test_in_a_cuda_graph(impl, symmetric):
    x, w = (t.requires_grad_() for t in cuda(1024, 2048, 576))
    head = torch.randn(5000, 576, device="cuda", dtype=HALF, requires_grad=True)
    ids, target = torch.arange(2048, device="cuda") % 900, torch.arange(1024, device="cuda") * 3 - 50
    target = target.where(target >= 0, -100)

    def step():
        loss = info_nce(x, w, key_ids=ids, symmetric=symmetric, impl=impl)
        loss = loss + linear_cross_entropy(x, head, target, impl=impl)
        return loss, *torch.autograd.grad(loss, (x, w, head))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x) / 24)
        ids.copy_(torch.arange(2048, device="cuda") % 700)
        target.copy_(torch.arange(1024, device="cuda"))
    graph.replay()
    for ours, right in zip(captured, step()):
        torch.testing.assert_close(ours, right)


@real
@pytest.mark.parametrize("impl", [*KERNELS, "auto"])
def test_nothing_waits_for_the_gpu(impl):
    x, w = (t.requires_grad_() for t in cuda(512, 1024, 576))
    ids = torch.arange(1024, device="cuda") % 300
    info_nce(x, w, key_ids=ids, impl=impl).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        info_nce(x, w, key_ids=ids, impl=impl).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@real
@pytest.mark.parametrize("impl", [*KERNELS, "auto"])
def test_compiled_whole(impl):
    def f(x, w, scale):
        return info_nce(x * 2, w, scale=scale, impl=impl) * 3

    outcomes = []
    for g in (f, torch.compile(f, fullgraph=True)):
        leaves = [t.requires_grad_() for t in (*cuda(512, 1024, 576), torch.tensor(2.0, device="cuda"))]
        loss = g(*leaves)
        outcomes.append([loss, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*outcomes)


@real
@pytest.mark.parametrize("impl", KERNELS)
def test_tf32_only_where_torch_allows_it(impl, monkeypatch):
    x, w = cuda(512, 1024, 576, dtype=torch.float32)
    exact = run_exactly(reference.info_nce, x, w)
    errors = {}
    for precision in ("ieee", "tf32"):
        monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", precision)
        errors[precision] = ((run(info_nce, x, w, impl=impl)["x"] - exact["x"]).norm() / exact["x"].norm()).item()
    assert errors["ieee"] < 2.0**-18 < errors["tf32"] < 2.0**-8


@real
def test_search_for_configurations(tmp_path, monkeypatch):
    monkeypatch.setenv("COSUP_AUTOTUNE", "1")
    monkeypatch.setenv("COSUP_CACHE", str(tmp_path))
    tuning.known_winners.clear()
    x, w = cuda(2048, 4096, 1024)
    found = run(info_nce, x, w, impl="fused")
    assert len(list((tmp_path / "autotune").iterdir())) == 1
    monkeypatch.setenv("COSUP_AUTOTUNE", "0")
    shipped = run(info_nce, x, w, impl="fused")
    tuning.known_winners.clear()
    torch.testing.assert_close(found, shipped, rtol=2e-2, atol=1e-5)
