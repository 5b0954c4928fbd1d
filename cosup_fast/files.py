"""Files and folders that appear whole or not at all: written under another name, flushed to disk, then renamed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


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


def check_writable(path: str | Path) -> Path:
    """The path of a file that `replace_file` may write; long work asks this before it begins.

    Raises:
        ValueError: the folder that is to hold it does not exist, or `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path.parent} is no folder: make it first, or name another file")
    return path


def check_replaceable(folder: str | Path, marker: str) -> Path:
    """The absolute path of a folder that `replace_folder` may write; long work asks this before it begins.

    Raises:
        ValueError: `folder` is a file, or holds files but no `marker`.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not (folder / marker).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} holds something else, it has no {marker}: give a new or an empty folder")
    return folder


@contextmanager
def replace_folder(folder: str | Path, marker: str) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` once all of it is on disk.

    One writer at a time in the folder above; another one waits. What a killed writer left is removed, or put back if it
    was the only copy.

    Args:
        folder: where the result should stand; an earlier result there is replaced.
        marker: the file by which an earlier result is known.

    Raises:
        ValueError: `folder` is a file, or holds files but no `marker`.
    """
    folder = check_replaceable(folder, marker)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.new")
    with locked(folder.parent):
        _recover(folder)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        try:
            yield new
            for path in sorted(new.rglob("*"), reverse=True):
                sync(path)
            _install(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def install_folder(new: Path, folder: str | Path, marker: str) -> None:
    """Puts a finished folder, whose files are on disk, in the place of `folder`, as `replace_folder` does."""
    folder = check_replaceable(folder, marker)
    with locked(folder.parent):
        _recover(folder)
        _install(new, folder)


def _recover(folder: Path) -> None:
    earlier = folder.with_name(f".{folder.name}.old")
    if earlier.exists() and not folder.exists():
        earlier.rename(folder)
    shutil.rmtree(earlier, ignore_errors=True)


def _install(new: Path, folder: Path) -> None:
    """A folder with files cannot be renamed over: the earlier one steps aside, and back if that is all there is."""
    earlier = folder.with_name(f".{folder.name}.old")
    sync(new)
    try:
        if folder.exists():
            folder.rename(earlier)
        new.rename(folder)
    except BaseException:
        if earlier.exists() and not folder.exists():
            earlier.rename(folder)
        raise
    sync(folder.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def remove_unfinished(parent: Path, name: str) -> None:
    """Removes what killed writers of `parent / name` (a pattern) left behind."""
    if leftovers := list(parent.glob(f".{name}.new")):
        with locked(parent):
            for leftover in leftovers:
                shutil.rmtree(leftover, ignore_errors=True)


def remove_unwritten(folder: Path) -> None:
    """Removes the files and folders under temporary names that killed writers left in a folder, at any depth."""
    for leftover in list(folder.rglob(".*.new")):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """One process at a time; the lock is on the folder itself, so that no lock file stays behind (not on Windows).

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)
