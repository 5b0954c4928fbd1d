"""The report of an evaluation: what happened to every question, and the metrics of every data set with intervals.

`report.json` holds a `Report` whole, with a checksum: settings, metrics, questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Self

from pydantic import Field, ValidationError

from cosup_fast.data.records import Example, Passage
from cosup_fast.data.strict import Strict, first_problem
from cosup_fast.evaluation.estimates import Estimate, bootstrap_mean, macro_average
from cosup_fast.evaluation.inputs import IN_DOMAIN, OUT_OF_DOMAIN
from cosup_fast.evaluation.judge import Verdict
from cosup_fast.evaluation.scoring import Titles
from cosup_fast.evaluation.suites import METRICS, SUMMARY, Suite
from cosup_fast.files import read_checked, write_checked
from cosup_fast.generation import Answer
from cosup_fast.terminal import FigureTable

FORMAT = "cosup-fast evaluation"
FORMAT_VERSION = 2
READABLE = (1, 2)  # 1 lacks chance, titles and the name of the corpus
REPORT = "report.json"


class QuestionRecord(Strict):
    """What happened to one question."""

    key: str  # data set and id
    domain: str
    corpus: str = ""  # the name of what was searched
    example: Example
    ranks: tuple[int | None, ...]  # of the first gold passage for each teacher-forced [NSP], from 1; None: not found
    chance: dict[str, float] = Field(default={})  # what each recall would be if the passages were ranked at random
    titles: Titles = Titles()
    answer: Answer
    evidence: dict[str, Passage]  # the passages that Gen was given
    verdicts: tuple[Verdict, ...]  # on the grounded segments, in order; empty without a judge
    scores: dict[str, float]  # the metrics of the suite that are defined for it, and `retrieval` and `correctness`


class DatasetReport(Strict):
    """The metrics of one data set in one domain."""

    dataset: str
    domain: str
    questions: int
    retrieval: str  # which metric stands for retrieval
    correctness: str
    metrics: dict[str, Estimate]
    chance: dict[str, float] = Field(default={})  # of the recalls


class Report(Strict):
    """Everything that was measured."""

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    settings: dict[str, Any]
    overall: dict[str, Estimate]  # means over all questions
    chance: dict[str, float] = Field(default={})  # of the recalls, over all questions
    averages: dict[str, dict[str, Estimate]]  # `SUMMARY`, means over data sets: of all, and of those in each domain
    datasets: tuple[DatasetReport, ...]
    questions: tuple[QuestionRecord, ...]

    @classmethod
    def of(
        cls, settings: dict[str, Any], questions: Sequence[QuestionRecord], suites: Mapping[tuple[str, str], Suite]
    ) -> Self:
        """Sums up the questions; `suites` holds the suite of each (data set, domain)."""
        groups = {group: [q for q in questions if (q.example.dataset, q.domain) == group] for group in suites}
        domains = [domain for domain in (IN_DOMAIN, OUT_OF_DOMAIN) if any(group[1] == domain for group in groups)]
        return cls(
            settings=settings,
            overall=_estimates(questions),
            chance=_chance(questions),
            averages={
                name: _averages([members for group, members in groups.items() if name in ("all", group[1])])
                for name in ("all", *domains)
            },
            datasets=tuple(
                DatasetReport(
                    dataset=dataset,
                    domain=domain,
                    questions=len(members),
                    retrieval=suites[dataset, domain].retrieval,
                    correctness=suites[dataset, domain].correctness,
                    metrics=_estimates(members),
                    chance=_chance(members),
                )
                for (dataset, domain), members in groups.items()
            ),
            questions=tuple(questions),
        )

    def values(self, metric: str) -> dict[str, float]:
        """A metric of each question for which it is defined, by the question's key; `paired_gain` compares two such.

        Raises:
            ValueError: no such metric.
        """
        if metric not in METRICS and metric not in SUMMARY:
            raise ValueError(f"metric={metric!r}: expected one of {', '.join([*METRICS, *SUMMARY])}")
        return {record.key: record.scores[metric] for record in self.questions if metric in record.scores}

    def rows(self) -> list[dict[str, Any]]:
        """A flat record of each question, JSON values: what a study keeps of an evaluation.

        `retrieved` are the ids of the passages that Gen was given; `ranks` and `chance` are those of the teacher-forced
        lists; `answer` is all that Gen wrote.
        """
        return [
            {
                "key": record.key,
                "dataset": record.example.dataset,
                "domain": record.domain,
                "corpus": record.corpus,
                "gold": record.example.gold,
                "retrieved": [found.best.passage for found in record.answer.retrievals],
                "ranks": list(record.ranks),
                "answer": record.answer.text,
                "stop_reason": record.answer.stop_reason,
                "verdicts": [verdict.entailed for verdict in record.verdicts],
                "answer_is_gold_title": record.titles.answer_is_gold,
                "answer_is_retrieved_title": record.titles.answer_is_retrieved,
                "wrote_retrieved_title": record.titles.wrote_retrieved,
                "chance": record.chance,
                "scores": record.scores,
            }
            for record in self.questions
        ]

    def table(self) -> FigureTable:
        """The main metrics with their intervals, a row for each data set and average."""
        columns = [name for name in ("recall@1", "recall@5", "recall@20") if name in self.overall]
        last = [name for name in ("grounded", "perplexity") if name in self.overall]
        table = FigureTable(
            *("data set", "questions"), *(METRICS[name].title for name in columns), *("retrieval", "correctness"),
            *(METRICS[name].title for name in last),
            caption="percent (perplexity apart), with 95% bootstrap intervals",
        )  # fmt: skip
        for part in self.datasets:
            table.add_row(
                "\n".join(filter(None, (part.dataset or "(no name)", part.domain))),
                str(part.questions),
                *(_with_chance(shown(name, part.metrics.get(name)), name, part.chance) for name in columns),
                *(
                    "-"
                    if part.metrics.get(name) is None
                    else f"{METRICS[name].title} {shown(name, part.metrics[name])}"
                    for name in (part.retrieval, part.correctness)
                ),
                *(shown(name, part.metrics.get(name)) for name in last),
            )
        for name, averages in self.averages.items():
            members = [part for part in self.datasets if name in ("all", part.domain)]
            if len(members) > 1 or len(self.averages) > 1:
                table.add_row(
                    f"{name}\naverage of {len(members)}",
                    str(sum(part.questions for part in members)),
                    *("" for _ in columns),
                    *(shown(column, averages.get(column)) for column in ("retrieval", "correctness")),
                    *(shown(column, averages.get(column)) if column in SUMMARY else "" for column in last),
                )
        return table

    def save(self, folder: str | Path) -> None:
        """Writes `report.json` into a folder; it appears whole. `html.write_html` writes the page to read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_checked(folder / REPORT, self.model_dump_json(indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a report that `save` wrote: the file, or its folder; an earlier version's has no checksum.

        Raises:
            ValueError: it is missing, damaged, altered, or of another format version.
        """
        path = Path(path)
        path = path / REPORT if path.is_dir() else path
        try:
            data = read_checked(path, ["format", "format_version", "settings"])
            if data["format"] != FORMAT or data["format_version"] not in READABLE:
                raise ValueError(
                    f"format {data['format']!r} version {data['format_version']!r}, this release reads {FORMAT_VERSION}"
                )
            if missing := {"system", "checkpoint", "generation", "judge", "fluency"} - set(data["settings"]):
                raise ValueError(f"its settings lack {', '.join(sorted(missing))}")
            if not isinstance(data["settings"]["system"], str):
                raise ValueError(f"its system is {data['settings']['system']!r:.60}")
            found = cls.model_validate(data)
            for record in found.questions:
                for name, value in record.scores.items():
                    positive = name not in METRICS or METRICS[name].unit != "geometric" or value > 0
                    if not math.isfinite(value) or not positive:
                        raise ValueError(f"{record.key}: {name}={value}")
            return found
        except (ValueError, TypeError) as error:
            problem = first_problem(error) if isinstance(error, ValidationError) else error
            raise ValueError(
                f"{path} is not a report that can be read ({problem}): expected what `cosup-fast evaluate` wrote, such "
                f"as RUN/evaluation/co-supervised, or its {REPORT}"
            ) from None


def estimate(metric: str, values: Sequence[float]) -> Estimate:
    """The mean of a metric's values with its interval; the geometric one where the metric has that."""
    if metric in METRICS and METRICS[metric].unit == "geometric":
        logs = bootstrap_mean([math.log(value) for value in values])
        low, high = (None if x is None else math.exp(x) for x in (logs.low, logs.high))
        return Estimate(mean=math.exp(logs.mean), low=low, high=high, count=logs.count)
    return bootstrap_mean(values)


def shown(metric: str, value: Estimate | None) -> str:
    """An estimate as text, in the unit of `figure`; its interval in a second line."""
    if value is None:
        return "-"
    interval = ""
    if value.low is not None and value.high is not None:
        interval = f"\n{figure(metric, value.low)}–{figure(metric, value.high)}"
    return figure(metric, value.mean) + interval


def figure(metric: str, value: float) -> str:
    """A value as text: a share in percent, any other metric itself."""
    unit = METRICS[metric].unit if metric in METRICS else "share"
    if unit != "geometric":
        return f"{100 * value:.1f}" if unit == "share" else f"{value:.2f}"
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def _with_chance(text: str, metric: str, chance: Mapping[str, float]) -> str:
    return f"{text}\nchance {figure(metric, chance[metric])}" if metric in chance else text


def _estimates(records: Sequence[QuestionRecord]) -> dict[str, Estimate]:
    found = {}
    for name in (*METRICS, *(name for name in SUMMARY if name not in METRICS)):
        if values := [record.scores[name] for record in records if name in record.scores]:
            found[name] = estimate(name, values)
    return found


def _chance(records: Sequence[QuestionRecord]) -> dict[str, float]:
    names = {name: None for record in records for name in record.chance}
    return {name: fmean(r.chance[name] for r in records if name in r.chance) for name in names}


def _averages(groups: Sequence[Sequence[QuestionRecord]]) -> dict[str, Estimate]:
    found = {}
    for name in SUMMARY:
        values = [[record.scores[name] for record in group if name in record.scores] for group in groups]
        if values := [part for part in values if part]:
            found[name] = macro_average(values)
    return found
