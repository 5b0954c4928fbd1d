"""One forward of Gen for the new tokens of many requests: hidden states, and the attention and products it runs with.

Shapes: T new tokens, D Gen's width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cosup_fast.generation.cache import CACHED_SDPA, Chunk, SlotCache, Step
from cosup_fast.model.attention import attending
from cosup_fast.model.linear import fast_linears, plain_linears

if TYPE_CHECKING:
    from cosup_fast.model import CoSupervisionModel

# Tokens that every vocabulary has: two requests, read in pieces and at once.
_PROBES = ([40, 41, 42, 43, 44, 45, 46], [30, 31, 32, 33])


class Runner:
    """Reads tokens into the cache of each request. Nothing of it stays on the model between calls.

    Args:
        model: whose Gen reads.
        slots: how many requests have a cache.

    Raises:
        ValueError: Gen does not attend through transformers' `AttentionInterface` in a way that can be cached.
    """

    def __init__(self, model: CoSupervisionModel, slots: int):
        self.model = model
        self.cache = SlotCache(slots)
        self.processed = 0  # tokens read since the beginning
        self._modules: list[nn.Module] = list(model.modules())
        self._linears = plain_linears(model.gen)

    @torch.inference_mode()
    def read(self, chunks: Sequence[Chunk]) -> Tensor:
        """Gen's hidden state after each chunk's last token, (len(chunks), D)."""
        self.cache.reserve(max(chunk.end for chunk in chunks))
        step = Step(self.cache, chunks, self.model.device)
        backbone: Any = self.model.gen.base_model
        with self._evaluating(), attending(backbone, CACHED_SDPA), fast_linears(self._linears):
            hidden = backbone(
                input_ids=step.input_ids[None], position_ids=step.position_ids[None], use_cache=False, step=step
            ).last_hidden_state[0]
        self.processed += len(step.input_ids)
        last = torch.empty(len(chunks), dtype=torch.long)
        last[torch.tensor(step.order)] = torch.tensor(step.last_rows)
        return hidden[last.to(hidden.device)]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Gen's logits (R, V) of hidden states (R, D), in memory of their own."""
        with self._evaluating():
            return self.model.logits(hidden)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """No dropout inside; every module has its own mode back afterwards."""
        training = [module for module in self._modules if module.training]
        if training:
            self.model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def check_cache(model: CoSupervisionModel) -> None:
    """Reads a few tokens in pieces and compares what transformers makes of them at once.

    Raises:
        ValueError: Gen's attention is not the one that is cached here.
    """
    from cosup_fast.model.backbone import agree, alone

    runner = Runner(model, 2)
    first, second = _PROBES
    parts = [[(0, 0, 4), (1, 0, 1)], [(0, 4, 5), (1, 1, 2)], [(1, 2, 4), (0, 5, 7)]]
    try:
        for part in parts:
            hidden = runner.read([Chunk(slot, past, _PROBES[slot][past:end]) for slot, past, end in part])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(_uncached(model, f"{type(error).__name__}: {error}")) from error
    for ours, probe in zip(hidden, (second, first), strict=True):
        with torch.inference_mode(), runner._evaluating():
            expected = alone(model.gen.base_model, torch.tensor([probe], device=model.device))[0, -1]
        if not agree(ours, expected, model.gen.dtype):
            raise ValueError(_uncached(model, "tokens read in pieces give other hidden states than read at once"))


def _uncached(model: CoSupervisionModel, reason: str) -> str:
    return (
        f"Gen ({type(model.gen).__name__}) cannot write with a cache of keys and values: {reason}; choose a model "
        "whose layers attend through transformers' AttentionInterface"
    )
