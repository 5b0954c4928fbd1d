"""The result of a cell: one JSON file of ids and numbers with a checksum, written whole or not at all.

Per question there is one value a metric, in the order of the set's ids. Values that are all 0 or 1 are a text of the
same length (`"0110-"`, `-` where the metric is not defined), others a list rounded to four digits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from cosup_fast.config import RunConfig
from cosup_fast.data.strict import Strict
from cosup_fast.files import read_checked, write_checked
from cosup_fast.files.fields import differences, short
from cosup_fast.study.config import Cell, Evaluation, StudyError, decisive

FORMAT = "cosup-fast study cell"
FORMAT_VERSION = 1

Packed = str | list[float | None]
Value = float | None


class SetFacts(Strict):
    """What a test set is, whatever answers it."""

    domain: str
    corpus: str
    passages: int
    ids: list[str]
    answer_is_title: Packed  # whether a gold answer is the title of a gold passage
    chance: dict[str, float]  # what each recall is when passages are ranked at random


class SetScores(Strict):
    """What one system got on one set."""

    retrieval: str  # the metric that `scores["retrieval"]` is
    correctness: str
    answer_is_retrieved_title: Packed  # whether a gold answer is the title of a passage that Gen was given
    scores: dict[str, Packed]


class CellResult(Strict):
    """Everything that a cell found out."""

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    name: str
    condition: str
    seed: int
    trial: int | None
    identity: dict[str, Any]  # what decides the figures: `Cell.identity` as it was
    changed: dict[str, Any]  # the fields that a trial changes
    commits: list[str]  # of the code that worked on it; several where it was resumed by another
    versions: dict[str, str]
    machine: str
    seconds: dict[str, float]  # by stage
    steps: int
    curves: dict[str, dict[str, list[Value]]]  # held-out, step and diagnosis figures over steps
    sets: dict[str, SetFacts]
    systems: dict[str, dict[str, SetScores]]
    probes: dict[str, Any]

    def save(self, path: Path) -> None:
        """Writes the file; it appears whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_checked(path, json.dumps(self.model_dump(mode="json"), separators=(",", ":"), ensure_ascii=False))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a file that `save` wrote; one of an earlier version has no checksum, and is read as it is.

        Raises:
            StudyError: it is damaged, or was changed, or is of another format version.
        """
        try:
            data = read_checked(path, ["format", "format_version"])
            if (data["format"], data["format_version"]) != (FORMAT, FORMAT_VERSION):
                raise ValueError(f"format {data['format']!r} version {data['format_version']}, not {FORMAT_VERSION}")
            found = cls.model_validate(data)
            found.check()
            return found
        except ValueError as error:
            raise StudyError(
                f"{path} is not a result of a cell that can be read ({error}): remove it, and the cell runs again"
            ) from None

    def check(self) -> None:
        """Refuses figures that are not one a question of the cell's sets.

        Raises:
            ValueError: naming the set and the figure.
        """
        for name, facts in self.sets.items():
            columns = {"answer_is_title": facts.answer_is_title}
            for system, by_set in self.systems.items():
                if name in by_set:
                    one = by_set[name]
                    columns |= {f"{system} {metric}": values for metric, values in one.scores.items()}
                    columns[f"{system} answer_is_retrieved_title"] = one.answer_is_retrieved_title
            for column, values in columns.items():
                if len(values) != len(facts.ids) or (isinstance(values, str) and set(values) - set("01-")):
                    raise ValueError(f"{name}: {column}: expected a value for each of {len(facts.ids)} questions")
        if strange := {name for by_set in self.systems.values() for name in by_set} - self.sets.keys():
            raise ValueError(f"{min(strange)} is not one of its sets")


def read_cell(cell: Cell) -> CellResult | None:
    """The result of a cell, or None while it is not finished.

    Raises:
        StudyError: the file cannot be read, or was made with another configuration.
    """
    if not cell.result.is_file():
        return None
    found = CellResult.load(cell.result)
    for field, (then, now) in differences(completed(found.identity), cell.identity).items():
        raise StudyError(
            f"cell {cell.name}: {cell.result} was made with {field}={short(then)}, the study now says {short(now)}: "
            "restore the configuration, remove the file so that the cell runs again, or name another --output"
        )
    return found


def completed(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity with the fields that its version did not have yet, at their defaults: what it did without them."""
    defaults = {"run": decisive(RunConfig()), "evaluation": Evaluation().model_dump()}
    about = {name: _filled(value, defaults.get(name)) for name, value in identity.items()}
    if "parts" in about:
        about["parts"] = [_filled(run, defaults["run"]) for run in about["parts"]]
    return about


def _filled(value: Any, default: Any) -> Any:
    if not (isinstance(value, dict) and isinstance(default, dict)):
        return value
    return default | {name: _filled(one, default.get(name)) for name, one in value.items()}


def pack(values: Sequence[Value]) -> Packed:
    """Values of questions for the file."""
    if all(value in (0, 1, None) for value in values):
        return "".join("-" if value is None else str(int(value)) for value in values)
    return [None if value is None else round(value, 4) for value in values]


def unpack(packed: Packed) -> list[Value]:
    """What `pack` was given, rounded."""
    if isinstance(packed, str):
        return [None if sign == "-" else float(sign) for sign in packed]
    return packed


def by_id(facts: SetFacts, packed: Packed) -> dict[str, float]:
    """The values of the questions for which the metric is defined, by id."""
    return {name: value for name, value in zip(facts.ids, unpack(packed), strict=True) if value is not None}


def curves(records: Sequence[Mapping[str, Any]], *, points: int = 120) -> dict[str, dict[str, list[Value]]]:
    """A run's metrics as columns: held-out evaluations, diagnoses, and means of steps over at most `points` spans."""
    found = {}
    for kind in ("held-out", "diagnosis", "spaces"):
        rows = [record for record in records if record["kind"] == kind]
        names = [name for name in (rows[0] if rows else ()) if name != "kind"]
        found[kind] = {name: [_rounded(row.get(name)) for row in rows] for name in names}
    steps = [record for record in records if record["kind"] == "step"]
    size = -(-len(steps) // points) if steps else 1
    spans = [steps[i : i + size] for i in range(0, len(steps), size)]
    found["step"] = {"step": [span[-1]["step"] for span in spans]}
    for name in ("ntp", "nsp", "in_batch_accuracy", "gen_grad_norm", "embseq_grad_norm", "lr"):
        columns = [[row[name] for row in span if row.get(name) is not None] for span in spans]
        found["step"][name] = [_rounded(sum(column) / len(column)) if column else None for column in columns]
    return found


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
