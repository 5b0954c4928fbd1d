"""What does the training step gain, and what do negatives without limit cost?

    step    the recipe (`recipe.py`), each optimisation alone, all of them, and the library's step, on the same batches
    cache   one NSP batch that is many times larger, in the memory of one of its micro-batches, against plain
            accumulation, whose negatives come from each micro-batch alone

Before anything is timed its losses are compared. Time: every contender once a round, in a new order, on that round's
batch of real examples. Memory: the most that a step adds to the resident set beside weights and gradients, in a process
of its own. Products: FLOPs of every matrix product, attention included, counted as torch runs them.
"""

from __future__ import annotations

import gc
import inspect
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.utils import flop_counter

from benchmarks import memory, report
from benchmarks.counting import OperationCounter
from benchmarks.material import Material
from benchmarks.recipe import OURS, VARIANTS, step
from benchmarks.timing import Spread, orders
from cosup_fast.data.packing import CoSupervisionBatch, PackLimits, make_batch
from cosup_fast.data.records import Example, Passage
from cosup_fast.data.sampling import StepSampler
from cosup_fast.losses import CoSupervisionOutput
from cosup_fast.model import CoSupervisionModel
from cosup_fast.training.step import accumulate_gradients

Say = Callable[[str], None]
TOLERANCE = 1e-5  # of losses, in fp32
CACHED, PLAIN, ONE = "one batch", "plain accumulation", "one micro-batch"
STEP, CACHE = [*VARIANTS, OURS], [CACHED, PLAIN, ONE]

# Attention on a CPU, which torch's own registry leaves out; whole squares, as it counts attention elsewhere.
_CPU_ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": flop_counter.sdpa_flop_count,
    "_scaled_dot_product_flash_attention_for_cpu_backward": flop_counter.sdpa_backward_flop_count,
}
MEASURES = ("memory", "products", "time")


class Setting(Material):
    """Of what, and how large a step is."""

    batch_size: int = Field(default=8, ge=1, description="examples of a step, or with --cache of a micro-batch")
    factor: int = Field(default=16, ge=2, description="micro-batches in the one batch of --cache")

    def bench(self) -> Bench:
        return Bench(self, *self.load())


@dataclass
class Bench:
    setting: Setting
    model: CoSupervisionModel
    corpus: dict[str, Passage]
    examples: list[Example]

    def chosen(self, number: int, size: int) -> list[Example]:
        """A batch of real examples as a plain shuffle gives it."""
        sampler = StepSampler([1] * len(self.examples), size, 0, balanced=False)
        return [self.examples[i] for i in sampler[number]]

    def batch(self, examples: list[Example], limits: PackLimits | None = None) -> CoSupervisionBatch:
        return make_batch(examples, self.corpus, self.model.template, limits)

    def contender(self, name: str, number: int, size: int | None = None) -> Callable[[], CoSupervisionOutput]:
        """One forward and backward on the batch of a round; another size may be asked for."""
        size = size or self.setting.batch_size
        if name not in (CACHED, PLAIN, ONE):
            return step(name, self.model, self.batch(self.chosen(number, size)))
        if name == ONE:
            return step(OURS, self.model, self.batch(self.chosen(number, size)))
        examples = self.chosen(number, size * self.setting.factor)
        if name == CACHED:
            batch = self.batch(examples, PackLimits(sequences=size))
            return lambda: accumulate_gradients(self.model, batch)
        parts = [self.batch(examples[i : i + size]) for i in range(0, len(examples), size)]
        ntp, nsp = (sum(getattr(part, count) for part in parts) for count in ("ntp_count", "nsp_count"))

        def accumulate() -> CoSupervisionOutput:
            losses = [step_of(part) for part in parts]
            return CoSupervisionOutput(*(sum(x) for x in list(zip(*losses, strict=True))[:3]), None)  # pyright: ignore

        def step_of(part: CoSupervisionBatch) -> CoSupervisionOutput:
            return accumulate_gradients(self.model, part, ntp_count=ntp, nsp_count=nsp)

        return accumulate

    def count(self, run: Callable[[], Any]) -> int:
        """FLOPs of the matrix products of one call."""
        formulas = {getattr(torch.ops.aten, name): _formula(count) for name, count in _CPU_ATTENTION.items()}
        flop_counter.flop_registry.update(formulas)
        try:
            with OperationCounter() as seen:
                run()
        finally:
            for op in formulas:
                del flop_counter.flop_registry[op]
        return seen.flops.total()


def _formula(count: Callable[..., int]) -> Callable[..., int]:
    """Of an operation whose first operands decide."""
    operands = len(inspect.signature(count).parameters)
    return lambda *args, out_val=None, **options: count(*(x.shape for x in args[:operands]))


@dataclass
class Row:
    """What was found of one contender."""

    name: str
    error: float = 0.0
    seconds: list[float] = field(default_factory=list)
    examples: int = 0
    memory: int | None = None
    flops: int | None = None


def measure(
    setting: Setting, names: list[str], rounds: int, what: Sequence[str] = MEASURES, *, say: Say = print
) -> list[Row]:
    """Losses are compared first; products and times are of this process, memory is that of others.

    Raises:
        ValueError: a contender's loss is not that of the first by more than 1e-5.
    """
    rows = {name: Row(name) for name in names}
    if "memory" in what:
        for name, row in rows.items():
            say(f"memory of {name}")
            row.memory = peak_of(setting, name)
    bench = setting.bench()
    expected: Tensor | None = None
    for name, row in rows.items():
        row.examples = setting.batch_size * (setting.factor if name in (CACHED, PLAIN) else 1)
        if name in CACHE and "products" not in what:  # batches of their own, so nothing to compare
            continue
        say(f"losses of {name}")
        found: list[CoSupervisionOutput] = []
        run = bench.contender(name, rounds, None if "products" in what else min(2, setting.batch_size))
        if "products" in what:
            row.flops = bench.count(lambda run=run, found=found: found.append(run()))
        else:
            found.append(run())
        losses = torch.stack([found[0].ntp, found[0].nsp]).double()
        expected = losses if expected is None else expected
        if name not in CACHE:
            row.error = float(((losses - expected) / expected).abs().max())
            if row.error > TOLERANCE:
                raise ValueError(f"{name} has losses {losses.tolist()}, {names[0]} {expected.tolist()}")
    for number, order in enumerate(orders(names, rounds if "time" in what else 0)):
        for name in order:
            say(f"round {number + 1} of {rounds}: {name}")
            run = bench.contender(name, number)
            gc.collect()
            begin = time.perf_counter()
            run()
            rows[name].seconds.append(time.perf_counter() - begin)
    return list(rows.values())


def peak_of(setting: Setting, name: str, timeout: float = 1800) -> int:
    """Bytes that a step adds beside weights and gradients, from a process of its own."""
    return int(memory.alone("benchmarks.train_step", setting.model_dump_json(), name, timeout=timeout))


def peak_here(setting: Setting, name: str) -> int:
    """The same in this process, which should do nothing else."""
    bench = setting.bench()
    bench.contender(name, 0)()  # gradients are there from now on, and what a first call sets up
    return memory.added(bench.contender(name, 1))


def step_report(rows: list[Row], setting: Setting, command: str) -> str:
    """Markdown: each variant against the first, and its products and memory as shares of the first one's."""
    first = rows[0]
    lines = [
        [
            row.name,
            f"{row.examples / median(row.seconds):.3g}" if row.seconds else "-",
            _ratio([a / b for a, b in zip(first.seconds, row.seconds)]),
            report.size(row.memory),
            _share(row.memory, first.memory),
            f"{row.flops / 1e12:.3f}" if row.flops else "-",
            _share(row.flops, first.flops),
            f"{row.error:.1e}",
        ]
        for row in rows
    ]
    against = f"x {first.name} (quartiles)"
    header = f"variant | examples/s | {against} | activations | share | TFLOP of products | share | loss error"
    return report.page("The training step", setting, command, report.table(header, lines))


def cache_report(rows: list[Row], setting: Setting, command: str) -> str:
    """Markdown: one large batch against plain accumulation, and the memory of one of its micro-batches."""
    by_name = {row.name: row for row in rows}
    plain, one = by_name[PLAIN], by_name[ONE]
    lines = [
        [
            row.name,
            str(row.examples),
            f"{1e3 * median(row.seconds) / row.examples:.0f}" if row.seconds else "-",
            _ratio([a / row.examples * plain.examples / b for a, b in zip(row.seconds, plain.seconds)]),
            report.size(row.memory),
            _share(row.memory, one.memory),
            f"{row.flops / row.examples / 1e9:.1f}" if row.flops else "-",
            _share(row.flops and row.flops * plain.examples, plain.flops and plain.flops * row.examples),
        ]
        for row in rows
    ]
    header = "step | examples | ms/example | x plain (quartiles) | activations | x one | GFLOP/example | x plain"
    return report.page("Negatives of a whole step", setting, command, report.table(header, lines))


def _share(value: int | None, whole: int | None) -> str:
    return f"{value / whole:.3f}" if value and whole else "-"


def _ratio(values: list[float]) -> str:
    if not values:
        return "-"
    spread = Spread.of(values)
    return f"{spread.median:.2f} ({spread.q1:.2f} to {spread.q3:.2f})"


def records(rows: list[Row]) -> list[dict[str, Any]]:
    """Lines of a CSV: one a contender, seconds by round."""
    return [
        {"name": row.name, "examples": row.examples, "loss_error": row.error, "activation_bytes": row.memory,
         "flops": row.flops, **{f"seconds_{i}": x for i, x in enumerate(row.seconds)}}
        for row in rows
    ]  # fmt: skip


if __name__ == "__main__":
    print(peak_here(Setting.model_validate_json(sys.argv[1]), sys.argv[2]))
