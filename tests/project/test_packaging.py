"""What is installed and imported: the kernels come along, nothing else does."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cosup_fast

ROOT = Path(__file__).resolve().parents[2]
WHEEL_INFO = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")
SDIST_TOP = {
    *("", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md"),
    *("SECURITY.md", "cosup_fast", "cosup_fast.egg-info", "pyproject.toml", "setup.cfg"),
}


def python(code: str, cwd: Path = ROOT) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_are_reached_through_a_link():
    link = ROOT / "cosup_fast" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == os.path.join("..", "kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()
    listed = subprocess.run(
        ["git", "ls-files", "--stage", "cosup_fast/kernels"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode == 0 and listed.stdout:
        assert listed.stdout.startswith("120000 "), "committed as something other than a symbolic link"


def test_version_is_the_installed_one():
    assert cosup_fast.__version__ == importlib.metadata.version("cosup-fast")


def test_a_tree_that_was_never_installed_has_a_version_too(tmp_path):
    (tmp_path / "cosup_fast").mkdir()
    for name in ("__init__.py", "lazy.py"):
        shutil.copy(ROOT / "cosup_fast" / name, tmp_path / "cosup_fast")
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import cosup_fast; print(cosup_fast.__version__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "0+unknown\n"


def closure(names: Iterable[str]) -> set[str]:
    """These distributions and, of those that are installed, whatever they need."""
    found, new = set(), set(names)
    while new:
        found |= new
        asked = []
        for one in new:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                asked += [Requirement(text) for text in importlib.metadata.requires(one) or ()]
        needed = [r for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]
        new = {canonicalize_name(r.name) for r in needed} - found
    return found


def test_the_base_install_brings_three_packages_beside_those_of_torch():
    assert closure(["cosup-fast"]) - closure(["torch"]) <= {"cosup-fast", "numpy", "triton"}


def test_whatever_is_imported_is_in_an_extra():
    """Inside of functions and by a name, too; what only tests and documentation need does not count."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [names for extra, names in project["optional-dependencies"].items() if extra not in ("dev", "docs")]
    declared = {Requirement(name).name for names in (project["dependencies"], *extras) for name in names}
    there = closure(map(canonicalize_name, declared - {"cosup-fast"}))
    imported = set()
    for path in (ROOT / "cosup_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                imported |= {node.args[0].value} if isinstance(node.args[0], ast.Constant) else set()
    ours = {"cosup_fast", "kernels", "benchmarks"}
    distributions = importlib.metadata.packages_distributions()
    missing = {}
    for root in {name.partition(".")[0] for name in imported} - sys.stdlib_module_names - ours:
        names = {canonicalize_name(name) for name in distributions.get(root, [root])}
        if not names & there:
            missing[root] = names
    assert missing == {}


def test_actions_are_pinned_by_commit_and_only_publishing_may_sign():
    uses = 0
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert workflow["permissions"] == {"contents": "read"}, path.name
        signing = [name for name, job in workflow["jobs"].items() if "id-token" in job.get("permissions", {})]
        assert signing == (["publish"] if path.name == "release.yml" else [])
        for line in path.read_text(encoding="utf-8").splitlines():
            if "uses:" in line:
                assert re.search(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line
                uses += 1
    assert uses >= 10


def test_top_level_kernels_is_nothing_of_ours():
    """The name belongs to a library that transformers looks for."""
    code = """
import importlib.util
spec = importlib.util.find_spec("kernels")
print(spec is None or spec.origin is None, spec is not None and spec.loader is not None and spec.origin is not None)
try:
    import kernels
    print([name for name in dir(kernels) if not name.startswith("__")])
except ModuleNotFoundError:
    print([])
"""
    usable = python(code).splitlines()
    assert usable == ["True False", "[]"]


def test_transformers_works_where_a_folder_is_called_kernels():
    pytest.importorskip("transformers")
    code = """
import transformers
from transformers.utils import is_kernels_available
from transformers import AutoModelForCausalLM, LlamaConfig
print(is_kernels_available())
"""
    here, elsewhere = python(code), python(code, Path(sys.prefix))
    assert here.splitlines()[-1] == elsewhere.splitlines()[-1]


def test_losses_import_neither_transformers_nor_triton():
    code = """
import sys
import cosup_fast
assert "torch" not in sys.modules
import torch
before = set(sys.modules)
import cosup_fast.losses, cosup_fast.reference
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    assert python(code) == "['cosup_fast']"


@pytest.mark.slow
def test_losses_import_in_the_time_of_torch():
    def seconds(module: str) -> float:
        """Of the CPU, which a cold disk or a busy neighbour does not lengthen much."""
        return float(python(f"import time; t = time.process_time(); import {module}; print(time.process_time() - t)"))

    pairs = [(seconds("torch"), seconds("cosup_fast.losses")) for _ in range(5)]
    torch_alone, ours = (statistics.median(column) for column in zip(*pairs))
    assert ours < 1.3 * torch_alone


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs a source tree")
def test_wheel_and_sdist_of_a_tag_hold_the_kernels_and_the_data_and_nothing_else(tmp_path):
    for package in ("build", "setuptools_scm", "twine"):
        pytest.importorskip(package)
    source = tmp_path / "source"
    # A copy: a build in place would leave its folders behind.
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, files.stdout.decode().split("\0")):
        origin, copy = ROOT / name, source / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if origin.is_symlink():
            copy.symlink_to(os.readlink(origin))
        elif origin.is_file():
            copy.write_bytes(origin.read_bytes())
    # Without git, as in an archive of the tree, the version is the fallback.
    untagged = subprocess.run(
        [sys.executable, "-m", "setuptools_scm"], cwd=source, capture_output=True, text=True, check=True
    )
    assert untagged.stdout.strip().endswith(".dev0")
    me = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    for command in (["init", "-q"], ["add", "-A"], [*me, "commit", "-qm", "all"], ["tag", "v9.8.7"]):
        subprocess.run(["git", *command], cwd=source, check=True)

    # Without isolation nothing is downloaded; the wheel is made from the sdist, as on an index.
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    wheel = tmp_path / "dist" / "cosup_fast-9.8.7-py3-none-any.whl"
    sdist = tmp_path / "dist" / "cosup_fast-9.8.7.tar.gz"
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout
    package = ROOT / "cosup_fast"
    wanted = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "*.html", "*.md", "*.yaml", "*.tsv", "py.typed")
        for folder in (package, package / "kernels")
        for path in folder.rglob(pattern)
    }
    assert {"cosup_fast/kernels/softmax_xent/engine.py", "cosup_fast/kernels/last_hidden/op.py"} <= wanted
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    assert wanted <= in_wheel
    info = {f"cosup_fast-9.8.7.dist-info/{name}" for name in WHEEL_INFO}
    assert {name for name in in_wheel if not name.startswith("cosup_fast/")} == info
    suffixes = {Path(name).suffix for name in in_wheel - info}
    assert suffixes <= {".py", ".html", ".json", ".md", ".yaml", ".tsv", ".typed"}
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    assert wanted <= in_sdist
    assert {name.partition("/")[0] for name in in_sdist} == SDIST_TOP

    # What was built works without the tree: from the wheel's own files, with a value computed.
    code = f"""
import json, sys
sys.path.insert(0, {str(wheel)!r})
import torch, cosup_fast, cosup_fast.functional
print(json.dumps([cosup_fast.__file__, cosup_fast.__version__, float(cosup_fast.info_nce(torch.eye(2), torch.eye(2)))]))
"""
    where, version, value = json.loads(python(code, tmp_path))
    assert where.startswith(str(wheel))
    assert version == "9.8.7"
    assert value == pytest.approx(0.31326, abs=1e-4)
