"""What a study found: the differences that decide, every arm beside its baselines, curves, trials and probes.

An arm is a condition as one system, `ntp-only/dense:minilm`. Scopes are the averages over all sets, over those of a
domain and over those of the study's `averages`, in which every set counts alike, and the sets themselves. Differences
are paired on questions; see `estimates`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from cosup_fast.data.strict import Strict
from cosup_fast.files.fields import flat
from cosup_fast.study.config import ALL, DOMAINS, Cell, Study, StudyError
from cosup_fast.study.estimates import Interval, Values, average, difference
from cosup_fast.study.result import CellResult, SetFacts, SetScores, by_id, read_cell, unpack
from cosup_fast.terminal import FigureTable

METRICS = {
    "recall@1": "R@1",
    "recall@5": "R@5",
    "recall@20": "R@20",
    "retrieval": "retrieval",
    "correctness": "correct",
    "beyond_gold_title": "correct, answer not the gold title",
    "beyond_retrieved_title": "correct, answer not the retrieved title",
    "grounded": "grounded",
    "follows_passage": "follows the passage",
    "follows_memory": "follows memory",
}
"""All of them shares. The two on titles are correctness on a part of the questions."""


class Difference(Strict):
    """A metric of one arm minus that of another."""

    title: str
    metric: str
    after: str
    before: str
    scopes: dict[str, Interval]
    seeds: tuple[int, int]
    """How many runs the means of both are over."""
    by_seed: dict[int, float]
    """Over all sets, of each seed that both have."""


class Arm(Strict):
    """A condition as a system, with its figures in every scope."""

    name: str
    what: str
    seeds: tuple[int, ...]
    figures: dict[str, dict[str, Interval]]


class SetRow(Strict):
    """A test set."""

    name: str
    domain: str
    questions: int
    corpus: str
    passages: int
    answer_is_title: float | None
    chance: dict[str, float]
    metrics: str
    """Which metrics its retrieval and its correctness are."""


class Trial(Strict):
    """A short run of the tuning; its loss is the sum of the held-out losses that its condition trains."""

    condition: str
    changed: dict[str, Any]
    loss: float | None
    held_out: dict[str, float | None]
    best: bool
    used: bool
    """Whether the cells of its condition have the values that it tried."""


class CellRow(Strict):
    """A finished cell."""

    name: str
    steps: int
    seconds: dict[str, float]
    commits: list[str]
    machine: str


class StudyReport(Strict):
    """Everything, JSON values."""

    title: str
    missing: list[str]
    averages: dict[str, tuple[str, ...]]
    """The study's own: the sets of each."""
    decisive: list[Difference]
    arms: list[Arm]
    gains: list[Difference]
    """Of the main arm over every other."""
    chance: dict[str, dict[str, float]]
    sets: list[SetRow]
    curves: dict[str, dict[int, dict[str, dict[str, list[float | None]]]]]
    """By condition and seed; see `result.curves`."""
    trials: list[Trial]
    probes: dict[str, dict[int, dict[str, Any]]]
    cells: list[CellRow]

    def table(self) -> FigureTable:
        """The differences that decide, in points."""
        table = FigureTable(
            "metric", "difference", "scope", "points, 95% interval", "seeds", "questions", "by seed", names=3
        )
        for one in self.decisive:
            for scope, interval in one.scopes.items():
                if scope not in (ALL, *DOMAINS, *self.averages):
                    continue
                seeds = "  ".join(f"{100 * x:+.1f}" for x in one.by_seed.values()) if scope == ALL else ""
                table.add_row(
                    METRICS[one.metric] if scope == ALL else "",
                    f"{one.after} - {one.before}" if scope == ALL else "",
                    scope,
                    points(interval),
                    counted(one.seeds),
                    str(interval.questions),
                    seeds,
                )
        if self.missing:
            table.caption = f"not finished: {', '.join(self.missing)}"
        return table


def make_report(study: Study, *, allow_mixed_commits: bool = False) -> StudyReport:
    """The report of the cells that are finished.

    Raises:
        StudyError: no cell is finished, one disagrees with the study, or the cells are of several commits and
            `allow_mixed_commits` is false; trials have a table of their own and may be of another commit.
    """
    found = {name: read_cell(cell) for name, cell in study.cells.items()}
    cells = [cell for cell in found.values() if cell is not None]
    if not cells:
        raise StudyError(f"no cell of the study is finished in {study.results}: run it first, or name its --output")
    trials, trained = [c for c in cells if c.trial is not None], [c for c in cells if c.trial is None]
    if not allow_mixed_commits:
        _check_commits(trials)
        _check_commits(trained)
    table = _Table(study, trained)
    tried = [(study.cells[name], cell) for name, cell in found.items() if cell is not None and cell.trial is not None]
    return StudyReport(
        title=study.title,
        missing=[name for name, cell in found.items() if cell is None],
        averages=study.averages,
        decisive=[
            one
            for asked in study.decisive
            if (one := table.difference(asked.title, asked.metric, asked.after, asked.before)) is not None
        ],
        arms=[table.arm(name) for name in study.arms if table.values(name)],
        gains=[
            one
            for metric in METRICS
            for name in study.arms
            if study.main and name != study.main and (one := table.difference("", metric, study.main, name))
        ],
        chance=table.chance(),
        sets=table.rows(),
        curves=_by_condition(trained, lambda cell: cell.curves if cell.curves.get("held-out") else None),
        trials=_trials(tried),
        probes=_by_condition(trained, lambda cell: cell.probes or None),
        cells=[
            CellRow(name=c.name, steps=c.steps, seconds=c.seconds, commits=c.commits, machine=c.machine) for c in cells
        ],
    )


def _check_commits(cells: Sequence[CellResult]) -> None:
    """Refuses results of several commits in one table."""
    commits = {commit: cell.name for cell in reversed(cells) for commit in cell.commits}
    if len(commits) > 1:
        told = ", ".join(f"{commit} ({name})" for commit, name in commits.items())
        raise StudyError(
            f"the cells were made by several commits: {told}. Remove those of the other commit and run them again, or "
            "add --allow-mixed-commits where the changes between touch no figure"
        )


def counted(seeds: tuple[int, int]) -> str:
    """How many runs are on either side of a difference: `3`, or `3, 2` where they are not as many."""
    return ", ".join(map(str, dict.fromkeys(seeds)))


def points(interval: Interval) -> str:
    """A difference of shares: +1.2 [-0.3, +2.7]."""
    return f"{100 * interval.mean:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def percent(interval: Interval) -> str:
    """A share with its interval: 41.2 [38.0, 44.1]."""
    return f"{100 * interval.mean:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


class _Table:
    """The values of every arm, by metric, set, seed and question."""

    def __init__(self, study: Study, cells: Sequence[CellResult]):
        self.study = study
        self.facts: dict[str, SetFacts] = {}
        self._scores: dict[str, dict[int, dict[str, SetScores]]] = {}
        for cell in cells:
            for name, facts in cell.sets.items():
                known = self.facts.setdefault(name, facts)
                if (known.ids, known.passages) != (facts.ids, facts.passages):
                    raise StudyError(
                        f"cell {cell.name} was asked other questions of set {name!r} than the cells before it: remove "
                        f"{study.results / cell.name}.json and run it again"
                    )
            for system, sets in cell.systems.items():
                self._scores.setdefault(f"{cell.condition}/{system}", {})[cell.seed] = sets

    def values(self, arm: str, metric: str | None = None) -> dict[str, Values]:
        """A metric of an arm by set; without a metric, whatever it has."""
        seeds = self._scores.get(arm, {})
        if metric is None:
            return {name: {seed: {}} for seed, sets in seeds.items() for name in sets}
        found: dict[str, dict[int, dict[str, float]]] = {}
        for seed, sets in sorted(seeds.items()):
            for name, scores in sets.items():
                if values := _metric(metric, self.facts[name], scores):
                    found.setdefault(name, {})[seed] = values
        return {name: found[name] for name in self.facts if name in found}

    def scopes(self, values: dict[str, Values]) -> Iterator[tuple[str, dict[str, Values]]]:
        """The sets of each average, and each set alone."""
        yield ALL, values
        for domain in DOMAINS:
            if inside := {name: one for name, one in values.items() if self.facts[name].domain == domain}:
                yield domain, inside
        for title, members in self.study.averages.items():
            if inside := {name: values[name] for name in members if name in values}:
                yield title, inside
        for name, one in values.items():
            yield name, {name: one}

    def arm(self, name: str) -> Arm:
        condition = name.partition("/")[0]
        figures: dict[str, dict[str, Interval]] = {}
        for metric in METRICS:
            for scope, inside in self.scopes(self.values(name, metric)):
                if (interval := average(inside)) is not None:
                    figures.setdefault(scope, {})[metric] = interval
        what = self.study.conditions[condition].what
        return Arm(name=name, what=what, seeds=tuple(sorted(self._scores[name])), figures=figures)

    def difference(self, title: str, metric: str, after: str, before: str) -> Difference | None:
        """None while an arm is missing, or where the metric is not defined for both."""
        ours, theirs = self.values(after, metric), self.values(before, metric)
        scopes = {}
        for scope, inside in self.scopes(ours):
            if (interval := difference(inside, theirs)) is not None:
                scopes[scope] = interval
        if ALL not in scopes:
            return None
        by_seed = {}
        for seed in sorted(self._scores[after].keys() & self._scores[before].keys()):
            one, other = (
                {name: {seed: values[seed]} for name, values in side.items() if seed in values}
                for side in (ours, theirs)
            )
            if (interval := difference(one, other)) is not None:
                by_seed[seed] = interval.mean
        return Difference(
            title=title,
            metric=metric,
            after=after,
            before=before,
            scopes=scopes,
            seeds=(_runs(ours), _runs(theirs)),
            by_seed=by_seed,
        )

    def chance(self) -> dict[str, dict[str, float]]:
        """What each recall is at random, by scope."""
        found = {}
        for scope, inside in self.scopes({name: {} for name in self.facts}):
            rows = [self.facts[name].chance for name in inside]
            names = set.intersection(*(set(row) for row in rows)) if rows else set()
            found[scope] = {name: fmean(row[name] for row in rows) for name in sorted(names)}
        return found

    def rows(self) -> list[SetRow]:
        metrics: dict[str, str] = {}
        for seeds in self._scores.values():
            for sets in seeds.values():
                for name, scores in sets.items():
                    if scores.correctness:
                        metrics.setdefault(name, f"{scores.retrieval}, {scores.correctness}")
        return [
            SetRow(
                name=name,
                domain=facts.domain,
                questions=len(facts.ids),
                corpus=facts.corpus,
                passages=facts.passages,
                answer_is_title=_mean(unpack(facts.answer_is_title)),
                chance=facts.chance,
                metrics=metrics.get(name, ""),
            )
            for name, facts in self.facts.items()
        ]


def _runs(values: dict[str, Values]) -> int:
    return len({seed for by_seed in values.values() for seed in by_seed})


def _metric(name: str, facts: SetFacts, scores: SetScores) -> dict[str, float]:
    """A metric of the questions for which it is defined."""
    part = {"beyond_gold_title": facts.answer_is_title, "beyond_retrieved_title": scores.answer_is_retrieved_title}
    if name in part:
        title, correct = by_id(facts, part[name]), _metric("correctness", facts, scores)
        return {question: value for question, value in correct.items() if title.get(question) == 0}
    if name == "grounded" and scores.correctness == "label_accuracy":  # a label alone is no claim
        return {}
    return by_id(facts, scores.scores[name]) if name in scores.scores else {}


def _trials(tried: Sequence[tuple[Cell, CellResult]]) -> list[Trial]:
    rows = []
    for trial, cell in tried:
        held_out = cell.curves["held-out"]
        last = {name: column[-1] for name, column in held_out.items() if column}
        run = cell.identity["run"]
        trained = [name for name in ("ntp", "nsp") if run.get(name, {}).get("weight", 1) != 0]
        losses = [last.get(name) for name in trained]
        loss = None if any(x is None for x in losses) else sum(x for x in losses if x is not None)
        used = flat(trial.study.cell(trial.condition, trial.study.seeds_of(trial.condition)[0]).identity["run"])
        is_used = all(used.get(name) == value for name, value in flat(cell.changed).items())
        rows.append(
            Trial(condition=cell.condition, changed=cell.changed, loss=loss, held_out=last, best=False, used=is_used)
        )
    best = {
        name: min((row.loss for row in rows if row.condition == name and row.loss is not None), default=None)
        for name in {row.condition for row in rows}
    }
    return [row.model_copy(update={"best": row.loss is not None and row.loss == best[row.condition]}) for row in rows]


def _by_condition(cells: Sequence[CellResult], what: Any) -> dict[str, dict[int, Any]]:
    found: dict[str, dict[int, Any]] = {}
    for cell in cells:
        if (value := what(cell)) is not None:
            found.setdefault(cell.condition, {})[cell.seed] = value
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
