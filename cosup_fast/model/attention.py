"""Attention over packs: sequences laid end to end, each attending to itself alone, with no mask and no pad token.

`packed_sdpa` is registered with transformers' `AttentionInterface`. A pack is one row of tokens `(1, T)`; the
lengths of its sequences come as the keyword argument `sequence_lengths`, which transformers hands down to every
layer. On a GPU with flash-attn, `flash_attention_2` reads the same pack through `cu_seq_lens_q` and never splits it.

Shapes: B sequences, H query heads, H_kv key heads, n queries, m keys, d and d_v head widths, T tokens of a pack.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_SDPA = "packed_sdpa"


class SequenceLengths:
    """The lengths of a pack, opaque to torch.compile, which would compile anew for each pack."""

    def __init__(self, lengths: tuple[int, ...]):
        self.lengths = lengths


def choose_attention(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """The attention implementation for a pack: what was requested, or the best one that runs here.

    `auto` is FlashAttention 2 where flash-attn imports, the device is CUDA and the dtype is 16 bits wide, and
    `packed_sdpa` everywhere else.

    Raises:
        ValueError: FlashAttention was requested and flash-attn is not installed; transformers would fetch a binary.
    """
    installed = importlib.util.find_spec("flash_attn") is not None
    if requested == "flash_attention_2" and not installed:
        raise ValueError(
            "model.attention='flash_attention_2' needs the package flash-attn, which is not installed: "
            "pip install 'cosup-fast[gpu]', or set model.attention=auto"
        )
    if requested != "auto":
        return requested
    half = dtype in (torch.float16, torch.bfloat16)
    return "flash_attention_2" if installed and device.type == "cuda" and half else PACKED_SDPA


def packed_sdpa(
    module: nn.Module,
    query: Tensor,  # (1, H, T, d)
    key: Tensor,  # (1, H_kv, T, d)
    value: Tensor,  # (1, H_kv, T, d)
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sequence_lengths: SequenceLengths | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence of a pack; without `sequence_lengths`, as transformers' own sdpa."""
    refuse_sinks(s_aux)
    if sequence_lengths is None and softcap is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if sequence_lengths is None:
        causal = attention_mask is None and query.shape[2] > 1
        whole = attend(
            query, key, value, attention_mask, causal=causal, scale=scaling, softcap=softcap, dropout=dropout
        )
        return whole.transpose(1, 2), None
    for windows in _recorders:
        windows.applied.add(sliding_window)
    runs = [(length, len(list(run))) for length, run in groupby(sequence_lengths.lengths)]
    tokens = [length * count for length, count in runs]
    pieces = []
    for (length, count), *qkv in zip(runs, *(x[0].split(tokens, dim=1) for x in (query, key, value)), strict=True):
        # Neighbours of equal length are a batch: (H, count * length, d) seen as (count, H, length, d).
        q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in qkv)
        mask = None
        if sliding_window is not None and length > sliding_window:
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - sliding_window)
        piece = attend(q, k, v, mask, causal=mask is None, scale=scaling, softcap=softcap, dropout=dropout)
        pieces.append(piece.transpose(1, 2).flatten(0, 1))
    return torch.cat(pieces)[None], None


def attend(
    query: Tensor,  # (B, H, n, d)
    key: Tensor,  # (B, H_kv, m, d)
    value: Tensor,  # (B, H_kv, m, d_v)
    mask: Tensor | None,  # added to the scores, or where it holds they are kept
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:  # (B, H, n, d_v)
    """softmax(s) V with s = scale Q K^T or, with a soft cap c (Gemma 2), s = c tanh(scale Q K^T / c)."""
    grouped = query.shape[1] != key.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    if grouped:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    # In fp32 as transformers has it, but never below the dtype of the scores.
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return F.dropout(weights, dropout) @ value


def refuse_sinks(s_aux: Tensor | None) -> None:
    """Refuses attention sinks, which no implementation here has.

    Raises:
        ValueError: a layer has them.
    """
    if s_aux is not None:
        raise ValueError("its layers attend with sinks (s_aux), which this implementation lacks")


@dataclass(eq=False)
class Windows:
    """How far layers see: what their masks were asked for, and what attention was told."""

    asked: set[int | None] = field(default_factory=set)
    applied: set[int | None] = field(default_factory=set)


_recorders: list[Windows] = []


@contextmanager
def recorded_windows() -> Iterator[Windows]:
    """Records the windows of what runs inside: one in a mask alone is lost in a pack, which has no mask."""
    windows = Windows()
    _recorders.append(windows)
    try:
        yield windows
    finally:
        _recorders.remove(windows)


@contextmanager
def attending(backbone: Any, implementation: str) -> Iterator[None]:
    """The backbone with another attention implementation."""
    before = backbone.config._attn_implementation
    backbone.config._attn_implementation = implementation
    try:
        yield
    finally:
        backbone.config._attn_implementation = before


def _packed_mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    attention_mask=None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
):
    """No mask for a pack nor where causality alone decides; else transformers' sdpa mask: a cache, a sliding window."""
    for windows in _recorders:
        windows.asked.add(local_size)
    # transformers forbids the skip for packs, whose sequences packed_sdpa keeps apart and inside the window.
    in_window = not allow_is_causal_skip or local_size is None or kv_length <= local_size
    if attention_mask is None and isinstance(q_offset, int) and q_offset == 0 and q_length == kv_length and in_window:
        return None
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, _packed_mask)
