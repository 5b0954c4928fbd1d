"""The report as one HTML file: tables, and for each question what was retrieved and why it counted or not.

It loads nothing, runs no script and escapes all text; `report.html` beside this file is its template.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cosup_fast.data.answers import answer_spans
from cosup_fast.data.records import Example
from cosup_fast.evaluation.metrics import is_gold, normalize, require
from cosup_fast.evaluation.report import QuestionRecord, Report, figure, shown
from cosup_fast.evaluation.suites import METRICS, SUMMARY
from cosup_fast.files import replace_file

HTML = "report.html"

SHOWN = 1000
"""Most questions in the file; `report.json` has all."""


ANSWERS = 8
"""Most gold answers shown for a question: TriviaQA has dozens of spellings."""


def page_template(path: Path) -> Any:
    """A jinja2 template of a page, which escapes every value and refuses unknown names.

    Raises:
        ImportError: jinja2 is not installed.
    """
    jinja2 = require("jinja2", "jinja2")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(path.read_text(encoding="utf-8"))


def render(report: Report) -> str:
    """The HTML of a report.

    Raises:
        ImportError: jinja2 is not installed.
    """
    retrieval = {part.dataset: part.retrieval for part in report.datasets}
    columns = [name for name in METRICS if any(name in part.metrics for part in report.datasets)]
    return page_template(Path(__file__).parent / "report.html").render(
        report=report,
        columns=columns,
        extra=[name for name in ("grounded", "perplexity") if name in columns],
        metrics=METRICS,
        summary=SUMMARY,
        shown=lambda name, value: shown(name, value).split("\n"),
        figure=figure,
        questions=[_question(record, retrieval[record.example.dataset]) for record in report.questions[:SHOWN]],
        titles={**SUMMARY, **{name: metric.title for name, metric in METRICS.items()}},
        most=SHOWN,
    )


def write_html(report: Report, folder: str | Path) -> None:
    """Writes `report.html` into a folder; it appears whole.

    Raises:
        ImportError: jinja2 is not installed.
    """
    page = render(report)
    with replace_file(Path(folder) / HTML) as file:
        file.write(page)


def _question(record: QuestionRecord, retrieval: str) -> dict[str, Any]:
    example, scores = record.example, record.scores
    right = scores.get("correctness")
    answers = [*example.answers, *(" / ".join(answers) for answers in example.answer_sets)]
    if example.answer_type == "string":
        spellings: dict[str, str] = {}
        for answer in answers:
            spellings.setdefault(normalize(answer) or answer, answer)
        answers = list(spellings.values())
    return {
        "record": record,
        "example": example,
        "found": scores.get("retrieval"),
        "right": right,
        "grounded": scores.get("grounded"),
        "filter": "unknown" if right is None else "right" if right >= 0.5 else "wrong",
        "segments": list(_segments(record)),
        "retrievals": list(_retrievals(record)),
        "answers": answers[:ANSWERS],
        "more_answers": len(answers[ANSWERS:]),
        "scores": [(name, figure(name, value).removesuffix(".0")) for name, value in scores.items()],
        "retrieval": METRICS[retrieval].title,
    }


def _segments(record: QuestionRecord) -> Iterator[dict[str, Any]]:
    verdicts = iter(record.verdicts)
    cited = 0
    for segment in record.answer.segments:
        grounded = segment.passage is not None
        cited += grounded
        yield {
            "pieces": _marked(segment.text, record.example),
            "number": cited if grounded else None,
            "verdict": next(verdicts, None) if grounded else None,
        }


def _retrievals(record: QuestionRecord) -> Iterator[dict[str, Any]]:
    example = record.example
    for number, found in enumerate(record.answer.retrievals, 1):
        passage = record.evidence[found.best.passage]
        title, text = _marked(passage.title, example), _marked(passage.text, example)
        reasons = []
        if example.gold:
            is_one = is_gold(passage.id, example.gold) is not None
            reasons.append((is_one, "gold passage" if is_one else "not a gold passage"))
        if example.answers or example.answer_sets:
            holds = any(marked for _, marked in (*title, *text))
            reasons.append((holds, "holds a gold answer" if holds else "no gold answer in it"))
        yield {
            "number": number,
            "score": found.best.score,
            "id": passage.id,
            "title": title,
            "text": text,
            "reasons": reasons,
            "others": [(c, is_gold(c.passage, example.gold) is not None) for c in found.candidates[1:]],
        }


def _marked(text: str, example: Example) -> list[tuple[str, bool]]:
    """A text in pieces, those that are a gold answer marked."""
    pieces, start = [], 0
    for begin, end in answer_spans(text, example):
        pieces += [(text[start:begin], False), (text[begin:end], True)]
        start = end
    return [(piece, marked) for piece, marked in [*pieces, (text[start:], False)] if piece]
