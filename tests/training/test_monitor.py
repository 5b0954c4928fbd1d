"""The failure signatures are seen when they happen, and only then."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from cosup_fast.training.monitor import FailureMonitor, SpikeGuard


def _run(losses, candidates=32):
    monitor = FailureMonitor(window=10)
    return [message for loss in losses for message in monitor.step(loss, candidates)]


def test_nsp_at_chance_is_reported_once():
    messages = _run([math.log(32)] * 40)
    assert len(messages) == 1
    assert "near chance, ln(M) = 3.47" in messages[0]


def test_saturated_scores_are_reported():
    (message,) = _run([300.0] * 20)
    assert "saturated" in message


def test_a_learning_run_is_silent():
    assert _run([math.log(32) * 0.97**i for i in range(100)]) == []


def test_batches_of_one_sequence_have_nothing_to_contrast():
    (message,) = _run([0.5] * 20, candidates=1)  # a symmetric NSP is not 0 there
    assert "training.batch_size" in message
    assert _run([0.0] * 5, candidates=1) == []


def test_a_small_batch_now_and_then_is_no_failure():
    """The last batch of an epoch of two steps holds a single sequence."""
    monitor = FailureMonitor(window=10)
    steps = [step for i in range(20) for step in ((3.0 * 0.9**i, 32), (0.0, 1))]
    assert [message for nsp, candidates in steps for message in monitor.step(nsp, candidates)] == []


def test_steps_without_retrieval_say_nothing():
    assert _run([0.0] * 40, candidates=0) == []


def test_rising_held_out_ntp_and_flat_recall():
    monitor = FailureMonitor(patience=2)
    messages = [m for ntp in (3.0, 2.0, 2.2, 2.3) for m in monitor.evaluation(ntp, 0.01)]
    assert len(messages) == 2
    assert any("held-out NTP loss has risen from 2.000" in m for m in messages)
    assert any("R@5 is flat at 1.0%" in m for m in messages)


def test_improving_held_out_figures_are_silent():
    monitor = FailureMonitor(patience=2)
    assert [m for i in range(8) for m in monitor.evaluation(3.0 - 0.1 * i, 0.05 * i)] == []


def test_retrieval_that_is_perfect_throughout_is_not_flat():
    monitor = FailureMonitor(patience=2)
    assert [m for _ in range(8) for m in monitor.evaluation(1.0, 1.0)] == []
    assert len([m for _ in range(3) for m in monitor.evaluation(1.0, 0.9)]) == 1


def test_one_bad_evaluation_is_no_failure():
    monitor = FailureMonitor(patience=3)
    messages = [m for ntp, recall in [(1, 0.5), (2, 0.4), (2, 0.4), (1, 0.6)] for m in monitor.evaluation(ntp, recall)]
    assert messages == []


def test_held_out_ntp_within_two_percent_of_its_best_has_not_risen():
    monitor = FailureMonitor(patience=2)
    held_out = [(2.0, 0.1), (2.03, 0.2), (2.03, 0.3), (2.03, 0.4)]
    assert [m for ntp, recall in held_out for m in monitor.evaluation(ntp, recall)] == []


def _fed(losses, factor=10.0, window=20):
    guard = SpikeGuard(factor, window)
    for loss in losses:
        guard.accept(loss, 2 * loss)
    return guard


def test_a_spike_is_measured_against_the_median_of_its_own_loss():
    losses = [3.0 + 0.5 * random.Random(i).random() for i in range(20)]
    guard = _fed(losses)
    median = statistics.median(losses)
    scale = 1.4826 * statistics.median(abs(x - median) for x in losses)
    assert scale > SpikeGuard.FLOOR
    assert list(guard.refuse(median + 9.9 * scale, 2 * (median + 9.9 * scale))) == []
    (message,) = guard.refuse(median + 10.1 * scale, 7.0)
    assert message.startswith("NTP loss")
    assert "10 robust standard deviations above" in message
    (message,) = guard.refuse(3.0, 2 * (median + 10.1 * scale))
    assert message.startswith("NSP loss")


def test_what_is_no_spike():
    assert list(_fed([3.0] * 9).refuse(1e6, None)) == []  # too few to compare with
    assert len(list(_fed([3.0] * 10).refuse(1e6, None))) == 1
    assert list(_fed([3.0] * 20).refuse(0.0, 0.0)) == []  # a fall
    assert list(_fed([1e-4] * 20).refuse(0.9, 0.9)) == []  # a loss of nearly nothing moves by less than ten floors
    assert list(_fed([3.0] * 20, factor=None).refuse(1e6, 1e6)) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_from_the_first_step_and_forgotten(bad):
    guard = SpikeGuard(None, 20)
    (message,) = guard.refuse(1.0, bad)
    assert message == f"NSP loss {bad}"
    guard.accept(bad, bad)
    assert list(guard.refuse(1.0, 1.0)) == []


def test_one_spike_does_not_make_the_next_one_pass():
    guard = _fed([3.0] * 19 + [1e6])
    assert len(list(guard.refuse(1e6, None))) == 1
