"""The gradient of an input embedding as rows added to `.grad`, instead of a dense V x D tensor of mostly zeros.

    dE = sum over tokens t of onehot(id_t) dx_t'        touches the rows of the tokens that a pack holds, a few in V

autograd makes dE whole, and with tied weights then adds it to the gradient of the head: 2 passes over V x D numbers for
a few hundred rows. Here the rows of equal tokens are summed and added in place after the backward pass.

Only where this is exactly what autograd would give: a plain `nn.Embedding` on a CPU in fp32 or fp64 whose weight has no
hooks (FSDP, an optimizer that steps in the backward pass) and is trained whole. A GPU sums rows with atomics, in no
fixed order.

Shapes: V vocabulary, D width, T tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosup_fast.model import CoSupervisionModel


@contextmanager
def embedding_rows(model: CoSupervisionModel) -> Iterator[None]:
    """Inside, the embeddings of both models get their gradients this way; `.grad` is complete afterwards."""
    pending: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    def embed(weight: nn.Parameter, ids: Tensor) -> Tensor:
        _add(pending)  # of the pack before, so that the rows of one pack are held at a time
        return _Embed.apply(weight, ids, pending)  # pyright: ignore[reportReturnType]

    changed = (
        [] if model.sharded else [m for m in (plain_embedding(part) for _, part in model.parts()) if m is not None]
    )
    for module in changed:
        # An entry of the instance, past nn.Module's own bookkeeping: it comes and goes with every step.
        module.__dict__["forward"] = functools.partial(embed, cast(nn.Parameter, module.weight))
    try:
        yield
        _add(pending)
    finally:
        for module in changed:
            del module.__dict__["forward"]


def _add(pending: list[tuple[nn.Parameter, Tensor, Tensor]]) -> None:
    while pending:
        weight, ids, gradient = pending.pop(0)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        tokens, place = ids.unique(return_inverse=True)
        rows = gradient.new_zeros(len(tokens), gradient.shape[1]).index_add_(0, place, gradient)
        weight.grad.index_add_(0, tokens, rows)


def plain_embedding(part: Any) -> nn.Embedding | None:
    """The input embedding of a model where it is torch's own and untouched; else None."""
    module = part.get_input_embeddings()
    if type(module) is not nn.Embedding or "forward" in module.__dict__:
        return None
    weight: Any = module.weight
    plain = not (module.sparse or module.scale_grad_by_freq or module.max_norm or module.padding_idx is not None)
    trained = type(weight) is nn.Parameter and weight.requires_grad and weight.dtype in (torch.float32, torch.float64)
    hooks = getattr(weight, "_backward_hooks", None) or getattr(weight, "_post_accumulate_grad_hooks", None)
    return module if plain and trained and weight.device.type == "cpu" and not hooks else None


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: nn.Parameter, ids: Tensor, pending: list[Any]) -> Tensor:
        ctx.weight, ctx.ids, ctx.pending = weight, ids, pending
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:  # pyright: ignore
        ctx.pending.append((ctx.weight, ctx.ids.flatten(), gradient.flatten(0, -2)))
        return None, None, None
