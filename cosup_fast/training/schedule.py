"""Learning rate and lambda over the steps of a run, also of one that is extended.

    factor(t) = (t + 1) / W                                              t < W, the warm-up
    factor(t) = max(m, d^e (m + (h - m) f((t - b) / (T - b))))           after it

T steps in all, m the floor, d the decay per epoch and e the epochs since b; f falls from 1 to 0 (linear, cosine) or
stays 1 (constant). The curve begins at b = W with height h = 1. A run that is resumed with another T, another shape or
another floor begins a new curve at the step where it stopped, at the height where the old one was: the learning rate
does not jump, and no warm-up is repeated.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:
    from cosup_fast.config.model import NSPConfig
    from cosup_fast.config.training import TrainingConfig


@dataclass(frozen=True)
class Schedule:
    """The factor on every learning rate, and lambda, at steps counted from 0."""

    kind: Literal["constant", "linear", "cosine"]
    total: int
    warmup: int  # steps
    floor: float
    decay: float  # after each epoch
    steps_per_epoch: int
    ramp: int = 0  # steps until lambda is nsp.weight
    begin: int = 0  # where the curve begins, unless the warm-up ends later
    height: float = 1.0  # of the curve where it begins
    decayed: float = 1.0  # by the epochs before that

    @classmethod
    def of(cls, training: TrainingConfig, nsp: NSPConfig, examples: int) -> Self:
        """The schedule of a whole run over so many examples."""
        per_epoch, total = count_steps(training, examples)
        return cls(
            kind=training.schedule,
            total=total,
            warmup=share_or_steps(training.warmup, total),
            floor=training.min_lr,
            decay=training.lr_decay,
            steps_per_epoch=per_epoch,
            ramp=share_or_steps(nsp.ramp or 0.0, total),
        )

    def factor(self, step: int) -> float:
        """The factor on the learning rates."""
        decayed = self._decayed(step)
        if step < self.warmup:
            return decayed * (step + 1) / self.warmup
        return max(self.floor, decayed * self._height(step))

    def nsp_weight(self, nsp: NSPConfig, step: int) -> float:
        """Lambda, which moves in a straight line from `nsp.initial_weight` to `nsp.weight`."""
        if nsp.initial_weight is None or step >= self.ramp:
            return nsp.weight
        return nsp.initial_weight + (nsp.weight - nsp.initial_weight) * step / self.ramp

    def continued(self, asked: Schedule, step: int) -> Schedule:
        """`asked` from `step` on, where this one was followed so far; warm-up and ramp keep their lengths in steps."""
        same = replace(asked, warmup=self.warmup, ramp=self.ramp)
        if step <= self.warmup:
            return same
        # Of the step before: at the end of a run the curve itself is down at the floor, perhaps at 0.
        return replace(same, begin=step, height=self._height(step - 1), decayed=self._decayed(step))

    def to_json(self) -> dict[str, Any]:
        """As it is kept with a checkpoint: the arguments of the class."""
        return asdict(self)

    def _decayed(self, step: int) -> float:
        return self.decayed * self.decay ** (step // self.steps_per_epoch - self.begin // self.steps_per_epoch)

    def _height(self, step: int) -> float:
        begin = max(self.warmup, self.begin)
        progress = (step - begin) / max(1, self.total - begin)
        fallen = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[self.kind]
        return self.floor + (self.height - self.floor) * fallen


def count_steps(config: TrainingConfig, examples: int) -> tuple[int, int]:
    """The steps of an epoch over so many examples, and those of the run."""
    per_epoch = math.ceil(examples / config.batch_size)
    return per_epoch, config.steps or config.epochs * per_epoch


def share_or_steps(value: float, total: int) -> int:
    """Steps: below 1 a share of all, from 1 on their number."""
    return round(value * total) if value < 1 else int(value)
