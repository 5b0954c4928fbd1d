"""A manifest: size and SHA-256 of files, by which damage and changes are noticed.

{"files": {"rows.npy": {"bytes": 128, "sha256": "..."}}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosup_fast.files.whole import read_object, replace_file, sha256


def described(path: Path) -> dict[str, Any]:
    """The entry of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def write_manifest(path: Path, files: Mapping[str, dict[str, Any]]) -> None:
    """Writes the entries of files, by their paths from the manifest's folder, in that order."""
    with replace_file(path) as file:
        file.write(json.dumps({"files": dict(files)}, indent=1) + "\n")


def check_manifest(path: Path, *, contents: bool = True, rank: int = 0, ranks: int = 1) -> None:
    """Compares the files with a manifest.

    Args:
        path: the manifest.
        contents: compare checksums, too, which reads every file; else sizes alone.
        rank, ranks: check this share of the files.

    Raises:
        ValueError: the manifest cannot be read, or a file is missing, has another size or was altered.
    """
    try:
        listed = read_object(path, ["files"])["files"]
        files = [(name, entry["bytes"], entry["sha256"]) for name, entry in listed.items()]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged: it does not describe files") from None
    for name, size, digest in files[rank::ranks]:
        file = path.parent / name
        if not file.is_file():
            raise ValueError(f"{file} is missing, which {path.name} lists")
        if (there := file.stat().st_size) != size:
            raise ValueError(f"{file} has {there} bytes, its manifest says {size} ({path.name})")
        if contents and (found := sha256(file)) != digest:
            raise ValueError(f"{file} was altered (sha256 {found[:12]}… is not what {path.name} says)")
