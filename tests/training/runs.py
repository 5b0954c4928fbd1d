"""A run in this process: the checkpoint, what it printed, and what it recorded."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from cosup_fast.training.log import read_metrics
from cosup_fast.training.run import run_training


def train(config, *callbacks, resume=False) -> tuple[Path, str]:
    """The checkpoint, and what was printed, on one line."""
    console = Console(file=io.StringIO(), width=200)
    try:
        checkpoint = run_training(config, resume=resume, console=console, callbacks=callbacks)
    finally:
        printed = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
        print(printed)
    return checkpoint, printed


def records(output: str | Path, kind: str = "step") -> list[dict]:
    """The records of a kind in a run's folder."""
    return [record for record in read_metrics(Path(output) / "metrics.jsonl") if record["kind"] == kind]


def steps_of(output: str | Path, kind: str = "step") -> list[int]:
    """Their steps."""
    return [record["step"] for record in records(output, kind)]
