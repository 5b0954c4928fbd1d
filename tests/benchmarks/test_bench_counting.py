"""The counters: figures known by hand, operators written in Python, Triton kernels, and the gate on ours."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from torch import Tensor

from benchmarks import gate, run
from benchmarks.cases import Case
from benchmarks.counting import Counts, OperationCounter, count
from benchmarks.providers import Provider, chosen

N, M, D = 64, 96, 32
PRODUCT = 2 * N * M * D


@torch.library.custom_op("cosup_test::chunked_product", mutates_args=())
def chunked_product(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([part @ b for part in a.split(16)])


def seen_of(work) -> OperationCounter:
    with OperationCounter() as seen:
        work()
    return seen


def test_products_by_precision():
    a, b = torch.randn(N, D), torch.randn(D, M)
    total = torch.zeros(N, M)
    seen = seen_of(lambda: (a @ b, a.bfloat16() @ b.bfloat16(), total.addmm_(a, b), torch.mm(a, b, out=total)))
    assert dict(seen.flops) == {"fp32": 3 * PRODUCT, "bf16": PRODUCT}


def test_operators_written_in_python_are_counted_by_what_they_run():
    a, b = torch.randn(N, D), torch.randn(D, M)
    seen = seen_of(lambda: chunked_product(a, b))
    assert dict(seen.flops) == {"fp32": PRODUCT}
    # Four parts, joined.
    assert seen.traffic == 4 * (N * D + 4 * D * M + N * M) + 4 * (2 * N * M)
    assert seen.peak == 2 * 4 * N * M


@pytest.mark.parametrize(
    ("work", "numbers"),
    [
        (lambda z, i: z.exp(), 2 * N * M),
        (lambda z, i: z.exp_(), 2 * N * M),
        (lambda z, i: z.t(), 0),
        (lambda z, i: z.sum(1), N * M + N),
        (lambda z, i: torch.zeros_like(z), N * M),
        (lambda z, i: torch.empty_like(z), 0),
        (lambda z, i: z.gather(1, i[:, None]), 2 * N + 2 * N),
        (lambda z, i: z.index_select(0, i[:8]), 2 * 8 * M + 2 * 8),
        (lambda z, i: torch.add(z, z, out=z), 3 * N * M),
        (lambda z, i: z[:1].expand(N, M).sum(1), M * 1 + N),
    ],
    ids=["out of place", "in place", "view", "sum", "fill", "empty", "gather", "rows", "out=", "expanded"],
)
def test_traffic(work, numbers):
    z, i = torch.randn(N, M), torch.arange(N)  # an index counts as two fp32
    expected = 4 * numbers
    if numbers == M + N:  # what an expanded tensor reads is bounded by what is stored
        expected = 4 * (N * M + N)
    assert seen_of(lambda: work(z, i)).traffic == expected


def test_workspace_is_what_lives_at_once():
    z = torch.randn(N, M)

    def work():
        a = z.exp()
        b = a + 1
        del a
        return (b * 2).sum()

    assert seen_of(work).peak == 2 * 4 * N * M + 4, "b, b * 2 and the sum"
    kept = []
    assert seen_of(lambda: kept.append(z.exp())).peak == 4 * N * M
    # What lived before is not counted, whatever is done to it.
    assert seen_of(lambda: kept[0].mul_(2)).peak == 0


def test_counts_are_the_same_on_every_call_and_in_any_number_of_threads():
    case = Case("info-nce-symmetric", 200, 200, 40, "bf16")
    inputs, threads = case.inputs(), torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 1):
            torch.set_num_threads(number)
            for provider in chosen(["ours stored", "ours reference", "dense"]):
                found.append(count(case, provider.make(case), inputs)[0])
    finally:
        torch.set_num_threads(threads)
    assert found[:3] == found[3:6] == found[6:]
    assert [counts.total for counts in found[:3]] == [3, 3, 3]


def test_a_product_more_is_seen():
    def make(case):
        def loss(x, w, target):
            return case.eager(x, w, target) + 0 * (x @ w.T).sum()

        return loss

    case = Case("info-nce", N, M, D)
    rows, _ = run.examine(case, [Provider("wasteful", "", ("info-nce",), make)], counting=True, say=lambda text: None)
    assert rows[0].counts is not None
    assert rows[0].counts.total == 6, "one more forward, two more backward"


def test_triton_kernels_are_counted_without_a_gpu(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    # Triton reads the source of a kernel, so it is in a file.
    (tmp_path / "planted_kernels.py").write_text(
        """
import torch
import triton
import triton.language as tl


@triton.jit
def product_kernel(a, b, c, counter, N, M, D: tl.constexpr, B: tl.constexpr):
    i, j = tl.program_id(0) * B + tl.arange(0, B), tl.program_id(1) * B + tl.arange(0, B)
    d = tl.arange(0, D)
    x = tl.load(a + i[:, None] * D + d)
    y = tl.load(b + j[:, None] * D + d)
    tl.store(c + i[:, None] * M + j, tl.dot(x, tl.trans(y)))
    tl.atomic_add(counter, 1)


def product(a, b):
    if not a.is_cuda or torch.cuda.get_device_capability(a.device) < (8, 0):
        raise RuntimeError("needs a GPU")
    c = torch.empty(len(a), len(b))
    counter = torch.zeros(1, dtype=torch.int32)
    product_kernel[(len(a) // 32, len(b) // 32)](a, b, c, counter, len(a), len(b), a.shape[1], 32)
    return c
"""
    )
    monkeypatch.syspath_prepend(tmp_path)

    def make(case):
        from planted_kernels import product  # pyright: ignore

        class Product(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, w):
                ctx.save_for_backward(x, w)
                return product(x, w)

            @staticmethod
            def backward(ctx, g):  # pyright: ignore
                x, w = ctx.saved_tensors
                return (g.to(x.dtype) @ w), (g.to(x.dtype).t() @ x)

        def loss(x, w, target):
            return torch.nn.functional.cross_entropy(Product.apply(x, w) * case.scale, target)

        return loss

    provider = Provider("planted", "", ("info-nce",), make, triton=True)
    case = Case("info-nce", N, M, D, "bf16")
    rows, fit = run.examine(case, [provider], counting=True, say=lambda text: None)
    counts = rows[0].counts
    assert rows[0].status == "ok", rows[0].reason
    assert counts is not None
    assert counts.products == {"bf16": 3.0}, "one by the kernel, two by torch"
    assert (counts.launches, counts.atomics, counts.locks) == (1, (N // 32) * (M // 32), 0)
    (binary,) = rows[0].binaries
    assert (binary.kernel, binary.problem, binary.spills) == ("product_kernel", "", 0)
    assert binary.registers > 0
    assert "HGMMA" in binary.tensor_cores or "HMMA" in binary.tensor_cores
    report = run.count_report(rows, "command").replace("D 32, B 32", "B 32, D 32")
    assert f"| planted | product_kernel | B 32, D 32 | {binary.registers} | 0 |" in report
    assert not fit, "counted and not to be timed"
    assert not torch.randn(1).is_cuda, "nothing is left pretending"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "products", "atomic", "locked"),
    [
        ("inf_cl", {"tf32": 5.0}, False, False),
        ("memeff flash", {"bf16": 5.0}, True, False),
        ("memeff atomic", {"bf16": 2.0, "tf32": 2.0}, True, False),
        ("CCE kernels exact", {"bf16": 4.0}, True, True),
        ("Liger", {"bf16": 3.0}, False, False),
    ],
)
def test_peers_cost_what_is_known_of_them(name, products, atomic, locked):
    (provider,) = chosen([name])
    case = Case(provider.losses[0], 256, 256, 256, "bf16")
    if reason := provider.reason(case, counting=True):
        pytest.skip(reason)
    rows, _ = run.examine(case, [provider], counting=True, say=lambda text: None)
    counts = rows[0].counts
    assert counts is not None, rows[0].reason
    assert {key: value for key, value in counts.products.items() if value > 0.1} == products
    assert (counts.atomics > 0, counts.locks > 0) == (atomic, locked)


@pytest.fixture(scope="module")
def found():
    return gate.measure()


def test_exact_figures_are_those_committed(found):
    """If a change of them is meant: python -m benchmarks gate --update."""
    versions, wanted = gate.load()
    if importlib.util.find_spec("triton") is None:
        wanted = {name: figures for name, figures in wanted.items() if name in found}
    if versions["triton"] != gate.versions()["triton"]:  # another compiler
        found, wanted = ({name: figures for name, figures in every.items() if not name.startswith(gate.BINARY)}
                         for every in (found, wanted))  # fmt: skip
    if versions["torch"] != gate.versions()["torch"]:
        # It may run other operations: only products are promised.
        found, wanted = ({name: figures | {"traffic": None, "workspace": None} for name, figures in every.items()}
                         for every in (found, wanted))  # fmt: skip
    assert gate.differences(found, wanted) == []


def test_kernels_have_no_atomics_and_spill_nothing(found):
    pytest.importorskip("triton")
    binaries = [figures for name, figures in found.items() if name.startswith(gate.BINARY)]
    assert len(binaries) > 20
    assert all(figures["spills"] == 0 and not figures["problem"] for figures in binaries)
    assert {figures["atomics"] for figures in found.values() if "atomics" in figures} == {0}


def test_ours_take_three_products_and_stay_in_the_workspace():
    for name, figures in gate.measure_torch().items():
        products = sum(value for key, value in figures.items() if key.endswith("products"))
        assert products == 3, name
        if "workspace" in name:
            # A chunk of scores and a block's temporaries, no larger than it; fp32 gradients and copies of the operands.
            assert figures["workspace"] < 4 * gate.SMALL_WORKSPACE + 4 * 4 * (320 + 448) * 96, name


@pytest.mark.parametrize("figure", ["fp32 products", "flops", "traffic", "workspace"])
def test_the_gate_catches_a_changed_figure(found, figure):
    name = "info-nce 320x448x96 fp32, ours stored"
    changed = json.loads(json.dumps(found))
    changed[name][figure] += 1
    assert gate.differences(changed, found) == [
        f"{name}: {figure} is {changed[name][figure]}, was {found[name][figure]}"
    ]


def test_the_gate_catches_what_comes_and_goes(found):
    names = sorted(found)
    fewer = {name: found[name] for name in names[1:]}
    assert gate.differences(fewer, found) == [f"{names[0]}: no longer measured"]
    assert gate.differences(found, fewer) == [f"{names[0]}: new"]
    other = {**found, names[0]: {**found[names[0]], "bf16 products": 1.0}}
    assert gate.differences(other, found)[0].startswith(f"{names[0]}: bf16 products is 1.0, was ")


def test_the_gate_is_updated_whole(found, tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "PATH", tmp_path / "exact.json")
    gate.update(found)
    assert gate.load() == (gate.versions(), found)
    assert [path.name for path in tmp_path.iterdir()] == ["exact.json"]


def test_flops_of_counts():
    case = Case("info-nce", N, M, D)
    assert Counts({"bf16": 2.0, "tf32": 2.5}).flops(case) == 4.5 * PRODUCT
