"""`cosup-fast bench`: the benchmarks of a clone, from any folder. They are not part of an installed package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import typer

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def load_benchmarks() -> None:
    """Makes `import benchmarks` mean the clone's.

    Raises:
        ValueError: this is an installed copy, with no benchmarks beside it.
    """
    if not (FOLDER / "__init__.py").is_file():
        raise ValueError(f"cosup-fast bench runs from a clone of the project; there is no {FOLDER}")
    if "benchmarks" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "benchmarks", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def bench(context: typer.Context) -> None:
    """Time, count and weigh the losses beside other libraries (from a clone; `cosup-fast bench --help` tells more)."""
    run_benchmarks(context.args)


def run_benchmarks(arguments: list[str]) -> None:
    """Runs the command line of the benchmarks."""
    load_benchmarks()
    from benchmarks.cli import main

    main(arguments, name="cosup-fast bench")
