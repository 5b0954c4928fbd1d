"""The plots of a study's report, as SVG."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cosup_fast.study.config import ALL
from cosup_fast.study.report import METRICS, Difference, StudyReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = {
    "held-out": {
        "ntp": "NTP held out (nats per token)",
        "nsp": "NSP held out (nats per query)",
        "recall_at_1": "R@1 held out",
        "recall_at_5": "R@5 held out",
    },
    "diagnosis": {
        "ntp_grad_norm": "gradient of NTP on Gen, norm",
        "nsp_grad_norm": "gradient of lambda NSP on Gen, norm",
        "grad_cosine": "cosine of the two gradients",
        "alignment": "alignment of queries and passages",
        "query_uniformity": "uniformity of queries",
        "passage_uniformity": "uniformity of passages",
    },
    "spaces": {
        "cka_passages": "CKA of passages: token space, sequence space",
        "cka_queries": "CKA of queries and what they ask for",
        "alignment": "alignment, held out",
        "query_uniformity": "uniformity of queries, held out",
        "passage_uniformity": "uniformity of passages, held out",
    },
}
_COLUMNS = 2


def plots(report: StudyReport) -> dict[str, str]:
    """Every plot that the finished cells give something for, SVG by title."""
    labels = [one.title or f"{one.after} - {one.before}" for one in report.decisive]
    drawn = {
        "What decides": _forest(report.decisive, labels) if labels else None,
        "Held-out figures over steps": curves(report, "held-out"),
        "What the losses do to Gen and to the space of sequences": curves(report, "diagnosis"),
        "Token space and sequence space": curves(report, "spaces"),
        "Attention from the answer, by layer": attention(report),
    }
    return {title: svg for title, svg in drawn.items() if svg}


def curves(report: StudyReport, kind: str) -> str | None:
    """A panel for each figure; a thin line a seed, a thick one their mean where there are several."""
    panels = {
        name: title
        for name, title in CURVES[kind].items()
        if any(_known(of_seed, kind, name) for seeds in report.curves.values() for of_seed in seeds.values())
    }
    if not panels:
        return None

    def draw(axes: Axes, name: str) -> None:
        for number, (condition, seeds) in enumerate(report.curves.items()):
            color = f"C{number % 10}"
            lines = [line for of_seed in seeds.values() if (line := _known(of_seed, kind, name))]
            for steps, values in lines:
                axes.plot(steps, values, color=color, alpha=0.35 if len(lines) > 1 else 1, linewidth=1)
            if len(lines) > 1 and all(line[0] == lines[0][0] for line in lines):
                mean = [sum(row) / len(row) for row in zip(*(values for _, values in lines), strict=True)]
                axes.plot(lines[0][0], mean, color=color, linewidth=2)
            if lines:
                axes.plot([], [], color=color, label=condition)
        axes.set(xlabel="step", title=panels[name])
        axes.legend(fontsize=7)

    return panelled(list(panels), draw)


def attention(report: StudyReport) -> str | None:
    """Shares of attention by layer, a line for each condition's first seed."""
    looked = {
        condition: found
        for condition, seeds in report.probes.items()
        if (found := next((probes["attention"] for probes in seeds.values() if "attention" in probes), None))
    }
    if not looked:
        return None
    titles = {"passage": "to the passage", "answer": "to the answer in the passage", "prompt": "to the prompt"}

    def draw(axes: Axes, name: str) -> None:
        for number, (condition, found) in enumerate(looked.items()):
            values = found["by_layer"][name]
            axes.plot(range(1, len(values) + 1), values, ".-", color=f"C{number % 10}", label=condition)
        if name == "passage":
            even = next(iter(looked.values()))["even"]
            axes.axhline(even, color="0.4", linestyle=":", label="all tokens alike")
        axes.set(xlabel="layer", title=titles[name])
        axes.legend(fontsize=7)

    return panelled(list(titles), draw)


def panelled(names: Sequence[str], draw: Callable[[Any, str], None]) -> str:
    """A grid of axes, each drawn by `draw(axes, name)`."""
    rows = -(-len(names) // _COLUMNS)
    figure = _figure(3.4 * rows)
    grid = figure.subplots(rows, _COLUMNS, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        axes.grid(alpha=0.3)
        draw(axes, name)
    for axes in grid.flat[len(names) :]:
        axes.remove()
    return _svg(figure)


def _forest(differences: Sequence[Difference], labels: Sequence[str]) -> str:
    """Differences with their intervals, a line for each scope."""
    lines = [
        (f"{label}\n{METRICS[one.metric]}, {scope}" if scope == ALL else scope, interval, scope == ALL)
        for one, label in zip(differences, labels, strict=True)
        for scope, interval in one.scopes.items()
    ]
    figure = _figure(1 + 0.32 * len(lines))
    axes = figure.subplots()
    for place, (_, interval, main) in enumerate(lines):
        color = "C0" if main else "0.45"
        axes.plot([100 * interval.low, 100 * interval.high], [-place] * 2, color=color, linewidth=3 if main else 1.5)
        axes.plot(100 * interval.mean, -place, "o", color=color)
    axes.axvline(0, color="0.2", linewidth=0.8)
    axes.set_yticks([-place for place in range(len(lines))], [label for label, _, _ in lines], fontsize=8)
    axes.set_xlabel("points, 95% interval")
    axes.grid(alpha=0.3, axis="x")
    return _svg(figure)


def _known(of_seed: Mapping[str, Any], kind: str, name: str) -> tuple[list[float], list[float]] | None:
    """Steps and values where the figure is known."""
    columns = of_seed.get(kind, {})
    pairs = [(s, v) for s, v in zip(columns.get("step", []), columns.get(name, []), strict=False) if v is not None]
    return ([s for s, _ in pairs], [v for _, v in pairs]) if pairs else None


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(11, height), layout="constrained")


def _svg(figure: Figure) -> str:
    """The figure as an element to put into a page, the same on every machine."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.hashsalt": "cosup-fast", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
