"""The learning rate over a run."""

from __future__ import annotations

import pytest

from cosup_fast.config.training import TrainingConfig
from cosup_fast.training.schedule import learning_rate_factor


def _factors(total, steps_per_epoch=1000, **fields):
    config = TrainingConfig(**fields)
    return [learning_rate_factor(config, step, total, steps_per_epoch) for step in range(total)]


def test_warmup_rises_to_one_and_constant_stays():
    factors = _factors(100, warmup=0.1)
    assert factors[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert factors[9:] == [1.0] * 91


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.5), ("cosine", 0.5)])
def test_schedules_fall_to_zero(schedule, middle):
    factors = _factors(101, warmup=0.0, schedule=schedule)
    assert factors[0] == 1.0
    assert factors[50] == pytest.approx(middle, abs=0.02)
    assert 0 < factors[-1] < 0.02
    assert factors == sorted(factors, reverse=True)


def test_decay_per_epoch_is_the_papers():
    factors = _factors(30, steps_per_epoch=10, warmup=0.0, lr_decay=0.85)
    assert factors == pytest.approx([1.0] * 10 + [0.85] * 10 + [0.85**2] * 10)
