"""Whether a run fits into memory, asked before a model is loaded: the quick form of `cosup-fast plan`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from cosup_fast.config import ConfigError, RunConfig
from cosup_fast.config.model import LoRAConfig
from cosup_fast.data.packing import CoSupervisionBatch, Pack
from cosup_fast.plan.planner import GIB, PlanError, make_plan, margin
from cosup_fast.plan.request import PlanRequest
from cosup_fast.plan.time import count_weights
from cosup_fast.training.adamw import state_bytes
from cosup_fast.training.callbacks import Callback

SMALL = 0.25
"""Share of a CPU's memory below which weights, gradients and states are not worth a simulation."""


class FitsIntoMemory(Callback):
    """Refuses a run whose step does not fit (`run_training(config, callbacks=[FitsIntoMemory()])`)."""

    def check(self, config: RunConfig, batches: Sequence[CoSupervisionBatch], ranks: int, device: torch.device) -> str:
        return check_fits(config, batches, ranks, device)


def check_fits(config: RunConfig, batches: Sequence[CoSupervisionBatch], ranks: int, device: torch.device) -> str:
    """Simulates a step as large as the largest of some batches; returns what was found, or "" where nothing was asked.

    What cannot be simulated may run all the same: that is told, not refused.

    Args:
        config: the run.
        batches: this rank's part of a few steps.
        ranks: processes that share a step.
        device: of this one.

    Raises:
        ConfigError: it does not fit; the message has the breakdown and the way to advice.
    """
    memory = memory_bytes(device)
    request = plan_request(config, batches, ranks, device.type)
    if device.type == "cpu" and least_bytes(request) < SMALL * memory:
        return ""
    try:
        found = make_plan(request, memory / GIB, quick=True)
    except PlanError as error:
        return f"memory: not known before the run; {error}"
    room = memory / GIB - margin(memory / GIB) if device.type == "cuda" else 0.9 * memory / GIB
    told = f"{found.peak_gib:.1f} GiB in the {found.phase}, by simulation, of {memory / GIB:.1f} GiB"
    if found.peak_gib > room:
        parts = ", ".join(f"{kind} {size:.1f}" for kind, size in found.breakdown_gib.items() if size > 0.05)
        parts = parts and f" ({parts})"
        raise ConfigError(
            f"a step of this run does not fit: {told} on each of {ranks} ranks, of which {memory / GIB - room:.1f} "
            f"are to be left free{parts}. For what would help ask cosup-fast plan with the same configuration and "
            f"--gpus {ranks} --gpu-memory {memory / GIB:.0f} --gen-pack {request.gen_sequences}x{request.gen_length} "
            f"--embseq-pack {request.embseq_sequences}x{request.embseq_length}; train --force starts all the same"
        )
    return f"memory: {told}"


def plan_request(config: RunConfig, batches: Sequence[CoSupervisionBatch], ranks: int, device: str) -> PlanRequest:
    """The request of steps like these."""
    gen = max((part.pack for batch in batches for part in batch.gen), key=_tokens)
    embseq = max((pack for batch in batches for pack in batch.passages), key=_tokens, default=gen)
    queries = max(batch.nsp_count for batch in batches)
    gen_packs = max(len(batch.gen) for batch in batches)
    return PlanRequest.of(
        config,
        gpus=ranks,
        device=device,
        gen_sequences=len(gen.lengths),
        gen_length=-(-_tokens(gen) // len(gen.lengths)),
        gen_packs=gen_packs,
        queries_per_sequence=-(-queries // (gen_packs * len(gen.lengths))),
        embseq_sequences=len(embseq.lengths),
        embseq_length=-(-_tokens(embseq) // len(embseq.lengths)),
        embseq_packs=max(1, *(len(batch.passages) for batch in batches)),
    )


def _tokens(pack: Pack) -> int:
    return len(pack.input_ids)


def memory_bytes(device: torch.device) -> int:
    """Bytes that a process can have."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return 1 << 62
    return pages // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def least_bytes(request: PlanRequest) -> float:
    """Bytes of weights, and of gradients and states where these are trained, that no step is without."""
    each = {"bfloat16": 2, "float64": 8}.get(request.dtype, 4)
    training = each + state_bytes(request.optimizer, each)

    def of(config: dict[str, Any], lora: LoRAConfig, *, frozen: bool = False) -> float:
        weight = 0.5 if lora.quantize else each
        return count_weights(config) * (weight + (0 if frozen or lora.rank else training))

    found = of(request.gen, request.gen_lora)
    if request.has_embseq and not request.shared:
        found += of(request.embseq or request.gen, request.embseq_lora, frozen=request.freeze_embseq)
    return found / (request.gpus if request.sharding == "fsdp" else 1)
