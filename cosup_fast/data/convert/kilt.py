"""KILT's tasks and its knowledge source to examples and passages (Petroni et al. 2021, arXiv 2009.02252)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from cosup_fast.data.convert.output import PASSAGES, Output, check_names, read, string, whole
from cosup_fast.data.convert.rows import read_rows
from cosup_fast.data.records import DataError, Example, Passage, Segment, validate

MAX_PARAGRAPHS = 10_000  # of one piece of evidence; no page of KILT has as many
Gold = Literal["paragraph", "page"]
Provenance = tuple[str, int, int]
"""A page's id, and its first and last paragraph that count; -1 where only the page is known."""
Answer = tuple[str, list[Provenance]]
"""An answer and where it comes from."""


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
    questions: dict[Path, list[tuple[str, Example, list[Provenance], list[Answer]]]] = {}
    for task in tasks:

        def question(where: str, number: int, record: dict[str, Any], task: Path = task):
            return kilt_question(where, record, task.name.split("-")[0], f"{task.stem}:{number}")

        found = read(task, read_rows(task), question, counts, "questions", skip=skip_malformed, bar=progress)
        questions[task] = [(where, *question) for where, question in found]
    cited = {page for found in questions.values() for _, _, provenance, _ in found for page, _, _ in provenance}
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
            for where, example, provenance, answers in found:
                if example.id in seen:
                    raise DataError(f"{where}: id: expected a new id, found {example.id!r} again")
                seen.add(example.id)
                ids = _gold(provenance, paragraphs, gold)
                counts["without a gold passage"] += not ids
                example = example.model_copy(update={"gold": ids})
                if for_training:
                    of_answers = ((text, _gold(sources, paragraphs, gold)) for text, sources in answers)
                    grounded = next(((text, names[0]) for text, names in of_answers if names), None)
                    if grounded is None:
                        counts["left out"] += 1
                        continue
                    segment = Segment(text=grounded[0], passage=grounded[1])
                    example = example.model_copy(update={"output": [segment]})
                output.write(task.name, example)
        output.finish("kilt", [*tasks, *([Path(knowledge)] if knowledge is not None else [])], counts)
    return dict(counts)


def kilt_question(
    where: str, record: dict[str, Any], dataset: str, name: str
) -> tuple[Example, list[Provenance], list[Answer]]:
    """An example without its gold ids, where they come from, and the same for each answer."""
    question = string(where, record, "input", "")
    if not question.strip():
        raise DataError(
            f"{where}: input: expected a question, found {question!r} (KILT's TriviaQA files have none before they are "
            "joined with TriviaQA's own)"
        )
    outputs = record.get("output")
    if not isinstance(outputs, list) or not all(isinstance(output, dict) for output in outputs) or not outputs:
        raise DataError(
            f"{where}: output: expected a list of answers with provenance, found {outputs!r:.60} (KILT's test files "
            "have none: convert a train or dev file)"
        )
    answers: dict[str, None] = {}
    provenance: dict[Provenance, None] = {}
    of_answers: list[Answer] = []
    for i, output in enumerate(outputs):
        answer = string(where, output, "answer", "", f"output.{i}.answer")
        if answer.strip():
            answers[answer] = None
        own: list[Provenance] = []
        sources = output.get("provenance") or []
        if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
            raise DataError(f"{where}: output.{i}.provenance: expected a list of objects, found {sources!r:.60}")
        for j, source in enumerate(sources):
            field = f"output.{i}.provenance.{j}"
            page = source.get("wikipedia_id")
            if not isinstance(page, str | int) or isinstance(page, bool) or not str(page).strip():
                raise DataError(f"{where}: {field}.wikipedia_id: expected a page's id, found {page!r:.60}")
            first = whole(where, source, "start_paragraph_id", -1, field)
            last = whole(where, source, "end_paragraph_id", first, field)
            if last - first >= MAX_PARAGRAPHS:
                raise DataError(
                    f"{where}: {field}.end_paragraph_id: expected fewer than {MAX_PARAGRAPHS} paragraphs after "
                    f"{first}, found {last}"
                )
            own.append((str(page), first, max(first, last)))
        provenance |= dict.fromkeys(own)
        if answer.strip():
            of_answers.append((answer, own))
    example = {
        "id": str(record.get("id") or name),
        "dataset": dataset,
        "question": question,
        "output": [],
        "answers": list(answers),
    }
    return validate(where, Example, example), list(provenance), of_answers


def kilt_page(where: str, record: dict[str, Any]) -> tuple[str, dict[int, Passage]]:
    """A page's id, and its passages by the number of their paragraph; its title and headings are none."""
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


def _gold(provenance: Iterable[Provenance], paragraphs: dict[str, list[int]] | None, gold: Gold) -> list[str]:
    ids: dict[str, None] = {}
    for page, first, last in provenance:
        if paragraphs is None:
            numbers: Iterable[int] = range(first, last + 1) if first >= 0 else ()
        else:
            whole = gold == "page" or first < 0
            numbers = [n for n in paragraphs.get(page, []) if whole or first <= n <= last]
        ids |= {f"kilt:{page}:{number}": None for number in numbers}
    return list(ids)
