"""Attention over a pack in one call of a GPU kernel that is told where sequences begin: flash-attn's or torch's own.

Which of them runs is decided at the call, by the dtype that the products have there: weights in fp32 give q, k and v in
bf16 under autocast and under FSDP's mixed precision. flash-attn (`flash_attn_varlen_func`) takes dropout and a soft
cap; torch's (`torch.nn.attention.varlen`, from torch 2.13 on with scale and window) takes neither. Both need half
precision and compute capability 8.0.

Neither has run on a GPU here: the tests check what each is handed.

Shapes: T tokens of a pack, S sequences in it, H query heads, K key heads, d head width.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def varlen_attention(
    query: Tensor,  # (T, H, d)
    key: Tensor,  # (T, K, d)
    value: Tensor,  # (T, K, d)
    cu_seqlens: Tensor,  # (S + 1,) int32
    longest: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    flash_attn: bool = False,
) -> Tensor | None:  # (T, H, d)
    """Causal attention inside each sequence of a pack; None where no kernel that is installed takes these inputs.

    Args:
        query, key, value: of all tokens of the pack, of one dtype.
        cu_seqlens: where sequences begin, and T.
        longest: tokens of the longest sequence.
        scale: of the scores.
        window: how many tokens a query sees, itself included; all before it by default.
        softcap: of the scores; none by default.
        dropout: of the attention weights.
        flash_attn: use flash-attn where it is installed.
    """
    if query.dtype not in (torch.float16, torch.bfloat16) or not takes_widths(query, value):
        return None
    bounds = cu_seqlens, cu_seqlens, longest, longest
    seen = (-1 if window is None else window - 1, 0)  # tokens to the left and to the right of the query
    if flash_attn and (call := flash_attn_varlen()) is not None:
        return call(
            query, key, value, *bounds,
            dropout_p=dropout, softmax_scale=scale, causal=True, window_size=seen, softcap=softcap or 0.0,
        )  # fmt: skip
    if softcap is None and not dropout and (call := torch_varlen()) is not None:
        grouped = query.shape[1] != key.shape[1]
        return call(query, key, value, *bounds, scale=scale, window_size=seen, enable_gqa=grouped)
    return None


@cache
def flash_attn_varlen() -> Callable[..., Tensor] | None:
    """flash-attn's function, if that is installed."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    return importlib.import_module("flash_attn").flash_attn_varlen_func


@cache
def torch_varlen() -> Callable[..., Tensor] | None:
    """torch's function, if this torch has it with a scale, a window and grouped heads."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    call = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    wanted = {"scale", "window_size", "enable_gqa"}
    return call if wanted <= inspect.signature(call).parameters.keys() else None


def takes_widths(query: Tensor, value: Tensor) -> bool:
    """Whether the kernels take heads of this width on this device."""
    width = query.shape[-1]
    if not query.is_cuda or torch.version.hip is not None or value.shape[-1] != width or width % 8 or width > 256:
        return False
    capability = torch.cuda.get_device_capability(query.device)
    # Beyond 192 the backward pass needs the shared memory of a data centre's card.
    return capability >= (8, 0) and (width <= 192 or capability in ((8, 0), (9, 0), (10, 0)))
