"""What a run records: figures of its steps and on held-out examples."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeAlias

import torch

from cosup_fast.training.diagnostics import Diagnosis


@dataclass(frozen=True)
class StepMetrics:
    """What one step tells. Losses are in nats; tokens are those of both models, none of them a pad token.

    None: a loss whose weight is 0 is not computed, and neither is what belongs to it.
    """

    step: int
    epoch: float
    loss: float
    ntp: float | None
    nsp: float | None
    in_batch_accuracy: float | None  # share of the queries whose own passage scores highest
    in_batch_rank: float | None  # mean rank of a query's own passage, 1 is the highest; 0 without a query
    candidates: int
    gen_grad_norm: float  # before clipping, as the next one
    embseq_grad_norm: float  # of Embseq with its projection; 0 where Embseq is Gen itself
    lr: float
    nsp_weight: float  # lambda of this step
    tokens_per_second: float
    useful_tokens: float  # share of the computed tokens that are not filler: 1 unless shapes are fixed
    peak_memory_gib: float  # so far: allocated on the GPU, or resident in this process without one; 0 if not known
    mfu: float | None = None  # model FLOP utilisation; None where the device's peak is not known (`utilization.py`)


@dataclass(frozen=True)
class HeldOut:
    """Figures on examples that are not trained on. NTP is there whatever its weight, the rest where an Embseq is."""

    step: int
    ntp: float  # nats per supervised token
    nsp: float | None  # nats per query, within batches of training.batch_size
    recall_at_1: float | None
    recall_at_5: float | None
    recall_at_20: float | None


@dataclass(frozen=True)
class Skipped:
    """A step that was passed over (`training.on_spike=skip`)."""

    step: int
    problems: list[str]
    examples: list[str]  # ids of its batch
    in_a_row: int  # steps skipped so far without one that was taken

    @property
    def reason(self) -> str:
        """For people: what is wrong, and with which batch."""
        more = f", … ({len(self.examples)} in all)" if len(self.examples) > 8 else ""
        return f"{'; '.join(self.problems)}; its examples: {', '.join(self.examples[:8])}{more}"


@dataclass(frozen=True)
class Changed:
    """Settings that a run was resumed with."""

    step: int
    fields: dict[str, list[Any]]  # by dotted name: before, and from here on


Metrics: TypeAlias = StepMetrics | Skipped | Changed | Diagnosis | HeldOut
_KINDS = {StepMetrics: "step", Skipped: "skipped", Changed: "changed", Diagnosis: "diagnosis", HeldOut: "held-out"}
FIGURES = {_KINDS[kind]: tuple(f.name for f in fields(kind)) for kind in (StepMetrics, Diagnosis, HeldOut)}
"""What the records hold that are numbers throughout, or null, by their kind."""
READ = {"step": ("ntp", "nsp"), "held-out": ("ntp", "recall_at_5")}
COUNTS = {"step": ("candidates",), "skipped": ("in_a_row",)}
"""Of these, what a resumed run reads, and what has to be whole numbers there; earlier versions wrote fewer others."""


def as_record(metrics: Metrics) -> dict[str, Any]:
    """Metrics as one flat record, `kind` telling which."""
    return {"kind": _KINDS[type(metrics)], **asdict(metrics)}


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch had allocated on a GPU, or that was resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
