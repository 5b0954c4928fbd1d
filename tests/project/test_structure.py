"""Where everything lives: arrows as CONTRIBUTING.md draws them, no circles, files that can be read in one go."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import cosup_fast

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "cosup_fast"
FILES = sorted([*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").rglob("*.py")])
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def imported(node: ast.AST) -> Iterator[str]:
    """The modules of this package that some code imports, inside functions and for annotations too."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.startswith("cosup_fast"))
    elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cosup_fast"):
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            yield name if name in MODULES else str(node.module)
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


ARROWS = {
    name: {found for found in imported(ast.parse(path.read_text(encoding="utf-8"))) if found != name}
    for name, path in MODULES.items()
}


def room(module: str) -> str:
    """The folder or file at the top that a module belongs to; "" for the package's own face."""
    return module.split(".")[1] if "." in module else ""


def drawn() -> dict[str, set[str]]:
    """What each room of the picture in CONTRIBUTING.md may import: whatever arrows lead to."""
    picture = re.search(r"```mermaid\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    assert picture is not None
    direct: dict[str, set[str]] = {}
    for line in picture[1].splitlines():
        if "-->" in line:
            start, ends = line.split("-->")
            direct.setdefault(start.strip(), set()).update(end.strip() for end in ends.split("&"))
    reached: dict[str, set[str]] = {}
    for name in TopologicalSorter(direct).static_order():  # raises CycleError, which names the circle
        ends = direct.get(name, set())
        reached[name] = ends.union(*(reached[end] for end in ends))
    return reached


def test_no_file_imports_one_that_imports_it_back():
    assert "cosup_fast.functional" in ARROWS["cosup_fast.losses"]
    assert list(TopologicalSorter(ARROWS).static_order())


def test_folders_import_what_the_picture_allows():
    allowed = drawn()
    for module, names in ARROWS.items():
        for name in names:
            here, there = room(module), room(name)
            if here == there or not here or not there or here == "__main__":
                continue
            assert here in allowed, f"CONTRIBUTING.md does not draw {here}"
            assert there in allowed[here], f"{module} imports {name}: CONTRIBUTING.md draws no arrow {here} --> {there}"


def test_the_top_of_the_package_is_what_contributing_lists():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text[text.index("| at the top of") :].split("\n\n")[0]
    listed = set(re.findall(r"`(\w+\.py)`", table)) | {"__init__.py"}
    assert {path.name for path in PACKAGE.glob("*.py")} == listed


def test_every_file_can_be_read_in_one_go():
    files = [*FILES, *(ROOT / "benchmarks").rglob("*.py")]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {str(path.relative_to(ROOT)): count for path, count in lines.items() if count >= 450}


def test_every_error_of_ours_has_the_common_base_and_a_row_in_the_docs():
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    found = 0
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error") and node.name != "CosupError":
                bases = [ast.unparse(base) for base in node.bases]
                assert bases[0].endswith("Error"), node.name
                assert "CosupError" in bases or all(base in page for base in bases), f"{node.name}: {bases}"
                assert f"`{module}.{node.name}`" in page, f"docs/errors.md lacks {module}.{node.name}"
                found += 1
    assert found >= 9
    assert issubclass(cosup_fast.CosupError, Exception)


def test_files_that_contributing_names_exist():
    """By their path or, where the sentence has named a folder, by their name."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w./-]+\.(?:py|md|yaml|toml|html))`", text)
    folders = (PACKAGE, ROOT / "kernels", ROOT / "benchmarks", ROOT / "tests", ROOT / "docs", ROOT / "examples")
    files = [path.as_posix() for folder in folders for path in folder.rglob("*.*")]
    files += [path.as_posix() for path in ROOT.glob("*.*")]
    missing = [name for name in named if not any(f"/{path}".endswith(f"/{name}") for path in files)]
    assert not missing
    assert len(named) > 50
