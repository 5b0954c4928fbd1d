"""Every check catches the bug planted for it and names the place; clean kernels pass them all."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton's wheels are for Linux")
tl = pytest.importorskip("triton.language")

from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from cosup_fast.testing import ODD_SHAPES, Finding, SanitizerError, examples, sanitize, with_gaps  # noqa: E402


def found(run, **options) -> list[Finding]:
    with sanitize(check=False, **options) as sanitizer:
        run()
    return sanitizer.findings


def only(findings: list[Finding], kind: str) -> Finding:
    assert [finding.kind for finding in findings] == [kind], "\n".join(map(str, findings))
    return findings[0]


@triton.jit
def copy_kernel(x, y, N, SHIFT: tl.constexpr, MASK: tl.constexpr, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    if MASK:
        tl.store(y + o, tl.load(x + o + SHIFT, mask=o < N), mask=o < N)
    else:
        tl.store(y + o, tl.load(x + o + SHIFT))


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "with gaps"])
def test_tail_lanes(contiguous):
    x, y = torch.ones(6, 5), torch.zeros(64)
    x = x if contiguous else with_gaps(x)
    findings = found(lambda: copy_kernel[(2,)](x, y, 30, SHIFT=0, MASK=False, B=16))
    finding = only(findings, "bounds")
    assert (finding.kernel, finding.argument) == ("copy_kernel", "x")
    assert finding.program == ((1, 0, 0) if contiguous else (0, 0, 0))
    # 13 elements a row with its gap: the sixth lane is in the first gap.
    assert finding.index == ((6, 0) if contiguous else (0, 5))
    assert "load outside shape (6, 5)" in finding.message
    assert finding.where.startswith("test_sanitizer.py:")


def test_stores_past_the_end_are_dropped():
    whole = torch.zeros(64)
    y = whole[:30]
    finding = only(found(lambda: copy_kernel[(2,)](torch.ones(32), y, 30, SHIFT=0, MASK=False, B=16)), "bounds")
    assert (finding.argument, finding.index, finding.count) == ("y", (30,), 2)
    assert whole.tolist() == [1] * 30 + [0] * 34


def test_views_that_overlap_or_repeat_have_no_gaps():
    windows = torch.arange(16.0).unfold(0, 4, 1)  # 13 windows of 4, strides (1, 1)
    repeated = torch.arange(16.0).expand(3, 16)
    for x in (windows, repeated):
        assert found(lambda x=x: copy_kernel[(1,)](x, torch.empty(16), 16, SHIFT=0, MASK=True, B=16)) == []
        finding = only(found(lambda x=x: copy_kernel[(1,)](x, torch.empty(16), 16, SHIFT=1, MASK=True, B=16)), "bounds")
        assert (finding.argument, finding.count) == ("x", 1)


def test_negative_offsets():
    finding = only(
        found(lambda: copy_kernel[(1,)](torch.ones(16), torch.empty(16), 16, SHIFT=-1, MASK=True, B=16)), "bounds"
    )
    assert (finding.argument, finding.index, finding.count) == ("x", (-1,), 1)


def test_a_load_out_of_bounds_reads_nan():
    y = torch.zeros(16)
    found(lambda: copy_kernel[(1,)](torch.ones(16), y, 16, SHIFT=-1, MASK=True, B=16))
    assert y.isnan().tolist() == [True] + [False] * 15


@triton.jit
def stray_kernel(y, address):
    tl.store(y, tl.load(address.to(tl.pointer_type(tl.float32))))


def test_an_address_of_no_argument():
    finding = only(found(lambda: stray_kernel[(1,)](torch.zeros(1), 2**40)), "bounds")
    assert "at an address of no argument" in str(finding)


@triton.jit
def row_kernel(x, y, stride, WIDE: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    o = tl.arange(0, B)
    tl.store(y + i * stride + o, tl.load(x + i * stride + o))


@pytest.mark.parametrize("columns", [2**16, 2**17], ids=["negative offset", "offset back in bounds"])
def test_int32_offsets_overflow_without_allocating(columns):
    x, y = (torch.empty(2**16, columns, device="meta") for _ in range(2))

    def run(wide):
        return found(lambda: row_kernel[(2**16,)](x, y, columns, WIDE=wide, B=64), programs="corners")

    findings = run(False)
    assert any(f.kind == "overflow" and f"65535 * {columns}" in f.message for f in findings)
    # 65535 * 2^17 wraps to -2^17, 65535 * 2^16 to -2^16: below the first element either way.
    assert {f.argument for f in findings if f.kind == "bounds"} == {"x", "y"}
    assert all(f.program == (2**16 - 1, 0, 0) for f in findings)
    assert run(True) == []


def test_int32_overflow_that_comes_back_in_bounds():
    x, y = (torch.empty(2**18, 2**15, device="meta") for _ in range(2))
    run = lambda: row_kernel[(2**18,)](x, y, 2**15, WIDE=False, B=64)  # noqa: E731
    findings = found(run, programs=lambda program: program[0] == 2**17 + 5)
    only(findings, "overflow")


@triton.jit
def overlap_kernel(x, y, STEP: tl.constexpr, B: tl.constexpr):
    o = tl.program_id(0) * STEP + tl.arange(0, B)
    tl.store(y + o, tl.load(x + o))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_two_programs_store_one_element(dtype):
    x, y = torch.ones(32, dtype=dtype), torch.empty(32, dtype=dtype)
    finding = only(found(lambda: overlap_kernel[(2,)](x, y, STEP=12, B=16)), "race")
    assert (finding.argument, finding.index, finding.program, finding.count) == ("y", (12,), (1, 0, 0), 4)
    assert "stored here, and by program (0, 0, 0)" in finding.message


def test_two_arguments_that_share_memory_race():
    buffer = torch.arange(64.0)
    findings = found(lambda: overlap_kernel[(2,)](buffer[:32], buffer[8:40], STEP=16, B=16))
    assert {f.kind for f in findings} == {"race", "order"}
    race = next(f for f in findings if f.kind == "race")
    assert "loaded here, stored by program (0, 0, 0)" in race.message


@triton.jit
def neighbour_kernel(y, N, B: tl.constexpr):
    i = tl.program_id(0)
    b_y = tl.load(y + (i + 1) % N * B + tl.arange(0, B))
    tl.store(y + i * B + tl.arange(0, B), b_y + 1)


def test_a_program_loads_what_another_stores():
    y = torch.zeros(4, 8)
    findings = found(lambda: neighbour_kernel[(4,)](y, 4, B=8))
    assert [f.kind for f in findings] == ["race", "race", "order"]
    assert "stored here, loaded by program (0, 0, 0)" in findings[0].message
    assert (findings[0].program, findings[0].argument) == ((1, 0, 0), "y")
    assert "loaded here, stored by program (0, 0, 0)" in findings[1].message
    assert findings[2].argument == "y"
    # What the caller keeps is the result in grid order.
    assert y[:, 0].tolist() == [1, 1, 1, 2]


@triton.jit
def lanes_kernel(y, B: tl.constexpr, SAME: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(y + o // 2, tl.full((B,), 1.0, tl.float32) if SAME else o.to(tl.float32))


def test_two_lanes_of_one_store_bring_different_values():
    finding = only(found(lambda: lanes_kernel[(1,)](torch.empty(8), B=16, SAME=False)), "race")
    assert "two lanes" in finding.message
    assert found(lambda: lanes_kernel[(1,)](torch.empty(8), B=16, SAME=True)) == []


@triton.jit
def accumulate_kernel(x, y, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + o, tl.load(y + o) + tl.load(x + o))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32], ids=str)
def test_what_nobody_wrote_is_read(dtype):
    def run(make):
        accumulate_kernel[(2,)](torch.ones(32, dtype=dtype), make(32, dtype=dtype), B=16)

    finding = only(found(lambda: run(torch.empty)), "unwritten")
    assert (finding.argument, finding.index, finding.program, finding.count) == ("y", (0,), (0, 0, 0), 32)
    assert found(lambda: run(torch.zeros)) == []


def test_what_torch_wrote_is_written():
    def run():
        y = torch.empty(2, 32)
        y[0] = 1
        accumulate_kernel[(2,)](torch.ones(32), y[0], B=16)
        accumulate_kernel[(2,)](torch.ones(32), y[1], B=16)

    assert only(found(run), "unwritten").count == 32


def test_torch_reads_what_a_kernel_left_out():
    def run():
        y = torch.empty(4, 8)
        copy_kernel[(2,)](torch.ones(32), y, 20, SHIFT=0, MASK=True, B=16)
        y[:2].sum()
        y.sum()

    finding = only(found(run), "unwritten")
    assert (finding.kernel, finding.argument, finding.index, finding.count) == ("aten::sum", "self", (2, 4), 12)


def test_empty_tensors_hold_nan_until_written():
    with sanitize() as sanitizer:
        y, i = torch.empty(3), torch.empty(3, dtype=torch.int64)
        z = sanitizer.poison(torch.ones(2))
        assert sanitizer.written(y) is y
        sanitizer.written(i)
        sanitizer.written(z)
    assert y.isnan().all()
    assert z.isnan().all()
    assert (i > 2**61).all()


def test_buffers_inside_custom_operators_are_seen():
    @torch.library.custom_op("cosup_fast_tests::accumulate", mutates_args=())
    def accumulate(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        accumulate_kernel[(2,)](x, y, B=16)
        return y

    assert only(found(lambda: accumulate(torch.ones(32))), "unwritten").argument == "y"


@triton.jit
def atomic_kernel(x, y, B: tl.constexpr):
    tl.atomic_add(y, tl.sum(tl.load(x + tl.program_id(0) * B + tl.arange(0, B))))


def test_atomics_and_the_order_of_sums():
    torch.manual_seed(0)
    x = torch.randn(64) * 10.0 ** torch.randint(-3, 4, (64,))
    run = lambda: atomic_kernel[(16,)](x, torch.zeros(1), B=4)  # noqa: E731
    findings = found(run, shuffles=3)
    assert [f.kind for f in findings] == ["atomic", "order"]
    assert (findings[0].argument, findings[0].count) == ("y", 16)
    assert "order: atomic_kernel y[0]" in str(findings[1])
    assert [f.kind for f in found(run, shuffles=0)] == ["atomic"]


@triton.jit
def mixed_kernel(y):
    if tl.program_id(0) == 0:
        tl.atomic_add(y, 1.0)
    else:
        tl.store(y, 2.0)


def test_a_store_beside_an_atomic_is_a_race():
    findings = found(lambda: mixed_kernel[(2,)](torch.zeros(1)), shuffles=0)
    assert [f.kind for f in findings] == ["atomic", "race"]


@triton.jit
def descriptor_kernel(d, y, ROWS, STEP: tl.constexpr, B: tl.constexpr, DEVICE: tl.constexpr):
    i = tl.program_id(0)
    if DEVICE:
        d_y = tl.make_tensor_descriptor(y, shape=[ROWS, 8], strides=[8, 1], block_shape=[B, 8])
        d_y.store([i * STEP, 0], d.load([i * STEP, 0]))
    else:
        y.store([i * STEP, 0], d.load([i * STEP, 0]))


@pytest.mark.parametrize("device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_descriptors(dtype, device):
    torch.manual_seed(0)
    x = torch.randn(6, 8).to(dtype)

    def run(rows, step):
        y = torch.empty(6, 8, dtype=dtype)
        d_y = y if device else TensorDescriptor(y, [rows, 8], [8, 1], [4, 8])
        d_x = TensorDescriptor(x, [6, 8], [8, 1], [4, 8])
        descriptor_kernel[(2,)](d_x, d_y, rows, STEP=step, B=4, DEVICE=device)
        return y

    # The hardware masks what lies outside a descriptor's shape.
    with sanitize():
        assert run(6, 4).equal(x)
    bounds = only(found(lambda: run(8, 4)), "bounds")
    assert (bounds.argument, bounds.index, bounds.program) == ("y", (6, 0), (1, 0, 0))
    assert "store outside shape (6, 8)" in bounds.message
    race = only(found(lambda: run(6, 2)), "race")
    assert (race.argument, race.index, race.program) == ("y", (2, 0), (1, 0, 0))


@triton.jit
def block_pointer_kernel(x, y, R, B: tl.constexpr, CHECK: tl.constexpr):
    i = tl.program_id(0) * B
    p_x = tl.make_block_ptr(x, shape=(R, 8), strides=(8, 1), offsets=(0, 0), block_shape=(B, 8), order=(1, 0))
    p_y = tl.make_block_ptr(y, shape=(R, 8), strides=(8, 1), offsets=(i, 0), block_shape=(B, 8), order=(1, 0))
    if CHECK:
        tl.store(p_y, tl.load(tl.advance(p_x, (i, 0)), boundary_check=(0, 1)), boundary_check=(0, 1))
    else:
        tl.store(p_y, tl.load(tl.advance(p_x, (i, 0)), boundary_check=(0, 1)))


@pytest.mark.skipif(triton.__version__ >= "3.9", reason="Triton 3.9 removed block pointers")
@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
def test_block_pointers():
    x, y = torch.randn(6, 8), torch.empty(6, 8)
    with sanitize():
        block_pointer_kernel[(2,)](x, y, 6, B=4, CHECK=True)
    assert y.equal(x)
    finding = only(found(lambda: block_pointer_kernel[(2,)](x, y, 6, B=4, CHECK=False)), "bounds")
    assert (finding.argument, finding.index, finding.program) == ("y", (6, 0), (1, 0, 0))


def test_descriptors_see_unwritten_memory():
    def run():
        descriptor_kernel[(2,)](
            TensorDescriptor(torch.empty(6, 8), [6, 8], [8, 1], [4, 8]), torch.empty(6, 8), 6, STEP=4, B=4, DEVICE=True
        )

    assert only(found(run), "unwritten").argument == "d"


def test_findings_fail_at_the_end_unless_allowed():
    def run(**options):
        with sanitize(shuffles=0, **options):
            atomic_kernel[(4,)](torch.ones(16), torch.zeros(1), B=4)

    run(allow=["atomic"])
    with pytest.raises(
        SanitizerError, match=r"1 faults\natomic: atomic_kernel program \(0, 0, 0\) y\[0\]: updated"
    ) as error:
        run()
    assert error.value.findings[0].kind == "atomic"
    with pytest.raises(ValueError, match="allow holds"):
        run(allow=["atomics"])


def test_an_error_inside_is_not_hidden_by_findings():
    def run():
        with sanitize(shuffles=0):
            atomic_kernel[(4,)](torch.ones(16), torch.zeros(1), B=4)
            raise KeyError("mine")

    with pytest.raises(KeyError) as error:
        run()
    assert any("atomic: atomic_kernel" in note for note in error.value.__notes__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=lambda s: f"{s.n}x{s.m}x{s.d}")
def test_clean_kernels_pass(shape, dtype):
    torch.manual_seed(0)
    n, m, d = shape
    with sanitize():
        a, b = with_gaps(torch.randn(n, d).to(dtype)), with_gaps(torch.randn(d, m).to(dtype))
        c = examples.matmul(a, b, blocks=(64, 64, 32))
        lse = examples.logsumexp(with_gaps(c))
        p = examples.softmax(with_gaps(c))
        # Rows of a descriptor start at multiples of 16 bytes.
        x, w = (torch.randn(rows, -(-d // 8) * 8).to(dtype) for rows in (n, m))
        e = examples.descriptor_matmul(x, w, blocks=(64, 64, 32))
        assert p.isfinite().all()
        assert lse.isfinite().all()
        assert e.isfinite().all()
