"""What does a loss cost beside its arithmetic? Forward and backward of a tiny one, against dense PyTorch.

At 4 x 4 x 16 the products take next to nothing: what is left is checking arguments, choosing an implementation, and the
autograd node. Every contender runs once in each round, in a new order; a ratio is that of one round. Calls are those of
Python functions, the same on every machine.
"""

from __future__ import annotations

import cProfile
import pstats
from dataclasses import dataclass
from functools import partial

from benchmarks import report, timing
from benchmarks.cases import LOSSES, Case
from benchmarks.check import step
from benchmarks.providers import dense, ours

SHAPE = (4, 4, 16)
TARGET = 4.0
"""The ratio to stay below."""
OURS, DENSE = "ours", "dense"


@dataclass(frozen=True)
class Cost:
    """Of one loss."""

    loss: str
    seconds: dict[str, timing.Spread]
    ratio: timing.Spread
    calls: dict[str, int]


def measure(loss: str, rounds: int = 31, seconds: float = 60.0) -> Cost:
    """Times and counts one loss, ours and dense.

    Args:
        loss: one of `LOSSES`.
        rounds: most rounds.
        seconds: no round begins that would end later.
    """
    case = Case(loss, *SHAPE)
    steps: dict[str, timing.Step] = {
        OURS: partial(step, ours.make("auto", case), case.inputs()),
        DENSE: partial(step, dense.dense(case), case.inputs()),
    }
    times = timing.interleave(steps, rounds=rounds, seconds=seconds)
    return Cost(
        loss,
        {name: timing.Spread.of(values) for name, values in times.items()},
        timing.Spread.of([mine / eager for mine, eager in zip(times[OURS], times[DENSE], strict=True)]),
        {name: count_calls(one) for name, one in steps.items()},
    )


def count_calls(one: timing.Step) -> int:
    """Python functions that a call of a step enters, itself included."""
    profile = cProfile.Profile(builtins=False)
    profile.runcall(one)
    return pstats.Stats(profile).total_calls  # type: ignore[attr-defined]


def describe(costs: list[Cost], command: str) -> str:
    """The table, as Markdown."""
    rows = [
        [
            cost.loss,
            *(f"{1e6 * cost.seconds[name].median:.0f}" for name in (OURS, DENSE)),
            f"{cost.ratio.median:.2f} ({cost.ratio.q1:.2f} to {cost.ratio.q3:.2f})",
            *(str(cost.calls[name]) for name in (OURS, DENSE)),
        ]
        for cost in costs
    ]
    shape = "x".join(map(str, SHAPE))
    header = "loss | ours, us | dense, us | ours / dense (quartiles) | calls, ours | calls, dense"
    return "\n".join(
        [
            f"# Host time of the losses: forward and backward at {shape} in fp32",
            "",
            f"{(__doc__ or '').partition(chr(10))[2].strip()} The aim is a ratio of at most {TARGET:.0f}.",
            "",
            report.table(header, rows),
            "",
            f"    {command}",
        ]
    )


def every(rounds: int, seconds: float) -> list[Cost]:
    """All losses."""
    return [measure(loss, rounds, seconds) for loss in LOSSES]
