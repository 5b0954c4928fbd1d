"""What `cosup-fast generate` does: questions from arguments and files, answers to a terminal as they come, or JSONL.

Answers come out in the order of the questions. On a terminal the first that has not ended is shown piece by piece;
those after it are written at the same time and shown when it is their turn.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cosup_fast.data.records import DataError, String, Text, parse, validate
from cosup_fast.files import naming, open_new
from cosup_fast.generation.answer import Answer
from cosup_fast.generation.generator import Generator
from cosup_fast.generation.request import Request


class Question(BaseModel):
    """A line of a JSONL file of questions; an example file will do, what else its lines hold is left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str | int | None = None
    question: Text
    instruction: String = ""


def read_questions(arguments: Sequence[str], files: Sequence[str]) -> list[Question]:
    """Questions of the command line, then those of files: *.jsonl, or one question a line; - is standard input.

    Raises:
        DataError: a file that cannot be read, or a line that is not a question.
        ValueError: no question at all.
    """
    questions = [validate("the question", Question, {"question": text}) for text in arguments]
    for name in files:
        try:
            text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8-sig")
        except OSError as error:
            raise DataError(f"{name}: expected a file of questions, found none: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{name}: expected UTF-8: {error.reason} at byte {error.start}") from None
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            where = f"{name}:{number}"
            if name.endswith(".jsonl"):
                questions.append(parse(where, line.encode(errors="surrogateescape"), Question))
            else:
                questions.append(validate(where, Question, {"question": line.strip()}))
    if not questions:
        empty = f": {', '.join(files)} holds none" if files else ""
        raise ValueError(f"no question was given{empty}: name one or more, or a file with --file")
    return questions


def answer_questions(
    generator: Generator,
    questions: Sequence[Question],
    *,
    out: Console,
    err: Console,
    as_json: bool = False,
    output: Path | None = None,
) -> int:
    """Answers the questions and shows or writes what comes of it; returns how many could not be answered.

    Args:
        generator: answers them.
        questions: in the order of the answers.
        out: where answers are shown, or JSON lines go.
        err: progress and errors.
        as_json: one JSON object a line: id, question, and the fields of `Answer`.
        output: a file for these lines, which appears when it is complete; until then they are in `<output>.partial`,
            which is kept when the work is interrupted.
    """
    lines = as_json or output is not None
    with ExitStack() as stack:
        partial = None if output is None else output.with_name(output.name + ".partial")
        file: IO[str] | None = None
        if partial is not None:
            partial.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(naming(partial))
            file = stack.enter_context(open_new(partial))
        shown = _Lines(questions, file or sys.stdout) if lines else _Shown(questions, out)
        progress = stack.enter_context(_progress(err, disable=not lines or (as_json and out.is_terminal)))
        bar = progress.add_task("Answering", total=len(questions), speed="")
        tokens = 0

        def on_answer(number: int, answer: Answer) -> None:
            nonlocal tokens
            tokens += answer.generated_tokens
            shown.answer(number, answer)
            elapsed = progress.tasks[0].elapsed or 0
            progress.update(bar, advance=1, speed=f"{tokens / elapsed:.0f} tokens/s" if elapsed else "")

        try:
            answers = generator.generate_all(
                [Request(question.question, question.instruction) for question in questions],
                on_text=shown.text,
                on_answer=on_answer,
            )
        except KeyboardInterrupt:
            done = shown.rest()
            where = f", they are in {partial}" if partial is not None else ""
            raise KeyboardInterrupt(f"{done} of {len(questions)} questions are answered{where}") from None
        if file is not None and partial is not None and output is not None:
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, output)
    failed = [number for number, answer in enumerate(answers) if answer.error is not None]
    for number in failed:
        err.print("[red]error:[/] ", end="")
        text = f"{questions[number].question[:60]!r} has no complete answer: {answers[number].error}"
        err.print(text, markup=False, highlight=False, soft_wrap=True)
    return len(failed)


def print_answer(console: Console, question: str, answer: Answer) -> None:
    """Shows an answer with what was retrieved for it."""
    _print_question(console, question)
    console.print(answer.text.strip() or "(nothing)", markup=False, highlight=False)
    _print_retrievals(console, answer)


class _Lines:
    """JSON lines, in order."""

    def __init__(self, questions: Sequence[Question], file: IO[str]):
        self._questions = questions
        self._file = file
        self._waiting: dict[int, Answer] = {}
        self._next = 0
        self._written = 0

    def text(self, number: int, piece: str) -> None:
        """Nothing is shown before an answer is complete."""

    def answer(self, number: int, answer: Answer) -> None:
        self._waiting[number] = answer
        while self._next in self._waiting:
            self._write(self._next)
            self._next += 1

    def rest(self) -> int:
        """Writes what waits for its turn; how many answers were written in all."""
        for number in sorted(self._waiting):
            self._write(number)
        return self._written

    def _write(self, number: int) -> None:
        question = self._questions[number]
        name = {} if question.id is None else {"id": question.id}
        row = {**name, "question": question.question, **self._waiting.pop(number).model_dump()}
        # ASCII for standard output, whose encoding may lack a character.
        self._file.write(json.dumps(row, ensure_ascii=self._file is sys.stdout) + "\n")
        self._file.flush()
        self._written += 1


class _Shown:
    """Questions and answers for people, the first that has not ended piece by piece."""

    def __init__(self, questions: Sequence[Question], console: Console):
        self._questions = questions
        self._console = console
        self._texts: dict[int, str] = {}
        self._ended: dict[int, Answer] = {}
        self._next = 0
        self._begun = False

    def text(self, number: int, piece: str) -> None:
        self._texts[number] = self._texts.get(number, "") + piece
        if number == self._next:
            self._show()

    def answer(self, number: int, answer: Answer) -> None:
        self._ended[number] = answer
        while self._next in self._ended:
            self._show()
            ended = self._ended.pop(self._next)
            self._console.print("" if ended.text.strip() else "(nothing)", highlight=False)
            _print_retrievals(self._console, ended)
            self._next, self._begun = self._next + 1, False
        if self._next in self._texts:
            self._show()

    def rest(self) -> int:
        """How many answers were shown; what is half shown ends its line."""
        if self._begun:
            self._console.print()
        return self._next

    def _show(self) -> None:
        """What there is of the next answer."""
        if not self._begun:
            _print_question(self._console, self._questions[self._next].question)
            self._begun = True
            self._texts[self._next] = self._texts.get(self._next, "").lstrip()
        self._console.print(self._texts.get(self._next, ""), end="", markup=False, highlight=False, soft_wrap=True)
        self._texts[self._next] = ""


def _print_question(console: Console, question: str) -> None:
    console.print(f"[bold]Q[/] {escape(question)}", highlight=False)
    console.print("[bold]A[/] ", end="")


def _print_retrievals(console: Console, answer: Answer) -> None:
    for retrieval in answer.retrievals:
        console.print(
            f"  [dim]retrieved ({retrieval.best.score:.3f})[/] {escape(retrieval.best.title)}", highlight=False
        )


def _progress(console: Console, disable: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=disable)
