"""A study's YAML: what its conditions share, what each of them changes, and the cells that follow.

output: benchmarks/results/my-study     # one small JSON file a cell, and the report
work: runs/my-study                     # checkpoints, answers: large, never committed
base: {model: ..., training: ...}       # sections of a run's configuration
sets: [squad, {name: nq, examples: questions/test-in, corpus: wiki-leads, domain: in-domain}]
seeds: [0]
conditions:
  ntp-only:      {change: {nsp.weight: 0}, systems: [gold, closed-book], seeds: [0, 1, 2]}
  nsp-only:      {change: {ntp.weight: 0}, systems: [ranks]}
  co-supervised: {systems: [co-supervised, gold]}
  pair:          {pair: {writer: ntp-only, retriever: nsp-only}}
"""

from __future__ import annotations

import fnmatch
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from cosup_fast.config import ConfigError, RunConfig, explain, load_config
from cosup_fast.config.reading import read_yaml
from cosup_fast.data.records import nearest
from cosup_fast.data.strict import Strict
from cosup_fast.errors import CosupError
from cosup_fast.evaluation.kinds import split_name
from cosup_fast.files.fields import flat
from cosup_fast.study.handed import HANDED

RANKS = "ranks"
"""A system of studies alone: teacher-forced ranks of the gold passages under the cell's own model, nothing written."""
OWN = (RANKS, *HANDED)
"""Systems that `cosup-fast evaluate` does not have."""

ALL, DOMAINS = "all sets", ("in-domain", "out-of-domain")
"""The sets that every report averages over."""
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
# Of `training`, what decides nothing: where a run is, and how often it reports or saves.
_INCIDENTAL = {
    "device", "log_every", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "rank_timeout",
}  # fmt: skip


class StudyError(CosupError, ValueError):
    """A study that cannot be run or reported; the message names the cell or the field, and the remedy."""


class StudySet(Strict):
    """A test set; a name alone is a prepared one, `NAME/test` with the corpus that belongs to it."""

    name: str
    examples: str
    corpus: str
    domain: Literal["in-domain", "out-of-domain"]

    @model_validator(mode="before")
    @classmethod
    def _prepared(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"name": value}
        if isinstance(value, dict) and "name" in value and "examples" not in value:
            return prepared_set(str(value["name"])) | value
        return value


class Pair(Strict):
    """Two conditions as one system: Gen of the first writes, the second retrieves for it."""

    writer: str
    retriever: str


class Condition(Strict):
    """What is trained, and as which systems it is evaluated."""

    what: str = Field(default="", description="a line for the report")
    change: dict[str, Any] = Field(default={}, description="fields of the run that differ from the base")
    systems: tuple[str, ...] = Field(
        default=(), description="as `cosup-fast evaluate --system` takes them, and `ranks`"
    )
    probes: tuple[Literal["attention", "spaces"], ...] = Field(
        default=(), description="further looks: at attention in the trained model, at both spaces while it is trained"
    )
    seeds: tuple[int, ...] | None = Field(default=None, description="null: those of the study")
    train: bool = Field(default=True, description="false: evaluated as it is before training")
    random_embseq: bool = Field(default=False, description="Embseq starts from random weights of its architecture")
    pair: Pair | None = Field(default=None, description="nothing is trained, two other conditions are put together")
    keep: bool = Field(default=False, description="keep the checkpoints of its finished cells")
    tune: tuple[dict[str, Any], ...] = Field(
        default=(), description="short trials on the held-out examples, each a few changed fields"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.pair is not None:
            if self.change or self.tune or self.probes or not self.train or self.systems or self.random_embseq:
                raise ValueError(
                    "a pair trains nothing and is one system: leave out change, tune, probes, train, systems"
                )
        elif not self.systems and not self.probes:
            raise ValueError("systems=[]: name at least one system, such as co-supervised, gold or ranks")
        for what in ("systems", "probes"):
            if twice := _twice(getattr(self, what)):
                raise ValueError(f"{what}: {twice!r} is named twice")
        for system in self.systems:
            if system not in OWN:
                split_name(system)
        return self


class Tuning(Strict):
    """How long the trials of `Condition.tune` are, and their seed, which no cell has."""

    steps: int = Field(default=60, ge=1)
    seed: int = 1000


class Comparison(Strict):
    """A difference that comes first in the report; arms are written `condition/system`."""

    title: str
    metric: str = Field(description="such as correctness, grounded or recall@1")
    after: str
    before: str


class Evaluation(Strict):
    """How every cell is evaluated; how Gen writes is in `base.generation`."""

    questions: int | None = Field(
        default=None, ge=1, description="ask only so many of each set, the same ones in every cell; null: all"
    )
    passages: int | None = Field(
        default=None,
        ge=1,
        description="search only so many of each corpus, all gold passages among them; null: all",
    )
    batch: int = Field(default=16, ge=1, description="questions answered at once")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="dtype of the weights while they write"
    )
    judge: str = Field(default="lexical", description="judge of grounding, as `cosup-fast evaluate --judge` takes it")


class Study(Strict):
    """A whole study."""

    output: str = Field(description="folder of the cells' results and the report")
    work: str | None = Field(default=None, description="folder of checkpoints and answers; null: work/ in the output")
    title: str = ""
    base: dict[str, Any] = Field(default={}, description="sections of a run's configuration, for every condition")
    sets: tuple[StudySet, ...] = ()
    seeds: tuple[int, ...] = (0,)
    conditions: dict[str, Condition]
    evaluation: Evaluation = Evaluation()
    tuning: Tuning = Tuning()
    decisive: tuple[Comparison, ...] = Field(default=(), description="the differences that the study is about")
    main: str | None = Field(default=None, description="the arm, `condition/system`, that all others are baselines of")
    averages: dict[str, tuple[str, ...]] = Field(
        default={}, description="sets to average over by themselves, beside all sets and those of a domain"
    )

    @field_validator("seeds", mode="after")
    @classmethod
    def _seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        return _checked_seeds("seeds", seeds)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.conditions:
            raise ValueError("conditions: a study needs at least one")
        if twice := _twice(one.name for one in self.sets):
            raise ValueError(f"sets: {twice!r} is named twice")
        for name, members in self.averages.items():
            _check_average(name, members, [one.name for one in self.sets])
        trials = {name: len(one.tune) for name, one in self.conditions.items() if one.tune}
        if len(set(trials.values())) > 1:
            told = ", ".join(f"{name} {count}" for name, count in trials.items())
            raise ValueError(f"tune: conditions get equal effort, so as many trials each, found {told}")
        named = [self.main or "", *(arm for one in self.decisive for arm in (one.after, one.before))]
        for arm in filter(None, named):
            if arm not in self.arms:
                raise ValueError(f"arm {arm!r} is not in this study{nearest(arm, self.arms)}: {', '.join(self.arms)}")
        for name, condition in self.conditions.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"conditions: {name!r} names files: use a-z, 0-9, '.', '_' and '-'")
            seeds = _checked_seeds(f"conditions.{name}.seeds", self.seeds_of(name))
            if self.tuning.seed in seeds:
                raise ValueError(
                    f"conditions.{name}.seeds: {self.tuning.seed} is tuning.seed, which no cell may have: change one"
                )
            if (condition.systems or condition.pair) and not self.sets:
                raise ValueError(f"conditions.{name} is evaluated and sets=[] has nothing to ask: name test sets")
            if condition.pair is None:
                continue
            for part in (condition.pair.writer, condition.pair.retriever):
                if part not in self.conditions or self.conditions[part].pair is not None:
                    raise ValueError(
                        f"conditions.{name}.pair: {part!r} is not a condition that is trained"
                        f"{nearest(part, [n for n, c in self.conditions.items() if c.pair is None])}"
                    )
                if missing := set(seeds) - set(self.seeds_of(part)):
                    raise ValueError(f"conditions.{name}: {part!r}, which it is made of, has no seed {min(missing)}")
        return self

    @property
    def arms(self) -> tuple[str, ...]:
        """Every condition as every system that it is evaluated as, `condition/system`."""
        return tuple(
            f"{name}/{system}"
            for name, condition in self.conditions.items()
            for system in (("pair",) if condition.pair else condition.systems)
        )

    def seeds_of(self, condition: str) -> tuple[int, ...]:
        """The seeds of a condition."""
        own = self.conditions[condition].seeds
        return self.seeds if own is None else own

    @property
    def results(self) -> Path:
        """Where the results of the cells are."""
        return Path(self.output) / "cells"

    @property
    def work_folder(self) -> Path:
        """Where checkpoints and answers are."""
        return Path(self.work) if self.work is not None else Path(self.output) / "work"

    @cached_property
    def cells(self) -> dict[str, Cell]:
        """All cells by name: trials first, then the first seed of every condition, pairs after what they need."""
        made = [
            Cell(self, name, self.tuning.seed, trial)
            for name, condition in self.conditions.items()
            for trial in range(len(condition.tune))
        ]
        most = max(len(self.seeds_of(name)) for name in self.conditions)
        for i in range(most):
            row = [Cell(self, name, self.seeds_of(name)[i]) for name in self.conditions if i < len(self.seeds_of(name))]
            made += sorted(row, key=lambda cell: cell.settings.pair is not None)
        return {cell.name: cell for cell in made}

    def cell(self, condition: str, seed: int) -> Cell:
        """The cell of a condition and a seed."""
        return self.cells[f"{condition}-seed{seed}"]


@dataclass(frozen=True)
class Cell:
    """One condition with one seed, or one of its trials."""

    study: Study
    condition: str
    seed: int
    trial: int | None = None

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.condition}-seed{self.seed}" if self.trial is None else f"tune-{self.condition}-{self.trial}"

    @property
    def settings(self) -> Condition:
        return self.study.conditions[self.condition]

    @property
    def result(self) -> Path:
        """The file that says that it is finished."""
        return self.study.results / f"{self.name}.json"

    @property
    def work(self) -> Path:
        """The folder of its run and its answers."""
        return self.study.work_folder / self.name

    @property
    def parts(self) -> tuple[Cell, ...]:
        """The cells whose checkpoints it reads: the writer's and the retriever's of a pair."""
        pair = self.settings.pair
        if pair is None or self.trial is not None:
            return ()
        return self.study.cell(pair.writer, self.seed), self.study.cell(pair.retriever, self.seed)

    @property
    def trains(self) -> bool:
        return self.settings.pair is None and self.settings.train

    @property
    def random_embseq(self) -> tuple[str, Path]:
        """The model whose architecture an Embseq of random weights has, and where that one is."""
        fields = flat(self.study.base) | flat(self.settings.change)
        name = fields.get("model.embseq") or fields.get("model.gen") or RunConfig().model.gen
        layers = fields.get("model.embseq_layers") or "all"
        return name, self.study.work_folder / "models" / f"random-{Path(name).name}-{layers}"

    @cached_property
    def run(self) -> RunConfig:
        """What it trains.

        Raises:
            StudyError: a field that a run does not have, or a value that it does not take.
        """
        fields = flat(self.study.base) | flat(self.settings.change)
        if self.trial is not None:
            trial = flat(self.settings.tune[self.trial])
            fields |= {"training.steps": self.study.tuning.steps} | trial
        fields |= {"training.seed": self.seed, "output": str(self.work / "run")}
        if self.settings.random_embseq:
            fields["model.embseq"] = str(self.random_embseq[1])
        try:
            return load_config(None, [f"{name}={json.dumps(value)}" for name, value in fields.items()])
        except ConfigError as error:
            told = str(error).removeprefix("the configuration: ")
            raise StudyError(f"condition {self.condition!r}: {told}") from None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its figures, JSON values."""
        study, settings = self.study, self.settings
        about: dict[str, Any] = {"seed": self.seed}
        if settings.pair is None:
            about["run"] = decisive(self.run)
            if settings.random_embseq:
                about["run"]["model"]["embseq"] = f"random weights of {self.random_embseq[0]}"
        else:
            about |= {"pair": settings.pair.model_dump(), "parts": [part.identity["run"] for part in self.parts]}
        if self.trial is None:
            about |= {
                "train": settings.train,
                "systems": list(settings.systems),
                "probes": list(settings.probes),
                "sets": [one.model_dump() for one in study.sets],
                "evaluation": study.evaluation.model_dump(),
            }
        return json.loads(json.dumps(about))


def load_study(path: str | Path, *, output: str | Path | None = None) -> Study:
    """Reads a study and checks the run of every cell.

    Args:
        path: the YAML file.
        output: where results go instead.

    Raises:
        StudyError: the file is missing or no mapping, a name occurs twice, a field is unknown, or a value cannot be.
    """
    path = Path(path)
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(f"{path}: no such study") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise StudyError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(raw, dict):
        raise StudyError(f"{path}: expected a mapping with base, conditions and sets, found {type(raw).__name__}")
    if output is not None:
        raw["output"] = str(output)
    try:
        study = Study.model_validate(raw)
    except ValidationError as error:
        raise StudyError("\n".join(f"{path}: {explain(one)}" for one in error.errors())) from None
    for cell in study.cells.values():
        if cell.settings.pair is None:
            _ = cell.run
    return study


def decisive(run: RunConfig) -> dict[str, Any]:
    """A run's fields without those that decide nothing."""
    fields = run.model_dump(mode="json")
    del fields["output"]
    for name in _INCIDENTAL:
        fields["training"].pop(name, None)
    return fields


def _checked_seeds(field: str, seeds: tuple[int, ...]) -> tuple[int, ...]:
    if not seeds:
        raise ValueError(f"{field}=[]: name at least one seed")
    if (twice := _twice(seeds)) is not None:
        raise ValueError(f"{field}: seed {twice} is named twice")
    return seeds


def _check_average(name: str, members: tuple[str, ...], sets: list[str]) -> None:
    field = f"averages.{name}"
    if name in (ALL, *DOMAINS, *sets):
        raise ValueError(f"{field}: the report has another row of that name: choose another")
    if not members:
        raise ValueError(f"{field}=[]: name at least one set")
    if (twice := _twice(members)) is not None:
        raise ValueError(f"{field}: {twice!r} is named twice")
    for member in members:
        if member not in sets:
            raise ValueError(f"{field}: {member!r} is none of {', '.join(sets)}{nearest(member, sets)}")


def _twice(names: Any) -> Any:
    """The first name that occurs twice, or None."""
    seen: set[Any] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)


def prepared_set(name: str) -> dict[str, Any]:
    """The fields of a test set that `cosup-fast data prepare` makes.

    Raises:
        ValueError: no prepared set has that name.
    """
    from cosup_fast.data.prepared.benchmarks import BENCHMARKS

    if name not in BENCHMARKS:
        raise ValueError(
            f"sets: {name!r} is not a prepared set{nearest(name, BENCHMARKS)}: name one of {', '.join(BENCHMARKS)}, "
            "or give examples, corpus and domain"
        )
    one = BENCHMARKS[name]
    return {"name": name, "examples": one.questions, "corpus": one.corpus, "domain": one.domain}


def select(study: Study, only: str | None) -> list[Cell]:
    """The cells whose names match one of the patterns of a list, `ntp-only-*,pair-seed0`, in the order of the study.

    Raises:
        StudyError: a pattern matches none, or there is none.
    """
    if only is None:
        return list(study.cells.values())
    if not only.strip(", "):
        raise StudyError(
            f"--only {only!r} names no cell: leave it out for all, or name some of {', '.join(study.cells)}"
        )
    wanted: set[str] = set()
    for pattern in filter(None, only.split(",")):
        found = fnmatch.filter(study.cells, pattern)
        if not found:
            near = nearest(pattern, study.cells)
            raise StudyError(f"--only {pattern!r} matches no cell{near}: {', '.join(study.cells)}")
        wanted |= set(found)
    return [cell for name, cell in study.cells.items() if name in wanted]
