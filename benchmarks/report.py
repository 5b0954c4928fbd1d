"""Tables and plots, in a folder that is there whole or not at all."""

from __future__ import annotations

import csv
import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent / "results"


def writable(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that is there, before anything is measured for it."""
    if folder.exists() and not overwrite:
        raise ValueError(f"output {folder} exists; pass --overwrite to replace it, or another --output")


def write(folder: Path, files: dict[str, str | bytes], overwrite: bool = False) -> None:
    """Writes a folder beside its place and moves it there when it is complete."""
    writable(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.writing-", dir=folder.parent))
    try:
        for name, content in files.items():
            path = new / name
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        new.chmod(0o755)
        if folder.exists():
            old = new.with_name(new.name + ".old")
            os.rename(folder, old)
            os.rename(new, folder)
            shutil.rmtree(old)
        else:
            os.rename(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
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
    image = io.BytesIO()
    figure.savefig(image, dpi=110, format="png", metadata={"Software": None})
    return image.getvalue()
