"""The training loop: batches in a fixed order, one joint step, held-out figures, checkpoints, exact continuation.

Epoch e reads the training set in an order that depends on (seed, e) alone, so the position of a run is its step
number. All examples of a step are contrasted with each other; how the step is cut into micro-batches (`step.py`) and
shared by ranks (`ranks.py`) changes neither a loss nor a gradient. Ranks meet before each step, so that all of them
stop together and one that is lost is named; rank 0 alone writes.
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
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cosup_fast.config.training import TrainingConfig
from cosup_fast.data.packing import CoSupervisionBatch, make_batch
from cosup_fast.data.records import Example, Passage
from cosup_fast.data.sampling import StepSampler, example_lengths
from cosup_fast.distributed import Peers
from cosup_fast.errors import CosupError
from cosup_fast.files import replace_file
from cosup_fast.losses import CoSupervisionOutput
from cosup_fast.model import CoSupervisionModel
from cosup_fast.training.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    load_trainer_state,
    random_state,
    set_random_state,
)
from cosup_fast.training.diagnostics import Diagnosis, diagnose
from cosup_fast.training.metrics import HeldOut, StepMetrics
from cosup_fast.training.monitor import FailureMonitor, SpikeGuard
from cosup_fast.training.optimizers import LocalOptimizer
from cosup_fast.training.ranks import reduce_gradients
from cosup_fast.training.schedule import count_steps, learning_rate_factor
from cosup_fast.training.sharding import agree_on_norms, local, reshard, shard
from cosup_fast.training.step import accumulate_gradients, autocast


class TrainingError(CosupError, ValueError):
    """Training cannot go on; the message names the step, the cause and the last good checkpoint."""


class Trainer:
    """Trains a `CoSupervisionModel`.

    Args:
        model: Gen and Embseq.
        config: the optimisation.
        examples: what is trained on.
        corpus: passages by id; every passage that an example asks for is in it.
        output: the run's folder; checkpoints go into `output/checkpoints`.
        lengths: what `example_lengths` says of the examples, if it was asked already.
        peers: the ranks that share every step; all of them have the same weights and arguments.
        device: where it is trained, if that is not where the model is: shards go there one by one, and only the first
            rank needs a model with weights.
        evaluate: called every `eval_every` steps, before the first step and after the last, with the model and the
            step, on every rank; returns a `HeldOut`.
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
        peers: Peers | None = None,
        device: torch.device | None = None,
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
        self.peers = peers
        self.rank, self.ranks = (0, 1) if peers is None else (peers.rank, peers.size)
        self.writer = CheckpointWriter(output / "checkpoints", config.keep_checkpoints, peers)
        self.evaluate = evaluate
        self.on_metrics = on_metrics
        self.on_warning = on_warning
        self.on_interrupt = on_interrupt
        self.monitor = FailureMonitor()
        self.guard = SpikeGuard(config.spike_factor, config.spike_window)
        self.step = 0
        self.last_checkpoint: Path | None = None
        self._saved_step = self._evaluated_step = -1
        self._written = False
        self.steps_per_epoch, self.total_steps = count_steps(config, len(examples))
        self.sampler = StepSampler(
            lengths or example_lengths(examples, corpus, model.template, config.pack_limits),
            config.batch_size,
            config.seed,
            balanced=config.balance_lengths,
        )
        self._next: tuple[int, CoSupervisionBatch] | None = None
        device = model.device if device is None else device
        model.criterion.nsp.key_grad = config.key_grad
        model.enable_activation_checkpointing(config.activation_checkpointing)
        if config.compile:
            model.compile_layers(fixed_shapes=config.fixed_shapes)
        if config.sharding == "fsdp" and peers is not None:
            agree_on_norms(model, peers)
            shard(model, peers.mesh(device.type), precision=config.precision)
        self.optimizer = LocalOptimizer(
            model.named_parameters(),
            config.optimizer,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            in_backward=config.optimizer_in_backward,
        )

    def resume(self, checkpoint: Path) -> None:
        """Continues behind a checkpoint whose model is loaded already."""
        self._seed()  # where the checkpoint is one of fewer ranks
        self.step = self._saved_step = load_trainer_state(
            checkpoint, self.model, self.optimizer, self.rank, self.ranks, warn=self.on_warning
        )
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
            self._seed()
            self._evaluate()
        with self._nothing_lost(), self._naming("training"), _interruptible(self.on_interrupt) as interrupted:
            while self.step < self.total_steps and not self._stop(interrupted, late=time.monotonic() >= deadline):
                if self.writer.pending is not None and self._written:
                    self.last_checkpoint = self.writer.finish()
                metrics = self._step()
                if self.step % config.log_every == 0:
                    self.on_metrics(metrics)
                self._warn(self.monitor.step(metrics.nsp, metrics.candidates))
                if config.eval_every and self.step % config.eval_every == 0 and self.step < self.total_steps:
                    self._evaluate()
                if config.checkpoint_every and self.step % config.checkpoint_every == 0:
                    self._begin_save()
            self.save()
            if self._stop(interrupted):
                raise KeyboardInterrupt(f"stopped after step {self.step}; saved {self.last_checkpoint}")
        self._evaluate()
        assert self.last_checkpoint is not None
        return self.last_checkpoint

    @contextlib.contextmanager
    def _nothing_lost(self) -> Iterator[None]:
        """Where this process is stopped at once, what it has begun to save is still saved."""
        try:
            yield
        except KeyboardInterrupt:
            if self.writer.pending is not None and self.peers is None:
                self.writer.finish()
            raise

    def _naming(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Where FSDP's collectives fail inside, the lost ranks are named."""
        return contextlib.nullcontext() if self.peers is None else self.peers.naming(what)

    def _seed(self) -> None:
        """Random numbers of dropout, other ones on every rank."""
        torch.manual_seed(self.config.seed + (self.rank << 32))

    def _stop(self, interrupted: threading.Event, *, late: bool = False) -> bool:
        """Whether this rank, or any other, was interrupted or is late."""
        note = {"step": self.step, "stop": interrupted.is_set() or late, "written": not self.writer.busy}
        notes = [note] if self.peers is None else self.peers.meet(f"step {self.step + 1}", note)
        self._written = all(one["written"] for one in notes)
        return any(one["stop"] for one in notes)

    def save(self, *, extra: int = 0) -> Path:
        """Writes a checkpoint of the current step, unless this trainer wrote it or came from it.

        Args:
            extra: how many checkpoints more than `keep_checkpoints` stay.
        """
        self._begin_save(extra=extra)
        if self.writer.pending is not None:
            self.last_checkpoint = self.writer.finish()
        assert self.last_checkpoint is not None
        return self.last_checkpoint

    def _begin_save(self, *, extra: int = 0) -> None:
        """Copies the state of this step; the files are written while training goes on."""
        if self._saved_step == self.step:
            return
        if self.writer.pending is not None:
            self.last_checkpoint = self.writer.finish()
        self.writer.start(self.step, self.model, self.optimizer, extra=extra)
        self._saved_step = self.step

    def batch_examples(self, step: int) -> list[Example]:
        """The examples of a step, counted from 0."""
        return [self.examples[i] for i in self.sampler[step]]

    def batch(self, step: int) -> CoSupervisionBatch:
        """What this rank reads of a step, on the model's device."""
        chosen = self.batch_examples(step)
        limits = self.config.pack_limits
        template, even = self.model.template, self.model.sharded
        batch = make_batch(chosen, self.corpus, template, limits, rank=self.rank, ranks=self.ranks, even=even)
        return batch.to(self.model.device)

    def _step(self) -> StepMetrics:
        config, model = self.config, self.model
        number, batch = self._next or (-1, None)
        if batch is None or number != self.step:
            batch = self.batch(self.step)
        if config.diagnose_every and (self.step + 1) % config.diagnose_every == 0:
            self.on_metrics(diagnose(model, batch, self.step + 1, precision=config.precision, peers=self.peers))
        start, random = time.perf_counter(), random_state(model.device)
        lr = self._schedule()
        with self._naming(f"step {self.step + 1}"):
            out = accumulate_gradients(model, batch, precision=config.precision, group=self.peers)
        # The device is still busy with this step; what follows waits for it.
        self._next = (self.step + 1, self.batch(self.step + 1)) if self.step + 1 < self.total_steps else None
        reduce_gradients(model, self.peers)
        loss, ntp, nsp, hits, ranks, computed, *peaks = self._totals(batch, out)
        gen_norm, embseq_norm, total_norm = self._clip()
        watched = ntp, nsp if batch.step.nsp and model.nsp.weight else None
        problems = list(self.guard.refuse(*watched))
        if not math.isfinite(total_norm):
            problems.append(f"gradient norms {gen_norm:.3g} (Gen) and {embseq_norm:.3g} (Embseq)")
        if problems:
            raise self._refused(
                problems,
                random,
                {"ntp": ntp, "nsp": nsp, "gen_grad_norm": gen_norm, "embseq_grad_norm": embseq_norm},
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.guard.accept(*watched)
        self.step += 1
        return StepMetrics(
            step=self.step,
            epoch=self.step / self.steps_per_epoch,
            loss=loss,
            ntp=ntp,
            nsp=nsp,
            in_batch_accuracy=hits / max(1, batch.step.nsp),
            in_batch_rank=ranks / max(1, batch.step.nsp),
            candidates=batch.step.passages,
            gen_grad_norm=gen_norm,
            embseq_grad_norm=embseq_norm,
            lr=lr,
            tokens_per_second=batch.step.tokens / (time.perf_counter() - start),
            useful_tokens=batch.step.tokens / computed,
            peak_memory_gib=max(peaks),
        )

    def _totals(self, batch: CoSupervisionBatch, out: CoSupervisionOutput) -> list[float]:
        """Losses, hits, ranks and computed tokens, summed over ranks, and the peak memory of each in GiB."""
        hits, places = out.loss.new_zeros(()), out.loss.new_zeros(())
        if out.stats is not None:
            hits, places = (out.stats.rank == 0).sum(), (out.stats.rank + 1).sum()
        peaks = [0.0] * self.ranks
        peaks[self.rank] = _peak_memory(self.model.device) / 2**30
        known = torch.tensor([sum(len(pack.input_ids) for pack in batch.packs), *peaks], dtype=torch.float64)
        found = torch.stack([x.double() for x in (out.loss, out.ntp, out.nsp, hits, places)])
        figures = torch.cat([found, known.to(found.device)])
        return (figures if self.peers is None else self.peers.sum_(figures)).tolist()

    def _refused(self, problems: list[str], random: dict[str, Tensor], figures: dict[str, float]) -> TrainingError:
        """Puts everything back to where it was before a step and saves that; the error to raise."""
        self.optimizer.zero_grad()
        chosen = self.batch_examples(self.step)
        losses = {example.id: self._ntp_alone(example) for example in chosen}
        set_random_state(random, self.model.device)
        worst = max(losses, key=lambda name: losses[name] if math.isfinite(losses[name]) else math.inf)
        description = self.output / "refused-step.json"
        if self.rank == 0:
            record = {"step": self.step + 1, "problems": problems, **figures, "ntp_of_examples": losses}
            self.output.mkdir(parents=True, exist_ok=True)
            with replace_file(description) as file:
                json.dump(_without_nan(record), file, indent=1)
        kept = f"last good checkpoint: {self.last_checkpoint or 'none'}"
        changed = self.config.optimizer_in_backward
        state = "changed" if changed else "not changed"
        if self.step and not changed and self._finite():
            try:
                kept = f"saved as they were before it: {self.save(extra=1)}"
            except CheckpointError as error:
                kept += f" ({error})"
        names = f"{', '.join(example.id for example in chosen[:8])}{', …' if len(chosen) > 8 else ''}"
        return TrainingError(
            f"step {self.step + 1}: {'; '.join(problems)}. Its examples: {names}; the highest NTP loss alone has "
            f"{worst} ({losses[worst]:.3g}); all of them: {description}. The weights were {state} by it; "
            f"{kept}. "
            "Look at these examples, or lower training.lr; --resume with training.spike_factor=null lets a spike pass"
        )

    def _finite(self) -> bool:
        """Whether all weights are finite, on every rank."""
        reshard(self.model)
        weights = (local(p) for p in self.model.parameters() if p.is_floating_point())
        wrong = torch.tensor(float(not all(bool(p.isfinite().all()) for p in weights)), device=self.model.device)
        return not bool(wrong if self.peers is None else self.peers.max(wrong))

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
        norms = [self._norm(group) for group in gradients.values()]
        total = torch.linalg.vector_norm(torch.stack(norms))
        if self.config.clip is not None:
            factor = (self.config.clip / (total + 1e-6)).clamp(max=1.0)
            for gradient in (g for group in gradients.values() for g in group):
                local(gradient).mul_(factor)
        return float(norms[0]), float(norms[1]), float(total)

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """The norm of gradients; a sharded one has its parts on all ranks."""
        norm = nn.utils.get_total_norm([local(g) for g in gradients if not isinstance(g, DTensor)])
        norm = norm.to(self.model.device)
        if not self.model.sharded or self.peers is None:
            return norm
        parts = nn.utils.get_total_norm([local(g) for g in gradients if isinstance(g, DTensor)])
        return (self.peers.sum(parts.to(norm).square()) + norm.square()).sqrt()

    def _schedule(self) -> float:
        lr = self.config.lr * learning_rate_factor(self.config, self.step, self.total_steps, self.steps_per_epoch)
        self.optimizer.set_lr(lr)
        return lr

    def _evaluate(self) -> None:
        if self.evaluate is None or self.config.eval_every is None or self._evaluated_step == self.step:
            return
        self._evaluated_step = self.step
        with _rng_untouched():
            held_out = self.evaluate(self.model, self.step)
        reshard(self.model)
        self.model.train()
        self.on_metrics(held_out)
        self._warn(self.monitor.evaluation(held_out.ntp, held_out.recall_at_5))

    def _warn(self, messages: Iterator[str]) -> None:
        for message in messages:
            self.on_warning(message)


def _peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch had allocated on a GPU, or that was resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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
