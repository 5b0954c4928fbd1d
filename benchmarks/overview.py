"""The plot of times in the README, made from the committed tables: `python -m benchmarks.overview FOLDER`.

Each bar is the time of a loss, forward and backward, over that of its three bare matrix products, median of the rounds.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.report import png
from cosup_fast.files import check_writable

NAME = "times.png"
LONGEST = 6.0  # a longer bar is cut, its value written beside it
Ratios = dict[str, dict[str, float]]  # by provider and shape


def read_ratios(folder: Path, dtype: str) -> Ratios:
    """The ratios of all providers that were timed, from the `time-*` tables of a folder."""
    found: Ratios = {}
    for table in sorted(folder.glob("time-*/time.csv")):
        with open(table, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row["status"] == "ok" and row["dtype"] == dtype:
                    shape = f"{row['loss']} {row['n']} x {row['m']} x {row['d']}"
                    found.setdefault(row["provider"], {})[shape] = float(row["ratio_median"])
    return found


def draw(folder: Path) -> bytes:
    """The plot as a PNG."""
    panels = {dtype: read_ratios(folder, dtype) for dtype in ("fp32", "bf16")}
    providers = sorted(panels["fp32"], key=lambda name: max(panels["fp32"][name].values()))
    shapes = sorted({shape for panel in panels.values() for ratios in panel.values() for shape in ratios})
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    width = 0.8 / len(shapes)
    for axis, (dtype, panel) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for i, shape in enumerate(shapes):
            places = [(j, panel[name][shape]) for j, name in enumerate(providers) if shape in panel.get(name, {})]
            heights = [j + (i - (len(shapes) - 1) / 2) * width for j, _ in places]
            axis.barh(heights, [min(x, LONGEST) for _, x in places], height=width, label=shape)
            for height, (_, x) in zip(heights, places, strict=True):
                if x > LONGEST:
                    axis.text(LONGEST, height, f" {x:.0f}", va="center", ha="right", fontsize=6, color="white")
        axis.axvline(1, color="black", lw=0.8)
        axis.set_title(dtype)
        axis.set_xlabel("time / time of the bare matrix products")
        axis.set_yticks(range(len(providers)), providers)
    figure.axes[0].invert_yaxis()
    figure.axes[-1].legend(fontsize=7)
    return png(figure)


def main(arguments: list[str]) -> None:
    """Writes the plot into the folder of results that is named."""
    if len(arguments) != 1:
        sys.exit("usage: python -m benchmarks.overview benchmarks/results/MACHINE")
    folder = Path(arguments[0])
    check_writable(folder / NAME).write_bytes(draw(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
