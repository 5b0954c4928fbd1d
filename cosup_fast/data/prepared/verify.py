"""Prepared files are what was prepared: size and times are compared at every use, the hash when they changed.

A folder's `VERIFIED.json` holds size, modification and change time of every file as it was last found right, so a hash
is taken once after preparing or copying, and again after anything wrote to the file; `cosup-fast data check` takes all.
Data that were converted where they were named (`data.convert.direct`) are compared in the same way.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from cosup_fast.data.records import DataError
from cosup_fast.files import read_object, replace_file, sha256

INFO = "PREPARED.json"  # in every prepared folder, written last
STAMPS = "VERIFIED.json"


def recorded(folder: Path, info: str = INFO, remedy: str = "") -> dict[str, str]:
    """The SHA-256 of each file of a prepared folder, as it was prepared.

    Args:
        folder: the folder.
        info: the file in it that says so.
        remedy: what to do where it does not; by default to prepare it again.

    Raises:
        DataError: the folder does not say so.
    """
    try:
        return dict(read_object(folder / info, ["files"])["files"])
    except (ValueError, TypeError) as error:
        remedy = remedy or _prepare_again(folder)
        raise DataError(f"{folder / info} does not say what was prepared ({error}): {remedy}") from None


def verify(folder: Path, files: list[str] | None = None, *, info: str = INFO, remedy: str = "") -> None:
    """Checks files of a prepared folder, by default all, against the hashes recorded when it was prepared.

    Args:
        folder: the folder.
        files: which.
        info, remedy: see `recorded`.

    Raises:
        DataError: one differs or is gone.
    """
    remedy = remedy or _prepare_again(folder)
    hashes = recorded(folder, info, remedy)
    try:
        stamps = read_object(folder / STAMPS)
    except ValueError:
        stamps = {}
    before = dict(stamps)
    for name in hashes if files is None else files:
        path = folder / name
        if not path.is_file() or name not in hashes:
            raise DataError(f"{path}: expected a file as it was prepared, found none: {remedy}")
        state = path.stat()
        stamp = [state.st_size, state.st_mtime_ns, state.st_ctime_ns]
        if stamps.get(name) != stamp:
            if (found := sha256(path)) != hashes[name]:
                raise DataError(f"{path}: expected sha256 {hashes[name]}, found {found}: {remedy}")
            stamps[name] = stamp
    if stamps != before:
        with suppress(OSError), replace_file(folder / STAMPS) as file:  # a folder that others own is hashed each time
            json.dump(stamps, file, indent=1)


def _prepare_again(folder: Path) -> str:
    return f"remove {folder} and run `cosup-fast data prepare {folder.name}`"
