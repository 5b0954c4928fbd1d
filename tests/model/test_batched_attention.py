"""Short sequences as padded products: exact values and gradients, nothing between neighbours, and when they run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cosup_fast.model import attention
from cosup_fast.model.attention import SequenceLengths, packed_sdpa
from cosup_fast.model.batched_attention import LONGEST, SIMILAR, PackLayout, batched_attention

LENGTHS = (96, 70, 1, 71, 33, 96, 5)
HEADS, KEY_HEADS, WIDTH, VALUE_WIDTH = 6, 2, 16, 24


def inputs(lengths=LENGTHS, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = (HEADS, WIDTH), (KEY_HEADS, WIDTH), (KEY_HEADS, VALUE_WIDTH), (HEADS, VALUE_WIDTH)
    return [torch.randn(sum(lengths), *shape, dtype=torch.float64).mul(1.5).to(dtype) for shape in shapes]


def eager(query, key, value, lengths=LENGTHS, *, scale, window=None, softcap=None):
    """Each sequence alone, as transformers' eager attention: keys repeated, softmax in fp32."""
    out = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        q, k, v = (x.transpose(0, 1).repeat_interleave(HEADS // x.shape[1], dim=0) for x in (q, k, v))
        scores = q @ k.mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
        seen = seen if window is None else seen.triu(1 - window)
        scores = scores.masked_fill(~seen, -torch.inf)
        weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
        out.append((weights @ v).transpose(0, 1))
    return torch.cat(out)


def differentiated(attend, tensors, upstream, dtype):
    tensors = [x.to(dtype).requires_grad_() for x in tensors]
    out = attend(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream.to(dtype))]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_as_exact_as_eager_ones(dtype, window, softcap):
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    *tensors, upstream = inputs(dtype=dtype)
    layout = PackLayout(LENGTHS, HEADS, KEY_HEADS)
    expected = differentiated(lambda *x: eager(*x, **options), tensors, upstream, torch.float64)
    theirs = differentiated(lambda *x: eager(*x, **options), tensors, upstream, dtype)
    ours = differentiated(lambda *x: batched_attention(*x, layout, **options), tensors, upstream, dtype)
    for name, a, b, c in zip(("out", "query", "key", "value"), ours, theirs, expected, strict=True):
        assert a.dtype == dtype
        last_bits = torch.finfo(dtype).eps * c.abs().max()  # which of them is worst is the processor's affair
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + last_bits, name
        assert (a - c).norm() <= 2 * (b - c).norm(), name


def test_buckets_hold_similar_lengths_and_every_row_comes_back():
    layout = PackLayout(LENGTHS, HEADS, KEY_HEADS)
    assert [(b.sequences, b.length) for b in layout.buckets] == [(2, 96), (2, 71), (1, 33), (1, 5), (1, 1)]
    assert min(70, 71) >= SIMILAR * 71
    rows, key_rows = torch.arange(sum(LENGTHS) * HEADS), torch.arange(sum(LENGTHS) * KEY_HEADS)
    assert torch.equal(layout.rows[layout.back], rows)
    assert torch.equal(layout.key_rows[layout.key_back], key_rows)
    assert len(layout.rows) - len(layout.padding) == len(rows)


def test_a_neighbour_changes_nothing_and_the_future_changes_nothing():
    query, key, value, _ = inputs()
    layout = PackLayout(LENGTHS, HEADS, KEY_HEADS)
    before = batched_attention(query, key, value, layout, scale=0.3)
    for changed in (key, value):
        changed[96 + 40] += 7.0  # of the second sequence
    after = batched_attention(query, key, value, layout, scale=0.3)
    same = torch.ones(sum(LENGTHS), dtype=torch.bool)
    same[96 + 40 : 96 + 70] = False
    assert torch.equal(before[same], after[same])
    assert not (before == after).all(-1).all(-1)[~same].any()


def run(tensors, lengths, **options):
    """Through the registered implementation, (T, H, d_v)."""
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    query, key, value = (x.transpose(0, 1)[None] for x in tensors)
    return packed_sdpa(
        nn.Identity(), query, key, value, None, sequence_lengths=SequenceLengths(lengths, bounds), **options
    )[0][0]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 17, 150])
def test_long_and_short_sequences_share_a_pack(window, softcap):
    longest = LONGEST[torch.float64]
    lengths = (longest + 1, longest, 3, 2 * longest, 2 * longest, 40)
    *tensors, upstream = inputs(lengths)
    options = {"softcap": softcap, "scale": 0.2}
    expected = differentiated(lambda *x: eager(*x, lengths, window=window, **options), tensors, upstream, torch.float64)
    ours = differentiated(
        lambda *x: run(x, lengths, scaling=0.2, sliding_window=window, softcap=softcap),
        tensors,
        upstream,
        torch.float64,
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_who_runs_is_decided_by_length_dtype_and_dropout(monkeypatch):
    taken = []

    def counted(query, key, value, layout, **options):
        taken.append(sum(bucket.sequences for bucket in layout.buckets))
        return batched_attention(query, key, value, layout, **options)

    monkeypatch.setattr(attention, "batched_attention", counted)
    lengths = (LONGEST[torch.bfloat16], LONGEST[torch.float32] + 1, LONGEST[torch.float32], 7)
    *tensors, _ = inputs(lengths, torch.float32)
    run(tensors, lengths)
    with torch.autocast("cpu", torch.bfloat16):  # which casts what rotations left in fp32
        assert run([*tensors[:2], tensors[2].bfloat16()], lengths).dtype == torch.bfloat16
    assert taken == [2, 4]
    run(tensors, lengths, dropout=0.5)
    assert len(taken) == 2
