"""The failure signatures are seen when they happen, and only then."""

from __future__ import annotations

import math

from cosup_fast.training.monitor import FailureMonitor


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
