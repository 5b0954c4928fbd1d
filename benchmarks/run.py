"""Runs the questions over cases and providers, and says what was found: rows for a CSV, Markdown for people."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks import machine, peak, report
from benchmarks.binaries import TARGET, Binary
from benchmarks.cases import Case
from benchmarks.check import Errors, Loss, Truth, errors, first_line, free, refusal, step, truth
from benchmarks.counting import Counts, count, count_kernels
from benchmarks.providers import Provider
from benchmarks.timing import COPY, COPY_BYTES, MIN_ROUNDS, SLOW, Spread, Step, interleave, limits, ratios

Say = Callable[[str], None]

# What no --shape asks for: the shapes of the committed table, and smaller ones that show how costs grow.
SUITE = (
    *(("info-nce", f"{n}x{n}x1024") for n in (512, 2048, 8192)),
    ("info-nce", "4096x4096x4096"),
    ("linear-cross-entropy", "2048x49152x576"),
    ("info-nce-cosine", "2048x2048x1024"),
    ("info-nce-symmetric", "2048x2048x1024"),
)


@dataclass
class Row:
    """What was found about one provider in one case."""

    case: Case
    provider: str
    version: str = ""
    status: str = "ok"  # or skipped, refused, inexact, failed, limit
    reason: str = ""
    errors: Errors | None = None
    counts: Counts | None = None
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    memory: int | None = None
    binaries: list[Binary] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """One line of a CSV."""
        case, counts = self.case, self.counts
        record: dict[str, Any] = {
            "loss": case.loss, "n": case.n, "m": case.m, "d": case.d, "dtype": case.dtype, "device": case.device,
            "provider": self.provider, "version": self.version, "status": self.status, "reason": self.reason,
        }  # fmt: skip
        if self.errors is not None:
            record |= {f"error_{name}": f"{error:.3g}" for name, error in self.errors._asdict().items()}
        if counts is not None:
            record |= {
                "products": f"{counts.total:.6g}",
                "precisions": precisions(counts),
                "flops": counts.flops(case),
                **{key: value for key, value in counts._asdict().items() if key != "products"},
            }
        if self.seconds:
            spread, ratio = Spread.of(self.seconds), Spread.of(self.ratios) if self.ratios else None
            record |= {
                "rounds": len(self.seconds),
                **{f"seconds_{name}": f"{value:.6g}" for name, value in spread._asdict().items()},
                **({f"ratio_{k}": f"{v:.4f}" for k, v in ratio._asdict().items()} if ratio else {}),
                "seconds": " ".join(f"{value:.6g}" for value in self.seconds),
            }
        if self.memory is not None:
            record["memory"] = self.memory
        return record


def precisions(counts: Counts) -> str:
    return " + ".join(f"{number:.2f} {name}" for name, number in counts.products.items())


def examine(
    case: Case, providers: Iterable[Provider], *, counting: bool, say: Say
) -> tuple[list[Row], dict[str, Loss]]:
    """Checks and counts each provider: a row for each, and the losses that may be timed.

    With `counting` a wrong result is counted all the same; without, it is refused.
    """
    torch._dynamo.reset()  # of earlier shapes, which would make Inductor compile for any size
    inputs = case.inputs()
    say(f"{case}: fp64")
    right: Truth = truth(case, inputs)
    rows: list[Row] = []
    fit: dict[str, Loss] = {}
    for provider in providers:
        rows.append(row := Row(case, provider.name, provider.version))
        if reason := provider.reason(case, counting=counting):
            row.status, row.reason = "skipped", reason
            continue
        say(f"{case}: checking {provider.name}")
        try:
            if provider.triton and counting:
                row.counts, result, row.binaries = count_kernels(case, provider, inputs)
            else:
                loss = provider.make(case)
                if provider.triton:  # on a GPU, where its kernels are out of the counters' sight
                    result = step(loss, inputs)
                else:
                    row.counts, result = count(case, loss, inputs, compiled=provider.compiled)
                fit[provider.name] = loss
            row.errors = errors(result, right.exact)
        except Exception as error:  # a peer may raise anything: a finding of its row, which stops nobody else
            row.status, row.reason = "failed", first_line(error)
        else:
            if reason := refusal(case, row.errors, right.eager):
                row.reason = reason
                row.status = "inexact" if counting else "refused"
        if row.status != "ok":
            fit.pop(provider.name, None)
        free(inputs)
    return rows, fit


def time_case(case: Case, providers: list[Provider], *, rounds: int, seconds: float, say: Say) -> list[Row]:
    """Rows of the providers, then of the limits."""
    rows, fit = examine(case, providers, counting=False, say=say)
    if not fit:
        return rows
    inputs = case.inputs()
    found = {row.provider: row for row in rows}
    steps: dict[str, Step] = {name: partial(step, loss, inputs) for name, loss in fit.items()}
    bare = limits(case, inputs)
    gc.collect()
    say(f"{case}: warming up")
    times = interleave(
        steps | bare,
        rounds=rounds,
        seconds=seconds,
        device=case.device,
        progress=lambda done: say(f"{case}: round {done} of {rounds}"),
    )
    for name in bare:
        rows.append(found.setdefault(name, Row(case, name, status="limit")))
    for name, values in times.items():
        found[name].seconds = values
        if name != COPY:
            found[name].ratios = ratios(times, name)
    return rows


def count_case(case: Case, providers: list[Provider], say: Say) -> list[Row]:
    return examine(case, providers, counting=True, say=say)[0]


def memory_case(case: Case, providers: list[Provider], say: Say) -> list[Row]:
    rows = []
    for provider in providers:
        rows.append(row := Row(case, provider.name, provider.version))
        if reason := provider.reason(case):
            row.status, row.reason = "skipped", reason
            continue
        say(f"{case}: memory of {provider.name}")
        try:
            row.memory = peak.measure(case, provider.name)
        except RuntimeError as error:
            row.status, row.reason = "failed", str(error)
    return rows


def by_case(rows: list[Row]) -> dict[Case, list[Row]]:
    cases: dict[Case, list[Row]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    return cases


def _head(title: str, command: str, device: str, text: str) -> list[str]:
    return [f"# {title}", "", f"    {command}", "", f"{machine.line(device)}.", "", text, ""]


def _absent(rows: list[Row]) -> list[str]:
    """Who is not in the table, and why; those that have no such loss go without saying."""
    absent = [row for row in rows if row.reason and not row.reason.startswith("has no ")]
    return ["", *(f"- {row.provider}: {row.status}: {row.reason}" for row in absent)] if absent else []


def timing_report(rows: list[Row], command: str) -> str:
    device = rows[0].case.device
    lines = _head(
        "Forward and backward: time",
        command,
        device,
        "Median and quartiles over interleaved rounds. *Ratio* is the time over that of the fastest bare products "
        "(x w', z w, z' x) in the same round. Products in units of one N x M x D product, by operand precision; "
        "traffic and workspace as counted from operations (`-`: hidden in compiled code). *Error* is the largest "
        "relative error of loss, dx and dw against fp64. Only what was just found correct is timed.",
    )
    for case, group in by_case(rows).items():
        lines += [f"## {case}", ""]
        timed = sorted((row for row in group if row.seconds), key=lambda row: Spread.of(row.seconds).median)
        body = []
        for row in timed:
            time, counts = Spread.of(row.seconds), row.counts
            ratio = Spread.of(row.ratios) if row.ratios else None
            if row.provider == COPY:
                rate = 2 * COPY_BYTES / time.median / 1e9
            else:
                rate = (3 * case.product if counts is None else counts.flops(case)) / time.median / 1e9
            body.append(
                [
                    f"*{row.provider}*" if row.status == "limit" else row.provider,
                    seconds_spread(time),
                    "-" if ratio is None else f"{ratio.median:.2f} ({ratio.q1:.2f} to {ratio.q3:.2f})",
                    f"{rate:.0f} {'GB/s' if row.provider == COPY else 'GFLOP/s'}",
                    "-" if counts is None else precisions(counts),
                    "-" if counts is None else report.size(counts.traffic),
                    "-" if counts is None else report.size(counts.workspace),
                    "-" if row.errors is None else f"{max(row.errors):.1e}",
                ]
            )
        header = "provider | time | ratio | rate | products | traffic | workspace | error"
        rounds = max((len(row.seconds) for row in timed), default=0)
        note = f"{rounds} rounds; {MIN_ROUNDS} for who takes over {SLOW} times the bare products."
        lines += [report.table(header, body), "", note, *_absent(group), ""]
    return "\n".join(lines)


def seconds_spread(spread: Spread) -> str:
    return f"{report.seconds(spread.median)} ({report.seconds(spread.q1)} to {report.seconds(spread.q3)})"


def count_report(rows: list[Row], command: str) -> str:
    lines = _head(
        "Forward and backward: counted costs",
        command,
        "cpu",
        "Exact figures, the same on every machine; Triton kernels run in the interpreter, on one thread, so a lock is "
        "never waited for and its count is the least possible. Products in units of one N x M x D product, tiles' "
        "padding included. Atomics are elements updated atomically, locks the atomic operations on them. *Error* is "
        "the largest relative error of loss, dx and dw against fp64. Spilled bytes are stored plus loaded, a thread.",
    )
    for case, group in by_case(rows).items():
        body = [
            [
                row.provider,
                row.version,
                f"{row.counts.total:.2f}",
                precisions(row.counts),
                f"{row.counts.launches:,}",
                f"{row.counts.atomics:,}",
                f"{row.counts.locks:,}",
                report.size(row.counts.traffic),
                report.size(row.counts.workspace),
                "-" if row.errors is None else f"{max(row.errors):.1e}",
            ]
            for row in group
            if row.counts is not None
        ]
        header = (
            "provider | version | products | by precision | launches | atomics | locks | traffic | workspace | error"
        )
        lines += [f"## {case}", "", report.table(header, body), *_absent(group), ""]
        binaries = [
            [row.provider, b.kernel, b.configuration, f"{b.registers}", f"{b.spills}", report.size(b.shared), cores(b)]
            for row in group
            for b in row.binaries
        ]
        if binaries:
            header = "provider | kernel | as launched | registers | spilled bytes | shared | tensor-core instructions"
            lines += [
                f"Compiled for {TARGET} by Triton {machine.version('triton')}:",
                "",
                report.table(header, binaries),
                "",
            ]
    return "\n".join(lines)


def cores(binary: Binary) -> str:
    return binary.problem or binary.tensor_cores


def binary_records(rows: list[Row]) -> list[dict[str, Any]]:
    """Lines of a CSV."""
    return [
        {"loss": row.case.loss, "shape": row.case.shape, "dtype": row.case.dtype, "provider": row.provider,
         "target": TARGET, **binary._asdict()}
        for row in rows
        for binary in row.binaries
    ]  # fmt: skip


def memory_report(rows: list[Row], command: str) -> str:
    device = rows[0].case.device
    lines = _head(
        "Forward and backward: peak memory",
        command,
        device,
        "The most that is held beside inputs and gradients: "
        + ("torch's allocator." if device == "cuda" else "resident set of a process of its own, second call."),
    )
    for case, group in by_case(rows).items():
        scores = case.n * case.m * 4
        body = [
            [row.provider, report.size(row.memory), f"{row.memory / scores:.2f}"]
            for row in sorted(group, key=lambda row: row.memory or 0)
            if row.memory is not None
        ]
        lines += [f"## {case}", "", report.table("provider | peak | in fp32 score matrices", body)]
        lines += [*_absent(group), ""]
    return "\n".join(lines)


def plots(rows: list[Row], what: str) -> dict[str, bytes]:
    """A PNG a loss that has several shapes: seconds over FLOPs, or bytes over scores; a panel a dtype."""
    images = {}
    for loss in dict.fromkeys(row.case.loss for row in rows):
        panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for row in rows:
            case = row.case
            if case.loss != loss or row.provider == COPY or not (row.seconds if what == "time" else row.memory):
                continue
            point = (
                (3 * case.product, Spread.of(row.seconds).median)
                if what == "time"
                else (case.n * case.m * 4, float(row.memory or 0))
            )
            panels.setdefault(case.dtype, {}).setdefault(row.provider, []).append(point)
        if panels:
            x, y = ("FLOP of three products", "seconds") if what == "time" else ("bytes of fp32 scores", "peak bytes")
            limit = tuple(row.provider for row in rows if row.status == "limit")
            images[f"{loss}.png"] = report.log_log(f"{loss}: {what} of forward and backward", panels, x, y, limit)
    return images
