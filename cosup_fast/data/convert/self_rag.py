"""Self-RAG's training file to passages and examples (Asai et al. 2024, arXiv 2310.11511)."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from cosup_fast.data.convert.output import Output, named_by_content, read, string
from cosup_fast.data.convert.rows import read_rows
from cosup_fast.data.records import DataError, Example, Passage, validate

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
        example, passages = self_rag_example(where, record, f"selfrag:{number}")
        output.check_passages(where, passages)
        return number, example, passages

    source, counts = Path(source), Counter()
    seen: set[str] = set()
    found = read(source, read_rows(source), convert, counts, "lines", skip=skip_malformed, bar=progress)
    with Output(folder) as output:
        for _, (number, example, passages) in found:
            if example is None:
                counts["without retrieval"] += 1
                continue
            if example.id in seen:
                example = example.model_copy(update={"id": f"{example.id}#{number}"})
            seen.add(example.id)
            output.write("train.jsonl", example)
            output.add_passages(passages)
            counts["examples"] += 1
        if not seen:
            raise DataError(f"{source}: expected examples with [Retrieval] and a [Relevant] paragraph, found none")
        counts["passages"] = output.passages
        output.finish("self-rag", [source], counts)
    return dict(counts)


def self_rag_example(where: str, record: dict[str, Any], name: str) -> tuple[Example | None, list[Passage]]:
    """An example and the passages that it cites; no example where it cites none.

    What follows a paragraph that is [Relevant] is grounded on it, also after [Continue to Use Evidence], unless it is
    marked [No support / Contradictory]; all else is free text.
    """
    instruction, given, text = (string(where, record, key, "") for key in ("instruction", "input", "output"))
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
        "id": string(where, record, "id", name) or name,
        "dataset": string(where, record, "dataset_name", ""),
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
    return named_by_content(where, "selfrag", title.strip(), rest.strip())
