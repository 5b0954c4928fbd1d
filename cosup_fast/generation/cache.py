"""Keys and values of many requests at once, and attention over them without pad tokens.

A step lays the new tokens of its requests end to end, like a pack: one token for each request that decodes, a chunk
for each that reads its prompt or a passage. `cached_sdpa`, registered with transformers' `AttentionInterface`, writes
their keys and values to the slots of the cache and lets every token attend to its own request alone. Requests that
decode are taken together, those of neighbouring slots and similar lengths, because a call costs as much as reading
a megabyte.

Shapes: T new tokens, S slots, C tokens that a slot can hold, H query heads, H_kv key heads, G = H / H_kv, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from cosup_fast.model.attention import attend, refuse_sinks

CACHED_SDPA = "cached_sdpa"
CALL_BYTES = 1 << 21  # a call of attention costs about as much as reading so many bytes of keys and values
FIRST_CAPACITY = 512


@dataclass(frozen=True)
class Chunk:
    """New tokens of one request: they follow the `past` tokens that its slot holds."""

    slot: int
    past: int
    tokens: Sequence[int]

    @property
    def end(self) -> int:
        """The length of the request afterwards."""
        return self.past + len(self.tokens)


class SlotCache:
    """Keys and values by slot, layer for layer; room is made as it is needed.

    Args:
        slots: S.
    """

    def __init__(self, slots: int):
        self.slots = slots
        self.capacity = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, length: int) -> None:
        """Makes room for `length` tokens in every slot."""
        if length <= self.capacity:
            return
        # Doubled: what grows token by token is copied a few times in all.
        capacity = max(FIRST_CAPACITY, 1 << (length - 1).bit_length())
        wider = {layer: (self._wider(k, capacity), self._wider(v, capacity)) for layer, (k, v) in self._layers.items()}
        # Only now that there was memory for all of it: the requests of a step that failed for want of it go on.
        self.capacity, self._layers = capacity, wider

    def write(self, layer: int, rows: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values (T, H_kv, d) at rows (T,) of (S * C); returns the layer's, (S, C, H_kv, d)."""
        if layer not in self._layers:
            self._layers[layer] = self._zeros(key, self.capacity), self._zeros(value, self.capacity)
        keys, values = self._layers[layer]
        keys.view(-1, *key.shape[1:]).index_copy_(0, rows, key)
        values.view(-1, *value.shape[1:]).index_copy_(0, rows, value)
        return keys, values

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Zeros in a slot that may hold NaN: what is masked is multiplied too."""
        for pair in self._layers.values():
            for tensor in pair:
                tensor[slot] = 0

    @property
    def bytes(self) -> int:
        """Memory that the cache occupies, once it is full."""
        return sum(tensor.nbytes for pair in self._layers.values() for tensor in pair)

    def _wider(self, tensor: Tensor, capacity: int) -> Tensor:
        wider = self._zeros(tensor[0], capacity)
        wider[:, : tensor.shape[1]] = tensor
        return wider

    def _zeros(self, like: Tensor, capacity: int) -> Tensor:
        """Room for tokens like these (n, H_kv, d). Zeros, since what is masked is multiplied too."""
        shape = (self.slots, capacity, *like.shape[1:])
        if like.device.type != "cpu":
            return like.new_zeros(shape)
        # From calloc: what no request has reached yet occupies no memory, which torch.zeros would write.
        return torch.from_numpy(np.zeros(math.prod(shape) * like.itemsize, np.uint8)).view(like.dtype).view(shape)


class Step:
    """The new tokens of several requests, laid end to end, and what attends to what.

    Args:
        cache: has room for them.
        chunks: at most one a slot.
        device: of the model.
    """

    def __init__(self, cache: SlotCache, chunks: Sequence[Chunk], device: torch.device):
        self.cache = cache
        self.device = device
        # Single tokens first and by slot: neighbours are then a slice of the tokens and of the cache.
        self.order = sorted(range(len(chunks)), key=lambda i: (len(chunks[i].tokens) > 1, chunks[i].slot))
        self.chunks = [chunks[i] for i in self.order]
        self.singles = sum(len(chunk.tokens) == 1 for chunk in self.chunks)
        tokens, positions, rows, self.last_rows = [], [], [], []
        for chunk in self.chunks:
            tokens += chunk.tokens
            positions += range(chunk.past, chunk.end)
            first = chunk.slot * cache.capacity + chunk.past
            rows += range(first, first + len(chunk.tokens))
            self.last_rows.append(len(tokens) - 1)
        self.input_ids, self.position_ids, self.rows = torch.tensor([tokens, positions, rows], device=device)
        self._groups: dict[int, list[range]] = {}
        self._masks: dict[tuple[Any, ...], Tensor | None] = {}

    def groups(self, token_bytes: int) -> list[range]:
        """Single tokens that attend in one call, as ranges of `chunks`: neighbours, as long as little is wasted."""
        if token_bytes not in self._groups:
            groups: list[range] = []
            start, longest, total = 0, 0, 0
            for i, chunk in enumerate(self.chunks[: self.singles]):
                longest, total = max(longest, chunk.end), total + chunk.end
                waste = ((i + 1 - start) * longest - total) * token_bytes
                if i > start and (chunk.slot != self.chunks[i - 1].slot + 1 or waste > CALL_BYTES):
                    groups.append(range(start, i))
                    start, longest, total = i, chunk.end, chunk.end
            if self.singles:
                groups.append(range(start, self.singles))
            self._groups[token_bytes] = groups
        return self._groups[token_bytes]

    def mask(self, which: range | int, window: int | None, first: int, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores: of a group (B, 1, 1, L), of a chunk (n, L); None where there is nothing to mask.

        Keys count from `first`. A token sees those up to its own position, and of those the last `window`.
        """
        name = (which, window, first, dtype)
        if name not in self._masks:
            chunks = [self.chunks[i] for i in which] if isinstance(which, range) else [self.chunks[which]]
            position = torch.cat([torch.arange(chunk.past, chunk.end) for chunk in chunks])
            key = torch.arange(first, max(chunk.end for chunk in chunks))
            seen = key <= position[:, None]
            if window is not None:
                seen &= key > position[:, None] - window
            mask = None
            if not seen.all():
                mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf).to(self.device)
                mask = mask[:, None, None] if isinstance(which, range) else mask
            self._masks[name] = mask
        return self._masks[name]


def cached_sdpa(
    module: nn.Module,
    query: Tensor,  # (1, H, T, d)
    key: Tensor,  # (1, H_kv, T, d)
    value: Tensor,  # (1, H_kv, T, d_v)
    attention_mask: Tensor | None,
    *,
    step: Step,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of a step's tokens to the tokens of their own requests, (1, T, H, d_v)."""
    refuse_sinks(s_aux)
    new_keys, new_values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    keys, values = step.cache.write(int(module.layer_idx), step.rows, new_keys, new_values)  # type: ignore[arg-type]
    queries = query[0].transpose(0, 1)  # (T, H, d)
    heads, key_heads = queries.shape[1], keys.shape[2]
    token_bytes = keys[0, 0].nbytes + values[0, 0].nbytes
    pieces: list[Tensor] = []
    for group in step.groups(token_bytes):
        chunks = step.chunks[group.start : group.stop]
        slots = slice(chunks[0].slot, chunks[-1].slot + 1)
        # Query heads that share a key head attend as if they were neighbouring positions: no key is copied.
        q = queries[group.start : group.stop].reshape(len(group), key_heads, heads // key_heads, -1)
        first = 0 if sliding_window is None else max(0, min(chunk.end for chunk in chunks) - sliding_window)
        span = slice(first, max(chunk.end for chunk in chunks))
        out = attend(
            q,
            keys[slots, span].transpose(1, 2),
            values[slots, span].transpose(1, 2),
            step.mask(group, sliding_window, first, q.dtype),
            scale=scaling,
            softcap=softcap,
        )
        pieces.append(out.reshape(len(group), heads, -1))
    at = step.singles
    for i, chunk in enumerate(step.chunks[step.singles :], start=step.singles):
        whole = chunk.past == 0 and (sliding_window is None or chunk.end <= sliding_window)
        first = 0 if sliding_window is None else max(0, chunk.past + 1 - sliding_window)
        out = attend(
            query[:, :, at : at + len(chunk.tokens)],
            keys[None, chunk.slot, first : chunk.end].transpose(1, 2),
            values[None, chunk.slot, first : chunk.end].transpose(1, 2),
            None if whole else step.mask(i, sliding_window, first, query.dtype),
            causal=whole,
            scale=scaling,
            softcap=softcap,
        )
        pieces.append(out[0].transpose(0, 1))
        at += len(chunk.tokens)
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces))[None], None


def _no_mask(**kwargs: Any) -> None:
    """`cached_sdpa` knows what attends to what."""


AttentionInterface.register(CACHED_SDPA, cached_sdpa)
AttentionMaskInterface.register(CACHED_SDPA, _no_mask)
