"""Extraction of hidden states: the Triton kernels on a CPU, torch's way, and what the operator promises around both."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cosup_fast import functional, reference
from cosup_fast.kernels.last_hidden import op
from cosup_fast.kernels.last_hidden.op import (
    gather_last_hidden,
    gather_last_hidden_backward_op,
    gather_last_hidden_op,
    last_rows,
    takes_triton,
)
from cosup_fast.testing import assert_close_to_fp64, randn, with_gaps

if importlib.util.find_spec("triton") is not None:
    import triton.compiler.code_generator  # noqa: F401  first imported by interpreted code, it stays interpreted

    from cosup_fast.kernels.last_hidden import kernels as last_hidden_triton
    from cosup_fast.testing import sanitize
    from cosup_fast.testing.torch_ops import TorchOps

HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
FLAGS = [(norm, unit) for norm in (False, True) for unit in (False, True)]
NAMES = ["gather", "l2", "rms", "rms, l2"]
T = 13
ROWS = {
    "repeated": torch.tensor([9, 0, 3, 9, 7, 12, 0, 9]),
    "all": torch.arange(T),
    "backwards": torch.arange(T).flip(0),
    "one": torch.tensor([4]),
    "none": torch.empty(0, dtype=torch.int64),
}


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def problem(t: int, d: int, dtype: torch.dtype = SINGLE, norm: bool = True) -> tuple[Tensor, Tensor | None]:
    return randn(t, d, dtype=dtype), randn(d, dtype=dtype, seed=1) if norm else None


def run(f, hidden, rows, norm_weight, upstream, *, unit, eps=1e-6):
    """Value and gradients of f."""
    hidden = hidden.detach().requires_grad_()
    leaves = {"hidden": hidden}
    if norm_weight is not None:
        norm_weight = leaves["norm_weight"] = norm_weight.detach().requires_grad_()
    y = f(hidden, rows, norm_weight=norm_weight, eps=eps, normalize=unit)
    grads = torch.autograd.grad(y, tuple(leaves.values()), upstream.to(y.dtype))
    assert [g.dtype for g in grads] == [leaf.dtype for leaf in leaves.values()]
    return {"y": y.detach(), **dict(zip(leaves, grads))}


def assert_right(ours: dict[str, Tensor], hidden, rows, norm_weight, upstream, **options) -> None:
    wide = None if norm_weight is None else norm_weight.double()
    upstream = upstream.to(hidden.dtype)
    eager = run(reference.gather_last_hidden, hidden, rows, norm_weight, upstream, **options)
    exact = run(reference.gather_last_hidden, hidden.double(), rows, wide, upstream, **options)
    assert_close_to_fp64(ours, eager, exact, dtype=hidden.dtype)


def pretend(monkeypatch, block: int) -> None:
    pytest.importorskip("triton", reason="Triton's wheels are for Linux")
    monkeypatch.setattr(op, "takes_triton", lambda device, dtype: dtype != DOUBLE)
    monkeypatch.setattr(last_hidden_triton, "MAX_BLOCK", block)
    monkeypatch.setattr(last_hidden_triton, "GROUP", 16)


@pytest.fixture
def kernels(monkeypatch, request):
    """CPU tensors take the Triton kernels, which see several blocks of columns and several groups of rows."""
    pretend(monkeypatch, 16)
    request.getfixturevalue("interpreted")


@pytest.mark.parametrize("dtype", [SINGLE, HALF, torch.float16], ids=str)
@pytest.mark.parametrize(("norm", "unit"), FLAGS, ids=NAMES)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_values_and_gradients(rows, norm, unit, dtype, kernels):
    hidden, w = problem(T, 33, dtype, norm)
    upstream = randn(len(rows), 33, dtype=dtype, seed=2)
    assert_right(run(gather_last_hidden, hidden, rows, w, upstream, unit=unit), hidden, rows, w, upstream, unit=unit)


@pytest.mark.parametrize(("norm", "unit"), FLAGS, ids=NAMES)
@pytest.mark.parametrize("width", [1, 5, 16, 40, 129])
def test_widths(width, norm, unit, kernels):
    """One column has a direction of +-1 whatever it holds: its gradient is rounding."""
    hidden, w = problem(5, width, norm=norm)
    rows, upstream = torch.tensor([3, 1, 3]), randn(3, width, seed=2)
    ours = run(gather_last_hidden, hidden, rows, w, upstream, unit=unit)
    if width > 1:
        assert_right(ours, hidden, rows, w, upstream, unit=unit)
        return
    size = (w.double() if norm else 1) * hidden.double()[rows]
    torch.testing.assert_close(ours["y"].double(), size.sign() if unit else ours["y"].double(), rtol=1e-6, atol=1e-6)
    for name in ("hidden", "norm_weight") if unit and norm else ("hidden",) if unit or norm else ():
        assert ours[name].abs().max() < 1e-5 * upstream.abs().max() / hidden.abs().min()


@pytest.mark.parametrize("unit", [False, True], ids=["", "l2"])
def test_many_rows_of_one(unit, kernels):
    """More rows than a group sums, most of them the same one, whose gradient is rounded once."""
    rows = torch.arange(50) % 7 % 3
    hidden, w = problem(4, 20, HALF)
    upstream = randn(50, 20, dtype=HALF, seed=2)
    ours = run(gather_last_hidden, hidden, rows, w, upstream, unit=unit)
    assert_right(ours, hidden, rows, w, upstream, unit=unit)
    exact = run(reference.gather_last_hidden, hidden.double(), rows, w.double(), upstream, unit=unit)
    rounded = exact["hidden"].to(HALF)
    assert ((ours["hidden"] - rounded).double().norm() <= 2**-10 * rounded.double().norm()).item()
    assert (ours["hidden"][3] == 0).all()


def test_another_dtype_and_another_eps_of_the_norm(kernels):
    hidden, w = problem(T, 24, HALF)
    upstream = randn(8, 24, dtype=HALF, seed=2)
    options = {"unit": False, "eps": 0.5}
    ours = run(gather_last_hidden, hidden, ROWS["repeated"], w.float() * 1.1, upstream, **options)
    assert_right(ours, hidden, ROWS["repeated"], w.float() * 1.1, upstream, **options)


@pytest.mark.parametrize("shape", ["gaps", "transposed", "expanded"])
@pytest.mark.parametrize(("norm", "unit"), FLAGS, ids=NAMES)
def test_views_and_the_sanitizer(norm, unit, shape, monkeypatch):
    pretend(monkeypatch, 16)
    hidden, w = problem(T, 21, norm=norm)
    rows = ROWS["repeated"]
    upstream = randn(1, 21, seed=2).expand(8, 21) if shape == "expanded" else randn(8, 21, seed=2)
    view, gappy = hidden, None if w is None else with_gaps(w[:, None])[:, 0]
    if shape == "gaps":
        view, rows, upstream = with_gaps(hidden), with_gaps(rows[:, None])[:, 0], with_gaps(upstream)
    elif shape == "transposed":
        view = hidden.t().contiguous().t()
    with sanitize():
        y, *saved = last_hidden_triton.forward(view, rows, gappy, 1e-6, unit, True)
        dhidden, dw = last_hidden_triton.backward(upstream, rows, gappy, *saved, T, unit, True, norm)
        ours = {"y": y, "hidden": dhidden} | ({"norm_weight": dw} if norm else {})
    assert_right(ours, hidden, rows, w, upstream, unit=unit)


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize(("norm", "unit"), FLAGS, ids=NAMES)
def test_rows_that_nobody_asked_for_do_not_leak(norm, unit, dtype, kernels):
    hidden, w = problem(T, 33, dtype, norm)
    rows = ROWS["repeated"]
    upstream = randn(8, 33, dtype=dtype, seed=2)
    clean = run(gather_last_hidden, hidden, rows, w, upstream, unit=unit)
    asked = torch.zeros(T, dtype=torch.bool).index_fill_(0, rows, True)
    dirty = hidden.masked_fill(~asked[:, None], math.nan)
    ours = run(gather_last_hidden, dirty, rows, w, upstream, unit=unit)
    for name, value in clean.items():
        assert torch.equal(ours[name], value), name
    assert (clean["hidden"][~asked] == 0).all()
    assert (clean["hidden"][asked] != 0).any(1).all()


@pytest.mark.parametrize("route", ["torch", "triton"])
@pytest.mark.parametrize("norm", [False, True], ids=["l2", "rms, l2"])
def test_rows_without_a_direction(norm, route, request):
    if route == "triton":
        request.getfixturevalue("kernels")
    hidden, w = problem(3, 20, norm=norm)
    hidden[1], hidden[2] = 0.0, hidden[2] * 1e-20
    ours = run(gather_last_hidden, hidden, torch.arange(3), w, randn(3, 20, seed=2), unit=True)
    for name in ("y", "hidden"):
        assert (ours[name][0] != 0).any()
        assert (ours[name][1:] == 0).all()
    assert all(t.isfinite().all() for t in ours.values())


@pytest.mark.parametrize(("norm", "unit"), FLAGS, ids=NAMES)
def test_a_row_out_of_range_is_nan_and_receives_nothing(norm, unit, monkeypatch):
    pretend(monkeypatch, 16)
    hidden, w = problem(T, 21, norm=norm)
    rows, inside = torch.tensor([3, T, -1, 5]), torch.tensor([3, 5])
    upstream = randn(4, 21, seed=2)
    with sanitize():
        y, *saved = last_hidden_triton.forward(hidden, rows, w, 1e-6, unit, True)
        dhidden, _ = last_hidden_triton.backward(upstream, rows, w, *saved, T, unit, True, False)
        y, dhidden = y.clone(), dhidden.clone()
    right = run(reference.gather_last_hidden, hidden, inside, w, upstream[[0, 3]], unit=unit)
    assert y[[1, 2]].isnan().all()
    torch.testing.assert_close(y[[0, 3]], right["y"])
    torch.testing.assert_close(dhidden, right["hidden"])


def test_offsets_beyond_int32():
    """2^33 elements on the meta device, which reads as zeros and drops what is stored."""
    pytest.importorskip("triton")
    t, d = 2**21, 2**12
    hidden, rows = torch.empty(t, d, device="meta", dtype=HALF), torch.empty(t, device="meta", dtype=torch.int64)
    w = torch.empty(d, device="meta")
    with sanitize(programs="corners"):
        y, *saved = last_hidden_triton.forward(hidden, rows, w, 1e-6, True, True)
        dhidden, dw = last_hidden_triton.backward(y, rows, w, *saved, t, True, True, True)
    assert (dhidden.shape, dw.shape) == ((t, d), (d,))


@pytest.mark.parametrize("height", [20, 200])
def test_bytes(height, counted, monkeypatch):
    """Forward reads the rows asked for and no others; backward stores the dense gradient once, and torch none of it."""
    pretend(monkeypatch, 16)
    hidden, w = problem(height, 48, HALF)
    rows, upstream = ROWS["repeated"], randn(8, 48, dtype=HALF, seed=2)
    made = []

    def see(op, args, kwargs, go):
        out = go()
        if isinstance(out, Tensor) and out.shape == (height, 48):
            made.append(str(op))
        return out

    hidden.requires_grad_()
    w.requires_grad_()
    y = gather_last_hidden(hidden, rows, w, normalize=True)
    forward, dense = "last_hidden_fwd_kernel", "last_hidden_bwd_hidden_kernel"
    assert counted.loaded[forward, "hidden"] == 2 * 8 * 48 * 2  # for the norms, then for the row
    assert counted.stored[forward, "x"] == counted.stored[forward, "y"] == 8 * 48 * 2
    assert counted.programs[forward] == 8
    with TorchOps(see):
        torch.autograd.grad(y, (hidden, w), upstream)
    assert len(made) == 1
    assert "empty" in made[0]
    assert counted.stored[dense, "dhidden"] == height * 48 * 2
    assert counted.loaded[dense, "x"] == counted.loaded[dense, "dy"] == 8 * 48 * 2
    assert counted.programs[dense] == height
    assert not counted.atomics


def test_a_frozen_input_costs_nothing(counted, monkeypatch):
    pretend(monkeypatch, 16)
    hidden, w = problem(T, 24)
    rows = ROWS["repeated"]
    fwd, dense, weight = (f"last_hidden_{name}_kernel" for name in ("fwd", "bwd_hidden", "bwd_weight"))
    frozen = gather_last_hidden(hidden, rows, w, normalize=True)
    with torch.no_grad():
        gather_last_hidden(hidden.clone().requires_grad_(), rows, w, normalize=True)
    assert not frozen.requires_grad
    assert {argument for kernel, argument in counted.stored if kernel == fwd} == {"y"}
    (trained,) = torch.autograd.grad(gather_last_hidden(h := hidden.clone().requires_grad_(), rows, w).sum(), h)
    assert trained.shape == h.shape
    assert (counted.launches[dense], counted.launches[weight]) == (1, 0)
    torch.autograd.grad(gather_last_hidden(hidden, rows, v := w.clone().requires_grad_()).sum(), v)
    assert (counted.launches[dense], counted.launches[weight]) == (1, 1)
    assert counted.launches["last_hidden_bwd_dot_kernel"] == 1  # dw of an RMSNorm alone needs none


def test_only_gathered_rows_are_kept_for_backward():
    kept = []
    hidden, w = problem(100, 24)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        gather_last_hidden(hidden.requires_grad_(), ROWS["repeated"], w, normalize=True)
    assert sorted(shape for shape in kept if shape.numel()) == [(8,), (8,), (8,), (8, 24), (24,)]
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        gather_last_hidden(hidden, ROWS["repeated"])
    assert sum(kept) == 8


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE, HALF], ids=str)
@pytest.mark.parametrize(("norm", "unit"), FLAGS, ids=NAMES)
@pytest.mark.parametrize("rows", ["repeated", "none"])
def test_the_way_of_torch(rows, norm, unit, dtype):
    hidden, w = problem(T, 33, dtype, norm)
    rows = ROWS[rows]
    upstream = randn(len(rows), 33, dtype=dtype, seed=2)
    ours = run(gather_last_hidden, hidden, rows, w, upstream, unit=unit)
    if dtype == DOUBLE:  # the reference in fp64 is no more exact than this
        right = run(reference.gather_last_hidden, hidden, rows, w, upstream, unit=unit)
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-13)
    else:
        assert_right(ours, hidden, rows, w, upstream, unit=unit)


def test_which_implementation_runs():
    triton = importlib.util.find_spec("triton") is not None
    for dtype in (SINGLE, HALF, torch.float16):
        assert takes_triton(torch.device("cuda"), dtype) == triton
        assert not takes_triton(torch.device("cpu"), dtype)
    assert not takes_triton(torch.device("cuda"), DOUBLE)


@pytest.mark.parametrize(("norm", "unit"), FLAGS, ids=NAMES)
def test_opcheck(norm, unit):
    hidden, w = problem(6, 5, norm=norm)
    rows = torch.tensor([4, 0, 4])
    for save in (True, False):
        torch.library.opcheck(gather_last_hidden_op, (hidden, rows, w, 1e-6, unit, save))
    leaves = (hidden.requires_grad_(), rows, w.requires_grad_() if norm else None, 1e-6, unit, True)
    torch.library.opcheck(gather_last_hidden_op, leaves)
    with torch.no_grad():
        _, *saved = gather_last_hidden_op(*leaves)
    weight = None if w is None else w.detach()
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(gather_last_hidden_backward_op, (randn(3, 5), rows, weight, *saved, 6, unit, *needs))


@pytest.mark.parametrize(("norm", "unit"), FLAGS, ids=NAMES)
def test_compiled_whole(norm, unit):
    def f(hidden, cu_seqlens, norm_weight):
        return gather_last_hidden(hidden * 2, last_rows(cu_seqlens), norm_weight, normalize=unit).square() * 3

    outcomes = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        hidden, w = problem(T, 12, norm=norm)
        leaves = (hidden.requires_grad_(), w.requires_grad_()) if norm else (hidden.requires_grad_(),)
        y = g(hidden, torch.tensor([0, 3, 9, T], dtype=torch.int32), w)
        outcomes.append([y, *torch.autograd.grad(y.sum() + y[0, 0], leaves)])
    torch.testing.assert_close(*outcomes)


@pytest.mark.slow
def test_compiled_by_inductor():
    def f(hidden, rows, norm_weight):
        return gather_last_hidden(hidden * 2, rows, norm_weight, normalize=True).square() * 3

    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for t in (T, T + 4):
        outcomes = []
        for g in (f, compiled):
            hidden, w = problem(t, 12)
            y = g(hidden.requires_grad_(), ROWS["repeated"], w.requires_grad_())
            outcomes.append([y, *torch.autograd.grad(y.sum() + y[0, 0], (hidden, w))])
        torch.testing.assert_close(*outcomes)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def test_fake_tensors(device):
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden = torch.empty(40, 8, dtype=HALF, device=device, requires_grad=True)
        w = torch.empty(8, device=device, requires_grad=True)
        rows = last_rows(torch.empty(4, dtype=torch.int32, device=device))
        y = gather_last_hidden(hidden, rows, w, normalize=True)
        dhidden, dw = torch.autograd.grad(y.float().sum(), (hidden, w))
    assert (y.shape, y.dtype) == ((3, 8), HALF)
    assert (dhidden.shape, dhidden.dtype, dhidden.device) == (hidden.shape, HALF, hidden.device)
    assert (dw.shape, dw.dtype) == (w.shape, w.dtype)


def test_meta_tensors():
    hidden = torch.empty(2**20, 2**13, device="meta", requires_grad=True)
    y = gather_last_hidden(hidden, torch.empty(5, device="meta", dtype=torch.int64), normalize=True)
    assert y.shape == (5, 2**13)
    assert torch.autograd.grad(y.sum(), hidden)[0].shape == hidden.shape


def test_graphs_kept_freed_and_differentiated_twice():
    hidden, w = problem(T, 12)
    y = gather_last_hidden(hidden.requires_grad_(), ROWS["repeated"], w, normalize=True).square().sum()
    first, again = (torch.autograd.grad(y, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    (once,) = torch.autograd.grad(y, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        once.sum().backward()
    z = gather_last_hidden(hidden, ROWS["repeated"]).sum()
    z.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        z.backward()


def test_autocast_changes_nothing():
    hidden, w = problem(T, 12)
    plain = run(gather_last_hidden, hidden, ROWS["repeated"], w, randn(8, 12), unit=True)
    with torch.autocast("cpu", dtype=HALF):
        ours = run(gather_last_hidden, hidden, ROWS["repeated"], w, randn(8, 12), unit=True)
    for name in plain:
        assert torch.equal(ours[name], plain[name])


@pytest.mark.compile_matrix("cosup_fast.kernels.last_hidden.kernels", targets=["sm_90"])
def test_binaries(compiled):
    compiled.check()


@pytest.mark.slow
@pytest.mark.compile_matrix("cosup_fast.kernels.last_hidden.kernels", targets=["sm_80", "sm_100", "sm_120", "gfx942"])
def test_binaries_elsewhere(compiled):
    compiled.check()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [SINGLE, HALF, torch.float16, DOUBLE], ids=str)
@pytest.mark.parametrize(("norm", "unit"), FLAGS, ids=NAMES)
@pytest.mark.parametrize("width", [33, 576, 4096, 5000])
def test_on_a_gpu(width, norm, unit, dtype):
    hidden, w = problem(300, width, dtype, norm)
    rows = torch.randint(300, (130,), generator=torch.Generator().manual_seed(0))
    upstream = randn(130, width, dtype=dtype, seed=2)
    inputs = [None if t is None else t.cuda() for t in (hidden, rows, w, upstream)]
    ours, again = (run(gather_last_hidden, *inputs, unit=unit) for _ in range(2))
    for name in ours:
        assert torch.equal(ours[name], again[name]), name
    assert_right({name: t.cpu() for name, t in ours.items()}, hidden, rows, w, upstream, unit=unit)


@pytest.mark.gpu
@needs_gpu
def test_in_a_cuda_graph():
    hidden, w = (t.cuda().requires_grad_() for t in problem(300, 576, HALF))
    cu_seqlens = torch.tensor([0, 100, 180, 300], dtype=torch.int32, device="cuda")

    def step():
        return torch.autograd.grad(
            gather_last_hidden(hidden, last_rows(cu_seqlens), w, normalize=True).sum(), (hidden, w)
        )

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    cu_seqlens.copy_(torch.tensor([0, 7, 250, 300]))
    graph.replay()
    for ours, right in zip(captured, step()):
        assert torch.equal(ours, right)


@pytest.mark.parametrize("options", [{}, {"normalize": True}], ids=["", "l2"])
def test_gather_last_hidden_gradcheck(options):
    rows = torch.tensor([9, 0, 3, 9, 7])
    inputs = torch.randn(2, 5, 4, dtype=DOUBLE, requires_grad=True), torch.randn(4, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda h, w: functional.gather_last_hidden(h, rows, norm_weight=w, **options), inputs
    )
    assert torch.autograd.gradcheck(lambda h: functional.gather_last_hidden(h, rows, **options), inputs[:1])


def test_gather_last_hidden_of_nothing_and_of_zeros():
    hidden = torch.zeros(4, 3, requires_grad=True)
    out = functional.gather_last_hidden(hidden, torch.tensor([1, 2]), normalize=True)
    assert (out == 0).all()
    assert (torch.autograd.grad(out.sum(), hidden)[0] == 0).all()
    nothing = functional.gather_last_hidden(hidden, torch.empty(0, dtype=torch.int64))
    assert (torch.autograd.grad(nothing.sum(), hidden)[0] == 0).all()
