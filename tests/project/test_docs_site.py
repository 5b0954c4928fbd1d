"""The documentation as a site: it builds without a warning and loads nothing from elsewhere; a broken link fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?https?:|<link\b[^>]*\bhref=\"?https?:|@import|url\(https?:"
)

pytestmark = pytest.mark.slow


def build(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=source,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://127.0.0.1:9"},  # a request would fail
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_site_builds_strict_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > 40
    for path in [*pages, *tmp_path.rglob("*.css")]:
        text = path.read_text(encoding="utf-8")
        assert not LOADED.search(text), path
        assert 'class="mermaid"' not in text, f"{path}: the theme would load mermaid from a CDN"
    losses = (tmp_path / "reference" / "losses" / "index.html").read_text(encoding="utf-8")
    assert 'id="cosup_fast.losses.InfoNCELoss"' in losses
    results = "amd-epyc-2-cores-2026-11-25/count"
    assert f'href="../benchmarks/results/{results}/"' in (tmp_path / "engine" / "index.html").read_text(
        encoding="utf-8"
    )


def test_broken_links_fail_the_build(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    source = tmp_path / "source"
    for name in ("benchmarks", "cosup_fast", "docs", "examples", "kernels", "scripts"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.md"), ROOT / "mkdocs.yml"]:
        shutil.copy(path, source)
    with (source / "docs" / "demo.md").open("a", encoding="utf-8") as page:
        page.write("\n[page](nowhere.md), [file](../kernels/nothing.py), [anchor](data.md#nothing-of-the-kind)\n")
    done = build(source, tmp_path / "site")
    assert done.returncode != 0
    for broken in ("nowhere.md", "../kernels/nothing.py", "data.md#nothing-of-the-kind"):
        assert broken in done.stderr
