"""What a run records: figures of its steps and on held-out examples."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cosup_fast.training.diagnostics import Diagnosis


@dataclass(frozen=True)
class StepMetrics:
    """What one step tells. Losses are in nats; tokens are those of both models, none of them a pad token."""

    step: int
    epoch: float
    loss: float
    ntp: float
    nsp: float
    in_batch_accuracy: float  # share of the queries whose own passage scores highest
    in_batch_rank: float  # mean rank of a query's own passage, 1 is the highest; 0 without a query
    candidates: int
    gen_grad_norm: float  # before clipping, as the next one
    embseq_grad_norm: float  # of Embseq with its projection; 0 where Embseq is Gen itself
    lr: float
    tokens_per_second: float
    useful_tokens: float  # share of the computed tokens that are no filler: 1 unless shapes are fixed
    peak_memory_gib: float  # so far: allocated on the GPU, or resident in this process without one; 0 if not known


@dataclass(frozen=True)
class HeldOut:
    """Figures on examples that are not trained on."""

    step: int
    ntp: float  # nats per supervised token
    nsp: float  # nats per query, within batches of training.batch_size
    recall_at_1: float
    recall_at_5: float
    recall_at_20: float


def as_record(metrics: StepMetrics | Diagnosis | HeldOut) -> dict[str, Any]:
    """Metrics as one flat record, `kind` telling which."""
    kind = {StepMetrics: "step", Diagnosis: "diagnosis", HeldOut: "held-out"}[type(metrics)]
    return {"kind": kind, **asdict(metrics)}
