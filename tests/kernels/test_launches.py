"""What a GPU would be asked to launch and to compile: by every implementation, for sizes of any value."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton's wheels are for Linux")

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: nothing compiles", allow_module_level=True)

from cosup_fast.functional import info_nce, linear_cross_entropy
from cosup_fast.kernels import tuning
from cosup_fast.kernels.last_hidden import kernels as last_hidden
from cosup_fast.kernels.softmax_xent import chunk_triton
from cosup_fast.kernels.softmax_xent.dispatch import KERNELS
from cosup_fast.testing import rehearse

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
    "head": {"head": True, "z_loss": 1e-4},
    "head with all": {"head": True, "bias": True, "label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0},
}


@pytest.fixture
def gpu(request, monkeypatch):
    """Our kernels take CPU tensors for those of a GPU: its tiles are launched, and nothing runs."""
    target = getattr(request, "param", "sm_90")
    for module in (tuning, chunk_triton):
        monkeypatch.setattr(module, "target_of", lambda device: target)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    return target


def loss(impl: str, n: int, m: int, d: int, dtype: torch.dtype, option: str, p: int = 3) -> None:
    """Forward and backward with garbage for scores: what is launched depends on no value."""
    options = dict(OPTIONS[option])
    x, w = (torch.randn(size, d, dtype=dtype, requires_grad=True) for size in (n, m))
    target = torch.arange(n) % m
    with mock.patch.object(chunk_triton, "_programs", return_value=132), allowed():
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
        return dispatch._kind(impl).unsupported(s, ranks) if impl in KERNELS else None

    return mock.patch.object(dispatch, "_unsupported", unsupported)


def extract(rows: int, height: int, d: int, dtype: torch.dtype, norm: bool, unit: bool) -> None:
    """Forward and backward of the gather."""
    hidden, weight = torch.randn(height, d, dtype=dtype), torch.randn(d, dtype=dtype) if norm else None
    index = torch.randint(height, (rows,))
    y, *saved = last_hidden.forward(hidden, index, weight, 1e-6, unit, True)
    last_hidden.backward(torch.randn_like(y), index, weight, *saved, height, unit, True, norm)


def cases():
    for impl, option in itertools.product(KERNELS, OPTIONS):
        one_way = impl != "fused" or not ("symmetric" in option or "with all" in option)
        if one_way and not (option == "ranks" and impl == "unranked"):
            yield impl, option


@pytest.mark.parametrize(("impl", "option"), cases(), ids=lambda value: str(value))
def test_everything_binds_and_sizes_of_any_value_use_one_binary(gpu, impl, option):
    """Rows, ids of a row and tiles make no other binary; columns do where they are no whole number of 16s."""
    with rehearse(gpu, compile=False) as rehearsal:
        for dtype in DTYPES:
            loss(impl, 64, 128, 64, dtype, option)
            before = rehearsal.count()
            for n, m, p in ((65, 128, 1), (1, 144, 16), (7, 1024, 5), (1000, 4096, 3)):
                if "symmetric" in option:
                    n = min(n, m)
                new = rehearsal.made_by(lambda: loss(impl, n, m, 64, dtype, option, p))  # noqa: B023
                assert [str(one) for one in new] == [], (n, m, p)
            assert rehearsal.count() == before
    assert rehearsal.launches
