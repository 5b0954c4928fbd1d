"""Memory for scores that is kept from one loss to the next.

A CPU maps and clears fresh pages at every call, which for a chunk of scores takes longer than its softmax. So the
largest buffer that was given back stays, at most COSUP_WORKSPACE_BYTES of it, until `release_workspace`. A GPU's
memory comes from torch's caching allocator, which does the same.
"""

from __future__ import annotations

import math
import os
import threading

import torch
from torch import Tensor

WORKSPACE_BYTES = 512 * 2**20
"""Bytes of a chunk of scores; the environment variable COSUP_WORKSPACE_BYTES overrides it."""

SMALL = 2**18
"""Bytes below which memory is not worth keeping: the allocator has it at hand."""

_lock = threading.Lock()
kept_buffers: list[Tensor] = []  # at most one buffer, that nobody uses


def workspace_bytes() -> int:
    text = os.environ.get("COSUP_WORKSPACE_BYTES")
    if text is None:
        return WORKSPACE_BYTES
    if not text.strip().isdecimal() or int(text) == 0:
        raise ValueError(f"COSUP_WORKSPACE_BYTES is {text!r}; set it to a positive whole number of bytes")
    return int(text)


def take(nbytes: int) -> Tensor:
    """A buffer (uint8) of at least so many bytes in the CPU's memory, uninitialised: the kept one if that will do."""
    with _lock:
        buffer = kept_buffers.pop() if kept_buffers else None
    if buffer is None or not nbytes <= len(buffer) <= max(nbytes, workspace_bytes()):
        buffer = None  # before the new one is there
        buffer = torch.empty(nbytes, dtype=torch.uint8)
    return buffer


def matrix(buffer: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The beginning of a buffer as a contiguous tensor."""
    return buffer[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def give_back(buffer: Tensor) -> None:
    """Keeps a buffer, whose views nobody may use any longer, for the next one to ask."""
    with _lock:
        if len(buffer) <= workspace_bytes() and (not kept_buffers or len(kept_buffers[0]) < len(buffer)):
            kept_buffers[:] = [buffer]


def release_workspace() -> None:
    """Returns the kept memory to the system."""
    with _lock:
        kept_buffers.clear()
