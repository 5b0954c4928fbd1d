"""Attention over packs: sequences laid end to end, each attending to itself alone, with no mask and no pad token.

A pack is one row of tokens `(1, T)`; the lengths of its sequences come as the keyword argument `sequence_lengths`,
which transformers hands down to every layer. Two implementations are registered with its `AttentionInterface`:

    packed_sdpa     torch alone: on a GPU one call of its varlen kernel (`varlen_attention`), on a CPU padded products
                    for short sequences (`batched_attention`), else a call of SDPA for neighbours of equal length
    packed_flash    the same, with flash-attn in place of torch's varlen kernel

Both choose at the call, by device, dtype and options. transformers' own `flash_attention_2` reads the same pack through
`cu_seq_lens_q`.

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

from cosup_fast.model.batched_attention import LONGEST, PackLayout, batched_attention
from cosup_fast.model.varlen_attention import varlen_attention

PACKED_SDPA, PACKED_FLASH = "packed_sdpa", "packed_flash"
PACKED = (PACKED_SDPA, PACKED_FLASH)


class SequenceLengths:
    """The lengths of a pack, opaque to torch.compile, which would recompile for each pack."""

    def __init__(self, lengths: tuple[int, ...], cu_seqlens: Tensor):
        self.lengths = lengths
        self.cu_seqlens = cu_seqlens
        self._layouts: dict[tuple[Any, ...], PackLayout] = {}

    def layout(self, lengths: tuple[int, ...], heads: int, key_heads: int) -> PackLayout:
        """Of some of the sequences, the same for every layer."""
        key = lengths, heads, key_heads
        if key not in self._layouts:
            self._layouts[key] = PackLayout(*key)
        return self._layouts[key]


def choose_attention(requested: str, device: torch.device) -> str:
    """The attention implementation for a pack: what was requested, or the best one that is installed.

    `auto` is `packed_flash` where flash-attn imports and the device is CUDA, and `packed_sdpa` everywhere else. The
    dtype of the weights has no say: that of the products is known at the call.

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
    return PACKED_FLASH if installed and device.type == "cuda" else PACKED_SDPA


def packed_sdpa(
    module: nn.Module,
    query: Tensor,  # (1, H, T, d)
    key: Tensor,  # (1, H_kv, T, d)
    value: Tensor,  # (1, H_kv, T, d_v)
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sequence_lengths: SequenceLengths | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    flash_attn: bool = False,
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
    q, k, v = _as_multiplied(query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options: dict[str, Any] = {"scale": scale, "window": sliding_window, "softcap": softcap}
    out = varlen_attention(
        q, k, v, sequence_lengths.cu_seqlens, max(sequence_lengths.lengths), **options, dropout=dropout,
        flash_attn=flash_attn,
    )  # fmt: skip
    if out is None:
        out = _by_runs(q, k, v, sequence_lengths, **options, dropout=dropout)
    return out[None], None


def packed_flash(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """`packed_sdpa` with flash-attn's kernel where inputs are in half precision."""
    return packed_sdpa(*args, **kwargs, flash_attn=True)


def _as_multiplied(*operands: Tensor) -> tuple[Tensor, ...]:
    """(1, H, T, d) each, as (T, H, d) in the dtype that autocast would multiply them in."""
    kind = operands[0].device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        operands = tuple(x.to(torch.get_autocast_dtype(kind)) for x in operands)
    return tuple(x[0].transpose(0, 1) for x in operands)


def _by_runs(
    query: Tensor,  # (T, H, d)
    key: Tensor,  # (T, H_kv, d)
    value: Tensor,  # (T, H_kv, d_v)
    sequences: SequenceLengths,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:  # (T, H, d_v)
    """A call for neighbours of equal length, and on a CPU for all neighbours that are short."""
    short = LONGEST.get(query.dtype, 0) if query.device.type == "cpu" and not dropout else 0
    runs = [tuple(run) for _, run in groupby(sequences.lengths, lambda length: max(length, short))]
    tokens = [sum(run) for run in runs]
    pieces = []
    for lengths, q, k, v in zip(runs, *(x.split(tokens) for x in (query, key, value)), strict=True):
        length = lengths[0]
        if length <= short:
            layout = sequences.layout(lengths, q.shape[1], k.shape[1])
            pieces.append(batched_attention(q, k, v, layout, scale=scale, window=window, softcap=softcap))
            continue
        q, k, v = (x.unflatten(0, (len(lengths), length)).transpose(1, 2) for x in (q, k, v))  # (B, H, n, d)
        mask = None
        if window is not None and length > window:
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        piece = attend(q, k, v, mask, causal=mask is None, scale=scale, softcap=softcap, dropout=dropout)
        pieces.append(piece.transpose(1, 2).flatten(0, 1))
    return torch.cat(pieces)  # also of one, which may be a view: compiled layers are compiled again for another base


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


for _name, _attention in zip(PACKED, (packed_sdpa, packed_flash), strict=True):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, _packed_mask)
