"""Weights, gradients and optimizer states shared out over ranks: FSDP2 over Gen and over Embseq.

Each model is a root of its own, its decoder layers are the units that are gathered and freed. A pass of a model
(`CoSupervisionModel.gen_losses`, `query_embeddings`, `sequence_states`) runs inside its root: there the weights are
whole, the LM head that NTP reads among them. Ranks must make the same passes in the same order (`make_batch` sees to
that). Gradients are sums over ranks, reduced in fp32: losses are sums over global counts, so nothing is divided.

What belongs to neither model, the projection and a learnt temperature, stays whole on every rank. The weights come
from the first rank, a unit at a time; the others may have none yet (`device="meta"`), so that a node holds them once.
Source: Zhao et al. 2023, arXiv 2304.11277; the unit is a parameter here (FSDP2), not a flat buffer.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from cosup_fast.data.packing import Pack
from cosup_fast.model.backbone import FinalNorm, run_pack

if TYPE_CHECKING:
    from cosup_fast.distributed import Peers
    from cosup_fast.model import CoSupervisionModel


def shard(model: CoSupervisionModel, mesh: DeviceMesh, *, precision: str) -> None:
    """Shares out both models over the ranks of a mesh, in place; call it before an optimizer is made.

    Args:
        model: loaded on the first rank, whose weights and buffers go to all others; on any device, "meta" too where it
            is not the first: the shards go to the mesh's.
        mesh: of all ranks: (shards,), or (replicas, shards), named, for hybrid sharding (see `Peers.mesh`): each row
            has a whole copy, and gradients are summed over rows too.
        precision: "bfloat16" gathers and multiplies bf16 weights and keeps the sharded ones as they are.

    Raises:
        ValueError: a model without decoder layers that transformers knows as such, or with 4-bit weights.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bfloat16" else None,
        reduce_dtype=torch.float32 if model.gen.dtype != torch.float64 else None,
        cast_forward_inputs=False,
    )
    for name, part in (("Gen", model.gen), ("Embseq", model.embseq)):
        if part is None:
            continue
        layers = [module for module in part.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers or getattr(part, "is_quantized", False):
            what = "4-bit weights, which cannot be shared out" if layers else "no decoder layers to share out"
            raise ValueError(
                f"training.sharding=fsdp: {name} ({type(part).__name__}) has {what}; use training.sharding=ddp"
            )
        for unit in (*layers, part):
            _spread(unit, mesh)
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        for unit in part.modules():
            if isinstance(unit, FSDPModule):
                unit.set_gradient_divide_factor(1.0)
                unit.set_force_sum_reduction_for_comms(True)
        setattr(part, "run_inside", types.MethodType(_run, part))  # noqa: B010  no attribute of its class
        register_fsdp_forward_method(part, "run_inside")
    for rest in (model.projection, model.criterion):
        if rest is not None:
            _spread(rest, mesh)
    model.sharded = True


def agree_on_norms(model: CoSupervisionModel, peers: Peers) -> None:
    """Gives models without values what the first rank found by looking at its own: the norms that run on rows alone."""
    first = peers.meet("final norms", {"norms": [model.gen_norm, model.embseq_norm]})[0]["norms"]
    model.gen_norm, model.embseq_norm = (norm and FinalNorm(*norm) for norm in first)


def reshard(model: CoSupervisionModel) -> None:
    """Frees the weights that forwards without a backward pass left whole, and puts the sharded ones in their place."""
    for module in model.modules() if model.sharded else ():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def passes_in_step(model: CoSupervisionModel, peers: Peers | None) -> Iterator[None]:
    """Inside, ranks that share out the weights each make the passes that they have work for, without gradients.

    Before each pass they meet. Gen's go first; who has one of Embseq's to make, or none any more, makes an empty one.
    Collectives of other kinds have no place inside.
    """
    if peers is None or not model.sharded:
        yield
        return
    inside: dict[str, Callable[[Callable[[], Any]], Any]] = {}

    def agree(wanted: str | None) -> str | None:
        """Whose pass is next, in the order of the parts; None: nobody has one left."""
        notes = [note["pass"] for note in peers.meet("evaluation", {"pass": wanted})]
        return next((name for name in inside if name in notes), None)

    def make(name: str, run: Callable[[], Any]) -> Any:
        # What FSDP gathers into is kept, and would be of no use outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            return inside[name](run)

    def fill(name: str) -> None:
        backbone = model.gen.base_model if name == "gen" else model.embseq
        nothing = Pack.nothing(None, 1).to(model.device)
        make(name, lambda: run_pack(backbone, nothing))

    def in_step(name: str, run: Callable[[], Any]) -> Any:
        while (turn := agree(name)) != name:
            assert turn is not None
            fill(turn)
        return make(name, run)

    for name, part in model.parts():
        inside[name] = cast(Any, part).run_inside
        cast(Any, part).run_inside = functools.partial(in_step, name)
    try:
        with peers.reporting("evaluation"):
            yield
        while (turn := agree(None)) is not None:
            fill(turn)
    finally:
        for name, part in model.parts():
            cast(Any, part).run_inside = inside[name]


def local(t: Tensor) -> Tensor:
    """This rank's part of a tensor: the same memory."""
    return t.to_local() if isinstance(t, DTensor) else t


def copies(t: Tensor) -> int:
    """How many ranks have the same part of a sharded tensor: the replicas of hybrid sharding."""
    if not isinstance(t, DTensor):
        return 1
    sizes = (t.device_mesh.size(i) for i, placement in enumerate(t.placements) if placement.is_replicate())
    return math.prod(sizes)


class Share(NamedTuple):
    """Which part of a sharded tensor a rank has."""

    row: int
    """Of the whole tensor, where the part begins."""
    replica: int
    """Of those that have the same part, which one this rank is."""

    @classmethod
    def of(cls, t: DTensor) -> Self:
        """That of this rank; a tensor (n, ...) over S ranks has ceil(n / S) rows on each, and fewer on the last."""
        here = t.device_mesh.get_coordinate()
        assert here is not None
        row = replica = 0
        for dimension, (placement, i) in enumerate(zip(t.placements, here, strict=True)):
            if placement.is_shard():
                row = min(i * -(-t.shape[0] // t.device_mesh.size(dimension)), t.shape[0])
            else:
                replica = i
        return cls(row, replica)


def unsharded_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Those that every rank has whole, whose gradients are still to be summed."""
    return (p for p in model.parameters() if not isinstance(p, DTensor))


@torch.no_grad()
def _spread(module: nn.Module, mesh: DeviceMesh) -> None:
    """Gives every rank what the first has of a module, whole and on the mesh's device; shards stay as they are."""
    kind = mesh.device_type
    device = torch.device(kind if kind == "cpu" else f"{kind}:{torch.get_device_module(kind).current_device()}")
    for x in (*module.parameters(), *module.buffers()):
        if isinstance(x, DTensor):
            continue
        whole = torch.empty_like(x, device=device) if x.is_meta else x.detach().to(device).contiguous()
        for dimension in range(mesh.ndim):  # the first of every row, then the others of the row
            dist.broadcast(whole.flatten().view(torch.uint8), group=mesh.get_group(dimension), group_src=0)
        if x.is_meta:  # tied weights are one tensor, and stay one
            is_parameter = isinstance(x, nn.Parameter)
            torch.utils.swap_tensors(x, nn.Parameter(whole, x.requires_grad) if is_parameter else whole)
        else:
            x.data = whole


def _run(part: nn.Module, run: Callable[[], Any]) -> Any:
    return run()
