"""Files and folders that appear whole or not at all: written under another name, flushed to disk, then renamed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flushes a file, or a folder's list of names, to disk."""
    if os.name == "nt":  # neither can be flushed there through a handle that only reads
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replace_file(path: str | Path) -> Iterator[TextIO]:
    """A text file to write into, which takes the place of `path` once all of it is on disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replace_folder(folder: str | Path, marker: str) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` once all of it is on disk.

    Args:
        folder: where the result should stand; an earlier result there is replaced.
        marker: the file by which an earlier result is known.

    Raises:
        ValueError: `folder` is a file, or holds files but no `marker`.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not (folder / marker).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} holds something else, it has no {marker}: give a new or an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder.parent, folder.name)
    temporary, earlier = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    temporary.mkdir()
    try:
        yield temporary
        for path in sorted(temporary.rglob("*"), reverse=True):
            sync(path)
        sync(temporary)
        # A folder with files cannot be renamed over: the earlier one steps aside, and back if the rename fails.
        if folder.exists():
            shutil.rmtree(earlier, ignore_errors=True)
            folder.rename(earlier)
        try:
            temporary.rename(folder)
        except OSError:
            if earlier.exists():
                earlier.rename(folder)
            raise
        sync(folder.parent)
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_unfinished(parent: Path, name: str) -> None:
    """Removes what killed writers of `parent / name` (a pattern) left behind."""
    for leftover in parent.glob(f".{name}.*.new"):
        shutil.rmtree(leftover, ignore_errors=True)
