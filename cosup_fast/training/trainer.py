"""The training loop: batches in a fixed order, one joint step, held-out figures, checkpoints, exact continuation.

Epoch e reads the training set in an order that depends on (seed, e) alone, so the position of a run is its step
number. All examples of a step are contrasted with each other; how the step is cut into micro-batches (`step.py`) and
shared by ranks (`ranks.py`) changes neither a loss nor a gradient. Ranks meet before each step, so that all of them
stop together and one that is lost is named; rank 0 alone writes.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosup_fast.config.training import TrainingConfig
from cosup_fast.data.packing import CoSupervisionBatch, make_batch
from cosup_fast.data.records import Example, Passage
from cosup_fast.data.sampling import Mixture, StepSampler, draw_negatives, example_lengths, seed_of
from cosup_fast.distributed import Peers
from cosup_fast.environment import return_freed_memory
from cosup_fast.errors import CosupError
from cosup_fast.losses import CoSupervisionOutput
from cosup_fast.model import CoSupervisionModel
from cosup_fast.signals import deferred
from cosup_fast.training.best import Best
from cosup_fast.training.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    checkpoint_folder,
    load_trainer_state,
)
from cosup_fast.training.clipping import clip_gradients
from cosup_fast.training.diagnostics import diagnose
from cosup_fast.training.metrics import HeldOut, Metrics, Skipped, StepMetrics, as_record, peak_memory
from cosup_fast.training.monitor import FailureMonitor, SpikeGuard
from cosup_fast.training.optimizers import LocalOptimizer, check_rates
from cosup_fast.training.ranks import reduce_gradients
from cosup_fast.training.refusal import are_finite, ntp_of_each, write_refusal
from cosup_fast.training.schedule import Schedule
from cosup_fast.training.sharding import agree_on_norms, reshard, shard
from cosup_fast.training.step import accumulate_gradients, random_state, set_random_state
from cosup_fast.training.utilization import Utilization, peak_tflops

RETURN_EVERY = 10  # steps on a CPU, between which freed memory is kept


class TrainingError(CosupError, ValueError):
    """Training cannot continue; the message names the step, the cause and the last good checkpoint."""


class Trainer:
    """Trains a `CoSupervisionModel`.

    Args:
        model: Gen and Embseq.
        config: the optimisation.
        examples: what is trained on.
        corpus: passages by id; every passage that an example asks for is in it.
        output: the run's folder; checkpoints go into `output/checkpoints`.
        lengths: what `example_lengths` says of the examples, if it was asked already.
        mixture: which examples make an epoch; by default each comes once.
        negatives: hard negatives of an example that a step reads; None: all.
        peers: the ranks that share every step; all of them have the same weights and arguments.
        device: where it is trained, if that is not where the model is: shards go there one by one, and only the first
            rank needs a model with weights.
        evaluate: called every `eval_every` steps, before the first step and after the last, with the model and the
            step, on every rank; returns a `HeldOut`.
        on_metrics: called with every `StepMetrics`, `Skipped`, `Diagnosis` and `HeldOut`.
        on_warning: called with every message of the failure monitor.
        on_notice: called with what the first Ctrl-C does, when it is pressed, and with why a run ends early.
        on_saved: called on rank 0 with every checkpoint, once it is whole.

    Raises:
        ValueError: what `example_lengths` refuses.
    """

    def __init__(
        self,
        model: CoSupervisionModel,
        config: TrainingConfig,
        examples: Sequence[Example],
        corpus: Mapping[str, Passage],
        output: Path,
        *,
        lengths: Sequence[int] | None = None,
        mixture: Mixture | None = None,
        negatives: int | None = None,
        peers: Peers | None = None,
        device: torch.device | None = None,
        evaluate: Callable[[CoSupervisionModel, int], HeldOut] | None = None,
        on_metrics: Callable[[Metrics], None] = lambda metrics: None,
        on_warning: Callable[[str], None] = lambda message: None,
        on_notice: Callable[[str], None] = lambda message: None,
        on_saved: Callable[[Path], None] = lambda checkpoint: None,
    ):
        self.model = model
        self.config = config
        self.examples = examples
        self.corpus = corpus
        self.output = output
        self.peers = peers
        self.rank, self.ranks = (0, 1) if peers is None else (peers.rank, peers.size)
        self.writer = CheckpointWriter(output / "checkpoints", config.keep_checkpoints, peers, on_saved)
        self.evaluate = evaluate
        self.on_metrics = on_metrics
        self.on_warning = on_warning
        self.on_notice = on_notice
        self.monitor = FailureMonitor()
        self.guard = SpikeGuard(config.spike_factor, config.spike_window)
        self.best = Best(config.keep_best, config.patience)
        self.step = 0
        self.last_checkpoint: Path | None = None
        self._saved_step = self._evaluated_step = -1
        self._saved_at = time.monotonic()
        self._written = self._due = False
        self.skipped_in_a_row = 0  # steps
        self.schedule = self.asked = Schedule.of(config, model.nsp, len(examples))
        self.contrasts = model.nsp.weight > 0
        if lengths is None:
            lengths = example_lengths(
                examples,
                corpus,
                model.template,
                config.pack_limits,
                ntp=model.ntp.weight > 0,
                retrieval=self.contrasts,
                negatives=negatives,
            )
        self.sampler = StepSampler(
            lengths, config.batch_size, config.seed, balanced=config.balance_lengths, mixture=mixture
        )
        self.negatives = negatives
        self._next: tuple[int, CoSupervisionBatch] | None = None
        device = model.device if device is None else device
        half = config.precision == "bfloat16" or model.gen.dtype.itemsize == 2
        self.utilization = Utilization(model, peak_tflops(config.peak_tflops, device, half=half))
        model.criterion.nsp.key_grad = config.key_grad
        model.enable_activation_checkpointing(config.activation_checkpointing)
        if config.compile:
            model.compile_layers(fixed_shapes=config.fixed_shapes)
        if config.sharding == "fsdp" and peers is not None:
            agree_on_norms(model, peers)
            shard(model, peers.mesh(device.type, config.replicas), precision=config.precision)
        check_rates(model, config)
        self.optimizer = LocalOptimizer(
            model.named_parameters(),
            config.optimizer,
            lr=config.lr,
            rates=config.rates,
            betas=config.betas,
            weight_decay=config.weight_decay,
            in_backward=config.optimizer_in_backward,
        )

    def resume(self, checkpoint: Path) -> None:
        """Continues from a checkpoint whose model is loaded already."""
        self._seed()  # where the checkpoint is one of fewer ranks
        self.step, state = load_trainer_state(
            checkpoint, self.model, self.optimizer, self.rank, self.ranks, warn=self.on_warning
        )
        self._saved_step, self.last_checkpoint = self.step, checkpoint
        if watched := state.get("watched"):
            self.monitor.load_state_dict(watched["monitor"])
            self.guard.load_state_dict(watched["guard"])
        if followed := state.get("schedule"):
            before = Schedule(**followed["followed"])
            same = Schedule(**followed["asked"]) == self.asked
            self.schedule = before if same else before.continued(self.asked, self.step)

    @property
    def total_steps(self) -> int:
        """The steps of the whole run."""
        return self.asked.total

    def replay(self, records: Iterable[dict[str, Any]]) -> None:
        """Shows the failure monitor the evaluations of the part before (see `as_record`), of which it has warned then;
        checkpoints hold what steps have shown, of which few are recorded."""
        for record in records:
            if record["kind"] == "skipped":
                self.skipped_in_a_row = record["in_a_row"] if record["step"] == self.step else 0
            elif record["kind"] == "held-out":
                for _ in self._evaluated(record):
                    pass
                self.best.replay(record, self.writer.root)
        if self.best.step is not None:
            self.writer.mark_best(self.best.step)

    def train(self) -> Path:
        """Runs to the end and returns the last checkpoint, or the best one where `keep_best` says which that is.

        Raises:
            TrainingError: a loss or a gradient is not finite, or a loss spikes, and `on_spike` says stop, or too many
                steps in a row were skipped. The step is not taken, its batch is described in
                `output/refused-step.json`, and the weights before it are saved.
            KeyboardInterrupt: Ctrl-C or SIGTERM; the current step has been finished and saved. A second Ctrl-C stops at
                once.
        """
        config = self.config
        deadline = time.monotonic() + 60 * (config.max_minutes or math.inf)
        self.model.train()
        if self.step == 0:
            self._seed()
            self._evaluate()
        with self._nothing_lost(), self._naming("training"), deferred(self._interrupted) as interrupted:
            while self._unfinished and not self._stop(interrupted, late=time.monotonic() >= deadline):
                if self.writer.pending is not None and self._written:
                    self.last_checkpoint = self.writer.finish()
                if self._due:
                    self._begin_save()
                metrics = self.take_step()
                if self.model.device.type == "cpu" and self.step % RETURN_EVERY == 0:
                    return_freed_memory()
                if isinstance(metrics, Skipped):
                    self.on_metrics(metrics)
                    self._warn([f"step {metrics.step} skipped: {metrics.reason}"])
                else:
                    if self.step % config.log_every == 0:
                        self.on_metrics(metrics)
                    self._warn(self.monitor.step(metrics.nsp or 0.0, metrics.candidates))
                if config.eval_every and self.step % config.eval_every == 0 and self.step < self.total_steps:
                    self._evaluate()
                if config.checkpoint_every and self.step % config.checkpoint_every == 0:
                    self._begin_save()
            self.save()
            if self._stop(interrupted):
                raise KeyboardInterrupt(f"stopped after step {self.step}; saved {self.last_checkpoint}")
        self._evaluate()
        if self.best.exhausted and self.step < self.total_steps:
            self.on_notice(
                f"ended at step {self.step} of {self.total_steps}: {config.patience} evaluations without a better "
                f"held-out {config.keep_best} than after step {self.best.step}"
            )
        assert self.last_checkpoint is not None
        return self.last_checkpoint if self.best.step is None else checkpoint_folder(self.writer.root, self.best.step)

    @property
    def _unfinished(self) -> bool:
        return self.step < self.total_steps and not self.best.exhausted

    def _interrupted(self, by: str) -> None:
        again = "; press Ctrl-C again to stop at once" if by == "SIGINT" else ""
        self.on_notice(f"{by}: finishing this step, then saving{again}")

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
        torch.manual_seed(seed_of("dropout", self.config.seed, self.rank))

    def _stop(self, interrupted: threading.Event, *, late: bool = False) -> bool:
        """Whether this rank, or any other, was interrupted or is late."""
        minutes = self.config.checkpoint_minutes
        due = self.step > 0 and minutes is not None and time.monotonic() >= self._saved_at + 60 * minutes
        note = {"stop": interrupted.is_set() or late, "written": not self.writer.busy, "due": due}
        notes = [note] if self.peers is None else self.peers.meet(f"step {self.step + 1}", note)
        self._written = all(one["written"] for one in notes)
        self._due = any(one["due"] for one in notes)
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
        """Copies the state of this step; the files are written while training continues."""
        if self._saved_step == self.step:
            return
        if self.writer.pending is not None:
            self.last_checkpoint = self.writer.finish()
        state = {
            "schedule": {"followed": self.schedule.to_json(), "asked": self.asked.to_json()},
            "watched": {"monitor": self.monitor.state_dict(), "guard": self.guard.state_dict()},
        }
        self.writer.start(self.step, self.model, self.optimizer, state=state, extra=extra)
        self._saved_step, self._saved_at = self.step, time.monotonic()

    def batch_examples(self, step: int) -> list[Example]:
        """The examples of a step, counted from 0."""
        chosen = [self.examples[i] for i in self.sampler[step]]
        return draw_negatives(chosen, self.negatives, self.config.seed, step)

    def batch(self, step: int) -> CoSupervisionBatch:
        """What this rank reads of a step, on the model's device."""
        chosen = self.batch_examples(step)
        limits = self.config.pack_limits
        template, even = self.model.template, self.model.sharded
        share = {"rank": self.rank, "ranks": self.ranks, "even": even, "retrieval": self.contrasts}
        return make_batch(chosen, self.corpus, template, limits, **share).to(self.model.device)

    def take_step(self) -> StepMetrics | Skipped:
        """Runs the next step and updates the weights, or refuses it."""
        config, model = self.config, self.model
        number, batch = self._next or (-1, None)
        if batch is None or number != self.step:
            batch = self.batch(self.step)
        weight = self.schedule.nsp_weight(model.nsp, self.step)
        settings: dict[str, Any] = {"precision": config.precision, "nsp_weight": weight}
        if config.diagnose_every and (self.step + 1) % config.diagnose_every == 0:
            self.on_metrics(diagnose(model, batch, self.step + 1, peers=self.peers, **settings))
        start, random = time.perf_counter(), random_state(model.device)
        lr = config.lr * self.schedule.factor(self.step)
        self.optimizer.set_lr(lr)
        with self._naming(f"step {self.step + 1}"):
            out = accumulate_gradients(model, batch, group=self.peers, **settings)
        # The device is still busy with this step; what follows waits for it.
        self._next = (self.step + 1, self.batch(self.step + 1)) if self.step + 1 < self.total_steps else None
        reduce_gradients(model, self.peers)
        loss, ntp, nsp, hits, ranks, computed, flop, *peaks = self._totals(batch, out)
        gen_norm, embseq_norm, total_norm = clip_gradients(model, config.clip, self.peers)
        watched = ntp if model.ntp.weight else None, nsp if batch.step.nsp and self.contrasts else None
        problems = list(self.guard.refuse(*watched))
        if not math.isfinite(total_norm):
            problems.append(f"gradient norms {gen_norm:.3g} (Gen) and {embseq_norm:.3g} (Embseq)")
        if problems and config.on_spike == "skip" and self.skipped_in_a_row < config.max_skips:
            return self._skip(problems)
        if problems:
            raise self._refused(
                problems,
                random,
                {"ntp": ntp, "nsp": nsp, "gen_grad_norm": gen_norm, "embseq_grad_norm": embseq_norm},
            )
        self.optimizer.step(seed=seed_of("rounding", config.seed, self.step))
        self.optimizer.zero_grad()
        self.guard.accept(*watched)
        self.step += 1
        self.skipped_in_a_row = 0
        seconds = time.perf_counter() - start
        return StepMetrics(
            step=self.step,
            epoch=self.step / self.schedule.steps_per_epoch,
            loss=loss,
            ntp=ntp if model.ntp.weight else None,
            nsp=nsp if self.contrasts else None,
            in_batch_accuracy=hits / max(1, batch.step.nsp) if self.contrasts else None,
            in_batch_rank=ranks / max(1, batch.step.nsp) if self.contrasts else None,
            candidates=batch.step.passages,
            gen_grad_norm=gen_norm,
            embseq_grad_norm=embseq_norm,
            lr=lr,
            nsp_weight=weight,
            tokens_per_second=batch.step.tokens / seconds,
            useful_tokens=batch.step.tokens / computed,
            peak_memory_gib=max(peaks),
            mfu=self.utilization.share(flop, seconds, self.ranks),
        )

    def _totals(self, batch: CoSupervisionBatch, out: CoSupervisionOutput) -> list[float]:
        """Losses, hits, ranks, computed tokens and FLOP, summed over ranks, and the peak memory of each in GiB."""
        hits, places = out.loss.new_zeros(()), out.loss.new_zeros(())
        if out.stats is not None:
            hits, places = (out.stats.rank == 0).sum(), (out.stats.rank + 1).sum()
        peaks = [0.0] * self.ranks
        peaks[self.rank] = peak_memory(self.model.device) / 2**30
        counts = [sum(len(pack.input_ids) for pack in batch.packs), self.utilization.flop(batch), *peaks]
        known = torch.tensor(counts, dtype=torch.float64)
        found = torch.stack([x.double() for x in (out.loss, out.ntp, out.nsp, hits, places)])
        figures = torch.cat([found, known.to(found.device)])
        return (figures if self.peers is None else self.peers.sum_(figures)).tolist()

    def _skip(self, problems: list[str]) -> Skipped:
        """Passes over a step: its gradients are dropped, weights and optimizer stay as they are."""
        self.optimizer.zero_grad()
        names = [example.id for example in self.batch_examples(self.step)]
        self.step += 1
        self.skipped_in_a_row += 1
        return Skipped(self.step, problems, names, self.skipped_in_a_row)

    def _refused(self, problems: list[str], random: dict[str, Tensor], figures: dict[str, float]) -> TrainingError:
        """Puts everything back to where it was before a step and saves that; the error to raise."""
        self.optimizer.zero_grad()
        chosen = self.batch_examples(self.step)
        losses = ntp_of_each(self.model, chosen, self.corpus, self.config.precision) if self.model.ntp.weight else {}
        set_random_state(random, self.model.device)
        highest = ""
        if losses:
            worst = max(losses, key=lambda name: losses[name] if math.isfinite(losses[name]) else math.inf)
            highest = f"; the highest NTP loss alone has {worst} ({losses[worst]:.3g})"
        description = self.output / "refused-step.json"
        if self.rank == 0:
            names = [example.id for example in chosen]
            record = {"step": self.step + 1, "problems": problems, **figures, "examples": names}
            write_refusal(description, {**record, "ntp_of_examples": losses})
        kept = f"last good checkpoint: {self.last_checkpoint or 'none'}"
        changed = self.config.optimizer_in_backward
        state = "changed" if changed else "not changed"
        if self.step and not changed and are_finite(self.model, self.peers):
            try:
                kept = f"saved as they were before it: {self.save(extra=1)}"
            except CheckpointError as error:
                kept += f" ({error})"
        names = f"{', '.join(example.id for example in chosen[:8])}{', …' if len(chosen) > 8 else ''}"
        before = f" after {self.skipped_in_a_row} skipped in a row" if self.skipped_in_a_row else ""
        return TrainingError(
            f"step {self.step + 1}{before}: {'; '.join(problems)}. Its examples: {names}{highest}; all of them: "
            f"{description}. The weights were {state} by it; {kept}. Look at these examples; --resume with a lower "
            "training.lr or training.clip tries again, with training.on_spike=skip passes over the step, with "
            "training.spike_factor=null lets a spike pass"
        )

    def _evaluate(self) -> None:
        if self.evaluate is None or self.config.eval_every is None or self._evaluated_step == self.step:
            return
        self._evaluated_step = self.step
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            held_out = self.evaluate(self.model, self.step)
        reshard(self.model)
        self.model.train()
        self.on_metrics(held_out)
        record = as_record(held_out)
        self._warn(self._evaluated(record))
        if self.best.update(record):
            self.writer.mark_best(self.step)
            self._begin_save()

    def _evaluated(self, record: dict[str, Any]) -> Iterator[str]:
        """What the failure monitor says of a held-out evaluation."""
        self._evaluated_step = record["step"]
        yield from self.monitor.evaluation(record["ntp"] if self.model.ntp.weight else None, record["recall_at_5"])

    def _warn(self, messages: Iterable[str]) -> None:
        for message in messages:
            self.on_warning(message)
