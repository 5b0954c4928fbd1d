"""The ranks of a training run: each takes a part of every step, and holds all weights or, under FSDP, a shard.

    g = sum over ranks of g_r        the gradient of the step, on every rank (`reduce_gradients`)

Losses are sums over global counts, so nothing is averaged and no result depends on how many ranks there are. What is
done with gradients between the backward passes and the optimizer is in `reduce_gradients` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cosup_fast.config.training import TrainingConfig
from cosup_fast.distributed import Peers, joined_ranks, world_size
from cosup_fast.environment import choose_device
from cosup_fast.kernels.numerics import accumulator
from cosup_fast.training.sharding import unsharded_parameters

BUCKET = 1 << 24
"""Elements that travel at once, or one parameter if that is larger."""


@contextmanager
def training_ranks(config: TrainingConfig) -> Iterator[Peers | None]:
    """The processes that torchrun started, or that are joined already; None where this is the only one.

    Raises:
        ValueError: more ranks than examples in a step, or than GPUs; one GPU named for several ranks; replicas that do
            not divide the ranks.
        PeerError: a rank did not come.
    """
    size = world_size()
    if size % config.replicas:
        raise ValueError(
            f"training.replicas={config.replicas} needs a multiple of as many ranks, and torchrun --nproc-per-node "
            f"started {size}: choose a divisor of that"
        )
    if size == 1:
        yield None
        return
    if config.sharding == "none" or config.optimizer_in_backward:
        field = "training.sharding=none" if config.sharding == "none" else "training.optimizer_in_backward=true"
        raise ValueError(
            f"{field} is a run of one process, and torchrun --nproc-per-node started {size}: use "
            f"training.sharding=ddp or fsdp{'' if config.sharding == 'none' else ' without it'}, or start one process"
        )
    if config.batch_size < size:
        raise ValueError(
            f"training.batch_size={config.batch_size} leaves some of the {size} ranks (torchrun --nproc-per-node) "
            "without an example: raise it, or start fewer ranks"
        )
    device = choose_device(config.device)
    on_gpu = device.type == "cuda"
    if on_gpu and config.device not in ("auto", "cuda"):
        raise ValueError(
            f"training.device={config.device} names one GPU for {size} ranks (torchrun --nproc-per-node): use "
            "training.device=cuda"
        )
    if on_gpu:
        torch.cuda.set_device(device)
    with joined_ranks("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=config.rank_timeout) as peers:
        yield peers


def reduce_gradients(model: nn.Module, peers: Peers | None) -> None:
    """Sums the gradients of the trained parameters over ranks, in fp32 at least; each rank has the same then.

    Those of sharded parameters are sums already.

    A parameter that no rank has a gradient of keeps none, as in one process.
    """
    if peers is None:
        return
    trained = [p for p in unsharded_parameters(model) if p.requires_grad]
    if not trained:
        return
    device = trained[0].device
    present = peers.max(torch.tensor([p.grad is not None for p in trained], dtype=torch.uint8, device=device))
    waiting: list[nn.Parameter] = []
    for p, somewhere in zip(trained, present.tolist(), strict=True):
        if not somewhere:
            continue
        same = not waiting or accumulator(waiting[0].dtype) == accumulator(p.dtype)
        if waiting and not (same and sum(q.numel() for q in waiting) + p.numel() <= BUCKET):
            _reduce(waiting, peers)
            waiting = []
        waiting.append(p)
    if waiting:
        _reduce(waiting, peers)


def _reduce(parameters: list[nn.Parameter], peers: Peers) -> None:
    dtype = accumulator(parameters[0].dtype)
    parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().to(dtype) for p in parameters]
    flat = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
    peers.sum_(flat)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p).to(p.dtype)


def digest(model: nn.Module) -> int:
    """A number that depends on every bit of the weights and not on the machine, in one pass over them."""
    total = 0
    for i, (_, tensor) in enumerate(sorted(model.state_dict().items())):
        total += (i + 1) * int(_bits(tensor).sum(dtype=torch.int64))
    return total % 2**53


def _bits(tensor: Tensor) -> Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(kinds[tensor.element_size()])
