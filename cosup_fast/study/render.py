"""A study's report as HTML to read, Markdown to commit, and JSON to compute with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from cosup_fast.evaluation.html import page_template
from cosup_fast.files import replace_file
from cosup_fast.study.config import ALL, DOMAINS
from cosup_fast.study.plots import plots
from cosup_fast.study.report import METRICS, Arm, Difference, StudyReport, counted, percent, points
from cosup_fast.study.status import duration

METHOD = (
    "Shares in percent, differences in points. Averages over sets count every set alike. Intervals are 95% percentile "
    "intervals of a bootstrap that resamples the questions within each set, alike for both sides of a difference, and "
    "the seeds of each condition (together where both sides have the same seeds; deviations scaled by sqrt(S / (S - "
    "1)) for S seeds). With one seed they say how sure a difference is on other questions, not on another run; three "
    "seeds show little of the spread between runs, so the difference of each seed is listed. Where two numbers of "
    "seeds are given, the means of either side are over that many, and the difference is not the mean of those by "
    "seed. Nothing is corrected for the number of comparisons. Questions whose answer is not the retrieved title are "
    "others for each arm: compare them by the differences, which are on those that both arms have. Grounding leaves "
    "out sets whose answers are labels, since a label alone is no claim."
)
SEEN = (
    "The standard error of each difference over all sets, and the smallest true difference that would be told from 0 "
    "about four times in five (2.8 standard errors): an interval that includes 0 does not rule out a smaller one. With "
    "one seed the spread between runs is not part of the error, which is then too small. `above 0` and `below 0` count "
    "the single sets whose interval excludes 0: by chance alone about one in twenty would."
)
HELD_OUT = (
    "At the last step, on the held-out examples, means over seeds: NTP in nats per token, NSP in nats per query, also "
    "where a condition does not train that loss."
)
TUNING = (
    "Short trials on the held-out examples, as many for each condition. The loss is the sum of the held-out losses "
    "that the condition trains; `used` marks what its cells are trained with."
)


@dataclass(frozen=True)
class Section:
    """A heading, text, and a table whose first row is its head."""

    title: str
    text: str = ""
    rows: Sequence[Sequence[str]] = ()


def write_report(report: StudyReport, folder: Path) -> list[Path]:
    """Writes report.json, report.md and report.html into a folder, each whole; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {
        "report.json": report.model_dump_json(indent=1) + "\n",
        "report.md": markdown(report),
        "report.html": html(report),
    }
    for name, text in written.items():
        with replace_file(folder / name) as file:
            file.write(text)
    return [folder / name for name in written]


def markdown(report: StudyReport) -> str:
    """The report as Markdown, without the plots."""
    parts = [f"# {report.title or 'Study'}"]
    for section in sections(report):
        parts += [f"## {section.title}"] + ([section.text] if section.text else [])
        if section.rows:
            head, *rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in section.rows]
            rule = ["---", *("--:" for _ in head[1:])]
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows)))
    return "\n\n".join(parts) + "\n"


def html(report: StudyReport) -> str:
    """The report as one HTML file that loads nothing and runs no script.

    Raises:
        ImportError: jinja2 is not installed.
    """
    template = page_template(Path(__file__).parent / "report.html")
    return template.render(title=report.title or "Study", sections=list(sections(report)), plots=plots(report))


def sections(report: StudyReport) -> Iterator[Section]:
    """The tables in their order: what decides comes first."""
    missing = f"Not finished: {', '.join(report.missing)}." if report.missing else "All cells are finished."
    yield Section("What decides", missing, [*_differences(report, report.decisive)] if report.decisive else ())
    yield Section("How to read it", METHOD)
    if report.decisive:
        yield Section("What could have been seen", SEEN, [*_seen(report)])
    for scope in (ALL, *DOMAINS, *report.averages):
        if rows := list(_arms(report, scope)):
            yield Section(f"Every arm: {scope}", _members(report, scope), rows)
    for metric, title in METRICS.items():
        if gains := [one for one in report.gains if one.metric == metric]:
            yield Section(f"{gains[0].after} over its baselines: {title}", "", [*_differences(report, gains)])
    if rows := list(_held_out(report)):
        yield Section("Held out", HELD_OUT, rows)
    yield Section("Test sets", "", [*_sets(report)])
    for row in report.sets:
        if rows := list(_arms(report, row.name)):
            yield Section(f"Every arm: {row.name} ({row.domain})", "", rows)
    if report.trials:
        yield Section("Tuning", TUNING, [*_trials(report)])
    if rows := list(_attention(report)):
        text = "Of the positions that predict the answer's tokens, the share of attention on the inserted passage."
        yield Section("Attention to the passage", text, rows)
    yield Section("Cells", "", [*_cells(report)])


def _differences(report: StudyReport, differences: Sequence[Difference]) -> Iterator[list[str]]:
    scopes = (ALL, *DOMAINS, *report.averages)
    yield ["difference", "metric", *scopes, "seeds", "questions", "by seed"]
    for one in differences:
        yield [
            _label(one),
            METRICS[one.metric],
            *(points(one.scopes[scope]) if scope in one.scopes else "-" for scope in scopes),
            counted(one.seeds),
            str(one.scopes[ALL].questions),
            ", ".join(f"{seed}: {100 * value:+.1f}" for seed, value in one.by_seed.items()) or "-",
        ]


def _seen(report: StudyReport) -> Iterator[list[str]]:
    yield ["difference", "metric", "seeds", "standard error", "seen four times in five", "sets", "above 0", "below 0"]
    for one in report.decisive:
        whole, sets = one.scopes[ALL], [one.scopes[row.name] for row in report.sets if row.name in one.scopes]
        yield [
            _label(one),
            METRICS[one.metric],
            counted(one.seeds),
            f"{100 * whole.error:.1f}",
            f"{100 * whole.detectable:.1f}",
            str(len(sets)),
            str(sum(interval.low > 0 for interval in sets)),
            str(sum(interval.high < 0 for interval in sets)),
        ]


def _label(one: Difference) -> str:
    return f"{one.title}\n{one.after} - {one.before}" if one.title else f"- {one.before}"


def _members(report: StudyReport, scope: str) -> str:
    return f"Over {', '.join(report.averages[scope])}." if scope in report.averages else ""


def _held_out(report: StudyReport) -> Iterator[list[str]]:
    names = {"ntp": "NTP", "nsp": "NSP", "recall_at_1": "R@1", "recall_at_5": "R@5", "recall_at_20": "R@20"}
    ends = {
        condition: [{name: column[-1] for name, column in kinds["held-out"].items()} for kinds in seeds.values()]
        for condition, seeds in report.curves.items()
    }
    if not ends:
        return
    yield ["condition", "seeds", "steps", *names.values()]
    for condition, runs in ends.items():
        figures = [[value for run in runs if (value := run.get(name)) is not None] for name in names]
        yield [
            condition,
            str(len(runs)),
            ", ".join(dict.fromkeys(f"{run['step']:.0f}" for run in runs)),
            *(f"{fmean(values):.3f}" if values else "-" for values in figures[:2]),
            *(f"{100 * fmean(values):.1f}" if values else "-" for values in figures[2:]),
        ]


def _arms(report: StudyReport, scope: str) -> Iterator[list[str]]:
    arms = [arm for arm in report.arms if scope in arm.figures]
    if not arms:
        return
    metrics = [metric for metric in METRICS if any(metric in arm.figures[scope] for arm in arms)]
    yield ["arm", "seeds", *(METRICS[metric] for metric in metrics)]
    chance = report.chance.get(scope, {})
    yield ["chance", "", *(f"{100 * chance[metric]:.2f}" if metric in chance else "" for metric in metrics)]
    for arm in arms:
        yield [arm.name, str(len(arm.seeds)), *(_figure(arm, scope, metric) for metric in metrics)]


def _figure(arm: Arm, scope: str, metric: str) -> str:
    interval = arm.figures[scope].get(metric)
    return "-" if interval is None else percent(interval)


def _sets(report: StudyReport) -> Iterator[list[str]]:
    yield ["set", "domain", "questions", "passages", "answer is the gold title", "R@1 by chance", "metrics"]
    for row in report.sets:
        yield [
            row.name,
            row.domain,
            str(row.questions),
            str(row.passages),
            "-" if row.answer_is_title is None else f"{100 * row.answer_is_title:.0f}%",
            f"{100 * row.chance['recall@1']:.2f}%" if "recall@1" in row.chance else "-",
            row.metrics,
        ]


def _trials(report: StudyReport) -> Iterator[list[str]]:
    names = ("ntp", "nsp", "recall_at_1", "recall_at_5")
    yield ["condition", "changed", "loss", "NTP", "NSP", "R@1", "R@5", ""]
    for row in report.trials:
        yield [
            row.condition,
            ", ".join(f"{name}={value}" for name, value in row.changed.items()),
            *("-" if value is None else f"{value:.3f}" for value in (row.loss, *map(row.held_out.get, names))),
            ", ".join(word for word, holds in (("best", row.best), ("used", row.used)) if holds),
        ]


def _attention(report: StudyReport) -> Iterator[list[str]]:
    looked = [
        (condition, seed, probes["attention"])
        for condition, seeds in report.probes.items()
        for seed, probes in seeds.items()
        if "attention" in probes
    ]
    if not looked:
        return
    yield ["condition", "seed", "questions", "mean of layers", "most in a layer", "to the answer, most", "all alike"]
    for condition, seed, found in looked:
        passage, answer = found["by_layer"]["passage"], found["by_layer"]["answer"]
        most = max(range(len(passage)), key=passage.__getitem__)
        shares = (f"{100 * value:.1f}" for value in (sum(passage) / len(passage), passage[most], max(answer)))
        mean, top, to_answer = shares
        layer = f"{top} (layer {most + 1})"
        yield [condition, str(seed), str(found["questions"]), mean, layer, to_answer, f"{100 * found['even']:.1f}"]


def _cells(report: StudyReport) -> Iterator[list[str]]:
    yield ["cell", "steps", "time", "training", "commit", "machine"]
    for cell in report.cells:
        yield [
            cell.name,
            str(cell.steps),
            duration(sum(cell.seconds.values())),
            duration(cell.seconds.get("training", 0)),
            ", ".join(cell.commits),
            cell.machine,
        ]
