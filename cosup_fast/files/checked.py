"""JSON objects that carry a checksum: their last field, `crc32`, is that of what comes before it."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cosup_fast.files.whole import parse_object, read_bytes, replace_file

FIELD = "crc32"


def with_checksum(text: bytes) -> bytes:
    """The text of a JSON object that has fields, with its checksum as the last one."""
    body = text.rstrip().removesuffix(b"}").rstrip()
    return body + _ending(body)


def check_checksum(text: bytes) -> None:
    """Compares the text of a JSON object with its checksum.

    Raises:
        ValueError: it is not as it was written, or has no checksum.
    """
    body, ending = text[:-_ENDING], text[-_ENDING:]
    if ending != _ending(body):
        raise ValueError("its checksum does not agree, or it has none")


def checked_line(fields: dict[str, Any]) -> bytes:
    """An object as a line of JSON, its checksum as the last field."""
    return with_checksum(json.dumps(fields, ensure_ascii=False).encode()) + b"\n"


def write_checked(path: Path, text: str) -> None:
    """Writes the text of a JSON object with its checksum; the file appears whole."""
    with replace_file(path, binary=True) as file:
        file.write(with_checksum(text.encode()) + b"\n")


def read_checked(path: Path, fields: Iterable[str] = ()) -> dict[str, Any]:
    """The object in a file that `write_checked` wrote, without its checksum; a file without one is read as it is.

    Args:
        path: the file.
        fields: names that the object has to have.

    Raises:
        ValueError: the file cannot be read, was changed, or holds anything else; the message begins with its path.
    """
    text = read_bytes(path)
    return checked(path, text.removesuffix(b"\n"), parse_object(path, text, fields))


def checked(where: object, text: bytes, found: dict[str, Any]) -> dict[str, Any]:
    """The object `found` in a text, without its checksum, if it has one, be it by another name.

    Raises:
        ValueError: the text was changed; the message begins with where it is.
    """
    if FIELD in found or re.fullmatch("[0-9a-f]{8}", str(next(reversed(found.values()), None))):
        try:
            check_checksum(text)
        except ValueError as error:
            raise ValueError(f"{where} is damaged: {error}") from None
    return {name: value for name, value in found.items() if name != FIELD}


def _ending(body: bytes) -> bytes:
    return b', "%s": "%08x"}' % (FIELD.encode(), zlib.crc32(body))


_ENDING = len(_ending(b""))
