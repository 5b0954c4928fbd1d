"""Launches without a GPU: what is bound, specialised and compiled, and what is refused."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton's wheels are for Linux")
tl = pytest.importorskip("triton.language")

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: nothing compiles", allow_module_level=True)

from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from cosup_fast.testing import interpret, rehearse  # noqa: E402


@triton.jit
def add_kernel(x, y, out, N, scale, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out + o, tl.load(x + o, mask=o < N) * scale + tl.load(y + o, mask=o < N), mask=o < N)


@triton.jit(do_not_specialize=["N"])
def count_kernel(x, N, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(x + o, o, mask=o < N)


@triton.jit
def product_kernel(x, w, out, B: tl.constexpr):
    out.store([0, 0], tl.dot(x.load([0, 0]), w.load([0, 0]).T).to(out.dtype))


@triton.jit
def faulty_kernel(x):
    tl.store(x, undefined_name)  # noqa: F821


def add(n: int = 64, offset: int = 0, dtype: torch.dtype = torch.float32, **options):
    x, y = torch.randn(n + offset, dtype=dtype)[offset:], torch.randn(n, dtype=dtype)
    return add_kernel[(triton.cdiv(n, 32),)](x, y, torch.empty(n), n, 2.0, B=32, **options)


def test_a_launch_compiles_once_and_runs_nothing():
    with rehearse("sm_90") as rehearsal:
        out = torch.full((64,), 7.0)
        for _ in range(3):
            add_kernel[(2,)](torch.ones(64), torch.ones(64), out, 64, 2.0, B=32)
    assert out.eq(7).all()
    assert rehearsal.launches == ["add_kernel"] * 3
    (binary,), (made,) = rehearsal.binaries, rehearsal.specializations
    assert binary.target == "sm_90"
    assert binary.registers > 0
    assert (made.name, made.dtype) == ("add_kernel", "fp32")
    assert made.aligned == {"x", "y", "out", "N"}
    assert made.constexprs == {"B": 32}
    assert made.signature["scale"] == "fp32"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"n": 128}, 0),  # another multiple of 16
        ({"n": 65}, 1),  # no multiple of 16
        ({"n": 1}, 1),  # compiled in
        ({"offset": 1}, 1),  # an address that is not a multiple of 16
        ({"offset": 4}, 0),
        ({"dtype": torch.bfloat16}, 1),
        ({"num_warps": 2}, 1),
        ({"num_warps": 4}, 1),  # what the default is, and still another key of Triton's
    ],
    ids=str,
)
def test_what_makes_another_binary(change, what):
    with rehearse("sm_80", compile=False) as rehearsal:
        add()
        assert len(rehearsal.made_by(lambda: add(**change))) == what


def test_a_size_that_is_not_specialised_makes_no_other_binary():
    with rehearse("sm_80", compile=False) as rehearsal:
        for n in (1, 2, 16, 17, 4096):
            count_kernel[(1,)](torch.empty(4096), n, B=16)
    assert len(rehearsal.specializations) == 1


def test_descriptors_compile_to_the_copy_engine_and_tensor_cores():
    x = torch.zeros(64, 64, dtype=torch.bfloat16)
    described = [TensorDescriptor.from_tensor(t, [64, 64]) for t in (x, x, x.clone())]
    with rehearse("sm_90") as rehearsal:
        product_kernel[(1,)](*described, B=64)
    (binary,) = rehearsal.binaries
    assert {"HGMMA", "TMA load", "TMA store"} <= binary.instructions.keys()
    assert binary.dtype == "bf16"


def test_what_a_gpu_would_refuse_is_refused():
    with rehearse("sm_90", compile=False):
        with pytest.raises(KeyError, match="num_warp was specified but unrecognised"):
            add(num_warp=4)
        with pytest.raises(TypeError, match="missing"):
            add_kernel[(1,)](torch.ones(4), B=32)
        with pytest.raises(ValueError, match=r"grid of add_kernel is \(0,\)"):
            add(n=0)
    with rehearse("sm_90"), pytest.raises(triton.CompilationError, match="undefined_name"):
        faulty_kernel[(1,)](torch.ones(4))


def test_nothing_is_left_behind():
    with interpret():
        before = torch.empty(64)
        add_kernel[(2,)](torch.ones(64), torch.ones(64), before, 64, 2.0, B=32)
    with rehearse("sm_90", compile=False):
        add()
    assert not add_kernel.device_caches
    with interpret():
        after = torch.empty(64)
        add_kernel[(2,)](torch.ones(64), torch.ones(64), after, 64, 2.0, B=32)
    assert after.equal(before)
    with rehearse("sm_90", compile=False) as rehearsal:  # compiled again for another device
        assert len(rehearsal.made_by(add)) == 1


def test_one_at_a_time_on_a_known_gpu():
    with pytest.raises(ValueError, match="target is 'sm_91'; choose from sm_80"), rehearse("sm_91"):
        pass
    with rehearse("sm_80", compile=False), pytest.raises(RuntimeError, match="on sm_80 is open"), rehearse("sm_90"):
        pass
    with interpret(), pytest.raises(RuntimeError, match=r"leave interpret\(\)"), rehearse("sm_90"):
        pass


def test_a_capture_can_be_pretended():
    with rehearse("sm_90", compile=False) as rehearsal:
        assert not torch.cuda.is_current_stream_capturing()
        rehearsal.capturing = True
        assert torch.cuda.is_current_stream_capturing()
