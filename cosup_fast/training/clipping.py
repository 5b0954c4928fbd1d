"""The norms of a step's gradients, and clipping all of them by the global one: g <- g min(1, limit / |g|)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cosup_fast.distributed import Peers
from cosup_fast.model import CoSupervisionModel
from cosup_fast.training.sharding import copies, local


def clip_gradients(
    model: CoSupervisionModel, limit: float | None, peers: Peers | None = None
) -> tuple[float, float, float]:
    """Clips in place; returns the norms before it: of Gen, of Embseq with its projection, and of everything.

    Args:
        model: with its gradients, summed over ranks.
        limit: the largest global norm; None: nothing is clipped. Gradients within it keep every bit.
        peers: the ranks that train.
    """
    gradients: dict[str, list[Tensor]] = {"gen": [], "embseq": [], "criterion": []}
    for name, p in model.named_parameters():
        if p.grad is not None:
            part = name.partition(".")[0]
            gradients["embseq" if part == "projection" else part].append(p.grad)
    norms = [_norm(model, group, peers) for group in gradients.values()]
    total = torch.linalg.vector_norm(torch.stack(norms))
    if limit is not None:
        factor = (limit / (total + 1e-6)).clamp(max=1.0)
        for gradient in (g for group in gradients.values() for g in group):
            local(gradient).mul_(factor)
    return float(norms[0]), float(norms[1]), float(total)


def _norm(model: CoSupervisionModel, gradients: list[Tensor], peers: Peers | None) -> Tensor:
    """The norm of gradients; a sharded one has its parts on all ranks, once in every replica."""
    norm = nn.utils.get_total_norm([local(g) for g in gradients if not isinstance(g, DTensor)])
    norm = norm.to(model.device)
    if not model.sharded or peers is None:
        return norm
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    parts = nn.utils.get_total_norm([local(g) for g in sharded]).to(norm).square()
    return (peers.sum(parts) / (copies(sharded[0]) if sharded else 1) + norm.square()).sqrt()
