"""Hooks of MkDocs that make the site from Markdown written for the repository.

Pages from outside docs/ join the site: the changelog, how to contribute, the results of benchmarks. A relative link is
followed as in the repository. Where it leads to a page or an image of the site it stays there, where it leads to
another file it becomes the address of that file on GitHub, and where it leads nowhere MkDocs finds it broken.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

log = logging.getLogger("mkdocs.hooks.docs_site")
ROOT = Path(__file__).resolve().parents[1]
SOURCE = "https://github.com/cosup-fast/cosup-fast/blob/main/"
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
GENERATED = {page: origin for origin, page in PAGES.items()}
RESULTS = ROOT / "benchmarks" / "results"

_FENCE = re.compile(r"^(```.*?^```[ ]*$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)]*)?(\))")
_LIST = re.compile(r"^(?!\s*(?:[-*]|\d+\.) )(\S.*)\n(?=(?:[-*]|\d+\.) )", re.MULTILINE)


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the pages from outside docs/."""
    for origin, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / origin).read_text(encoding="utf-8")))
    for path in sorted(RESULTS.rglob("*")):
        if path.suffix in {".md", ".png"}:
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, files: Files, **_: Any) -> str:
    """Turns links of the repository into links of the site, and separates lists as Python-Markdown wants them."""
    name = page.file.src_uri
    here = name if name.startswith("benchmarks/results/") else GENERATED.get(name, f"docs/{name}")
    parts = _FENCE.split(markdown)
    for i in range(0, len(parts), 2):
        text = _LINK.sub(lambda found: _link(found, here, name, files), parts[i])
        parts[i] = _LIST.sub(r"\1\n\n", text)
    return "".join(parts)


def _link(found: re.Match[str], here: str, page: str, files: Files) -> str:
    start, target, anchor, end = found.groups()
    if ":" in target:
        return found[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
    if not (ROOT / path).exists():
        log.warning("%s links to %s, which does not exist", here, target)
        return found[0]
    site = {**PAGES, "README.md": "index.md"}.get(path, path.removeprefix("docs/"))
    if files.get_file_from_path(site) is None:
        return f"{start}{SOURCE}{path}{anchor or ''}{end}"
    return f"{start}{posixpath.relpath(site, posixpath.dirname(page) or '.')}{anchor or ''}{end}"
