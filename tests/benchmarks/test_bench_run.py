"""Correctness before timing, interleaving, ratios, and what a broken provider does to the others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from statistics import median

import pytest
import torch

from benchmarks import run, timing
from benchmarks.cases import Case
from benchmarks.counting import OperationCounter
from benchmarks.providers import Provider, chosen
from benchmarks.timing import CHUNKS, COPY, MIN_ROUNDS, SLOW, Spread, interleave, limits, orders, ratios

pytestmark = pytest.mark.usefixtures("small_copy")

CASE = Case("info-nce", 64, 64, 32)


def say(text: str) -> None:
    pass


def planted(name: str, change):
    """A provider that computes the loss and then changes it; counts its calls."""
    calls = []

    def make(case):
        def loss(x, w, target):
            calls.append(name)
            return change(x, w, case.eager(x, w, target))

        return loss

    return Provider(name, "", ("info-nce",), make), calls


class OffBackward(torch.autograd.Function):
    """Right forward, gradient off by 1 in 1,000."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, g):  # pyright: ignore
        return g * 1.001


def forgets_half_of_dw(x, w, loss):
    return loss + (w.sum() - w.detach().sum()) * 0.01


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, w, loss: loss * 1.001, "loss is wrong by 0.001, allowed 3.8e-06"),
        (lambda x, w, loss: OffBackward.apply(loss), "dx is wrong by 0.001"),
        (forgets_half_of_dw, "dw is wrong by"),
        (lambda x, w, loss: loss + 0 * torch.tensor(float("nan")), "loss is wrong by inf"),
        (lambda x, w, loss: loss.expand(2).mean(0, keepdim=True), "loss is wrong by inf"),
    ],
    ids=["loss", "gradients", "dw", "nan", "shape"],
)
def test_a_wrong_provider_is_refused_before_timing(change, reason):
    wrong, calls = planted("wrong", change)
    rows = run.time_case(CASE, [wrong, *chosen(["dense"])], rounds=2, seconds=0, say=say)
    found = {row.provider: row for row in rows}
    assert found["wrong"].status == "refused"
    assert found["wrong"].reason.startswith(reason)
    assert found["wrong"].seconds == []
    assert len(calls) == 1, "only the check called it"
    assert len(found["dense"].seconds) == 2
    report = run.timing_report(rows, "command")
    assert f"- wrong: refused: {found['wrong'].reason}" in report
    assert "| wrong |" not in report


def test_bf16_is_held_to_twice_eager_and_not_to_fp32():
    rounds_scores, _ = planted("rounds", lambda x, w, loss: loss)
    coarse, _ = planted("coarse", lambda x, w, loss: loss * 1.05)
    case = Case("info-nce", 64, 64, 32, "bf16")
    rows, fit = run.examine(case, [rounds_scores, coarse], counting=False, say=say)
    assert list(fit) == ["rounds"]
    assert rows[1].reason.startswith("loss is wrong by 0.0")


def test_a_broken_provider_stops_nobody():
    def explode(x, w, loss):
        raise RuntimeError("no kernel image\nlong trace")

    def no_module(case):
        raise ImportError("libpeer.so: cannot open")

    broken, _ = planted("broken", explode)
    absent = Provider("absent", "", ("info-nce",), no_module)
    other = Provider("other", "", ("linear-cross-entropy",), no_module)
    cut, _ = planted("cut off", lambda x, w, loss: loss.detach())
    rows, fit = run.examine(CASE, [broken, absent, other, cut, *chosen(["ours stored"])], counting=False, say=say)
    assert [(row.provider, row.status, row.reason) for row in rows[:3]] == [
        ("broken", "failed", "RuntimeError: no kernel image"),
        ("absent", "failed", "ImportError: libpeer.so: cannot open"),
        ("other", "skipped", "has no linear-cross-entropy".replace("linear-cross-entropy", "info-nce")),
    ]
    assert rows[3].reason == "ValueError: no gradient reaches x"
    assert list(fit) == ["ours stored"]


def test_every_round_runs_everyone_once_in_another_order():
    names = list("abcdef")
    seen = list(orders(names, 20))
    assert all(sorted(order) == names for order in seen)
    assert len({tuple(order) for order in seen}) > 15
    assert list(orders(names, 20)) == seen, "the same on every run"
    # Nobody always follows the same one.
    followers = {name: {order[order.index(name) - 1] for order in seen if order.index(name)} for name in names}
    assert all(len(before) >= 3 for before in followers.values())


class Clock:
    """Time that passes only where a step says so."""

    def __init__(self, costs):
        self.now, self.log = 0.0, []
        self.steps: dict[str, Callable] = {name: partial(self.spend, name, cost) for name, cost in costs.items()}

    def spend(self, name, cost):
        self.now += cost
        self.log.append(name)

    def measure(self, step, calls, device):
        begin = self.now
        for _ in range(calls):
            step()
        return (self.now - begin) / calls

    def run(self, **options):
        return interleave(dict(self.steps), measure=self.measure, clock=lambda: self.now, **options)


def test_rounds_are_interleaved_and_end_with_the_budget():
    clock = Clock({"products": 1.0, "a": 2.0, "b": 3.0})
    # 6 s of warming up, 6 s a round.
    times = clock.run(rounds=100, seconds=40.0)
    assert {name: len(values) for name, values in times.items()} == {"products": 5, "a": 5, "b": 5}
    assert clock.now == 36.0
    for i in range(6):
        assert sorted(clock.log[3 * i : 3 * i + 3]) == ["a", "b", "products"]
    assert len(Clock({"a": 2.0}).run(rounds=2, seconds=1e9)["a"]) == 2
    assert len(Clock({"a": 2.0}).run(rounds=100, seconds=0)["a"]) == MIN_ROUNDS


def test_the_slow_leave_after_the_first_rounds_and_the_copy_stays():
    clock = Clock({"products": 1.0, "fine": SLOW * 0.99, "slow": SLOW * 1.01, COPY: 50.0})
    times = clock.run(rounds=6, seconds=1e9)
    assert {name: len(values) for name, values in times.items()} == {
        "products": 6, "fine": 6, "slow": MIN_ROUNDS, COPY: 6,
    }  # fmt: skip


def test_short_calls_are_repeated(monkeypatch):
    monkeypatch.setattr(timing, "SHORTEST", 0.02)
    clock = Clock({"short": 0.001, "long": 1.0})
    times = clock.run(rounds=1, seconds=0)
    assert (clock.log.count("short"), clock.log.count("long")) == (1 + 20, 1 + 1)
    assert times["short"] == pytest.approx([0.001])


def test_ratios_are_taken_within_rounds_over_the_fastest_products():
    # The machine is twice as slow in the second round; ratios do not notice.
    times = {"products": [2.0, 4.0, 2.0], "products in 4 chunks": [1.0, 2.0, 1.0], "a": [1.5, 3.0, 1.5]}
    assert ratios(times, "a") == [1.5, 1.5, 1.5]
    assert ratios(times, "products") == [2.0, 2.0, 2.0]


def test_spread():
    assert Spread.of([3.0]) == (3.0, 3.0, 3.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 100.0]) == (3.0, 2.0, 4.0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_limits_are_three_products_and_a_copy(dtype):
    case = Case("info-nce", 512, 640, 32, dtype)
    steps = limits(case, case.inputs())
    assert list(steps) == ["products", *(f"products in {n} chunks" for n in CHUNKS[1:]), COPY]
    for name, step in steps.items():
        with OperationCounter() as seen:
            step()
        assert sum(seen.flops.values()) == (0 if name == COPY else 3 * case.product)
        assert set(seen.flops) <= {dtype, "fp32"}, "fp32 on a CPU without instructions for bf16"
        assert seen.peak == 0, "memory is there already"
        if name == COPY:
            assert seen.traffic == 2 * timing.COPY_BYTES


def test_small_chunks_are_left_out():
    case = Case("info-nce", 100, 100, 8)
    assert list(limits(case, case.inputs())) == ["products", COPY]


def test_a_timed_row_is_written_whole():
    rows = run.time_case(CASE, chosen(["ours stored", "inf_cl"]), rounds=3, seconds=0, say=say)
    ours, theirs = rows[0], rows[1]
    record = ours.record()
    assert record["status"] == "ok"
    assert record["rounds"] == 3
    assert [float(s) for s in record["seconds"].split()] == pytest.approx(ours.seconds, rel=1e-5)
    assert float(record["seconds_median"]) == pytest.approx(median(ours.seconds), rel=1e-5)
    assert float(record["ratio_median"]) == pytest.approx(median(ours.ratios), rel=1e-3, abs=5e-4)
    assert (record["products"], record["precisions"], record["flops"]) == ("3", "3.00 fp32", 3 * CASE.product)
    assert theirs.status == "skipped"
    assert theirs.reason
    report = run.timing_report(rows, "python -m benchmarks time")
    assert f"- inf_cl: skipped: {theirs.reason}" in report
    assert "| ours stored |" in report
    assert "| *products* |" in report
    assert "    python -m benchmarks time\n" in report
    assert f"torch {version('torch')}" in report
