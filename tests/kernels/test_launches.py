"""What a GPU would be asked to launch and to compile: by every implementation, for sizes of any value."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton's wheels are for Linux")

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: nothing compiles", allow_module_level=True)

from cosup_fast.functional import info_nce, linear_cross_entropy  # noqa: E402
from cosup_fast.kernels import launch, tuning  # noqa: E402
from cosup_fast.kernels.last_hidden import kernels as last_hidden  # noqa: E402
from cosup_fast.kernels.scaling import scale_  # noqa: E402
from cosup_fast.kernels.softmax_xent import chunk_product, chunk_triton  # noqa: E402
from cosup_fast.kernels.softmax_xent.dispatch import KERNELS  # noqa: E402
from cosup_fast.testing import Rehearsal, rehearse  # noqa: E402
from cosup_fast.testing import compile as compiler  # noqa: E402

TARGETS = ("sm_80", "sm_90", "sm_100")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPTIONS = {
    "plain": {},
    "ids": {"key_ids": True},
    "duplicates are positive": {"key_ids": True, "duplicates": "positive"},
    "several positives": {"key_ids": True, "positive_ids": True},
    "smoothed": {"label_smoothing": 0.1, "scale": torch.tensor(2.0, requires_grad=True)},
    "everything": {"key_ids": True, "positive_ids": True, "label_smoothing": 0.1},
    "symmetric": {"symmetric": True},
    "symmetric with ids": {"symmetric": True, "key_ids": True, "label_smoothing": 0.1},
    "no reduction": {"reduction": "none"},
    "ranks": {"return_stats": True},
    "levelled": {"levelled": True},
    "levelled with ids and ranks": {"levelled": True, "key_ids": True, "return_stats": True},
    "margin with ranks": {"key_ids": True, "margin": 0.1, "return_stats": True},
    "head": {"head": True, "z_loss": 1e-4},
    "head with all": {"head": True, "bias": True, "label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0},
}


@pytest.fixture
def gpu(request, monkeypatch):
    """Our kernels take CPU tensors for those of a GPU: its tiles are launched, and nothing runs."""
    target = getattr(request, "param", "sm_90")
    for module in (tuning, chunk_triton, chunk_product):
        monkeypatch.setattr(module, "target_of", lambda device: target)
    monkeypatch.setattr(launch, "capturing", lambda device: torch.cuda.is_current_stream_capturing())
    return target


def loss(impl: str, n: int, m: int, d: int, dtype: torch.dtype, option: str, p: int = 3) -> None:
    """Forward and backward with garbage for scores: what is launched depends on no value."""
    options = dict(OPTIONS[option])
    x, w = (torch.randn(size, d, dtype=dtype, requires_grad=True) for size in (n, m))
    target = torch.arange(n) % m
    # Sizes decide whether exponentials are above positives; here the options do.
    row_traffic = 0.0 if options.pop("levelled", False) else torch.inf
    level = mock.patch.object(chunk_product.FusedChunk, "_row_traffic", return_value=row_traffic)
    with mock.patch.object(chunk_product, "programs", return_value=132), level, allowed():
        if options.pop("head", False):
            if options.pop("bias", False):
                options["bias"] = torch.randn(m, dtype=dtype)
            value = linear_cross_entropy(x, w, target, impl=impl, **options)
        else:
            if options.pop("key_ids", False):
                options["key_ids"] = torch.arange(m)
            if options.pop("positive_ids", False):
                options["positive_ids"] = torch.arange(n)[:, None].expand(n, p).contiguous() % m
            value = info_nce(x, w, target, impl=impl, **options)
            value = value[0] if isinstance(value, tuple) else value
        value.sum().backward()


def allowed():
    """Host code that asks for a GPU, or for the interpreter, is told that there is one."""
    from cosup_fast.kernels.softmax_xent import dispatch

    def unsupported(impl, s, ranks):
        return dispatch.chunks_of(impl).unsupported(s, ranks) if impl in KERNELS else None

    return mock.patch.object(dispatch, "unsupported", unsupported)


def extract(rows: int, height: int, d: int, dtype: torch.dtype, norm: bool, unit: bool) -> None:
    """Forward and backward of the gather."""
    hidden, weight = torch.randn(height, d, dtype=dtype), torch.randn(d, dtype=dtype) if norm else None
    index = torch.randint(height, (rows,))
    y, *saved = last_hidden.forward(hidden, index, weight, 1e-6, unit, True)
    last_hidden.backward(torch.randn_like(y), index, weight, *saved, height, unit, True, norm)


def fits(impl: str, option: str, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Fused holds exponentials: a softcap's derivative is not told by them, and fp16 is too narrow for two axes."""
    if impl != "fused":
        return "levelled" not in option
    return not ("with all" in option or ("symmetric" in option and dtype == torch.float16))


CASES = [case for case in itertools.product(KERNELS, OPTIONS) if fits(*case)]


@pytest.mark.parametrize(("impl", "option"), CASES, ids=str)
def test_everything_binds_and_sizes_of_any_value_use_one_binary(gpu, impl, option):
    """Rows, candidates, ids of a row and tiles: none of their numbers makes another binary."""
    with rehearse(gpu, compile=False) as rehearsal:
        for dtype in filter(lambda dtype: fits(impl, option, dtype), DTYPES):
            loss(impl, 64, 128, 64, dtype, option)
            before = rehearsal.count()
            for n, m, p in ((65, 131, 1), (1, 144, 16), (7, 1, 5), (1000, 4097, 3)):
                if "symmetric" in option:
                    n = min(n, m)
                loss(impl, n, m, 64, dtype, option, p)
                assert [str(one) for one in rehearsal.specializations[before:]] == [], (n, m, p)
    assert rehearsal.launches


@pytest.mark.parametrize(("norm", "unit"), [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_extraction_binds_and_uses_one_binary_for_any_number_of_rows(norm, unit):
    with rehearse("sm_90", compile=False) as rehearsal:
        for dtype in DTYPES:
            extract(16, 64, 96, dtype, norm, unit)
            before = rehearsal.count()
            for rows, height in ((1, 64), (17, 1), (33, 1000)):
                extract(rows, height, 96, dtype, norm, unit)
                assert [str(one) for one in rehearsal.specializations[before:]] == [], (rows, height)
    assert len(set(rehearsal.launches)) == 1 + (norm or unit) + 1 + norm


def test_scaling_uses_one_binary_for_any_size():
    with rehearse("sm_90", compile=False) as rehearsal:
        for dtype in DTYPES:
            for rows in (1, 2, 16, 17, 4097):
                scale_(torch.ones(rows, 16, dtype=dtype), torch.tensor(2.0))
    assert len(rehearsal.launches) == 15
    assert len(rehearsal.specializations) == len(DTYPES)


@pytest.mark.parametrize("impl", KERNELS)
def test_nothing_compiles_in_a_cuda_graph_after_a_warm_up_of_another_size(gpu, impl):
    with rehearse(gpu, compile=False) as rehearsal:
        loss(impl, 64, 128, 64, torch.bfloat16, "ids")
        rehearsal.capturing = True
        loss(impl, 1, 17, 64, torch.bfloat16, "ids")


@pytest.mark.parametrize("run", [*KERNELS, "extraction"])
def test_a_cuda_graph_before_any_warm_up_is_refused(gpu, run):
    with rehearse(gpu, compile=False) as rehearsal:
        rehearsal.capturing = True
        with pytest.raises(
            RuntimeError, match=r"_kernel would be compiled while a CUDA graph is captured.*run the step"
        ):
            extract(4, 8, 16, torch.float32, True, True) if run == "extraction" else loss(
                run, 64, 128, 64, torch.bfloat16, "plain"
            )
        assert not rehearsal.specializations
        rehearsal.capturing = False
        loss("rows", 64, 128, 64, torch.bfloat16, "plain")


def test_only_the_thread_that_captures_may_not_compile():
    kernel, others = SimpleNamespace(name="kernel"), []
    inside, leave = threading.Event(), threading.Event()

    def capture():
        with launch._compiling_nothing():
            inside.set()
            leave.wait(10)

    before = triton.knobs.runtime.jit_cache_hook
    with launch._compiling_nothing():
        thread = threading.Thread(target=capture)  # waits for its turn
        thread.start()
        hook = triton.knobs.runtime.jit_cache_hook
        compiling = threading.Thread(target=lambda: others.append(hook(fn=kernel)))
        compiling.start()
        compiling.join()
        assert others == [None]
        with pytest.raises(RuntimeError, match="kernel would be compiled"):
            hook(fn=kernel)
    assert inside.wait(10)
    leave.set()
    thread.join()
    assert triton.knobs.runtime.jit_cache_hook is before


def test_the_commonest_loss_compiles_as_it_is_launched(gpu):
    """Targets and nothing else, as NTP has them."""
    with rehearse(gpu) as rehearsal:
        loss("fused", 64, 128, 64, torch.bfloat16, "head")
        loss("fused", 64, 128, 64, torch.bfloat16, "levelled")
    check(rehearsal)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("gpu", TARGETS, indirect=True)
def test_everything_compiles_as_it_is_launched(gpu, impl):
    """Every option in bf16, all of them and ids in fp16 and fp32."""
    with rehearse(gpu) as rehearsal:
        for option, dtype in itertools.product(OPTIONS, DTYPES):
            wanted = dtype == torch.bfloat16 or option in ("everything", "head", "symmetric with ids")
            if wanted and fits(impl, option, dtype):
                loss(impl, 64, 128, 64, dtype, option)
        if impl == "rows":
            for dtype in DTYPES:
                extract(16, 64, 96, dtype, True, True)
    check(rehearsal)


def check(rehearsal: Rehearsal) -> None:
    """No spills, shared memory that exists, tensor cores in every product of half precision."""
    core = compiler.TARGETS[rehearsal.target].tensor_core
    wrong = []
    for one, made in zip(rehearsal.specializations, rehearsal.binaries, strict=True):
        half = one.name.startswith(("scores_", "positives_")) and one.dtype in ("bf16", "fp16")
        if made.spills or made.shared > made.shared_limit or (half and core not in made.instructions):
            wrong.append(f"{one}: {made}")
    assert wrong == []
