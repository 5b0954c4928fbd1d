"""A run in this process: the checkpoint, what it printed, and what it recorded."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from cosup_fast.training.checkpoint import checkpoints, verify
from cosup_fast.training.log import read_metrics
from cosup_fast.training.run import run_training
from cosup_fast.training.trainer import Trainer


def train(config, *callbacks, resume=False) -> tuple[Path, str]:
    """The checkpoint, and what was printed, on one line."""
    console = Console(file=io.StringIO(), width=200)
    try:
        checkpoint = run_training(config, resume=resume, console=console, callbacks=callbacks)
    finally:
        printed = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
        print(printed)
    return checkpoint, printed


def during(monkeypatch, step, act) -> None:
    """Calls `act` before a step of every trainer."""
    taken = Trainer.take_step

    def acting(self):
        if self.step == step:
            act()
        return taken(self)

    monkeypatch.setattr(Trainer, "take_step", acting)


def last_saved(output: Path) -> dict[str, Tensor]:
    """Weights, optimizer states and random number generators of a run's last checkpoint, which is verified."""
    folder = checkpoints(output / "checkpoints")[-1]
    verify(folder)
    files = folder.rglob("*.safetensors")
    return {f"{path.relative_to(folder)}/{name}": x for path in files for name, x in load_file(path).items()}


def records(output: str | Path, kind: str = "step") -> list[dict]:
    """The records of a kind in a run's folder."""
    return [record for record in read_metrics(Path(output) / "metrics.jsonl") if record["kind"] == kind]


def steps_of(output: str | Path, kind: str = "step") -> list[int]:
    """Their steps."""
    return [record["step"] for record in records(output, kind)]
