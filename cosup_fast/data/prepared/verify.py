"""Prepared files are what was prepared: size and times are compared at every use, the hash when they changed.

A folder's `VERIFIED.json` holds size, modification and change time of every file as it was last found right, so a hash
is taken once after preparing or copying, and again after anything wrote to the file; `cosup-fast data check` takes all.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from cosup_fast.data.records import DataError
from cosup_fast.files import read_object, replace_file, sha256

INFO = "PREPARED.json"  # in every prepared folder, written last
STAMPS = "VERIFIED.json"


def recorded(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a prepared folder, as it was prepared.

    Raises:
        DataError: the folder does not say so.
    """
    try:
        return dict(read_object(folder / INFO, ["files"])["files"])
    except (ValueError, TypeError) as error:
        raise DataError(f"{folder / INFO} does not say what was prepared ({error}): {_remedy(folder)}") from None


def verify(folder: Path, files: list[str] | None = None) -> None:
    """Checks files of a prepared folder, by default all, against the hashes recorded when it was prepared.

    Raises:
        DataError: one differs or is gone.
    """
    hashes = recorded(folder)
    try:
        stamps = read_object(folder / STAMPS)
    except ValueError:
        stamps = {}
    before = dict(stamps)
    for name in hashes if files is None else files:
        path = folder / name
        if not path.is_file() or name not in hashes:
            raise DataError(f"{path}: expected a file as it was prepared, found none: {_remedy(folder)}")
        state = path.stat()
        stamp = [state.st_size, state.st_mtime_ns, state.st_ctime_ns]
        if stamps.get(name) != stamp:
            if (found := sha256(path)) != hashes[name]:
                raise DataError(f"{path}: expected sha256 {hashes[name]}, found {found}: {_remedy(folder)}")
            stamps[name] = stamp
    if stamps != before:
        with suppress(OSError), replace_file(folder / STAMPS) as file:  # a folder that others own is hashed each time
            json.dump(stamps, file, indent=1)


def _remedy(folder: Path) -> str:
    return f"remove {folder} and run `cosup-fast data prepare {folder.name}`"
