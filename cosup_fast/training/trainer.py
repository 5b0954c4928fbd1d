"""The training loop: batches in a fixed order, one joint step, held-out figures, checkpoints, exact continuation.

Each step draws `batch_size * accumulate` examples; epoch e reads the training set in the order of the permutation
seeded by (seed, e), so the position of a run is its step number alone. Losses are summed and divided by the counts of
the whole step: the gradient does not depend on how a step is cut into micro-batches, except that NSP's negatives come
from each micro-batch.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from cosup_fast.data.packing import make_batch
from cosup_fast.data.records import Example, Passage
from cosup_fast.data.template import IGNORE
from cosup_fast.modeling import CoSupervisionModel
from cosup_fast.training.checkpoint import load_trainer_state, save_checkpoint
from cosup_fast.training.monitor import FailureMonitor


class TrainingConfig(BaseModel):
    """The optimisation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(default=3, ge=1, description="passes over the training set, unless steps is given")
    steps: int | None = Field(default=None, ge=1, description="stop after so many steps, whatever the epochs")
    max_minutes: float | None = Field(default=None, gt=0, description="stop after so many minutes, with a checkpoint")
    batch_size: int = Field(default=32, ge=1, description="examples in one forward: their passages are the negatives")
    accumulate: int = Field(default=1, ge=1, description="forwards per step")
    lr: float = Field(default=2e-5, gt=0)
    warmup: float = Field(default=0.03, ge=0, lt=1, description="share of the steps with a rising learning rate")
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    lr_decay: float = Field(
        default=1.0, gt=0, le=1, description="factor on the learning rate after each epoch (paper: 0.85)"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="of matrices; norms, biases and scales have none")
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = Field(
        default=1.0, gt=0, description="global gradient norm over both models; null: no clipping"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="bfloat16: autocast, weights stay as is"
    )
    activation_checkpointing: bool = False
    seed: int = 0
    log_every: int = Field(default=1, ge=1, description="steps between metrics")
    eval_every: int | None = Field(default=100, ge=1, description="steps between held-out evaluations; null: never")
    checkpoint_every: int | None = Field(
        default=500, ge=1, description="steps between checkpoints; null: only at the end"
    )
    keep_checkpoints: int = Field(default=2, ge=1)
    device: str = Field(default="auto", description="auto: cuda when there is one, else cpu")


class TrainingError(ValueError):
    """Training cannot go on; the message names the step, the cause and the last good checkpoint."""


@dataclass(frozen=True)
class StepMetrics:
    """What one step tells. Losses are in nats; tokens are those of both models, none of them a pad token."""

    step: int
    epoch: float
    loss: float
    ntp: float
    nsp: float
    in_batch_accuracy: float  # share of the queries whose own passage scores highest
    candidates: int
    gen_grad_norm: float  # before clipping, as the next one
    embseq_grad_norm: float  # of Embseq with its projection; 0 where Embseq is Gen itself
    lr: float
    tokens_per_second: float


@dataclass(frozen=True)
class HeldOut:
    """Figures on examples that are not trained on."""

    step: int
    ntp: float  # nats per supervised token
    nsp: float  # nats per query, within batches of training.batch_size
    recall_at_1: float
    recall_at_5: float
    recall_at_20: float


class Trainer:
    """Trains a `CoSupervisionModel`.

    Args:
        model: Gen and Embseq.
        config: the optimisation.
        examples: what is trained on.
        corpus: passages by id; every passage that an example asks for is in it.
        output: the run's folder; checkpoints go into `output/checkpoints`.
        evaluate: called every `eval_every` steps, before the first step and after the last, with the model and the
            step; returns a `HeldOut`.
        on_metrics: called with every `StepMetrics` and `HeldOut`.
        on_warning: called with every message of the failure monitor.
        on_interrupt: called with what the first Ctrl-C does, when it is pressed.

    Raises:
        ValueError: no examples, or an example that does not fit the models (see `Template.gen_sequence`).
    """

    def __init__(
        self,
        model: CoSupervisionModel,
        config: TrainingConfig,
        examples: Sequence[Example],
        corpus: dict[str, Passage],
        output: Path,
        *,
        evaluate: Callable[[CoSupervisionModel, int], HeldOut] | None = None,
        on_metrics: Callable[[StepMetrics | HeldOut], None] = lambda metrics: None,
        on_warning: Callable[[str], None] = lambda message: None,
        on_interrupt: Callable[[str], None] = lambda message: None,
    ):
        if not examples:
            raise ValueError("there is no training example: data.train names an empty set")
        self.model = model
        self.config = config
        self.examples = examples
        self.corpus = corpus
        self.checkpoints = output / "checkpoints"
        self.evaluate = evaluate
        self.on_metrics = on_metrics
        self.on_warning = on_warning
        self.on_interrupt = on_interrupt
        self.monitor = FailureMonitor()
        self.step = 0
        self.last_checkpoint: Path | None = None
        self._saved_step = self._evaluated_step = -1
        self.steps_per_epoch, self.total_steps = count_steps(config, len(examples))
        if config.activation_checkpointing:
            model.enable_activation_checkpointing()
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [  # decay would pull norms and the learnt scale towards 0, not towards a simpler model
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.lr,
            betas=config.betas,
            fused=model.device.type in ("cpu", "cuda"),
        )

    def resume(self, checkpoint: Path) -> None:
        """Continues behind a checkpoint whose model is loaded already."""
        self.step = self._saved_step = load_trainer_state(checkpoint, self.model, self.optimizer)
        self.last_checkpoint = checkpoint

    def replay(self, records: Iterable[dict[str, Any]]) -> None:
        """Shows the failure monitor the records (see `as_record`) of the part before; it has warned of them then."""
        for record in records:
            if record["kind"] == "step":
                messages = self.monitor.step(record["nsp"], record["candidates"])
            else:
                messages = self.monitor.evaluation(record["ntp"], record["recall_at_5"])
                self._evaluated_step = record["step"]
            for _ in messages:
                pass

    def train(self) -> Path:
        """Runs to the end and returns the last checkpoint.

        Raises:
            TrainingError: the loss or a gradient is not finite.
            KeyboardInterrupt: Ctrl-C; the current step has been finished and saved. A second one stops at once.
        """
        config = self.config
        deadline = time.monotonic() + 60 * (config.max_minutes or math.inf)
        self.model.train()
        if self.step == 0:
            torch.manual_seed(config.seed)
            self._warn(_lost_in_rounding(self.model, config.lr))
            self._evaluate()
        with _interruptible(self.on_interrupt) as interrupted:
            while self.step < self.total_steps and time.monotonic() < deadline and not interrupted.is_set():
                metrics = self._step()
                if self.step % config.log_every == 0:
                    self.on_metrics(metrics)
                self._warn(self.monitor.step(metrics.nsp, metrics.candidates))
                if config.eval_every and self.step % config.eval_every == 0 and self.step < self.total_steps:
                    self._evaluate()
                if config.checkpoint_every and self.step % config.checkpoint_every == 0:
                    self.save()
            self.save()
            if interrupted.is_set():
                raise KeyboardInterrupt(f"stopped after step {self.step}; saved {self.last_checkpoint}")
        self._evaluate()
        assert self.last_checkpoint is not None
        return self.last_checkpoint

    def save(self) -> Path:
        """Writes a checkpoint of the current step, unless this trainer wrote it or came from it."""
        if self.last_checkpoint is None or self._saved_step != self.step:
            self.last_checkpoint = save_checkpoint(
                self.checkpoints, self.step, self.model, self.optimizer, keep=self.config.keep_checkpoints
            )
            self._saved_step = self.step
        return self.last_checkpoint

    def batch_examples(self, step: int) -> list[Example]:
        """The examples of a step, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed((self.config.seed << 20) + epoch)
        order = torch.randperm(len(self.examples), generator=generator)
        size = self.config.batch_size * self.config.accumulate
        return [self.examples[i] for i in order[position * size : (position + 1) * size].tolist()]

    def _step(self) -> StepMetrics:
        config, model = self.config, self.model
        start = time.perf_counter()
        chosen = self.batch_examples(self.step)
        batches = [
            make_batch(chosen[i : i + config.batch_size], self.corpus, model.template).to(model.device)
            for i in range(0, len(chosen), config.batch_size)
        ]
        ntp_count = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
        nsp_count = sum(len(batch.query_rows) for batch in batches)
        totals = torch.zeros(4, device=model.device)
        for batch in batches:
            with autocast(model.device, config.precision):
                out = model(batch, ntp_count=ntp_count, nsp_count=nsp_count)
            out.loss.backward()
            totals[:3] += torch.stack([out.loss, out.ntp, out.nsp]).detach()
            if out.stats is not None:
                totals[3] += (out.stats.rank == 0).sum()
        loss, ntp, nsp, hits = totals.tolist()
        gen_norm, embseq_norm, total_norm = self._clip()
        if not math.isfinite(loss) or not math.isfinite(total_norm):
            raise TrainingError(
                f"step {self.step + 1}: loss {loss}, gradient norms {gen_norm} (Gen) and {embseq_norm} (Embseq); "
                f"its examples: {', '.join(e.id for e in chosen[:8])}{', …' if len(chosen) > 8 else ''}. The weights "
                f"were not changed by it. Last good checkpoint: {self.last_checkpoint or 'none'}; "
                "lower training.lr, or look at these examples"
            )
        lr = self._schedule()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        packs = [pack for b in batches for pack in (b.gen, b.passages) if pack is not None]
        return StepMetrics(
            step=self.step,
            epoch=self.step / self.steps_per_epoch,
            loss=loss,
            ntp=ntp,
            nsp=nsp,
            in_batch_accuracy=hits / max(1, nsp_count),
            candidates=max(len(b.passages.lengths) if b.passages else 0 for b in batches),
            gen_grad_norm=gen_norm,
            embseq_grad_norm=embseq_norm,
            lr=lr,
            tokens_per_second=sum(sum(pack.lengths) for pack in packs) / (time.perf_counter() - start),
        )

    def _clip(self) -> tuple[float, float, float]:
        """Clips the global norm; returns what it was of Gen, of Embseq with its projection, and of everything."""
        gradients: dict[str, list[Tensor]] = {"gen": [], "embseq": [], "criterion": []}
        for name, p in self.model.named_parameters():
            if p.grad is not None:
                part = name.partition(".")[0]
                gradients["embseq" if part == "projection" else part].append(p.grad)
        norms = [nn.utils.get_total_norm(group).to(self.model.device) for group in gradients.values()]
        total = torch.linalg.vector_norm(torch.stack(norms))
        if self.config.clip is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.clip, total)
        return float(norms[0]), float(norms[1]), float(total)

    def _schedule(self) -> float:
        lr = self.config.lr * learning_rate_factor(self.config, self.step, self.total_steps, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _evaluate(self) -> None:
        if self.evaluate is None or self.config.eval_every is None or self._evaluated_step == self.step:
            return
        self._evaluated_step = self.step
        with _rng_untouched():
            held_out = self.evaluate(self.model, self.step)
        self.model.train()
        self.on_metrics(held_out)
        self._warn(self.monitor.evaluation(held_out.ntp, held_out.recall_at_5))

    def _warn(self, messages: Iterator[str]) -> None:
        for message in messages:
            self.on_warning(message)


def count_steps(config: TrainingConfig, examples: int) -> tuple[int, int]:
    """The steps of an epoch over so many examples, and those of the run."""
    per_epoch = math.ceil(examples / (config.batch_size * config.accumulate))
    return per_epoch, config.steps or config.epochs * per_epoch


def learning_rate_factor(config: TrainingConfig, step: int, total: int, steps_per_epoch: int) -> float:
    """The factor on `lr` at a step counted from 0: warm-up, then the schedule, times the decay per epoch."""
    warmup = round(config.warmup * total)
    decay = config.lr_decay ** (step // steps_per_epoch)
    if step < warmup:
        return decay * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return (
        decay
        * {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[config.schedule]
    )


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bfloat16 when asked for."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def choose_device(requested: str) -> torch.device:
    """`auto` is CUDA when there is one, else the CPU."""
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise ValueError(f"training.device={requested!r}: {error}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"training.device={requested!r}: this torch sees no CUDA device; use auto or cpu")
    return device


def as_record(metrics: StepMetrics | HeldOut) -> dict[str, Any]:
    """Metrics as one flat record, `kind` telling which."""
    return {"kind": "step" if isinstance(metrics, StepMetrics) else "held-out", **asdict(metrics)}


@torch.no_grad()
def _lost_in_rounding(model: CoSupervisionModel, lr: float) -> Iterator[str]:
    """A warning when many bfloat16 weights are further apart than a step of AdamW, about `lr`, can bridge."""
    trained = [p for p in model.parameters() if p.requires_grad and p.dtype == torch.bfloat16]
    stuck = sum(float((p + lr == p).sum()) for p in trained) / max(1, sum(p.numel() for p in trained))
    if stuck > 0.1:
        yield (
            f"model.dtype=bfloat16: a step of training.lr={lr:g} is rounded away on {stuck:.0%} of the weights, which "
            "then barely move: use model.dtype=float32 with training.precision=bfloat16"
        )


@contextlib.contextmanager
def _rng_untouched() -> Iterator[None]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


@contextlib.contextmanager
def _interruptible(on_interrupt: Callable[[str], None]) -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into an event that the loop reads between steps; the second one interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.getsignal(signal.SIGINT)

    def stop(signum: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)
        with contextlib.suppress(RuntimeError):  # Python refuses to print in the middle of another print
            on_interrupt("finishing this step, then saving; press Ctrl-C again to stop at once")

    signal.signal(signal.SIGINT, stop)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
