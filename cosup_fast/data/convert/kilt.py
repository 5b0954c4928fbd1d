"""KILT's tasks and its knowledge source to examples and passages (Petroni et al. 2021, arXiv 2009.02252)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cosup_fast.data.convert.output import PASSAGES, Output, check_names, identifier, read, string, whole
from cosup_fast.data.convert.rows import read_rows
from cosup_fast.data.records import DataError, Example, Passage, Segment, validate

MAX_PARAGRAPHS = 10_000  # of one piece of evidence; no page of KILT has as many
Gold = Literal["paragraph", "page"]


class Source(NamedTuple):
    """Where an answer comes from: a page, and its first and last paragraph that count."""

    page: str  # Wikipedia's id, "" where KILT names the title alone
    title: str
    first: int  # -1 where only the page is known
    last: int


class Answer(NamedTuple):
    """An output of KILT: a text, which may be empty, and all that it takes to support it."""

    text: str
    sources: list[Source]


class Question(NamedTuple):
    """A line of a task: an example without an output and gold ids, and what KILT says about both."""

    example: Example
    answers: list[Answer]


def convert_kilt(
    tasks: Sequence[str | Path],
    folder: str | Path,
    *,
    knowledge: str | Path | None = None,
    gold: Gold = "paragraph",
    for_training: bool = False,
    skip_malformed: bool = False,
    progress: bool = True,
) -> dict[str, int]:
    """KILT's tasks to questions, a file each, and its knowledge source to `passages.jsonl`, a passage a paragraph.

    Args:
        tasks: the JSONL files, such as nq-dev-kilt.jsonl; none converts the knowledge source alone.
        folder: where to write.
        knowledge: kilt_knowledgesource.json. Without it no passages are written, and gold ids are taken as they are.
        gold: which passages count as retrieved correctly: the provenance's own paragraphs, or all of its pages.
        for_training: Gen's output becomes the first answer that has a known gold passage, grounded on that passage;
            questions without one are left out.
        skip_malformed: leave malformed lines out, with their numbers on stderr, instead of stopping.
        progress: show progress bars on stderr.

    Returns:
        How many lines were read, and what became of them.

    Raises:
        DataError: a malformed line, or nothing to convert.
    """
    tasks = [Path(task) for task in tasks]
    if not tasks and knowledge is None:
        raise DataError("kilt: expected task files, a knowledge source or both, found none")
    if gold not in ("paragraph", "page"):
        raise DataError(f"gold={gold!r}: choose paragraph or page")
    if gold == "page" and knowledge is None:
        raise DataError("gold='page': the knowledge source says which paragraphs a page has: name it")
    check_names("kilt", (task.name for task in tasks))
    counts: Counter[str] = Counter()
    questions: dict[Path, list[tuple[str, Question]]] = {}
    for task in tasks:

        def answered(where: str, _: int, record: dict[str, Any], dataset: str = dataset_of(task)) -> Question:
            return _answered(where, read_question(where, record, dataset))

        found = read(task, read_rows(task), answered, counts, "questions", skip=skip_malformed, bar=progress)
        questions[task] = list(found)
    cited = {source.page for found in questions.values() for _, question in found for source in _sources(question)}
    paragraphs: dict[str, list[int]] | None = None
    with Output(folder) as output:
        if knowledge is not None:
            paragraphs = {}
            rows = read_rows(knowledge)
            pages = read(
                knowledge, rows, lambda w, _, r: kilt_page(w, r), counts, "pages", skip=skip_malformed, bar=progress
            )
            for where, (page, passages) in pages:
                for passage in passages.values():
                    output.write(PASSAGES, passage)
                counts["passages"] += len(passages)
                if page in cited:
                    if page in paragraphs:
                        raise DataError(f"{where}: wikipedia_id: expected a new page, found {page!r} again")
                    paragraphs[page] = list(passages)
        for task, found in questions.items():
            seen: set[str] = set()
            for where, question in found:
                example = question.example
                if example.id in seen:
                    raise DataError(f"{where}: id: expected a new id, found {example.id!r} again")
                seen.add(example.id)
                ids = _gold(_sources(question), paragraphs, gold)
                counts["without a gold passage"] += not ids
                example = example.model_copy(update={"gold": ids})
                if for_training:
                    of_answers = ((text, _gold(sources, paragraphs, gold)) for text, sources in question.answers)
                    grounded = next(((text, names[0]) for text, names in of_answers if text.strip() and names), None)
                    if grounded is None:
                        counts["left out"] += 1
                        continue
                    segment = Segment(text=grounded[0], passage=grounded[1])
                    example = example.model_copy(update={"output": [segment]})
                output.write(task.name, example)
        output.finish("kilt", [*tasks, *([Path(knowledge)] if knowledge is not None else [])], counts)
    return dict(counts)


def read_question(where: str, record: dict[str, Any], dataset: str) -> Question:
    """Reads a line of a task; those of a blind test set have no answers.

    Raises:
        DataError: it has another form, naming the field.
    """
    name = identifier(where, record, "id")
    if not name:
        raise DataError(f"{where}: id: expected the id that KILT gives each question, found None")
    question = string(where, record, "input", "")
    if not question.strip():
        raise DataError(
            f"{where}: input: expected a question, found {question!r} (KILT's TriviaQA files have none before they are "
            "joined with TriviaQA's own)"
        )
    outputs = record.get("output") or []
    if not isinstance(outputs, list) or not all(isinstance(output, dict) for output in outputs):
        raise DataError(f"{where}: output: expected a list of answers with provenance, found {outputs!r:.60}")
    answers = []
    for i, output in enumerate(outputs):
        text = string(where, output, "answer", "", f"output.{i}.answer")
        found = output.get("provenance") or []
        if not isinstance(found, list) or not all(isinstance(source, dict) for source in found):
            raise DataError(f"{where}: output.{i}.provenance: expected a list of objects, found {found!r:.60}")
        sources = [_source(where, source, f"output.{i}.provenance.{j}") for j, source in enumerate(found)]
        answers.append(Answer(text, sources))
    texts = dict.fromkeys(answer.text for answer in answers if answer.text.strip())
    example = {"id": name, "dataset": dataset, "question": question, "output": [], "answers": list(texts)}
    return Question(validate(where, Example, example), answers)


def dataset_of(task: Path) -> str:
    """The data set of a task file: its name up to `-dev`, `-test`, `-train` or `-kilt`."""
    return re.split(r"[-_](?:dev|test|train|kilt)(?![a-z])", task.stem)[0]


def kilt_page(where: str, record: dict[str, Any]) -> tuple[str, dict[int, Passage]]:
    """A page's id, and its passages by the number of their paragraph; titles and headings are not passages."""
    page = record.get("wikipedia_id", record.get("_id"))
    if not isinstance(page, str | int) or isinstance(page, bool) or not str(page).strip():
        raise DataError(f"{where}: wikipedia_id: expected a page's id, found {page!r:.60}")
    title = string(where, record, "wikipedia_title", None)
    texts = record.get("text")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: text: expected a list of paragraphs, found {texts!r:.60}")
    passages = {}
    for number, text in enumerate(texts):
        text = re.sub(r"^BULLET::::-?\s*", "", text).strip()
        if not text or text.startswith("Section::::") or (number == 0 and text == title.strip()):
            continue
        fields = {"id": f"kilt:{page}:{number}", "title": title, "text": text}
        passages[number] = validate(where, Passage, fields)
    return str(page), passages


def _source(where: str, source: dict[str, Any], field: str) -> Source:
    first = whole(where, source, "start_paragraph_id", -1, field)
    last = whole(where, source, "end_paragraph_id", first, field)
    if last - first >= MAX_PARAGRAPHS:
        raise DataError(
            f"{where}: {field}.end_paragraph_id: expected fewer than {MAX_PARAGRAPHS} paragraphs after {first}, found "
            f"{last}"
        )
    page = identifier(where, source, "wikipedia_id", f"{field}.wikipedia_id")
    return Source(page, string(where, source, "title", "", f"{field}.title"), first, max(first, last))


def _answered(where: str, question: Question) -> Question:
    """Refuses a question without answers, or with pages that have no id."""
    if not question.answers:
        raise DataError(
            f"{where}: output: expected a list of answers with provenance, found none (KILT's test files have none: "
            "convert a train or dev file)"
        )
    for i, answer in enumerate(question.answers):
        for j, source in enumerate(answer.sources):
            if not source.page:
                raise DataError(f"{where}: output.{i}.provenance.{j}.wikipedia_id: expected a page's id, found None")
    return question


def _sources(question: Question) -> Iterator[Source]:
    return (source for answer in question.answers for source in answer.sources)


def _gold(sources: Iterable[Source], paragraphs: dict[str, list[int]] | None, gold: Gold) -> list[str]:
    ids: dict[str, None] = {}
    for page, _, first, last in sources:
        if paragraphs is None:
            numbers: Iterable[int] = range(first, last + 1) if first >= 0 else ()
        else:
            whole = gold == "page" or first < 0
            numbers = [n for n in paragraphs.get(page, []) if whole or first <= n <= last]
        ids |= {f"kilt:{page}:{number}": None for number in numbers}
    return list(ids)
