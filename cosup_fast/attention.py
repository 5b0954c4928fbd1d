"""Attention over packs: sequences laid end to end, each attending to itself alone, with no mask and no pad token.

`packed_sdpa` is registered with transformers' `AttentionInterface`. A pack is one row of tokens `(1, T)`; the
lengths of its sequences come as the keyword argument `sequence_lengths`, which transformers hands down to every
layer. On a GPU with flash-attn, `flash_attention_2` reads the same pack through `cu_seq_lens_q` and never splits it.
"""

from __future__ import annotations

import importlib.util
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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence of a pack; without `sequence_lengths`, transformers' own sdpa."""
    if sequence_lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    lengths = sequence_lengths.lengths
    if sliding_window is not None and max(lengths) > sliding_window:
        raise ValueError(
            f"a sequence of {max(lengths)} tokens is longer than the model's sliding window of "
            f"{sliding_window}, which packed_sdpa does not apply: set model.attention=flash_attention_2, or "
            "shorten the sequences"
        )
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    tokens = [length * count for length, count in runs]
    pieces = []
    for (length, count), *qkv in zip(runs, *(x[0].split(tokens, dim=1) for x in (query, key, value)), strict=True):
        # Neighbours of equal length are a batch: (H, count * length, d) seen as (count, H, length, d).
        q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in qkv)
        piece = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        pieces.append(piece.transpose(1, 2).flatten(0, 1))
    return torch.cat(pieces)[None], None


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
