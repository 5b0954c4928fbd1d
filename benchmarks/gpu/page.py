"""The results of a folder as one page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import report
from benchmarks.gpu.session import Result, Task
from benchmarks.timing import COPY, Spread


def page(tasks: Sequence[Task], results: dict[str, Result], setting: str, waiting: Sequence[str]) -> str:
    """Markdown: a table of tasks, then what each has found."""
    lines = ["# On a GPU", "", setting, ""]
    table = []
    for task in tasks:
        result = results.get(task.name)
        state = "not yet" if result is None else result.status + (f": {result.reason}" if result.reason else "")
        table.append([task.name, task.what, "-" if result is None else f"{result.seconds:.0f}", state])
    lines += [report.table("task | what | seconds | state", [[_cell(x) for x in row] for row in table]), ""]
    if waiting:
        lines += [f"Left for the next run, which resumes: {', '.join(waiting)}.", ""]
    for machine in dict.fromkeys(result.machine for result in results.values() if result.machine):
        lines += [f"{machine}.", ""]
    for task in tasks:
        result = results.get(task.name)
        if result is not None and result.status == "ok":
            lines += [f"## {task.name}", "", *_body(task.name, result.found), ""]
    return "\n".join(lines).rstrip() + "\n"


def _body(name: str, found: dict[str, Any]) -> list[str]:
    if name.startswith("loss-"):
        return _losses(found)
    if name == "tests":
        counts = ", ".join(f"{n} {what}" for what, n in found.items() if isinstance(n, int) and what != "finished")
        failed = [f"- `{test}`: {reason}" for test, reason in found["failures"].items()]
        return [counts + ("" if found["finished"] else "; stopped before the end"), *failed]
    if name == "tiles":
        return _tiles(found)
    return [f"- {key}: {_value(value)}" for key, value in found.items() if value is not None]


def _losses(found: dict[str, Any]) -> list[str]:
    """A table of those that were timed, fastest first, and the reasons of the others."""
    timed = sorted((row for row in found["rows"] if row["seconds"]), key=lambda row: Spread.of(row["seconds"]).median)
    table, absent = [], []
    for row in timed:
        spread = Spread.of(row["seconds"])
        name = f"*{row['provider']}*" if row["status"] == "limit" else row["provider"]
        error = "-" if row["errors"] is None else f"{max(row['errors'].values()):.1e}"
        ratio = "-" if row["ratio"] is None or row["provider"] == COPY else f"{row['ratio']:.2f}"
        rate = "-" if row["products_flops"] is None else f"{row['products_flops'] / 1e12:.1f}"
        sizes = [report.size(row[key]) for key in ("peak_bytes", "planned_bytes")]
        time = f"{report.seconds(spread.median)} ({report.seconds(spread.q1)} to {report.seconds(spread.q3)})"
        table.append([name, time, ratio, rate, *sizes, error])
    for row in found["rows"]:
        if not row["seconds"]:
            absent.append(f"- {row['provider']}: {row['status']}: {row['reason']}")
    header = "provider | forward and backward | x products | TFLOP/s of 3 G | memory | planned | error"
    auto = f"`auto` is {found['chosen by auto']}"
    return [report.table(header, table), "", auto, *([""] if absent else []), *absent]


def _tiles(found: dict[str, Any]) -> list[str]:
    rows = []
    for entry in found.values():
        sizes = "x".join(map(str, entry["key"]["sizes"]))
        rows += [[entry["key"]["kernel"], sizes, _configuration(t), f"{t['seconds']:.3g}"] for t in entry["timings"]]
    return [report.table("kernel | sizes up to | tiles | seconds", rows)]


def _configuration(timing: dict[str, Any]) -> str:
    tiles = ", ".join(f"{name} {value}" for name, value in timing["constexprs"].items())
    return f"{tiles}, {timing['num_warps']} warps, {timing['num_stages']} stages"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    if isinstance(value, dict):
        return "; ".join(f"{key} {_value(inner)}" for key, inner in value.items())
    return str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
