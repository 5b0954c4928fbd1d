"""Tables and plots, in a folder that is there whole or not at all."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from benchmarks import machine
from cosup_fast.files import FolderKind, check_replaceable, replace_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent / "results"
REPORT = FolderKind("a report", "README.md", files=("*.csv", "*.png"))
"""Anything else in a folder, such as code, is not replaced by one."""


def writable(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that is there, or is not a report's, before anything is measured for it."""
    if folder.exists() and not overwrite:
        raise ValueError(f"output {folder} exists; pass --overwrite to replace it, or another --output")
    check_replaceable(folder, REPORT)


def write(folder: Path, files: dict[str, str | bytes], overwrite: bool = False) -> None:
    """Writes a folder whole or not at all; with `overwrite` it may replace an earlier report."""
    writable(folder, overwrite)
    with replace_folder(folder, REPORT) as new:
        for name, content in files.items():
            (new / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def csv_text(rows: list[dict[str, Any]]) -> str:
    """One line a row; columns in the order of their first appearance; None is empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def table(header: str, rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are right-aligned."""
    names = header.split(" | ")
    lines = [f"| {' | '.join(names)} |", "|---|" + "--:|" * (len(names) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def page(title: str, setting: BaseModel, command: str, *parts: str) -> str:
    """Markdown: the machine, the command and the fields of a setting, then the parts."""
    fields = ", ".join(f"{name} {value}" for name, value in setting)
    return "\n\n".join([f"# {title}", machine.line(), f"    {command}", fields, *parts]) + "\n"


def size(value: int | None) -> str:
    """Bytes for people."""
    if value is None:
        return "-"
    amount, units = float(value), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while amount >= 1024 and unit != "GiB":
        amount, unit = amount / 1024, next(units)
    return f"{amount:.3g} {unit}" if amount < 100 else f"{amount:.0f} {unit}"


def seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def log_log(
    title: str, panels: dict[str, dict[str, list[tuple[float, float]]]], x: str, y: str, dashed: tuple[str, ...] = ()
) -> bytes:
    """A PNG of lines over logarithmic axes, one panel beside the other; lines named in `dashed` are limits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 4.4), layout="constrained")
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (panel, lines) in zip(axes, panels.items()):
        for i, name in enumerate(names):
            if points := sorted(lines.get(name, [])):
                style = {"ls": "--", "color": "black", "lw": 1} if name in dashed else {"color": f"C{i % 10}"}
                axis.plot(*zip(*points), marker="osD^v<>pPX"[i % 10], ms=4, label=name, **style)
        axis.set(xscale="log", yscale="log", xlabel=x, title=panel)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel(y)
    axes[-1].legend(fontsize=7)
    figure.suptitle(title)
    return png(figure)


def png(figure: Figure) -> bytes:
    """A figure as an image; the version of matplotlib is not written into it."""
    image = io.BytesIO()
    figure.savefig(image, dpi=110, format="png", metadata={"Software": None})
    return image.getvalue()
