"""What a run tells while it runs: metrics as JSONL, a progress bar or lines, plots."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cosup_fast.data.records import DataError, parse_object
from cosup_fast.files import check_regular, checked, checked_line, naming, replace_file
from cosup_fast.terminal import FigureTable
from cosup_fast.training.callbacks import Callback
from cosup_fast.training.diagnostics import Diagnosis
from cosup_fast.training.metrics import COUNTS, FIGURES, READ, HeldOut, Metrics, StepMetrics, as_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cosup_fast.config import RunConfig


LINES_EVERY = 60.0
"""Seconds, or ten steps, between the lines about steps where there is no terminal."""


class RunLog(Callback):
    """Metrics to JSONL, a progress bar or, where there is no terminal, lines, and a plot at the end."""

    def __init__(self, output: Path, console: Console):
        self.output = output
        self.console = console
        self.path = output / "metrics.jsonl"
        self.last: StepMetrics | None = None
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
        )

    def start(self, config: RunConfig, step: int, total: int) -> None:
        """Opens the files; records after `step`, of a part that is run again, are dropped."""
        for name in ("warnings.log", "curves.png"):  # before the work rather than after it
            check_regular(self.output / name)
        kept = records_until(step, self.path)
        with replace_file(self.path) as file:
            file.writelines(checked_line(record).decode() for record in kept)
        self.file: TextIO = self.path.open("a", buffering=1, encoding="utf-8")
        self._first, self._total, self._begun = step, total, time.monotonic()
        minutes = config.training.max_minutes
        self._deadline = math.inf if minutes is None else self._begun + 60 * minutes
        self._told_step, self._told_at = -math.inf, -math.inf
        self.task = self.progress.add_task("training", total=total, completed=step, status="")
        self.progress.start()

    def end(self, error: BaseException | None) -> None:
        self.progress.stop()
        with naming(self.path):
            self.file.close()
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():  # never hide the first error
            plot_curves(read_metrics(self.path), self.output / "curves.png")

    def metrics(self, metrics: Metrics) -> None:
        """Records a step, a diagnosis, an evaluation, or what else happened to the run."""
        with naming(self.path):
            self.file.write(checked_line(as_record(metrics)).decode())
        if isinstance(metrics, StepMetrics):
            self.last = metrics
            self._step(metrics)
        elif isinstance(metrics, Diagnosis):
            self.console.print(diagnosis_table(metrics, self.last))
        elif isinstance(metrics, HeldOut):
            recalls = {1: metrics.recall_at_1, 5: metrics.recall_at_5, 20: metrics.recall_at_20}
            figures = _told(
                ("NTP", metrics.ntp, ".3f"),
                ("NSP", metrics.nsp, ".3f"),
                *((f"R@{k}", value, ".1%") for k, value in recalls.items()),
            )
            self.console.print(f"held out after step {metrics.step}: {figures}")

    def _step(self, metrics: StepMetrics) -> None:
        now = time.monotonic()
        status = _told(
            ("NTP", metrics.ntp, ".3f"),
            ("NSP", metrics.nsp, ".3f"),
            ("in-batch", metrics.in_batch_accuracy, ".0%"),
            ("lr", metrics.lr, ".2e"),
            ("MFU", metrics.mfu, ".1%"),
        )
        if (left := self.seconds_left(metrics.step, now)) is not None:
            status += f"  {timedelta(seconds=round(left))} left"
        self.progress.update(self.task, completed=metrics.step, status=status)
        if self.console.is_terminal:
            return
        if metrics.step >= self._told_step + 10 or now >= self._told_at + LINES_EVERY or metrics.step == self._total:
            self._told_step, self._told_at = metrics.step, now
            self.console.print(
                f"step {metrics.step} of {self._total}  {status}  {metrics.tokens_per_second:.0f} tokens/s"
            )

    def seconds_left(self, step: int, now: float) -> float | None:
        """Seconds until the last step, or until `max_minutes`, at the pace of this part of the run."""
        if step <= self._first:
            return None
        pace = (now - self._begun) / (step - self._first)
        return max(0.0, min(pace * (self._total - step), self._deadline - now))

    def warning(self, message: str) -> None:
        """Shows a warning of the failure monitor and keeps it with the metrics."""
        self.console.print(f"[yellow]warning:[/] {escape(message)}", highlight=False)
        with (self.output / "warnings.log").open("a", encoding="utf-8") as file:
            file.write(message + "\n")


def _told(*figures: tuple[str, float | None, str]) -> str:
    """Those figures that there are, each after its name."""
    return "  ".join(f"{name} {value:{form}}" for name, value, form in figures if value is not None)


def diagnosis_table(found: Diagnosis, last: StepMetrics | None) -> FigureTable:
    """What the losses do to Gen and to the space of sequences, with the speed and memory of the step before."""

    def figure(value: float | None, form: str = ".3g") -> str:
        return "-" if value is None else format(value, form)

    columns = {
        "before step": str(found.step),
        "gradient of Gen: NTP": figure(found.ntp_grad_norm),
        "lambda NSP": figure(found.nsp_grad_norm),
        "cosine": figure(found.grad_cosine, "+.3f"),
        "alignment": figure(found.alignment),
        "uniformity: queries": figure(found.query_uniformity),
        "passages": figure(found.passage_uniformity),
    }
    if last is not None:
        columns |= {
            "in-batch rank": figure(last.in_batch_rank),
            "useful tokens": figure(last.useful_tokens, ".0%"),
            "tokens/s": figure(last.tokens_per_second, ".0f"),
            "peak GiB": figure(last.peak_memory_gib, ".2f"),
        }
    table = FigureTable(*columns)
    table.add_row(*columns.values())
    return table


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, without their checksums; a last line that was cut off by a kill is left out.

    Raises:
        DataError: a line is not a record, or was changed; it is named.
    """
    if not path.is_file():
        return []
    return [_record(f"{path}:{number}", line) for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1)]


def _record(where: str, line: bytes) -> dict[str, Any]:
    record = parse_object(where, line)
    try:
        record = checked(where, line, record)
    except ValueError as error:
        raise DataError(f"{error}: remove the line") from None
    kind, step = record.get("kind"), record.get("step")
    wrong = [name for name, right in (("kind", isinstance(kind, str)), ("step", type(step) is int)) if not right]
    if not wrong:
        kind = str(kind)
        wrong = [name for name in READ.get(kind, ()) if name not in record]
        wrong += [name for name in COUNTS.get(kind, ()) if type(record.get(name)) is not int]
        wrong += [name for name in FIGURES.get(kind, ()) if not isinstance(record.get(name), int | float | None)]
    if wrong:
        found = record.get(wrong[0])
        raise DataError(f"{where}: {wrong[0]}: expected what a run writes there, found {found!r:.60}: remove the line")
    return record


def records_until(step: int, path: Path) -> list[dict[str, Any]]:
    """Those up to a step."""
    return [record for record in read_metrics(path) if record["step"] <= step] if step else []


def plot_curves(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws losses and retrieval accuracy over the steps."""
    from matplotlib.figure import Figure

    def curve(axes: Axes, kind: str, name: str, *style: str, **options: Any) -> None:
        """Draws one figure over the steps; what a run does not compute has no curve."""
        points = [(r["step"], r[name]) for r in records if r["kind"] == kind and r.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), *style, **options)

    figure = Figure(figsize=(11, 4), layout="constrained")
    losses, retrieval = figure.subplots(1, 2)
    for name, color in (("ntp", "tab:blue"), ("nsp", "tab:orange")):
        curve(losses, "step", name, color=color, alpha=0.5, label=name.upper())
        curve(losses, "held-out", name, "o-", color=color, label=f"{name.upper()} held out")
    losses.set(xlabel="step", ylabel="loss (nats)", title="losses")
    curve(retrieval, "step", "in_batch_accuracy", color="tab:gray", alpha=0.5, label="in batch")
    for k in (1, 5, 20):
        curve(retrieval, "held-out", f"recall_at_{k}", "o-", label=f"R@{k} held out")
    retrieval.set(xlabel="step", ylabel="share of queries", ylim=(0, 1), title="retrieval")
    for axes in (losses, retrieval):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    with replace_file(path, binary=True) as file:
        figure.savefig(file, dpi=120, format="png")
