"""The records every data file is made of, and reading and writing them as JSONL.

A passage file holds one `Passage` a line, an example file one `Example`. Reading checks everything that a
run would otherwise trip over later; what is wrong is a `DataError` that reads `file:line: field: what was
expected, what was found`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from cosup_fast.data.strict import Strict
from cosup_fast.errors import CosupError
from cosup_fast.files import replace_file


class DataError(CosupError, ValueError):
    """Data that cannot be used; the message says where, what was expected and what was found."""


def field_names(names: Iterable[object]) -> str:
    """The names of fields or columns for a message, on one line, whatever they hold; "nothing" where there are none."""
    return ", ".join(repr(str(name))[1:-1] for name in names) or "nothing"


def nearest(name: str, names: Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the name closest to a mistyped one, or nothing when none is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f", did you mean '{close[0]}'?" if close else ""


def _encodable(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("text", "expected Unicode text, found {value}", {"value": ascii(value)}) from None
    return value


def _nonblank(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("text", "expected some text, found {value}", {"value": repr(value)})
    return value


String = Annotated[str, AfterValidator(_encodable)]
Text = Annotated[String, AfterValidator(_nonblank)]


class _Record(Strict):
    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in data:
                if name not in cls.model_fields:
                    known = ", ".join(cls.model_fields)
                    found = repr(str(name))  # on one line, whatever it holds
                    raise PydanticCustomError(
                        "unknown_field",
                        "expected one of {known}, found {value}{hint}",
                        {
                            "field": found[1:-1],
                            "known": known,
                            "value": found,
                            "hint": nearest(str(name), cls.model_fields),
                        },
                    )
        return data


class Passage(_Record):
    """One entry of the nonparametric index: a sequence that Embseq embeds as `title :: text`."""

    id: Text
    title: String
    text: Text
    topic: String = ""

    @property
    def content(self) -> tuple[str, str]:
        """What is read of it: passages of different ids may be alike."""
        return self.title, self.text


class Segment(_Record):
    """A stretch of Gen's output: grounded on `passage` (an id), or free text when that is None."""

    text: Text
    passage: Text | None = None


class Example(_Record):
    """A question with the output that Gen should write.

    `answers` are gold answers for evaluation, strings or (with `answer_type="regex"`) patterns; `answer_sets` are the
    short answers of a question with several readings (ASQA), a list for each; `gold` are the ids of the passages that
    count as retrieved correctly, by default those the output is grounded on; `gold_sets` are sets of them each of which
    is enough (the outputs of KILT), for R-precision; `negatives` those of passages that do not answer, though they look
    like it: training contrasts with them.

    An output that is grounded on nothing asks for the first gold passage where it begins, if there is one: a question
    with `gold` alone trains retrieval, and free text with `gold` is grounded on that passage as a whole.
    """

    id: Text
    dataset: String = ""
    instruction: String = ""
    question: Text
    output: list[Segment]
    answers: list[Text] = Field(default_factory=list)
    answer_type: Literal["string", "regex"] = "string"
    answer_sets: list[Annotated[list[Text], Field(min_length=1)]] = Field(default_factory=list)
    gold: list[Text] = Field(default_factory=list)
    gold_sets: list[Annotated[list[Text], Field(min_length=1)]] = Field(default_factory=list)
    negatives: list[Text] = Field(default_factory=list)

    @model_validator(mode="after")
    def _answers_and_gold(self) -> Example:
        if self.answer_type == "regex":
            for answer in self.answers:
                try:
                    re.compile(answer)
                except (re.error, RecursionError, OverflowError) as error:
                    raise PydanticCustomError(
                        "regex",
                        "expected a regular expression, found {value}: {reason}",
                        {"field": "answers", "value": repr(answer), "reason": str(error)},
                    ) from None
        if not self.gold:
            of_sets = list(dict.fromkeys(name for names in self.gold_sets for name in names))
            object.__setattr__(self, "gold", of_sets or list(self.cited))
        for number, names in enumerate(self.gold_sets):
            if lost := [name for name in names if name not in self.gold]:
                raise PydanticCustomError(
                    "gold_set",
                    "expected passages that gold lists, too, found {value}",
                    {"field": f"gold_sets.{number}", "value": repr(lost[0])},
                )
        for number, name in enumerate(self.negatives):
            if name in self.gold or name in self.cited:
                raise PydanticCustomError(
                    "negative",
                    "expected a passage that does not answer, found {value}, which is gold or in the output",
                    {"field": f"negatives.{number}", "value": repr(name)},
                )
        return self

    @property
    def cited(self) -> tuple[str, ...]:
        """The ids of the passages that the output is grounded on, each once."""
        return tuple(dict.fromkeys(segment.passage for segment in self.output if segment.passage is not None))

    @property
    def asked(self) -> tuple[str, ...]:
        """The ids of the passages that training asks for, each once: the cited ones, or else the first gold one."""
        return self.cited or tuple(self.gold[:1])


M = TypeVar("M", bound=BaseModel)
R = TypeVar("R", Passage, Example)


def read_passages(path: str | Path) -> list[Passage]:
    """The passages of a JSONL file; ids are unique."""
    return [passage for _, passage in _read(Path(path), Passage)]


def read_examples(
    path: str | Path, passages: Collection[str] | None, allow_no_retrieval: bool = False
) -> list[Example]:
    """The examples of a JSONL file; ids are unique and every passage named is one of `passages`, if given.

    An example with neither a grounded segment nor a gold passage teaches no retrieval and is refused unless
    `allow_no_retrieval`.
    """
    examples = []
    for where, example in _read(Path(path), Example):
        check_example(where, example, passages, allow_no_retrieval)
        examples.append(example)
    return examples


def check_example(where: str, example: Example, passages: Collection[str] | None, allow_no_retrieval: bool) -> None:
    """Raises `DataError` unless the example retrieves and names known passages only."""
    named = [(f"output.{i}.passage", s.passage) for i, s in enumerate(example.output) if s.passage is not None]
    if not example.asked and not allow_no_retrieval:
        raise DataError(
            f"{where}: output: expected at least one segment with a passage, or a gold passage, found none "
            "(allow_no_retrieval=True keeps such examples)"
        )
    if passages is not None:
        for kind in ("gold", "negatives"):
            named += [(f"{kind}.{i}", name) for i, name in enumerate(getattr(example, kind))]
        for field, name in named:
            if name not in passages:
                raise DataError(f"{where}: {field}: expected the id of a passage in the corpus, found {name!r}")


def write_jsonl(path: str | Path, records: Iterable[BaseModel]) -> None:
    """Writes one record a line, defaults left out; the file appears whole or not at all."""
    with replace_file(path) as file:
        for record in records:
            file.write(to_line(record))


def to_line(record: BaseModel) -> str:
    """A record as a line of JSON, defaults left out."""
    return json.dumps(record.model_dump(exclude_defaults=True), ensure_ascii=False) + "\n"


def validate(where: str, kind: type[M], data: Any) -> M:
    """The record that `data` describes, or a `DataError` that begins with `where`."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise DataError(f"{where}: {_describe(error)}") from None


def parse(where: str, line: bytes, kind: type[M]) -> M:
    """The record in one line of a JSONL file, or a `DataError` that begins with `where`."""
    return validate(where, kind, parse_object(where, line))


def parse_object(where: str, line: bytes) -> dict[str, Any]:
    """The JSON object in one line of a file (a byte order mark may come first), or a `DataError`."""
    try:
        data = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: expected UTF-8, found byte 0x{error.object[error.start]:02x}") from None
    except (ValueError, RecursionError) as error:
        found = _short(line.decode("utf-8-sig").strip())
        raise DataError(f"{where}: expected one JSON object, found {found} ({error})") from None
    if not isinstance(data, dict):
        raise DataError(f"{where}: expected one JSON object, found {_short(data)}")
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def lines(path: str | Path, on_line: Callable[[bytes], object] | None = None) -> Iterator[tuple[int, int, bytes]]:
    """The lines of a file that are not blank, one at a time: line number from 1, byte offset, the line.

    Args:
        path: the file.
        on_line: called with every line, blank ones included.
    """
    path, offset = Path(path), 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if on_line is not None:
                    on_line(line)
                if line.strip():
                    yield number, offset, line
                offset += len(line)
    except OSError as error:
        raise DataError(f"{path}: expected a JSONL file, found none: {error.strerror}") from None


def _read(path: Path, kind: type[R]) -> Iterator[tuple[str, R]]:
    seen: dict[str, int] = {}
    for number, _, line in lines(path):
        where = f"{path}:{number}"
        record = parse(where, line, kind)
        if record.id in seen:
            raise DataError(f"{where}: id: expected a new id, found {record.id!r} of line {seen[record.id]} again")
        seen[record.id] = number
        yield where, record
    if not seen:
        raise DataError(f"{path}: expected at least one {kind.__name__.lower()}, found an empty file")


def _describe(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    context = first.get("ctx", {})
    field = ".".join([*map(str, first["loc"]), *filter(None, [context.get("field")])])
    match first["type"]:
        case "missing":
            return f"{field}: expected a value, found only {field_names(first['input'])}"
        case "unknown_field" | "text" | "regex" | "negative" | "gold_set":
            return f"{field}: {first['msg']}"
        case _:
            return f"{field}: {_EXPECTED.get(first['type'], first['msg'])}, found {_short(first['input'])}"


_EXPECTED = {
    "string_type": "expected a string",
    "list_type": "expected a list",
    "too_short": "expected at least one entry",
    "literal_error": "expected 'string' or 'regex'",
    "model_type": "expected an object",
}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
