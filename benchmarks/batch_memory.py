"""How much memory does a step take whose NSP batch is large? Peak resident set of a process of its own.

What is measured is `Trainer`'s own step, with clipping and AdamW: embeddings of the whole batch first, then one
micro-batch after the other (`training/step.py`). A small step before it makes the optimizer's state, so that nothing of
what a long run holds is missing. The peak is the process's: weights, gradients, optimizer, data and libraries included.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from benchmarks import memory, report
from benchmarks.material import Material
from cosup_fast.config.training import TrainingConfig
from cosup_fast.data.packing import make_batch
from cosup_fast.training.metrics import StepMetrics
from cosup_fast.training.step import accumulate_gradients
from cosup_fast.training.trainer import Trainer


class Setting(Material):
    """Of what, and how a step is cut."""

    tokens_per_micro_batch: int = Field(default=2048, ge=1, description="most tokens of a pack")
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="precision of products")


@dataclass(frozen=True)
class Row:
    """What was found of one batch size."""

    size: int  # examples
    queries: int
    passages: int
    micro_batches: int
    nsp: float
    peak_bytes: int
    seconds: float


def measure(setting: Setting, sizes: list[int], *, say: Callable[[str], None] = print) -> list[Row]:
    """One row a size, each from a process of its own.

    Raises:
        RuntimeError: a process failed; its last words.
    """
    rows = []
    for size in sizes:
        say(f"a batch of {size}")
        found = memory.alone("benchmarks.batch_memory", setting.model_dump_json(), str(size), timeout=86400)
        rows.append(Row(**json.loads(found)))
    return rows


def here(setting: Setting, size: int) -> Row:
    """The same in this process, which should do nothing else.

    Raises:
        ValueError: there are fewer examples than that.
    """
    model, corpus, examples = setting.load()
    if size > len(examples):
        raise ValueError(f"size={size}: there are {len(examples)} examples in {', '.join(setting.examples)}")
    examples = random.Random(0).sample(examples, size)  # one step is an epoch of them
    config = TrainingConfig(
        steps=1,
        batch_size=size,
        tokens_per_micro_batch=setting.tokens_per_micro_batch,
        precision=setting.precision,
        activation_checkpointing="full" if setting.checkpointing else "none",
        diagnose_every=None,
        eval_every=None,
        checkpoint_every=None,
        device="cpu",
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, config, examples, corpus, Path(folder))
        few = make_batch(examples[:2], corpus, model.template, config.pack_limits)
        accumulate_gradients(model, few, precision=config.precision)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        batch = trainer.batch(0)
        counts = {"queries": batch.step.nsp, "passages": batch.step.passages, "micro_batches": len(batch.packs)}
        assert len(trainer.batch_examples(0)) == size
        del batch
        begin = time.perf_counter()
        metrics = trainer.take_step()
        assert isinstance(metrics, StepMetrics)
        assert metrics.nsp is not None
        seconds = time.perf_counter() - begin
    return Row(size, **counts, nsp=metrics.nsp, peak_bytes=memory.status("VmHWM"), seconds=seconds)


def page(rows: list[Row], setting: Setting, command: str) -> str:
    """Markdown."""
    lines = [
        [str(row.size), str(row.queries), str(row.passages), str(row.micro_batches), report.size(row.peak_bytes),
         f"{row.peak_bytes / rows[0].peak_bytes:.3f}", f"{row.nsp:.3f}", f"{row.seconds:.0f}"]
        for row in rows
    ]  # fmt: skip
    header = "examples | queries | passages | micro-batches | peak resident set | x the first | NSP | seconds"
    return report.page("Memory of a step by the size of its NSP batch", setting, command, report.table(header, lines))


if __name__ == "__main__":
    print(json.dumps(asdict(here(Setting.model_validate_json(sys.argv[1]), int(sys.argv[2])))))
