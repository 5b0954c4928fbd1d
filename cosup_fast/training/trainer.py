"""The training loop: batches in a fixed order, one joint step, held-out figures, checkpoints, exact continuation.

Epoch e reads the training set in an order that depends on (seed, e) alone, so the position of a run is its step
number. All examples of a step are contrasted with each other; how the step is cut into micro-batches (`step.py`)
changes neither a loss nor a gradient.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from cosup_fast.data.packing import CoSupervisionBatch, PackLimits, make_batch
from cosup_fast.data.records import Example, Passage
from cosup_fast.data.sampling import StepSampler, example_lengths
from cosup_fast.decoder_layers import Recompute
from cosup_fast.files import replace_file
from cosup_fast.modeling import CoSupervisionModel
from cosup_fast.training.checkpoint import CheckpointError, load_trainer_state, save_checkpoint
from cosup_fast.training.diagnostics import Diagnosis, diagnose
from cosup_fast.training.monitor import FailureMonitor, SpikeGuard
from cosup_fast.training.optimizers import OptimizerName
from cosup_fast.training.sharding import Sharding
from cosup_fast.training.step import accumulate_gradients, autocast


class TrainingConfig(BaseModel):
    """The optimisation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(default=3, ge=1, description="passes over the training set, unless steps is given")
    steps: int | None = Field(default=None, ge=1, description="stop after so many steps, whatever the epochs")
    max_minutes: float | None = Field(default=None, gt=0, description="stop after so many minutes, with a checkpoint")
    batch_size: int = Field(default=32, ge=1, description="examples of a step: all their passages are its negatives")
    micro_batch_size: int | None = Field(
        default=None, ge=1, description="most sequences in one forward of a model, for memory; null: all of the step"
    )
    tokens_per_micro_batch: int | None = Field(
        default=None, ge=1, description="most tokens in one forward of a model, for memory; null: all of the step"
    )
    fixed_shapes: bool = Field(
        default=False, description="fill every micro-batch up to tokens_per_micro_batch, so that no shape ever changes"
    )
    balance_lengths: bool = Field(
        default=True, description="give every step short and long examples alike; false: a plain permutation"
    )
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
    activation_checkpointing: Recompute = Field(
        default="none", description="computed again in the backward pass, for memory: selective keeps all products"
    )
    compile: bool = Field(default=False, description="torch.compile for every decoder layer")
    sharding: Sharding = Field(
        default="none",
        description="fsdp: ranks share out weights, gradients and optimizer states; ddp: each has all of them",
    )
    optimizer: OptimizerName = Field(
        default="adamw", description="adamw-8bit: states of bitsandbytes; adamw-8bit-torchao: of torchao"
    )
    optimizer_in_backward: bool = Field(
        default=False, description="step each weight in the backward pass and keep no gradients; one GPU, one pack"
    )
    seed: int = 0
    log_every: int = Field(default=1, ge=1, description="steps between metrics")
    diagnose_every: int | None = Field(
        default=100,
        ge=1,
        description="steps between looks at the gradients of each loss, each as dear as a step; null: never",
    )
    spike_factor: float | None = Field(
        default=20.0,
        gt=0,
        description="stop before a step whose loss is so many robust standard deviations above the median; null: never",
    )
    spike_window: int = Field(default=100, ge=4, description="steps that the median of spike_factor is taken over")
    eval_every: int | None = Field(default=100, ge=1, description="steps between held-out evaluations; null: never")
    checkpoint_every: int | None = Field(
        default=500, ge=1, description="steps between checkpoints; null: only at the end"
    )
    keep_checkpoints: int = Field(default=2, ge=1)
    device: str = Field(default="auto", description="auto: cuda when there is one, else cpu")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.fixed_shapes and self.tokens_per_micro_batch is None:
            raise ValueError(
                "training.fixed_shapes=true needs a size to fill micro-batches up to: set "
                "training.tokens_per_micro_batch, now null"
            )
        if self.compile and self.activation_checkpointing != "none":
            raise ValueError(
                f"training.compile=true has no effect under training.activation_checkpointing="
                f"{self.activation_checkpointing}, which runs its layers uncompiled: change one of them"
            )
        for wrong, field in (
            (
                self.clip is not None,
                f"training.clip={self.clip}, which needs the norm of all gradients: set it to null",
            ),
            (
                self.tokens_per_micro_batch is not None or self.micro_batch_size is not None,
                f"training.tokens_per_micro_batch={self.tokens_per_micro_batch} and training.micro_batch_size="
                f"{self.micro_batch_size}, which add gradients up over packs: set both to null",
            ),
            (self.sharding != "none", f"training.sharding={self.sharding}, which sums gradients first: set it to none"),
            (
                self.spike_factor is not None,
                f"training.spike_factor={self.spike_factor}, which refuses a step before it is taken: set it to null",
            ),
        ):
            if self.optimizer_in_backward and wrong:
                raise ValueError(f"training.optimizer_in_backward=true cannot be had with {field}")
        return self

    @property
    def pack_limits(self) -> PackLimits:
        """What goes into a micro-batch."""
        return PackLimits(self.tokens_per_micro_batch, self.micro_batch_size, self.fixed_shapes)


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
    in_batch_rank: float  # mean rank of a query's own passage, 1 is the highest; 0 without a query
    candidates: int
    gen_grad_norm: float  # before clipping, as the next one
    embseq_grad_norm: float  # of Embseq with its projection; 0 where Embseq is Gen itself
    lr: float
    tokens_per_second: float
    useful_tokens: float  # share of the computed tokens that are no filler: 1 unless shapes are fixed
    peak_memory_gib: float  # so far: allocated on the GPU, or resident in this process without one; 0 if not known


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
        lengths: what `example_lengths` says of the examples, if it was asked already.
        evaluate: called every `eval_every` steps, before the first step and after the last, with the model and the
            step; returns a `HeldOut`.
        on_metrics: called with every `StepMetrics`, `Diagnosis` and `HeldOut`.
        on_warning: called with every message of the failure monitor.
        on_interrupt: called with what the first Ctrl-C does, when it is pressed.

    Raises:
        ValueError: what `example_lengths` refuses.
    """

    def __init__(
        self,
        model: CoSupervisionModel,
        config: TrainingConfig,
        examples: Sequence[Example],
        corpus: dict[str, Passage],
        output: Path,
        *,
        lengths: Sequence[int] | None = None,
        evaluate: Callable[[CoSupervisionModel, int], HeldOut] | None = None,
        on_metrics: Callable[[StepMetrics | Diagnosis | HeldOut], None] = lambda metrics: None,
        on_warning: Callable[[str], None] = lambda message: None,
        on_interrupt: Callable[[str], None] = lambda message: None,
    ):
        self.model = model
        self.config = config
        self.examples = examples
        self.corpus = corpus
        self.output = output
        self.checkpoints = output / "checkpoints"
        self.evaluate = evaluate
        self.on_metrics = on_metrics
        self.on_warning = on_warning
        self.on_interrupt = on_interrupt
        self.monitor = FailureMonitor()
        self.guard = SpikeGuard(config.spike_factor, config.spike_window)
        self.step = 0
        self.last_checkpoint: Path | None = None
        self._saved_step = self._evaluated_step = -1
        self.steps_per_epoch, self.total_steps = count_steps(config, len(examples))
        self.sampler = StepSampler(
            lengths or example_lengths(examples, corpus, model.template, config.pack_limits),
            config.batch_size,
            config.seed,
            balanced=config.balance_lengths,
        )
        self._next: tuple[int, CoSupervisionBatch] | None = None
        model.enable_activation_checkpointing(config.activation_checkpointing)
        if config.compile:
            model.compile_layers(fixed_shapes=config.fixed_shapes)
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
            messages: Iterable[str] = ()
            if record["kind"] == "step":
                messages = self.monitor.step(record["nsp"], record["candidates"])
                self.guard.accept(record["ntp"], record["nsp"] if record["candidates"] else None)
            elif record["kind"] == "held-out":
                messages = self.monitor.evaluation(record["ntp"], record["recall_at_5"])
                self._evaluated_step = record["step"]
            for _ in messages:
                pass

    def train(self) -> Path:
        """Runs to the end and returns the last checkpoint.

        Raises:
            TrainingError: a loss or a gradient is not finite, or a loss spikes. The step is not taken, its batch is
                described in `output/refused-step.json`, and the weights before it are saved.
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

    def save(self, *, extra: int = 0) -> Path:
        """Writes a checkpoint of the current step, unless this trainer wrote it or came from it.

        Args:
            extra: how many checkpoints more than `keep_checkpoints` stay.
        """
        if self.last_checkpoint is None or self._saved_step != self.step:
            self.last_checkpoint = save_checkpoint(
                self.checkpoints, self.step, self.model, self.optimizer, keep=self.config.keep_checkpoints + extra
            )
            self._saved_step = self.step
        return self.last_checkpoint

    def batch_examples(self, step: int) -> list[Example]:
        """The examples of a step, counted from 0."""
        return [self.examples[i] for i in self.sampler[step]]

    def batch(self, step: int) -> CoSupervisionBatch:
        """What a step reads, on the model's device."""
        chosen = self.batch_examples(step)
        return make_batch(chosen, self.corpus, self.model.template, self.config.pack_limits).to(self.model.device)

    def _step(self) -> StepMetrics:
        config, model = self.config, self.model
        number, batch = self._next or (-1, None)
        if batch is None or number != self.step:
            batch = self.batch(self.step)
        if config.diagnose_every and (self.step + 1) % config.diagnose_every == 0:
            self.on_metrics(diagnose(model, batch, self.step + 1, precision=config.precision))
        start, random = time.perf_counter(), _random_state()
        out = accumulate_gradients(model, batch, precision=config.precision)
        # The device is still busy with this step; what follows waits for it.
        self._next = (self.step + 1, self.batch(self.step + 1)) if self.step + 1 < self.total_steps else None
        hits, ranks = (
            (out.loss.new_zeros(()),) * 2
            if out.stats is None
            else ((out.stats.rank == 0).sum(), (out.stats.rank + 1).sum())
        )
        loss, ntp, nsp, hits, ranks = torch.stack([out.loss, out.ntp, out.nsp, hits, ranks]).tolist()
        gen_norm, embseq_norm, total_norm = self._clip()
        watched = ntp, nsp if batch.nsp_count and model.nsp.weight else None
        problems = list(self.guard.refuse(*watched))
        if not math.isfinite(total_norm):
            problems.append(f"gradient norms {gen_norm:.3g} (Gen) and {embseq_norm:.3g} (Embseq)")
        if problems:
            raise self._refused(
                problems,
                random,
                {"ntp": ntp, "nsp": nsp, "gen_grad_norm": gen_norm, "embseq_grad_norm": embseq_norm},
            )
        lr = self._schedule()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.guard.accept(*watched)
        self.step += 1
        return StepMetrics(
            step=self.step,
            epoch=self.step / self.steps_per_epoch,
            loss=loss,
            ntp=ntp,
            nsp=nsp,
            in_batch_accuracy=hits / max(1, batch.nsp_count),
            in_batch_rank=ranks / max(1, batch.nsp_count),
            candidates=len(batch.key_ids),
            gen_grad_norm=gen_norm,
            embseq_grad_norm=embseq_norm,
            lr=lr,
            tokens_per_second=batch.tokens / (time.perf_counter() - start),
            useful_tokens=batch.tokens / sum(len(pack.input_ids) for pack in batch.packs),
            peak_memory_gib=_peak_memory(model.device) / 2**30,
        )

    def _refused(self, problems: list[str], random: list[Tensor], figures: dict[str, float]) -> TrainingError:
        """Puts everything back to where it was before a step and saves that; the error to raise."""
        self.optimizer.zero_grad(set_to_none=True)
        chosen = self.batch_examples(self.step)
        losses = {example.id: self._ntp_alone(example) for example in chosen}
        _set_random_state(random)
        worst = max(losses, key=lambda name: losses[name] if math.isfinite(losses[name]) else math.inf)
        kept = f"last good checkpoint: {self.last_checkpoint or 'none'}"
        if self.step and all(bool(p.isfinite().all()) for p in self.model.parameters() if p.is_floating_point()):
            try:
                kept = f"saved as they were before it: {self.save(extra=1)}"
            except CheckpointError as error:
                kept += f" ({error})"
        description = self.output / "refused-step.json"
        record = {"step": self.step + 1, "problems": problems, **figures, "ntp_of_examples": losses}
        self.output.mkdir(parents=True, exist_ok=True)
        with replace_file(description) as file:
            json.dump(_without_nan(record), file, indent=1)
        names = f"{', '.join(example.id for example in chosen[:8])}{', …' if len(chosen) > 8 else ''}"
        return TrainingError(
            f"step {self.step + 1}: {'; '.join(problems)}. Its examples: {names}; the highest NTP loss alone has "
            f"{worst} ({losses[worst]:.3g}); all of them: {description}. The weights were not changed by it; {kept}. "
            "Look at these examples, or lower training.lr; --resume with training.spike_factor=null lets a spike pass"
        )

    @torch.no_grad()
    def _ntp_alone(self, example: Example) -> float:
        """NTP of one example, nats per token."""
        part = make_batch([example], self.corpus, self.model.template).to(self.model.device).gen[0]
        with autocast(self.model.device, self.config.precision):
            return float(self.model.gen_losses(part, len(part.targets))[0])

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
    per_epoch = math.ceil(examples / config.batch_size)
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


def as_record(metrics: StepMetrics | Diagnosis | HeldOut) -> dict[str, Any]:
    """Metrics as one flat record, `kind` telling which."""
    kind = {StepMetrics: "step", Diagnosis: "diagnosis", HeldOut: "held-out"}[type(metrics)]
    return {"kind": kind, **asdict(metrics)}


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


def _peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch had allocated on a GPU, or that was resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _random_state() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if state[1:]:
        torch.cuda.set_rng_state_all(state[1:])


def _without_nan(value: Any) -> Any:
    """The same for JSON, which has no NaN: as text."""
    if isinstance(value, dict):
        return {key: _without_nan(x) for key, x in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


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
