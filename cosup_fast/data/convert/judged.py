"""Questions with passages that answer them and passages that do not: sentence-transformers' columns, Tevatron, DPR.

Each form has a reader of one row; what becomes of the row is the same for all of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cosup_fast.data.convert.output import (
    Output,
    check_names,
    identifier,
    named_by_content,
    objects,
    read,
    string,
    text,
)
from cosup_fast.data.convert.rows import read_rows
from cosup_fast.data.records import DataError, Example, Passage, Segment, field_names, validate

COLUMNS = {"anchor": ("anchor", "query", "question"), "positive": ("positive", "answer", "passage")}
"""What a column may be called, in order of preference."""


@dataclass(frozen=True)
class Judged:
    """A question and its passages."""

    question: str
    positives: list[Passage]
    negatives: list[Passage]
    id: str = ""
    dataset: str = ""
    answers: list[str] = field(default_factory=list)


def convert_sentence_transformers(
    sources: Sequence[str | Path],
    folder: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    skip_malformed: bool = False,
    progress: bool = True,
) -> dict[str, int]:
    """Tables of an anchor, a positive and perhaps negatives, as sentence-transformers trains on, to pairs.

    Args:
        sources: JSONL, CSV, TSV or Parquet files, or `hf:owner/name[:split]`.
        folder: where to write `passages.jsonl` and a file of examples for each source.
        columns: what the columns `anchor`, `positive` or `negative` are called in these files.
        skip_malformed: leave malformed rows out, with their numbers on stderr, instead of stopping.
        progress: show a progress bar on stderr.

    Returns:
        How many rows were read, and what became of them.

    Raises:
        DataError: a malformed row, or a column that is missing.
    """
    renamed = dict(columns or {})
    if wrong := sorted(renamed.keys() - {"anchor", "positive", "negative"}):
        raise DataError(f"columns: expected anchor, positive or negative, found {wrong[0]!r}")

    def of_row(where: str, record: dict[str, Any]) -> Judged:
        return sentence_transformers_row(where, record, renamed)

    return _convert("sentence-transformers", of_row, sources, folder, False, skip_malformed, progress)


def convert_tevatron(
    sources: Sequence[str | Path],
    folder: str | Path,
    *,
    for_training: bool = False,
    skip_malformed: bool = False,
    progress: bool = True,
) -> dict[str, int]:
    """Tevatron's JSONL, the form that MS MARCO is trained in: `query`, `positive_passages`, `negative_passages`.

    Args:
        for_training: Gen's output becomes the first of `answers`, grounded on the first positive passage; rows without
            answers are left out.
        sources, folder, skip_malformed, progress: as of `convert_sentence_transformers`.

    Returns:
        How many rows were read, and what became of them.

    Raises:
        DataError: a malformed row.
    """
    return _convert("tevatron", tevatron_row, sources, folder, for_training, skip_malformed, progress)


def convert_dpr(
    sources: Sequence[str | Path],
    folder: str | Path,
    *,
    for_training: bool = False,
    skip_malformed: bool = False,
    progress: bool = True,
) -> dict[str, int]:
    """DPR's retriever files, such as biencoder-nq-train.json: one JSON list, read an object at a time.

    Negatives are `hard_negative_ctxs`. Arguments, counts and errors are those of `convert_tevatron`.
    """
    return _convert("dpr", dpr_row, sources, folder, for_training, skip_malformed, progress)


def sentence_transformers_row(where: str, record: dict[str, Any], renamed: Mapping[str, str] | None = None) -> Judged:
    """A row of columns; `renamed` says what they are called instead."""
    renamed = renamed or {}
    if scored := [name for name in ("label", "labels", "score", "scores") if name in record]:
        raise DataError(
            f"{where}: {scored[0]}: expected pairs that all belong together, found a column of labels: keep the rows "
            "that are positive, and drop the column"
        )
    found = {}
    for column, names in COLUMNS.items():
        wanted = (renamed[column],) if column in renamed else names
        found[column] = next((name for name in wanted if name in record), None)
        if found[column] is None:
            raise DataError(
                f"{where}: {wanted[0]}: expected a column of this name, found only {field_names(record)}; "
                f"--columns {column}=NAME says which one it is"
            )
    prefix = re.escape(renamed.get("negative", "negative"))
    negatives = [name for name in record if re.fullmatch(rf"{prefix}s?(_?\d+)?", name)]
    if "negative" in renamed and not negatives:
        raise DataError(
            f"{where}: {renamed['negative']}: expected a column of this name, found only {field_names(record)}"
        )
    anchor, positive = str(found["anchor"]), str(found["positive"])
    return Judged(
        question=text(where, record, anchor),
        positives=[named_by_content(where, "text", "", one) for one in _texts(where, record, positive)],
        negatives=[
            named_by_content(where, "text", "", one)
            for name in negatives
            if record[name] != ""  # a table has no other way to say that there is none
            for one in _texts(where, record, name)
        ],
    )


def tevatron_row(where: str, record: dict[str, Any]) -> Judged:
    """A row of Tevatron's."""
    if "positive_passages" not in record:
        raise DataError(f"{where}: positive_passages: expected a value, found only {field_names(record)}")
    return Judged(
        id=identifier(where, record, "query_id"),
        question=text(where, record, "query"),
        positives=_passages(where, record, "positive_passages", "docid"),
        negatives=_passages(where, record, "negative_passages", "docid"),
        answers=_answers(where, record),
    )


def dpr_row(where: str, record: dict[str, Any]) -> Judged:
    """An object of DPR's."""
    if "positive_ctxs" not in record:
        raise DataError(f"{where}: positive_ctxs: expected a value, found only {field_names(record)}")
    return Judged(
        question=text(where, record, "question"),
        positives=_passages(where, record, "positive_ctxs", "passage_id", "psg_id"),
        negatives=_passages(where, record, "hard_negative_ctxs", "passage_id", "psg_id"),
        dataset=string(where, record, "dataset", ""),
        answers=_answers(where, record),
    )


def _texts(where: str, record: dict[str, Any], key: str) -> list[str]:
    """A column that holds a text, or a list of them."""
    values = record[key] if isinstance(record[key], list) else [record[key]]
    return [text(where, {key: value}, key) for value in values]


def _answers(where: str, record: dict[str, Any]) -> list[str]:
    answers = record.get("answers") or []
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"{where}: answers: expected a list of strings, found {answers!r:.60}")
    return [answer for answer in dict.fromkeys(answers) if answer.strip()]


def _passages(where: str, record: dict[str, Any], key: str, *ids: str) -> list[Passage]:
    """The passages of a list; one without an id is named by its content."""
    found = []
    for i, passage in enumerate(objects(where, record, key)):
        field = f"{key}.{i}"
        title = string(where, passage, "title", "", f"{field}.title")
        content = text(where, passage, "text", f"{field}.text")
        names = (identifier(where, passage, name, f"{field}.{name}") for name in ids)
        if name := next(filter(None, names), ""):
            found.append(validate(where, Passage, {"id": name, "title": title, "text": content}))
        else:
            found.append(named_by_content(where, "text", title, content))
    return found


def _convert(
    form: str,
    read_row: Callable[[str, dict[str, Any]], Judged],
    sources: Sequence[str | Path],
    folder: str | Path,
    for_training: bool,
    skip_malformed: bool,
    progress: bool,
) -> dict[str, int]:
    """Rows to examples, a file for each source, and all of their passages to one file."""
    if not sources:
        raise DataError(f"{form}: expected files to convert, found none")
    names = [f"{_stem(source)}.jsonl" for source in sources]
    check_names(form, names)
    counts: Counter[str] = Counter()
    with Output(folder) as output:
        for source, name in zip(sources, names, strict=True):
            convert = _namer(read_row, _stem(source), for_training, output)
            rows = read(source, read_rows(source), convert, counts, "rows", skip=skip_malformed, bar=progress)
            for _, (judged, example) in rows:
                if example is None:
                    counts["left out"] += 1
                    continue
                output.add_passages((*judged.positives, *judged.negatives))
                counts["negatives that answer"] += len({p.id for p in judged.negatives} & set(example.gold))
                output.write(name, example)
                counts["examples"] += 1
        if not counts["examples"]:
            what = "a passage that answers" + " and an answer" * for_training
            raise DataError(f"{sources[0]}: expected rows with {what}, found none")
        counts["passages"] = output.passages
        output.finish(form, sources, counts)
    return dict(+counts)


def _namer(
    read_row: Callable[[str, dict[str, Any]], Judged], stem: str, for_training: bool, output: Output
) -> Callable[[str, int, dict[str, Any]], tuple[Judged, Example | None]]:
    """From a row of one source to its example, whose id is new; None for a row with nothing to train on."""
    seen: set[str] = set()

    def convert(where: str, number: int, record: dict[str, Any]) -> tuple[Judged, Example | None]:
        judged = read_row(where, record)
        own = judged.id or f"{stem}:{number}"
        example = _example(where, judged, f"{own}#{number}" if own in seen else own, for_training)
        if example is not None:
            output.check_passages(where, (*judged.positives, *judged.negatives))
            seen.add(own)
        return judged, example

    return convert


def _example(where: str, judged: Judged, name: str, for_training: bool) -> Example | None:
    """The example of a row, or None where nothing answers it, or nothing is to be written."""
    gold = list(dict.fromkeys(passage.id for passage in judged.positives))
    if not gold or (for_training and not judged.answers):
        return None
    record = {
        "id": name,
        "dataset": judged.dataset,
        "question": judged.question,
        "output": [Segment(text=judged.answers[0], passage=gold[0])] if for_training else [],
        "answers": judged.answers,
        "gold": gold,
        "negatives": [n for n in dict.fromkeys(p.id for p in judged.negatives) if n not in gold],
    }
    return validate(where, Example, record)


def _stem(source: str | Path) -> str:
    """What the examples of a source are called."""
    if str(source).startswith("hf:"):
        return re.sub(r"[^\w.-]+", "-", str(source).removeprefix("hf:"))
    return Path(source).stem
