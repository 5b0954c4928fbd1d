"""Published files to ours: Self-RAG's training file, KILT's tasks and its knowledge source.

The forms that are read are in docs/data.md. A conversion reads line by line and writes a folder that appears whole or
not at all; a line that does not have its form is a `DataError` with its number, or is counted and left out when
malformed lines are to be skipped. Sources: Asai et al. 2024, arXiv 2310.11511; Petroni et al. 2021, arXiv 2009.02252.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Self, TextIO, TypeVar

from pydantic import BaseModel
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from cosup_fast.data.records import DataError, Example, Passage, lines, parse_object, to_line, validate
from cosup_fast.files import FolderKind, replace_folder, sha256
from cosup_fast.terminal import SafeConsole

CONVERTED = FolderKind("converted data", "converted.json", frozenset({"form", "sources", "counts", "files"}))
PASSAGES = "passages.jsonl"
MAX_PARAGRAPHS = 10_000  # of one piece of evidence; no page of KILT has as many
Gold = Literal["paragraph", "page"]
Provenance = tuple[str, int, int]
"""A page's id, and its first and last paragraph that count; -1 where only the page is known."""
T = TypeVar("T")

_NO_SUPPORT = "[No support / Contradictory]"
_MARKS = (
    "[No Retrieval]", "[Retrieval]", "[Continue to Use Evidence]", "[Relevant]", "[Irrelevant]",
    "[Fully supported]", "[Partially supported]", _NO_SUPPORT,
    "[Utility:1]", "[Utility:2]", "[Utility:3]", "[Utility:4]", "[Utility:5]",
)  # fmt: skip
_PIECES = re.compile(
    r"(<paragraph>(?:(?!<paragraph>).)*?</paragraph>|" + "|".join(map(re.escape, _MARKS)) + ")", re.DOTALL
)


def convert_self_rag(
    source: str | Path, folder: str | Path, *, skip_malformed: bool = False, progress: bool = True
) -> dict[str, int]:
    """Self-RAG's training file to `passages.jsonl` and `train.jsonl`; only what retrieves is kept.

    Args:
        source: the JSONL file.
        folder: where to write.
        skip_malformed: leave malformed lines out, with their numbers on stderr, instead of stopping.
        progress: show a progress bar on stderr.

    Returns:
        How many lines were read, and what became of them.

    Raises:
        DataError: a malformed line, or a file in which nothing retrieves.
    """

    def convert(where: str, number: int, record: dict[str, Any]) -> tuple[int, Example | None, list[Passage]]:
        return number, *self_rag_example(where, record, f"selfrag:{number}")

    source, counts = Path(source), Counter()
    seen: set[str] = set()
    known: set[str] = set()
    with _Output(folder) as output:
        for _, (number, example, passages) in _read(source, convert, counts, "lines", skip_malformed, progress):
            if example is None:
                counts["without retrieval"] += 1
                continue
            if example.id in seen:
                example = example.model_copy(update={"id": f"{example.id}#{number}"})
            seen.add(example.id)
            output.write("train.jsonl", example)
            for passage in passages:
                if passage.id not in known:
                    known.add(passage.id)
                    output.write(PASSAGES, passage)
            counts["examples"] += 1
        if not seen:
            raise DataError(f"{source}: expected examples with [Retrieval] and a [Relevant] paragraph, found none")
        counts["passages"] = len(known)
        output.finish("self-rag", [source], counts)
    return dict(counts)


def self_rag_example(where: str, record: dict[str, Any], name: str) -> tuple[Example | None, list[Passage]]:
    """An example and the passages that it cites; no example where it cites none.

    What follows a paragraph that is [Relevant] is grounded on it, also after [Continue to Use Evidence], unless it is
    marked [No support / Contradictory]; all else is free text.
    """
    instruction, given, text = (_string(where, record, key, "") for key in ("instruction", "input", "output"))
    if not instruction.strip():
        raise DataError(f"{where}: instruction: expected some text, found {instruction!r}")
    if not text.strip():
        raise DataError(f"{where}: output: expected some text, found {text!r}")
    written: list[tuple[str, Passage | None]] = []
    current: Passage | None = None
    grounds = False
    for piece in _PIECES.split(text):
        if piece.startswith("<paragraph>") and piece.endswith("</paragraph>"):
            current, grounds = _paragraph(where, piece[len("<paragraph>") : -len("</paragraph>")]), False
        elif piece in ("[Relevant]", "[Continue to Use Evidence]"):
            if piece == "[Relevant]" and current is None:
                raise DataError(f"{where}: output: expected a <paragraph> before [Relevant], found none")
            relevant = piece == "[Relevant]" or any(passage is current for _, passage in written)
            grounds = current is not None and relevant
        elif piece in ("[Irrelevant]", "[No Retrieval]"):
            grounds = False
        elif piece == "[Retrieval]":
            current, grounds = None, False
        elif piece == _NO_SUPPORT:
            if written:
                written[-1] = (written[-1][0], None)
        elif piece not in _MARKS and piece.strip():
            if "<paragraph>" in piece or "</paragraph>" in piece:
                raise DataError(f"{where}: output: expected <paragraph> and </paragraph> in pairs, found one alone")
            apart = written and not written[-1][0][-1:].isspace() and not piece[0].isspace()
            written.append((" " * bool(apart) + piece, current if grounds else None))
    segments: list[dict[str, str]] = []
    before: Passage | None = None
    for piece, passage in written:
        if segments and passage is before:
            segments[-1]["text"] += piece
        else:
            segments.append({"text": piece, **({"passage": passage.id} if passage else {})})
        before = passage
    cited = [passage for _, passage in written if passage is not None]
    if not cited:
        return None, []
    example = {
        "id": _string(where, record, "id", name) or name,
        "dataset": _string(where, record, "dataset_name", ""),
        "instruction": f"{instruction}\n\n" if given.strip() else "",
        "question": given if given.strip() else instruction,
        "output": segments,
    }
    return validate(where, Example, example), cited


def _paragraph(where: str, text: str) -> Passage:
    title, separator, rest = text.strip().partition("\n")
    if not separator:
        title, rest = "", title
    if not rest.strip():
        raise DataError(f"{where}: output: expected some text in <paragraph>, found {text!r}")
    title, rest = title.strip(), rest.strip()
    digest = hashlib.sha256(f"{title}\n{rest}".encode(errors="surrogatepass")).hexdigest()
    return validate(where, Passage, {"id": f"selfrag:{digest[:16]}", "title": title, "text": rest})


def convert_kilt(
    tasks: Sequence[str | Path],
    folder: str | Path,
    *,
    knowledge: str | Path | None = None,
    gold: Gold = "paragraph",
    skip_malformed: bool = False,
    progress: bool = True,
) -> dict[str, int]:
    """KILT's tasks to questions, a file each, and its knowledge source to `passages.jsonl`, a passage a paragraph.

    Args:
        tasks: the JSONL files, such as nq-dev-kilt.jsonl; none converts the knowledge source alone.
        folder: where to write.
        knowledge: kilt_knowledgesource.json. Without it no passages are written, and gold ids are taken as they are.
        gold: which passages count as retrieved correctly: the provenance's own paragraphs, or all of its pages.
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
    written = Counter([PASSAGES, CONVERTED.marker, *(task.name for task in tasks)])
    if repeated := [name for name, count in written.items() if count > 1]:
        raise DataError(f"kilt: {repeated[0]!r} would be the name of several files that are written: rename one")
    counts: Counter[str] = Counter()
    questions: dict[Path, list[tuple[str, Example, list[Provenance]]]] = {}
    for task in tasks:

        def question(where: str, number: int, record: dict[str, Any], task: Path = task):
            return kilt_question(where, record, task.name.split("-")[0], f"{task.stem}:{number}")

        found = _read(task, question, counts, "questions", skip_malformed, progress)
        questions[task] = [(where, example, provenance) for where, (example, provenance) in found]
    cited = {page for found in questions.values() for _, _, provenance in found for page, _, _ in provenance}
    paragraphs: dict[str, list[int]] | None = None
    with _Output(folder) as output:
        if knowledge is not None:
            paragraphs = {}
            pages = _read(Path(knowledge), lambda w, _, r: kilt_page(w, r), counts, "pages", skip_malformed, progress)
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
            for where, example, provenance in found:
                if example.id in seen:
                    raise DataError(f"{where}: id: expected a new id, found {example.id!r} again")
                seen.add(example.id)
                ids = _gold(provenance, paragraphs, gold)
                counts["without a gold passage"] += not ids
                output.write(task.name, example.model_copy(update={"gold": ids}))
        output.finish("kilt", [*tasks, *([Path(knowledge)] if knowledge is not None else [])], counts)
    return dict(counts)


def kilt_question(where: str, record: dict[str, Any], dataset: str, name: str) -> tuple[Example, list[Provenance]]:
    """An example without its gold ids, and where they come from."""
    question = _string(where, record, "input", "")
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
    for i, output in enumerate(outputs):
        answer = _string(where, output, "answer", "", f"output.{i}.answer")
        if answer.strip():
            answers[answer] = None
        sources = output.get("provenance") or []
        if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
            raise DataError(f"{where}: output.{i}.provenance: expected a list of objects, found {sources!r:.60}")
        for j, source in enumerate(sources):
            field = f"output.{i}.provenance.{j}"
            page = source.get("wikipedia_id")
            if not isinstance(page, str | int) or isinstance(page, bool) or not str(page).strip():
                raise DataError(f"{where}: {field}.wikipedia_id: expected a page's id, found {page!r:.60}")
            first = _whole(where, source, "start_paragraph_id", -1, field)
            last = _whole(where, source, "end_paragraph_id", first, field)
            if last - first >= MAX_PARAGRAPHS:
                raise DataError(
                    f"{where}: {field}.end_paragraph_id: expected fewer than {MAX_PARAGRAPHS} paragraphs after "
                    f"{first}, found {last}"
                )
            provenance[str(page), first, max(first, last)] = None
    example = {
        "id": str(record.get("id") or name),
        "dataset": dataset,
        "question": question,
        "output": [],
        "answers": list(answers),
    }
    return validate(where, Example, example), list(provenance)


def kilt_page(where: str, record: dict[str, Any]) -> tuple[str, dict[int, Passage]]:
    """A page's id, and its passages by the number of their paragraph; its title and headings are none."""
    page = record.get("wikipedia_id", record.get("_id"))
    if not isinstance(page, str | int) or isinstance(page, bool) or not str(page).strip():
        raise DataError(f"{where}: wikipedia_id: expected a page's id, found {page!r:.60}")
    title = _string(where, record, "wikipedia_title", None)
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


def _string(where: str, record: dict[str, Any], key: str, default: str | None, field: str = "") -> str:
    value = record.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise DataError(f"{where}: {field or key}: expected a string, found {value!r:.60}")
    return value


def _whole(where: str, record: dict[str, Any], key: str, default: int, field: str) -> int:
    value = record.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"{where}: {field}.{key}: expected a whole number, found {value!r:.60}")
    return value


def _read(
    path: Path, convert: Callable[[str, int, dict[str, Any]], T], counts: Counter[str], what: str, skip: bool, bar: bool
) -> Iterator[tuple[str, T]]:
    """What `convert` makes of each line, and where it stood; malformed lines stop it, or are shown and counted."""
    console = SafeConsole(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not bar) as progress:
        task = progress.add_task(path.name, total=path.stat().st_size if path.is_file() else None)
        for number, offset, line in lines(path):
            where = f"{path}:{number}"
            try:
                converted = convert(where, number, parse_object(where, line))
            except DataError as error:
                if not skip:
                    raise
                console.print(f"left out: {error}", markup=False, highlight=False, soft_wrap=True)
                counts["malformed"] += 1
                continue
            counts[what] += 1
            progress.update(task, completed=offset + len(line))
            yield where, converted


class _Output:
    """JSONL files in a folder that takes its place at the end, with a note of what it was made of."""

    def __init__(self, folder: str | Path):
        self._target = folder
        self._files: dict[str, TextIO] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._folder = stack.enter_context(replace_folder(self._target, CONVERTED))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def write(self, name: str, record: BaseModel) -> None:
        if name not in self._files:
            file = (self._folder / name).open("w", encoding="utf-8", newline="\n")
            self._files[name] = self._open.enter_context(file)
        self._files[name].write(to_line(record))

    def finish(self, form: str, sources: Sequence[Path], counts: Counter[str]) -> None:
        made_of = {source.name: sha256(source) for source in sources}
        note = {"form": form, "sources": made_of, "counts": dict(counts), "files": sorted(self._files)}
        (self._folder / CONVERTED.marker).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
