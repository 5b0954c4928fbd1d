"""Files and folders that appear whole or not at all: written under another name, flushed to disk, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


_UMASK = os.umask(0)  # it cannot be read without being set
os.umask(_UMASK)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_object(path: Path, fields: Iterable[str] = ()) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.
        fields: names that the object has to have.

    Raises:
        ValueError: the file cannot be read, or holds anything else; the message begins with its path.
    """
    return parse_object(path, read_bytes(path), fields)


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        ValueError: the file cannot be read; the message begins with its path.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def parse_object(path: Path, text: bytes, fields: Iterable[str] = ()) -> dict[str, Any]:
    """`read_object` of a file whose content is known."""
    try:
        found = json.loads(text.decode())
    except RecursionError:
        raise ValueError(f"{path} is damaged: its JSON is nested too deep") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: it is not UTF-8 at byte {error.start}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object, found {type(found).__name__}")
    if missing := [name for name in fields if name not in found]:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(missing)}")
    return found


def usual_mode(path: Path) -> None:
    """Gives a file the permissions of any other new file: libraries that write weights leave them to their owner."""
    path.chmod(0o666 & ~_UMASK)


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
def replace_file(path: str | Path, *, binary: bool = False) -> Iterator[IO[Any]]:
    """A file to write into, text unless it is `binary`, which takes the place of `path` once all of it is on disk."""
    path = Path(path)
    check_regular(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with naming(path):
            with open_new(temporary, binary=binary) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Says which file or folder it was, where the system does not: "[Errno 28] No space left on device" names none."""
    try:
        yield
    except OSError as error:
        if error.errno is None and re.fullmatch(r"\d+ requested and \d+ written", str(error)):  # numpy on a full disk
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):  # of safetensors and tokenizers
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise


def open_new(path: Path, *, binary: bool = False) -> IO[Any]:
    """A file to write into that is new: neither an earlier one of this name nor what a link there points to."""
    path.unlink(missing_ok=True)
    # Exclusive creation follows no link.
    return open(path, "xb") if binary else open(path, "x", encoding="utf-8", newline="\n")


def save_array(path: Path, values: np.ndarray) -> None:
    """Writes an `.npy` file that appears whole or not at all."""
    with replace_file(path, binary=True) as file:
        np.save(file, values, allow_pickle=False)


def load_array(path: Path) -> np.ndarray:
    """An `.npy` file mapped into memory, in which nothing is ever changed."""
    return np.load(path, mmap_mode="c", allow_pickle=False)  # copy on write: torch takes no read-only array


def check_regular(path: Path) -> None:
    """Refuses to replace what is not a regular file: as root, renaming over a device would remove it.

    Raises:
        ValueError: it is a folder, a link, a device, a pipe or a socket.
    """
    try:
        mode = path.lstat().st_mode
    except OSError:
        return
    if stat.S_ISDIR(mode):
        raise ValueError(f"{path} is a folder: name a file in it")
    if stat.S_ISLNK(mode):
        raise ValueError(f"{path} is a link to {path.resolve()}: name that file itself")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is a device, a pipe or a socket: name a regular file")


def check_writable(path: str | Path) -> Path:
    """The path of a file that `replace_file` may write; long work asks this before it begins.

    Raises:
        ValueError: the folder that is to hold it does not exist, or `path` is anything but a regular file.
    """
    path = Path(path)
    check_regular(path)
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path.parent} is not a folder: make it first, or name another file")
    return path


_DESKTOP = {".DS_Store", "Thumbs.db", "desktop.ini"}
"""What file managers leave in any folder."""


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that is written, and replaced, as a whole; it is known by the content of its marker."""

    name: str
    """As errors call it: "an index"."""
    marker: str
    """A JSON file in it."""
    keys: frozenset[str] = frozenset()
    """Fields that the marker has to have; with none its content is not looked at."""
    files: tuple[str, ...] = ()
    """Patterns of the paths in it, beside those that the marker lists in its field `files` if it has to have one."""

    def foreign(self, folder: Path) -> str:
        """Why a folder with files in it is not of this kind alone; nothing when it is."""
        path = folder / self.marker
        if not path.is_file():
            return f"it has no {self.marker}"
        listed = self.files
        if self.keys:
            try:
                described = read_object(path, self.keys)
                if "files" in self.keys:
                    listed = (*listed, *(os.fspath(name) for name in described["files"]))
            except (ValueError, KeyError, TypeError):
                return f"its {self.marker} is not that of {self.name}"
        for file in sorted(p for p in folder.rglob("*") if not p.is_dir()):
            name = file.relative_to(folder).as_posix()
            known = (
                name == self.marker or file.name in _DESKTOP or (file.name.startswith(".") and name.endswith(".new"))
            )
            if not known and not any(name == one or fnmatch(name, one) for one in listed):
                return f"{name} in it is not part of {self.name}"
        return ""


def check_replaceable(folder: str | Path, kind: FolderKind) -> Path:
    """The absolute path of a folder that `replace_folder` may write; long work asks this before it begins.

    Raises:
        ValueError: `folder` is a file, or holds anything that does not belong to an earlier result of this kind.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} holds something else, it is a file: give a new or an empty folder")
    if folder.exists() and any(folder.iterdir()) and (why := kind.foreign(folder)):
        raise ValueError(f"{folder} holds something else, {why}: give a new or an empty folder")
    return folder


@contextmanager
def replace_folder(folder: str | Path, kind: FolderKind) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` once all of it is on disk.

    One writer at a time in the folder above; another one waits. What a killed writer left is removed, or put back if it
    was the only copy.

    Args:
        folder: where the result goes; an earlier result there is replaced.
        kind: what it is, by which an earlier result is known.

    Raises:
        ValueError: `folder` is a file, or holds anything that does not belong to an earlier result of this kind.
    """
    folder = check_replaceable(folder, kind)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.new")
    with locked(folder.parent):
        _recover(folder)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        try:
            with naming(folder):
                yield new
                for path in sorted(new.rglob("*"), reverse=True):
                    if path.is_file():
                        usual_mode(path)
                    sync(path)
                _install(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def install_folder(new: Path, folder: str | Path, kind: FolderKind) -> None:
    """Puts a finished folder, whose files are on disk, in the place of `folder`, as `replace_folder` does."""
    folder = check_replaceable(folder, kind)
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
def held(path: Path, work: str) -> Iterator[None]:
    """Keeps other processes from doing the same work on a file or folder; the lock ends with the process at the latest.

    Args:
        path: what is written; the lock is the file `.<name>.lock` beside it, which says who holds it.
        work: as the error calls it: "generate".

    Raises:
        ValueError: another process is at it, named by its number and machine.
    """
    from filelock import FileLock, Timeout

    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    check_regular(lock)
    try:
        taken = FileLock(lock).acquire(blocking=False)
    except Timeout:
        holder = lock.read_text(encoding="utf-8").strip() or "another process"
        raise ValueError(
            f"{path} is being written by {holder}: wait for that {work} to end, stop it, or give another output"
        ) from None
    with taken:
        lock.write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")
        yield


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
