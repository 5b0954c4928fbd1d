"""The losses that a model is trained by, as its configuration names them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosup_fast.config.model import NSPConfig, NTPConfig
from cosup_fast.losses import CoSupervisionLoss, InfoNCELoss, LinearCrossEntropyLoss
from cosup_fast.model.loading import logit_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_criterion(gen: PreTrainedModel, nsp: NSPConfig, ntp: NTPConfig) -> CoSupervisionLoss:
    """NTP over Gen's head and NSP, weighted."""
    return CoSupervisionLoss(
        nsp_weight=nsp.weight,
        ntp_weight=ntp.weight,
        ntp=LinearCrossEntropyLoss(ignore_index=None, **logit_options(gen)),  # supervised rows alone come in
        nsp=InfoNCELoss(
            temperature=nsp.temperature,
            learnable_scale=nsp.learnable_temperature,
            symmetric=nsp.symmetric,
            label_smoothing=nsp.label_smoothing,
        ),
    )
