"""The bytes that a step's collectives carry of the two models, counted on the models themselves.

What FSDP gathers are the weights, frozen ones too, in the dtype of the products; what ranks sum are the gradients of
trained ones in fp32 (fp64). With adapters the first stays that of the whole model, and the second nearly vanishes. FSDP
cuts rows, n of them into S parts of ceil(n / S): what is missing in the last ones travels as padding, which multiplies
an adapter of rank r < S by S / r.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from cosup_fast.kernels.numerics import accumulator
from cosup_fast.model import CoSupervisionModel
from cosup_fast.plan.request import PlanRequest
from cosup_fast.plan.scaling import PassWeights, StepWeights


def count_step_weights(model: CoSupervisionModel, request: PlanRequest) -> StepWeights:
    """What each pass gathers and reduces of a model that is not sharded yet; only shapes and dtypes are read."""
    gen: Any = model.gen
    parts = [(gen, gen if request.ntp_weight else gen.base_model)]  # a model, and what a pass of it runs
    if request.has_embseq:
        parts.append((gen, gen.base_model) if model.embseq is None else (model.embseq, model.embseq))
    inside = {p for part, _ in parts for p in part.parameters()}
    whole = {p for p in model.parameters() if not (request.sharding == "fsdp" and p in inside)}
    if request.sharding != "fsdp":
        whole -= inside.difference(*(used.parameters() for _, used in parts))
    return StepWeights(tuple(_count(part, used, request) for part, used in parts), _gradients(whole))


def _count(part: nn.Module, used: nn.Module, request: PlanRequest) -> PassWeights:
    """All of `part` is gathered, and what is used has a gradient if it is trained."""
    shards = request.gpus // request.replicas if request.sharding == "fsdp" else 1

    def gathered(parameters: Iterable[nn.Parameter]) -> int:
        rounded = request.precision == "bfloat16"
        return sum(_padded(p, shards) * (2 if rounded else p.element_size()) for p in parameters)

    layers = [module for module in part.modules() if isinstance(module, GradientCheckpointingLayer)]
    of_layers = gathered(p for layer in layers for p in layer.parameters())
    return PassWeights(of_layers, gathered(part.parameters()) - of_layers, _gradients(used.parameters(), shards))


def _gradients(parameters: Iterable[nn.Parameter], shards: int = 1) -> int:
    return sum(_padded(p, shards) * accumulator(p.dtype).itemsize for p in parameters if p.requires_grad)


def _padded(p: nn.Parameter, shards: int) -> int:
    """Elements of a parameter whose rows are padded to a multiple of the shards."""
    return -(-p.shape[0] // shards) * shards * p[0].numel() if p.ndim else 1
