"""What is found out and written down about a step that is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cosup_fast.data.packing import make_batch
from cosup_fast.data.records import Example, Passage
from cosup_fast.distributed import Peers
from cosup_fast.files import replace_file
from cosup_fast.model import CoSupervisionModel
from cosup_fast.training.sharding import local, reshard
from cosup_fast.training.step import autocast


@torch.no_grad()
def ntp_of_each(
    model: CoSupervisionModel, examples: Sequence[Example], corpus: Mapping[str, Passage], precision: str
) -> dict[str, float]:
    """NTP of each example alone, nats per token, by its id."""
    losses: dict[str, float] = {}
    for example in examples:
        part = make_batch([example], corpus, model.template, retrieval=False).to(model.device).gen[0]
        with autocast(model.device, precision):
            losses[example.id] = float(model.gen_losses(part, len(part.targets))[0])
    return losses


def are_finite(model: CoSupervisionModel, peers: Peers | None) -> bool:
    """Whether all weights are finite, on every rank."""
    reshard(model)
    weights = (local(p) for p in model.parameters() if p.is_floating_point())
    wrong = torch.tensor(float(not all(bool(p.isfinite().all()) for p in weights)), device=model.device)
    return not bool(wrong if peers is None else peers.max(wrong))


def write_refusal(path: Path, record: dict[str, Any]) -> None:
    """Writes the description of a refused step, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        json.dump(_without_nan(record), file, indent=1)


def _without_nan(value: Any) -> Any:
    """The same for JSON, which has no NaN: as text."""
    if isinstance(value, dict):
        return {key: _without_nan(x) for key, x in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
