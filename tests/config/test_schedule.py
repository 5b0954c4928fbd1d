"""Learning rates and lambda over a run, also over one that is extended."""

from __future__ import annotations

import pytest

from cosup_fast.config.model import NSPConfig
from cosup_fast.config.training import TrainingConfig
from cosup_fast.training.schedule import Schedule, share_or_steps

SHAPES = ["constant", "linear", "cosine"]


def _schedule(total, steps_per_epoch=1000, nsp=None, **fields):
    config = TrainingConfig(steps=total, batch_size=2, **fields)
    return Schedule.of(config, NSPConfig(**(nsp or {})), 2 * steps_per_epoch)


def _factors(total, steps_per_epoch=1000, **fields):
    schedule = _schedule(total, steps_per_epoch, **fields)
    return [schedule.factor(step) for step in range(total)]


@pytest.mark.parametrize("warmup", [0.1, 10])
def test_warmup_rises_to_one_and_constant_stays(warmup):
    factors = _factors(100, warmup=warmup)
    assert factors[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert factors[9:] == [1.0] * 91


def test_below_one_is_a_share_and_one_is_a_step():
    assert [share_or_steps(value, 200) for value in (0.0, 0.5, 0.999, 1.0, 30.0)] == [0, 100, 200, 1, 30]


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.5), ("cosine", 0.5)])
def test_schedules_fall_to_zero(schedule, middle):
    factors = _factors(101, warmup=0.0, schedule=schedule)
    assert factors[0] == 1.0
    assert factors[50] == pytest.approx(middle, abs=0.02)
    assert 0 < factors[-1] < 0.02
    assert factors == sorted(factors, reverse=True)


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.6), ("cosine", 0.6)])
def test_schedules_fall_to_their_floor(schedule, middle):
    factors = _factors(1001, warmup=0.0, schedule=schedule, min_lr=0.2)
    assert factors[0] == 1.0
    assert factors[500] == pytest.approx(middle, abs=0.01)
    assert 0.2 < factors[-1] < 0.201


def test_decay_per_epoch_is_the_papers():
    factors = _factors(30, steps_per_epoch=10, warmup=0.0, lr_decay=0.85)
    assert factors == pytest.approx([1.0] * 10 + [0.85] * 10 + [0.85**2] * 10)
    assert _factors(30, steps_per_epoch=10, warmup=0.0, lr_decay=0.5, min_lr=0.4)[20:] == [0.4] * 10


@pytest.mark.parametrize("ramp", [0.5, 4])
def test_lambda_moves_in_a_straight_line(ramp):
    nsp = NSPConfig(weight=1.0, initial_weight=0.2, ramp=ramp)
    schedule = _schedule(8, nsp=nsp.model_dump())
    assert [schedule.nsp_weight(nsp, step) for step in range(8)] == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1.0] * 4])
    falling = NSPConfig(weight=0.1, initial_weight=1.0, ramp=ramp)
    assert [schedule.nsp_weight(falling, step) for step in (0, 2, 4)] == pytest.approx([1.0, 0.55, 0.1])


@pytest.mark.parametrize("stopped", [60, 100])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("total", [70, 200, 10_000])
def test_a_run_that_is_extended_neither_jumps_nor_warms_up_again(shape, stopped, total):
    """A warm-up of 3% of 10,000 steps would begin again at step 60."""
    fields = {"steps_per_epoch": 25, "warmup": 0.03, "schedule": shape, "lr_decay": 0.9, "min_lr": 0.05}
    before, asked = _schedule(100, **fields), _schedule(max(total, stopped + 20), **fields)
    extended = before.continued(asked, stopped)
    assert extended.total == asked.total
    last, after = before.factor(stopped - 1), [extended.factor(step) for step in range(stopped, asked.total)]
    decay = 0.9 if stopped % 25 == 0 else 1.0
    assert after[0] == pytest.approx(max(0.05, last * decay))
    assert after == sorted(after, reverse=True)
    if shape != "constant":
        assert after[-1] == pytest.approx(0.05, abs=0.02)
    assert Schedule(**extended.to_json()) == extended


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stopped", [5, 10])
def test_a_run_that_is_extended_in_its_warm_up_keeps_its_length(shape, stopped):
    before, asked = (_schedule(total, warmup=0.1, schedule=shape) for total in (100, 500))
    extended = before.continued(asked, stopped)
    assert [extended.factor(step) for step in range(10)] == [before.factor(step) for step in range(10)]
    assert extended.factor(10) == 1.0


def test_another_shape_takes_over_where_the_first_one_was():
    before, asked = _schedule(100, warmup=0.0, schedule="linear"), _schedule(100, warmup=0.0)
    taken_over = before.continued(asked, 50)
    assert [taken_over.factor(step) for step in (50, 75, 99)] == [before.factor(49)] * 3
    again = taken_over.continued(before, 80)
    assert again.factor(80) == taken_over.factor(79)
    assert again.factor(99) < 0.05
