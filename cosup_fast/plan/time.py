"""An estimate of a step's time: its FLOP over an assumed share of what the GPUs can do. Nothing here is measured.

    FLOP = passes x (2 P T + 4 L D sum_s l_s^2 / 2)        P weights in products, T tokens, sequences of l_s tokens

A pass forward counts once; its backward twice, or once where adapters alone are trained; activation checkpointing and
the first pass of a step of several packs (GradCache) once more each. Attention is causal: half of its square. The head
is taken to be on every token of Gen's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cosup_fast.plan.configs import decoder
from cosup_fast.plan.request import PlanRequest

UTILIZATION = 0.4
"""Assumed share of the peak rate."""
DENSE_TFLOPS = 312.0
"""bf16 without sparsity: an A100's data sheet."""


@dataclass(frozen=True)
class StepTime:
    """An estimate."""

    seconds: float
    pflop: float  # 10^15 operations of all GPUs
    tflops_per_gpu: float
    utilization: float


def estimate_step(request: PlanRequest, *, tflops: float = DENSE_TFLOPS) -> StepTime:
    """The time of a step at `UTILIZATION` of `tflops` a GPU; communication is assumed to be hidden behind it."""
    flop = 0.0
    for gen in (True, False) if request.has_embseq else (True,):
        model = decoder(request.gen if gen or request.shared else request.embseq or request.gen)
        packs, sequences, length = (
            (request.gen_packs, request.gen_sequences, request.gen_length)
            if gen
            else (request.embseq_packs, request.embseq_sequences, request.embseq_length)
        )
        tokens = sequences * length
        width = model.hidden_size
        forward = 2 * _weights(model) * tokens + 2 * model.num_hidden_layers * width * sequences * length**2
        passes = 1.0
        if gen or not request.freeze_embseq:
            lora = request.gen_lora if gen or request.shared else request.embseq_lora
            passes += (1 if lora.rank else 2) + (request.activation_checkpointing == "full")
            passes += 1 - 1 / packs if request.has_embseq else 0
        flop += packs * passes * forward
        if gen and request.ntp_weight:
            flop += packs * 3 * 2 * tokens * width * model.vocab_size
    rate = UTILIZATION * tflops * 1e12
    return StepTime(float(f"{flop / rate:.3g}"), float(f"{request.gpus * flop / 1e15:.3g}"), tflops, UTILIZATION)


def count_weights(config: dict[str, Any]) -> float:
    """About all weights of a model: those of products, and embeddings with a head."""
    model = decoder(config)
    return _weights(model) + 2 * model.hidden_size * model.vocab_size


def _weights(model: Any) -> float:
    """Weights of the decoder layers' products."""
    width, heads = model.hidden_size, model.num_attention_heads
    groups = getattr(model, "num_key_value_heads", None) or heads
    size = getattr(model, "head_dim", None) or width // heads
    inner = getattr(model, "intermediate_size", None) or getattr(model, "n_inner", None) or 4 * width
    gated = 2 if model.model_type == "gpt2" else 3
    return float(model.num_hidden_layers * (width * size * (2 * heads + 2 * groups) + gated * width * inner))
