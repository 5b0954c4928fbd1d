"""How many steps a run takes, and what the learning rate is at each of them."""

from __future__ import annotations

import math

from cosup_fast.config.training import TrainingConfig


def count_steps(config: TrainingConfig, examples: int) -> tuple[int, int]:
    """The steps of an epoch over so many examples, and those of the run."""
    per_epoch = math.ceil(examples / config.batch_size)
    return per_epoch, config.steps or config.epochs * per_epoch


def learning_rate_factor(config: TrainingConfig, step: int, total: int, steps_per_epoch: int) -> float:
    """The factor on `lr` at a step counted from 0: warm-up, then the schedule, times the decay per epoch."""
    warmup = round(config.warmup * total)
    decay = config.lr_decay ** (step // steps_per_epoch)
    if step < warmup:
        return decay * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return (
        decay
        * {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[config.schedule]
    )
