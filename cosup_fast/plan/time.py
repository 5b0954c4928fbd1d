"""An estimate of a step's time: its FLOP over an assumed share of what the GPUs can do. Nothing here is measured.

    FLOP = passes x (2 P T + 4 L D sum_s l_s^2 / 2)        P weights in products, T tokens, sequences of l_s tokens

A pass forward counts once, its backward twice, activation checkpointing and the first pass of a step of several packs
(GradCache) once more each. Attention is causal: half of its square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    for gen in (True, False):
        config = request.gen if gen or request.shared else request.embseq or request.gen
        packs, sequences, length = (
            (request.gen_packs, request.gen_sequences, request.gen_length)
            if gen
            else (request.embseq_packs, request.embseq_sequences, request.embseq_length)
        )
        tokens = sequences * length
        layers, width = _value(config, "num_hidden_layers", "n_layer"), _value(config, "hidden_size", "n_embd")
        forward = 2 * _weights(config) * tokens + 2 * layers * width * sequences * length**2
        trained = gen or not request.freeze_embseq
        passes = 1.0
        if trained:
            passes = 3 + (request.activation_checkpointing == "full") + (1 - 1 / packs)
        flop += packs * passes * forward
        if gen:
            flop += packs * 3 * 2 * tokens * width * _value(config, "vocab_size")
    rate = UTILIZATION * tflops * 1e12
    return StepTime(round(flop / rate, 2), round(request.gpus * flop / 1e15, 3), tflops, UTILIZATION)


def count_weights(config: dict[str, Any]) -> float:
    """About all weights of a model: those of products, and embeddings with a head."""
    return _weights(config) + 2 * _value(config, "hidden_size", "n_embd") * _value(config, "vocab_size")


def _weights(config: dict[str, Any]) -> float:
    """Weights of the decoder layers' products."""
    layers, width = _value(config, "num_hidden_layers", "n_layer"), _value(config, "hidden_size", "n_embd")
    heads = _value(config, "num_attention_heads", "n_head")
    groups = config.get("num_key_value_heads") or heads
    size = (config.get("head_dim") or width // heads) * 1.0
    inner = config.get("intermediate_size") or config.get("n_inner") or 4 * width
    gated = 2 if config.get("model_type") == "gpt2" else 3
    return layers * (width * size * (2 * heads + 2 * groups) + gated * width * inner)


def _value(config: dict[str, Any], *names: str) -> int:
    stack = config.get("text_config", config)
    return next(int(stack[name]) for name in names if name in stack)
