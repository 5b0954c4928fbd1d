"""What the varlen kernels of a GPU are handed, and which one; stand-ins for them compute on a CPU."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from cosup_fast.model import varlen_attention as module
from cosup_fast.model.attention import (
    PACKED_FLASH,
    PACKED_SDPA,
    SequenceLengths,
    choose_attention,
    packed_flash,
    packed_sdpa,
)

LENGTHS = (9, 9, 30, 4)
BOUNDS = torch.tensor([0, 9, 18, 48, 52], dtype=torch.int32)


def by_bounds(query, key, value, bounds, window, scale):
    """Causal attention of (T, H, d) between bounds, with a (left, right) window as both kernels define it."""
    left, right = window
    assert right == 0
    out = []
    for a, b in zip(bounds.tolist(), bounds.tolist()[1:]):
        q, k, v = (x[a:b].transpose(0, 1)[None].double() for x in (query, key, value))
        place = torch.arange(b - a)
        before = place[:, None] - place
        seen = (before >= 0) & (before <= (b if left < 0 else left))
        out.append(nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)[0])
    return torch.cat([x.transpose(0, 1) for x in out]).to(query.dtype)


@pytest.fixture
def kernels(monkeypatch):
    """Both kernels on a device that takes everything; returns what they were called with."""
    calls = []

    def check(query, key, value, cu_q, cu_k, longest_q, longest_k):
        assert query.shape[1:] == (4, 8)
        assert key.shape[1:] == value.shape[1:] == (2, 8)
        assert query.dtype == key.dtype == value.dtype
        assert query.dtype in (torch.float16, torch.bfloat16)
        assert cu_q.dtype == torch.int32
        assert cu_q is cu_k
        assert torch.equal(cu_q, BOUNDS)
        assert (type(longest_q), longest_q, longest_k) == (int, 30, 30)

    def torch_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
        check(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
        assert enable_gqa
        calls.append(("torch", {"window": window_size}))
        return by_bounds(query, key, value, cu_seq_q, window_size, scale)

    def flash_kernel(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                     softmax_scale, causal, window_size, softcap):  # fmt: skip
        check(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        assert causal
        calls.append(("flash-attn", {"window": window_size, "dropout": dropout_p, "softcap": softcap}))
        return by_bounds(query, key, value, cu_seqlens_q, window_size, softmax_scale)

    monkeypatch.setattr(module, "takes_widths", lambda query, value: True)
    monkeypatch.setattr(module, "torch_varlen", lambda: torch_kernel)
    monkeypatch.setattr(module, "flash_attn_varlen", lambda: flash_kernel)
    return calls


def attend(implementation=packed_sdpa, dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 52, 8, dtype=dtype) for heads in (4, 2, 2))
    lengths = SequenceLengths(LENGTHS, BOUNDS)
    out, _ = implementation(nn.Identity(), query, key, value, None, sequence_lengths=lengths, scaling=0.4, **options)
    assert out.shape == (1, 52, 4, 8)
    return out


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("implementation", "name"), [(packed_sdpa, "torch"), (packed_flash, "flash-attn")])
def test_a_pack_is_one_call_and_what_sdpa_makes_of_it(implementation, name, window, kernels, monkeypatch):
    ours = attend(implementation, sliding_window=window)
    assert [(call, options["window"]) for call, options in kernels] == [(name, (-1 if window is None else 4, 0))]
    monkeypatch.setattr(module, "takes_widths", lambda query, value: False)
    torch.testing.assert_close(ours, attend(sliding_window=window), rtol=2e-2, atol=2e-2)
    assert len(kernels) == 1


def test_the_dtype_of_the_products_decides_not_that_of_the_weights(kernels):
    attend(dtype=torch.float32)
    assert not kernels
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(dtype=torch.float32).dtype == torch.bfloat16
        attend(packed_flash, dtype=torch.float32)
    assert [name for name, _ in kernels] == ["torch", "flash-attn"]


def test_what_torchs_kernel_lacks_goes_elsewhere(kernels):
    for options in ({"softcap": 3.0}, {"dropout": 0.1}):
        attend(**options)
        assert not kernels
    attend(packed_flash, softcap=3.0, dropout=0.1)
    assert kernels == [("flash-attn", {"window": (-1, 0), "dropout": 0.1, "softcap": 3.0})]


def test_a_missing_kernel_leaves_the_other(kernels, monkeypatch):
    monkeypatch.setattr(module, "flash_attn_varlen", lambda: None)
    attend(packed_flash)
    monkeypatch.setattr(module, "torch_varlen", lambda: None)
    attend(packed_flash)
    assert [name for name, _ in kernels] == ["torch"]


@pytest.mark.parametrize(
    ("capability", "width", "value_width", "taken"),
    [
        ((8, 0), 128, 128, True),
        ((7, 5), 128, 128, False),
        ((9, 0), 256, 256, True),
        ((8, 6), 256, 256, False),
        ((9, 0), 264, 264, False),
        ((9, 0), 60, 60, False),
        ((9, 0), 192, 128, False),
    ],
)
def test_heads_and_cards_that_the_kernels_take(capability, width, value_width, taken, monkeypatch):
    class OnGPU:
        is_cuda, device = True, torch.device("cuda")

        def __init__(self, width):
            self.shape = (1, 1, width)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert module.takes_widths(OnGPU(width), OnGPU(value_width)) is taken  # pyright: ignore[reportArgumentType]
    assert not module.takes_widths(torch.empty(1, 1, width), torch.empty(1, 1, width))


def test_torchs_kernel_is_taken_by_what_its_signature_has(monkeypatch):
    from torch.nn.attention import varlen

    names = inspect.signature(varlen.varlen_attn).parameters.keys()
    module.torch_varlen.cache_clear()
    assert (module.torch_varlen() is varlen.varlen_attn) == ({"scale", "window_size", "enable_gqa"} <= names)

    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        raise AssertionError

    monkeypatch.setattr(varlen, "varlen_attn", older)
    module.torch_varlen.cache_clear()
    assert module.torch_varlen() is None
    module.torch_varlen.cache_clear()


def test_auto_takes_flash_attn_where_it_is_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert choose_attention("auto", torch.device("cuda")) == PACKED_FLASH
    assert choose_attention("auto", torch.device("cpu")) == PACKED_SDPA
    assert choose_attention("packed_sdpa", torch.device("cuda")) == PACKED_SDPA
