"""One training run from a configuration: data and models in, a folder of checkpoints, metrics and plots out.

output/config.yaml        what was run
output/data.json          SHA-256 of the examples and passages that it reads
output/checkpoints/       see `checkpoint.py`
output/metrics.jsonl      one record a step, diagnosis or held-out evaluation
output/tensorboard/       the same for TensorBoard
output/curves.png         losses and retrieval accuracy
output/refused-step.json  the batch that ended the run, if one did
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from cosup_fast.config import ConfigError, RunConfig, dump_config, load_config
from cosup_fast.data.packing import make_batch
from cosup_fast.data.records import DataError, Example, Passage
from cosup_fast.data.sampling import example_lengths
from cosup_fast.data.sources import load_corpus, load_examples
from cosup_fast.data.splits import check_splits
from cosup_fast.data.template import Template
from cosup_fast.evaluation import retrieval_ranks
from cosup_fast.files import replace_file
from cosup_fast.loading import load_template
from cosup_fast.modeling import CoSupervisionModel
from cosup_fast.training.checkpoint import checkpoints, verify
from cosup_fast.training.diagnostics import Diagnosis
from cosup_fast.training.step import autocast
from cosup_fast.training.trainer import (
    HeldOut,
    StepMetrics,
    Trainer,
    TrainingConfig,
    as_record,
    choose_device,
    count_steps,
)

if TYPE_CHECKING:
    from types import TracebackType

# What may change between the parts of one run: none of it touches a step already taken or the order of the data.
RESUMABLE = {
    "training.steps", "training.epochs", "training.max_minutes", "training.log_every", "training.eval_every",
    "training.checkpoint_every", "training.keep_checkpoints", "training.device", "output",
    "training.diagnose_every", "training.spike_factor", "training.spike_window",
    "data.allow_leaks",
}  # fmt: skip


def run_training(config: RunConfig, *, resume: bool = False, console: Console | None = None) -> Path:
    """Trains as configured and returns the last checkpoint's folder.

    Args:
        config: the run.
        resume: continue behind the newest whole checkpoint in `config.output`, or start when there is none. A run
            that has ended is left as it is.
        console: where progress goes; standard error by default.

    Raises:
        ConfigError: the output folder holds another run, or the configuration differs from the one being resumed.
        DataError: see `load_data`; or the data differ from those of the run being resumed.
        CheckpointError, TrainingError: see there.
        KeyboardInterrupt: Ctrl-C; it says what was saved.
    """
    console = console or Console(stderr=True)
    output = Path(config.output)
    with _interruption_explained(output):
        checkpoint = _checkpoint_to_resume(config, output, resume)
        device = choose_device(config.training.device)
        corpus, examples, held_out = load_data(config)
        evaluator = HeldOutEvaluator(held_out, corpus, config) if held_out else None
        digests = {
            "training": _digest(examples, [corpus[passage] for passage in _passages(examples)]),
            "held-out": _digest(held_out, evaluator.pool if evaluator else []),
        }
        if checkpoint is not None:
            _check_same_data(output, digests)
            if _has_ended(checkpoint, config, len(examples), evaluated=evaluator is not None):
                console.print(f"{checkpoint} is the end of this run; a larger training.steps goes on", markup=False)
                return checkpoint
        if checkpoint is None:
            lengths = _measure(load_template(config.model, config.text)[0], config, examples, corpus, console)
            torch.manual_seed(config.training.seed)
            model = CoSupervisionModel.from_pretrained(config.model, config.text, config.nsp, device=device)
        else:
            verify(checkpoint)
            model = CoSupervisionModel.load(checkpoint, device=device, attention=config.model.attention, merge=False)
            console.print(f"continuing behind {checkpoint}", markup=False)
            lengths = _measure(model.template, config, examples, corpus, console)
        with RunLog(output, console) as log:
            trainer = Trainer(
                model,
                config.training,
                examples,
                corpus,
                output,
                lengths=lengths,
                evaluate=evaluator,
                on_metrics=log.metrics,
                on_warning=log.warning,
                on_interrupt=console.print,
            )
            if checkpoint is not None:
                trainer.resume(checkpoint)
            _write_description(output, config, digests)
            trainer.replay(log.start(trainer.step, trainer.total_steps))
            return trainer.train()


def load_data(config: RunConfig) -> tuple[dict[str, Passage], list[Example], list[Example]]:
    """The corpus by id, the training examples and the held-out examples.

    Raises:
        DataError: what the files hold is not valid, or, without `data.allow_leaks`, what is held out is trained on:
            the same example, the same question, or the same gold passage.
    """
    data = config.data
    corpus = {passage.id: passage for passage in load_corpus(data.corpus)}

    def load(names: list[str], limit: int | None, seed: int) -> list[Example]:
        loaded = [e for name in names for e in load_examples(name, corpus, allow_no_retrieval=data.allow_no_retrieval)]
        if limit is not None and limit < len(loaded):
            loaded = random.Random(seed).sample(loaded, limit)
        return loaded

    # What is held out is the same for every seed of the training, so that runs compare.
    examples = load(data.train, data.train_limit, config.training.seed)
    held_out = load(data.dev, data.dev_limit, seed=0)
    if not data.allow_leaks:
        try:
            if both := {e.id for e in examples} & {e.id for e in held_out}:
                raise DataError(f"example {min(both)!r} stands in data.train and in data.dev ({len(both)} such ids)")
            check_splits({"train": examples, "dev": held_out}, corpus)
        except DataError as error:
            raise DataError(
                f"{error}. Held-out figures would flatter: remove it from one, or set data.allow_leaks=true"
            ) from None
    return corpus, examples, held_out


class HeldOutEvaluator:
    """Losses and retrieval on held-out examples, among a fixed pool of passages that holds their gold ones."""

    def __init__(self, examples: Sequence[Example], corpus: dict[str, Passage], config: RunConfig):
        self.examples = examples
        self.corpus = corpus
        self.training: TrainingConfig = config.training
        gold = list(dict.fromkeys(passage for example in examples for passage in example.gold))
        others = sorted(corpus.keys() - set(gold))
        extra = max(0, min(config.data.dev_pool - len(gold), len(others)))
        chosen = gold + random.Random(0).sample(others, extra)
        self.pool = [corpus[passage] for passage in chosen]

    @torch.no_grad()
    def __call__(self, model: CoSupervisionModel, step: int) -> HeldOut:
        model.eval()
        ntp = nsp = 0.0
        tokens = queries = 0
        with autocast(model.device, self.training.precision):
            for i in range(0, len(self.examples), self.training.batch_size):
                chosen = self.examples[i : i + self.training.batch_size]
                batch = make_batch(chosen, self.corpus, model.template, self.training.pack_limits).to(model.device)
                out = model(batch, ntp_count=1, nsp_count=1)  # sums over the batch
                ntp, nsp = ntp + float(out.ntp), nsp + float(out.nsp)
                tokens, queries = tokens + batch.ntp_count, queries + batch.nsp_count
            ranks = retrieval_ranks(model, self.examples, self.pool)
        recall = [sum(rank < k for rank in ranks) / max(1, len(ranks)) for k in (1, 5, 20)]
        return HeldOut(step, ntp / max(1, tokens), nsp / max(1, queries), *recall)


class RunLog:
    """Metrics to JSONL, TensorBoard, a progress bar and, at every evaluation, a plot."""

    def __init__(self, output: Path, console: Console):
        self.output = output
        self.console = console
        self.path = output / "metrics.jsonl"
        self.last: StepMetrics | None = None
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
        )

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if hasattr(self, "file"):
            self.progress.stop()
            self.file.close()
            self.tensorboard.close()
            with contextlib.suppress(OSError) if error else contextlib.nullcontext():  # never hide the first error
                plot_curves(read_metrics(self.path), self.output / "curves.png")

    def start(self, step: int, total: int) -> list[dict[str, Any]]:
        """Opens the files and returns the records so far; those behind `step`, of a part run again, are dropped."""
        kept = [record for record in read_metrics(self.path) if record["step"] <= step] if step else []
        with replace_file(self.path) as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
        self.file: TextIO = self.path.open("a", buffering=1)
        self.tensorboard = SummaryWriter(str(self.output / "tensorboard"), purge_step=step)
        self.task = self.progress.add_task("training", total=total, completed=step, status="")
        self.progress.start()
        return kept

    def metrics(self, metrics: StepMetrics | Diagnosis | HeldOut) -> None:
        """Records a step, a diagnosis or an evaluation."""
        record = as_record(metrics)
        self.file.write(json.dumps(record) + "\n")
        kind = record["kind"]
        for name, value in record.items():
            if isinstance(value, float):
                self.tensorboard.add_scalar(f"{kind}/{name}", value, metrics.step)
        if isinstance(metrics, StepMetrics):
            self.last = metrics
            status = f"NTP {metrics.ntp:.3f}  NSP {metrics.nsp:.3f}  in-batch {metrics.in_batch_accuracy:.0%}"
            self.progress.update(self.task, completed=metrics.step, status=status)
            if not self.console.is_terminal and metrics.step % 10 == 0:
                self.console.print(f"step {metrics.step}  {status}  {metrics.tokens_per_second:.0f} tokens/s")
        elif isinstance(metrics, Diagnosis):
            self.console.print(diagnosis_table(metrics, self.last))
        else:
            self.console.print(
                f"held out after step {metrics.step}: NTP {metrics.ntp:.3f}  NSP {metrics.nsp:.3f}  "
                f"R@1 {metrics.recall_at_1:.1%}  R@5 {metrics.recall_at_5:.1%}  R@20 {metrics.recall_at_20:.1%}"
            )

    def warning(self, message: str) -> None:
        """Shows a warning of the failure monitor and keeps it with the metrics."""
        self.console.print(f"[yellow]warning:[/] {message}")
        with (self.output / "warnings.log").open("a") as file:
            file.write(message + "\n")


def diagnosis_table(found: Diagnosis, last: StepMetrics | None) -> Table:
    """What the losses do to Gen and to the space of sequences, with the speed and memory of the step before."""

    def figure(value: float | None, form: str = ".3g") -> str:
        return "-" if value is None else format(value, form)

    table = Table(title=f"before step {found.step}", title_justify="left")
    columns = {
        "gradient of Gen: NTP": figure(found.ntp_grad_norm),
        "lambda NSP": figure(found.nsp_grad_norm),
        "cosine": figure(found.grad_cosine, "+.3f"),
        "alignment": figure(found.alignment),
        "uniformity: queries": figure(found.query_uniformity),
        "passages": figure(found.passage_uniformity),
    }
    if last is not None:
        columns |= {
            "in-batch rank": figure(last.in_batch_rank),
            "useful tokens": figure(last.useful_tokens, ".0%"),
            "tokens/s": figure(last.tokens_per_second, ".0f"),
            "peak GiB": figure(last.peak_memory_gib, ".2f"),
        }
    for name in columns:
        table.add_column(name, justify="right")
    table.add_row(*columns.values())
    return table


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line that was cut off by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def plot_curves(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws losses and retrieval accuracy over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [r for r in records if r["kind"] == "step"]
    held_out = [r for r in records if r["kind"] == "held-out"]
    figure, (losses, retrieval) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, color in (("ntp", "tab:blue"), ("nsp", "tab:orange")):
        losses.plot(
            [r["step"] for r in steps], [r[name] for r in steps], color=color, alpha=0.5, label=f"{name.upper()}"
        )
        losses.plot(
            [r["step"] for r in held_out],
            [r[name] for r in held_out],
            "o-",
            color=color,
            label=f"{name.upper()} held out",
        )
    losses.set(xlabel="step", ylabel="loss (nats)", title="losses")
    retrieval.plot(
        [r["step"] for r in steps],
        [r["in_batch_accuracy"] for r in steps],
        color="tab:gray",
        alpha=0.5,
        label="in batch",
    )
    for k in (1, 5, 20):
        retrieval.plot(
            [r["step"] for r in held_out], [r[f"recall_at_{k}"] for r in held_out], "o-", label=f"R@{k} held out"
        )
    retrieval.set(xlabel="step", ylabel="share of queries", ylim=(0, 1), title="retrieval")
    for axes in (losses, retrieval):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _checkpoint_to_resume(config: RunConfig, output: Path, resume: bool) -> Path | None:
    """The checkpoint to continue behind, if any; refuses an output that holds another run."""
    saved = output / "config.yaml"
    if saved.is_file() and not resume:
        raise ConfigError(f"output={config.output!r} holds a run already: add --resume to continue it, or name another")
    found = checkpoints(output / "checkpoints")
    if not saved.is_file() or not found:
        return None
    before, now = _flat(load_config(saved).model_dump()), _flat(config.model_dump())
    changed = [name for name in now if name not in RESUMABLE and before[name] != now[name]]
    if changed:
        name = changed[0]
        more = f" ({len(changed) - 1} more fields differ)" if len(changed) > 1 else ""
        raise ConfigError(
            f"--resume: {name}={now[name]!r}, but the run in {config.output!r} was started with {before[name]!r}{more}"
            ": give the same value, or start a new run in another output"
        )
    return found[-1]


def _passages(examples: Iterable[Example]) -> list[str]:
    """The ids of the passages that training reads, each once: those of the outputs and the hard negatives."""
    return list(dict.fromkeys(name for example in examples for name in (*example.cited, *example.negatives)))


def _digest(examples: Iterable[Example], passages: Iterable[Passage]) -> str:
    digest = hashlib.sha256()
    for record in (*examples, *passages):
        digest.update(record.model_dump_json(exclude_defaults=True).encode() + b"\n")
    return digest.hexdigest()


def _check_same_data(output: Path, digests: dict[str, str]) -> None:
    path = output / "data.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    for name, digest in digests.items():
        if (then := before.get(name, digest)) != digest:
            raise DataError(
                f"--resume: the {name} examples or their passages are not those that the run in {str(output)!r} was "
                f"started with (sha256 {then[:12]}… then, {digest[:12]}… now): restore the files, or start a new run "
                "in another output"
            )


def _has_ended(checkpoint: Path, config: RunConfig, examples: int, *, evaluated: bool) -> bool:
    """Whether a checkpoint is the last step, and was evaluated where the run evaluates."""
    step = int(checkpoint.name.rpartition("-")[2])
    if step < count_steps(config.training, examples)[1]:
        return False
    records = read_metrics(Path(config.output) / "metrics.jsonl")
    shown = any(r["kind"] == "held-out" and r["step"] == step for r in records)
    return shown or not evaluated or config.training.eval_every is None


@contextlib.contextmanager
def _interruption_explained(output: Path) -> Iterator[None]:
    """Gives a `KeyboardInterrupt` that says nothing a text: what there is to continue behind."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if interrupt.args:
            raise
        found = checkpoints(output / "checkpoints")
        left = f"last checkpoint: {found[-1]}" if found else "nothing was saved so far"
        raise KeyboardInterrupt(f"stopped at once; {left}") from None


def _write_description(output: Path, config: RunConfig, digests: dict[str, str]) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        with replace_file(output / "data.json") as file:
            file.write(json.dumps(digests, indent=1) + "\n")
        with replace_file(output / "config.yaml") as file:
            file.write(dump_config(config))
    except OSError as error:
        raise ConfigError(f"output={config.output!r} cannot be written: {error}") from None


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in section.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _measure(
    template: Template,
    config: RunConfig,
    examples: Sequence[Example],
    corpus: dict[str, Passage],
    console: Console,
) -> list[int]:
    """Tokenizes everything once, so that what does not fit is refused before a model is loaded, not late at night."""
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress:

        def track(examples: Sequence[Example]) -> Iterable[Example]:
            return progress.track(examples, description="checking lengths")

        return example_lengths(examples, corpus, template, config.training.pack_limits, track=track)
