"""JSON objects that carry a checksum: their last field, `crc32`, is that of what comes before it."""

from __future__ import annotations

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
    found = parse_object(path, text, fields)
    if FIELD in found:
        del found[FIELD]
        try:
            check_checksum(text.removesuffix(b"\n"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
    return found


def _ending(body: bytes) -> bytes:
    return b', "%s": "%08x"}' % (FIELD.encode(), zlib.crc32(body))


_ENDING = len(_ending(b""))
