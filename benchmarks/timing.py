"""How fast? Every contender runs once in each round, in a new order, beside bare matrix products and a memory copy.

The limits are measured in the same rounds: the three products of forward and backward with nothing around them, whole
and in chunks of rows, into memory that is already there, and a copy of 256 MiB. A ratio is a contender's time over that
of the fastest bare products in the same round, so that what slows the machine for a while slows both.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator
from statistics import median, quantiles
from typing import NamedTuple

import torch

from benchmarks.cases import Case, Inputs
from cosup_fast.kernels.softmax_xent.chunk_torch import operand_dtype

Step = Callable[[], object]

PRODUCTS = "products"
COPY = "memory copy"
COPY_BYTES = 256 * 2**20
CHUNKS = (1, 4, 16)
SHORTEST = 0.02  # seconds: shorter calls are repeated within one measurement
MIN_ROUNDS = 3
SLOW = 4  # times the bare products: who takes longer is in the first MIN_ROUNDS only


class Spread(NamedTuple):
    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        q1, _, q3 = quantiles(values, n=4, method="inclusive")
        return cls(median(values), q1, q3)


def bare_products(case: Case, inputs: Inputs, chunks: int) -> Step:
    """z = x w', dx = z w, dw = z' x with nothing in between; dw adds up over chunks of rows.

    Half-precision operands of a CPU that has no instructions for them are fp32 copies made beforehand.
    """
    dtype = operand_dtype(inputs.x.dtype, inputs.x.device, case.n * case.m * case.d)
    x, w = inputs.x.detach().to(dtype), inputs.w.detach().to(dtype)
    rows = -(-case.n // chunks)
    z, dx, dw = x.new_empty(rows, case.m), torch.empty_like(x), torch.empty_like(w)

    def step() -> None:
        for i in range(0, case.n, rows):
            part = x[i : i + rows]
            scores = z[: len(part)]
            torch.mm(part, w.t(), out=scores)
            torch.mm(scores, w, out=dx[i : i + rows])
            torch.addmm(dw, scores.t(), part, beta=0 if i == 0 else 1, out=dw)

    return step


def limits(case: Case, inputs: Inputs) -> dict[str, Step]:
    """What no implementation can be faster than."""
    steps: dict[str, Step] = {}
    for chunks in CHUNKS:
        if chunks == 1 or case.n >= 32 * chunks:
            steps[PRODUCTS if chunks == 1 else f"{PRODUCTS} in {chunks} chunks"] = bare_products(case, inputs, chunks)
    source = torch.empty(COPY_BYTES // 4, device=case.device)
    target = torch.empty_like(source.fill_(1))
    steps[COPY] = lambda: target.copy_(source)
    return steps


def orders(names: list[str], rounds: int) -> Iterator[list[str]]:
    """Each round's order: everyone once, after another one than last time."""
    shuffle = random.Random(0)
    for _ in range(rounds):
        order = list(names)
        shuffle.shuffle(order)
        yield order


def seconds_of(step: Step, calls: int, device: str) -> float:
    """Seconds a call takes, the mean over `calls` in a row."""
    gc.disable()
    try:
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            for _ in range(calls):
                step()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1000 / calls
        begin = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - begin) / calls
    finally:
        gc.enable()


def interleave(
    steps: dict[str, Step],
    *,
    rounds: int,
    seconds: float,
    device: str = "cpu",
    measure: Callable[[Step, int, str], float] = seconds_of,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, list[float]]:
    """Seconds by round of each step.

    After MIN_ROUNDS those that are SLOW take no part, and no round begins that would end later than `seconds` from now.
    """
    begin = clock()
    gc.collect()
    gc.freeze()  # what is there already is not looked through between rounds
    try:
        # The first call warms up and says how often to repeat.
        calls = {
            name: max(1, math.ceil(SHORTEST / max(measure(step, 1, device), 1e-7))) for name, step in steps.items()
        }
        times: dict[str, list[float]] = {name: [] for name in steps}
        for done, order in enumerate(orders(list(steps), rounds)):
            if done >= MIN_ROUNDS:
                typical = {name: median(values) for name, values in times.items()}
                slow = SLOW * min((t for name, t in typical.items() if name.startswith(PRODUCTS)), default=math.inf)
                order = [name for name in order if typical[name] <= slow or name == COPY]
                if clock() - begin + sum(calls[name] * typical[name] for name in order) > seconds:
                    break
            gc.collect()
            for name in order:
                times[name].append(measure(steps[name], calls[name], device))
            progress(done + 1)
    finally:
        gc.unfreeze()
    return times


def fastest_products(times: dict[str, list[float]]) -> str:
    return min((name for name in times if name.startswith(PRODUCTS)), key=lambda name: median(times[name]))


def ratios(times: dict[str, list[float]], name: str) -> list[float]:
    """Of each round, over the fastest bare products."""
    return [mine / bare for mine, bare in zip(times[name], times[fastest_products(times)])]
