"""Weights, gradients and optimizer states shared out over ranks: FSDP2 over Gen and over Embseq.

Each model is a root of its own, its decoder layers are the units that are gathered and freed. A pass of a model
(`CoSupervisionModel.gen_losses`, `query_embeddings`, `sequence_states`) runs inside its root: there the weights are
whole, the LM head that NTP reads among them. Ranks must make the same passes in the same order (`make_batch` sees to
that). Gradients are sums over ranks, reduced in fp32: losses are sums over global counts, so nothing is divided.

What belongs to neither model, the projection and a learnt temperature, stays whole on every rank.
Source: Zhao et al. 2023, arXiv 2304.11277; the unit is a parameter here (FSDP2), not a flat buffer.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

if TYPE_CHECKING:
    from cosup_fast.modeling import CoSupervisionModel

Sharding = Literal["none", "ddp", "fsdp"]


def shard(model: CoSupervisionModel, mesh: DeviceMesh, *, precision: str) -> None:
    """Shares out both models over the ranks of a one-dimensional mesh, in place; call it before an optimizer is made.

    Args:
        model: loaded, the same on every rank, on any device: the shards go to the mesh's.
        mesh: of all ranks.
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
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        for unit in part.modules():
            if isinstance(unit, FSDPModule):
                unit.set_gradient_divide_factor(1.0)
                unit.set_force_sum_reduction_for_comms(True)
        setattr(part, "run_inside", types.MethodType(_run, part))  # noqa: B010  no attribute of its class
        register_fsdp_forward_method(part, "run_inside")
    for rest in (model.projection, model.criterion):
        if rest is not None:
            rest.to(model.gen.device)
    model.sharded = True


def reshard(model: CoSupervisionModel) -> None:
    """Frees the weights that forwards without a backward pass left whole, and puts the sharded ones in their place."""
    for module in model.modules() if model.sharded else ():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(t: Tensor) -> Tensor:
    """This rank's part of a tensor: the same memory."""
    return t.to_local() if isinstance(t, DTensor) else t


def unsharded_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Those that every rank has whole, whose gradients are still to be summed."""
    return (p for p in model.parameters() if not isinstance(p, DTensor))


def _run(part: nn.Module, run: Callable[[], Any]) -> Any:
    return run()
