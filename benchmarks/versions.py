"""How much faster is a training step than that of another version? Two checkouts in processes of their own, in turns.

A step is what the trainer does: gradients of both losses, clipping, AdamW. Both read the same examples with the same
weights, and take turns, so that whatever else runs on the machine slows both down. Losses are compared first: in fp32,
and in the precision that is measured. Beside the time that passed, that of the processor is given, which a neighbour
changes less.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from benchmarks import report
from benchmarks.timing import Spread
from cosup_fast.data.strict import Strict

_HEAD = "from __future__ import annotations\nimport sys\n"
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


class Setting(Strict):
    """What a step is of."""

    model: str = Field(default="smollm2-135m", description="the model that is Gen and Embseq")
    layers: int | None = Field(default=None, ge=1, description="keep so many of Gen's")
    embseq_layers: int | None = Field(default=6, ge=1, description="keep so many of Embseq's")
    corpus: str = Field(default="wiki-leads", description="passages")
    examples: list[str] = Field(default=["cloze/train", "questions/train"], description="sets of examples")
    passage_tokens: int = Field(default=48, ge=1, description="longest passage")
    batch_size: int = Field(default=16, ge=1, description="examples of a step")
    precision: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="precision of products")
    threads: int = Field(default=2, ge=1, description="threads of torch")


class Worker:
    """The step of one checkout."""

    def __init__(self, folder: Path, setting: Setting):
        code = f"{_HEAD}sys.path.insert(0, {str(folder)!r})\n{inspect.getsource(_work)}\n_work()"
        command = [sys.executable, "-c", code, setting.model_dump_json()]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=pipe, text=True)

    def step(self, number: int, precision: str, *, learn: bool) -> dict[str, float]:
        """One step; without `learn` the weights stay what they are."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([number, precision, learn]) + "\n")
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"the process of a version ended with exit status {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def measure(
    setting: Setting, folders: Sequence[Path], rounds: int, say: Callable[[str], None] = print
) -> list[list[dict[str, float]]]:
    """What each version took in each round, the first folder's first.

    Raises:
        ValueError: losses of the same weights differ by more than rounding.
    """
    workers = [Worker(folder, setting) for folder in folders]
    try:
        for precision in ("float32", setting.precision):
            first, second = (worker.step(0, precision, learn=False) for worker in workers)
            for name in ("ntp", "nsp"):
                off = abs(first[name] - second[name]) / abs(first[name])
                say(f"{name} in {precision}: {first[name]:.7g} and {second[name]:.7g}, {off:.1e} apart")
                if off > TOLERANCE[precision]:
                    raise ValueError(f"{name} is {first[name]} in {folders[0]}, {second[name]} in {folders[1]}")
        found: list[list[dict[str, float]]] = [[], []]
        for number in range(-1, rounds):  # the first round makes the optimizer's states
            for i in (0, 1) if number % 2 else (1, 0):
                took = workers[i].step(number + 1, setting.precision, learn=True)
                say(f"round {number + 1}: {folders[i]} {took['seconds']:.2f} s, processor {took['processor']:.2f} s")
                if number >= 0:
                    found[i].append(took)
        return found
    finally:
        for worker in workers:
            worker.close()


def versions_report(found: list[list[dict[str, float]]], setting: Setting, said: str, command: str) -> str:
    """Markdown: the ratio of both times, by round and over rounds."""
    lines = []
    for what in ("seconds", "processor"):
        ratios = [a[what] / b[what] for a, b in zip(*found, strict=True)]
        spread = Spread.of(ratios)
        lines.append(
            [what, f"{spread.median:.2f}", f"{spread.q1:.2f} to {spread.q3:.2f}", " ".join(f"{x:.2f}" for x in ratios)]
        )
    table = report.table("time | times as fast | quartiles | rounds", lines)
    return report.page("The training step against that of another version", setting, command, table, said)


def _work() -> None:
    """Answers each line of standard input with a step; of any version, so imports are tried."""
    import contextlib
    import importlib
    import json
    import sys
    import time

    import torch

    def find(name: str, *places: str) -> Any:
        for place in places:
            try:
                return getattr(importlib.import_module(place), name)
            except (ImportError, AttributeError):
                continue
        raise ImportError(f"{name} in none of {places}")

    setting = json.loads(sys.argv[1])
    torch.set_num_threads(setting["threads"])
    model_class = find("CoSupervisionModel", "cosup_fast.model", "cosup_fast.modeling")
    configuration = find("ModelConfig", "cosup_fast.config.model", "cosup_fast.model_config")
    text = find("TextConfig", "cosup_fast.data.template")
    load_corpus, load_examples = (find(x, "cosup_fast.data.sources") for x in ("load_corpus", "load_examples"))
    make_batch = find("make_batch", "cosup_fast.data.packing")
    sampler = find("StepSampler", "cosup_fast.data.sampling")
    accumulate = find("accumulate_gradients", "cosup_fast.training.step")
    with contextlib.suppress(ImportError):
        find("keep_freed_memory", "cosup_fast.environment")()  # as training on a CPU does
    torch.manual_seed(0)
    model = model_class.from_pretrained(
        configuration(gen=setting["model"], gen_layers=setting["layers"], embseq_layers=setting["embseq_layers"]),
        text(max_passage_tokens=setting["passage_tokens"], long_passages="truncate"),
    ).train()
    corpus = {passage.id: passage for passage in load_corpus(setting["corpus"])}
    examples = [example for name in setting["examples"] for example in load_examples(name, corpus)]
    order = sampler([1] * len(examples), setting["batch_size"], 0, balanced=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for line in sys.stdin:
        number, precision, learn = json.loads(line)
        batch = make_batch([examples[i] for i in order[number]], corpus, model.template)
        start, processor = time.perf_counter(), time.process_time()
        out = accumulate(model, batch, precision=precision)
        if learn:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad()
        took = {"seconds": time.perf_counter() - start, "processor": time.process_time() - processor}
        print(json.dumps({**took, "ntp": float(out.ntp), "nsp": float(out.nsp)}), flush=True)
