"""One training run from a configuration: data and models in, a folder of checkpoints, metrics and plots out.

output/config.yaml        what was run
output/data.json          SHA-256 of the examples and passages that it reads
output/checkpoints/       see `checkpoint.py`
output/metrics.jsonl      one record a step, diagnosis or held-out evaluation
output/tensorboard/       the same for TensorBoard, if `training.report_to` says so (it does by default)
output/trackers.json      the runs of other trackers
output/curves.png         losses and retrieval accuracy
output/refused-step.json  the batch that ended the run, if one did
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from cosup_fast.config import ConfigError, RunConfig, dump_config
from cosup_fast.config.sections import DataConfig
from cosup_fast.data.packing import make_batch
from cosup_fast.data.prepared.splits import check_splits
from cosup_fast.data.records import DataError, Example, Passage
from cosup_fast.data.sampling import StepSampler, draw_negatives
from cosup_fast.data.sources import load_examples, open_corpus_by_id
from cosup_fast.data.template import Template
from cosup_fast.distributed import PeerError, Peers
from cosup_fast.environment import choose_device, keep_freed_memory, return_freed_memory
from cosup_fast.files import held, replace_file
from cosup_fast.model import CoSupervisionModel
from cosup_fast.model.folder import check_saving
from cosup_fast.model.loading import load_template
from cosup_fast.model.pretrained import read_config
from cosup_fast.terminal import SafeConsole
from cosup_fast.training.adamw import check_available
from cosup_fast.training.callbacks import Callback, Together, asks
from cosup_fast.training.checkpoint import checkpoints, chosen_checkpoint, verify
from cosup_fast.training.held_out import HeldOutEvaluator
from cosup_fast.training.initial import as_in, inherit, initial_checkpoint, new_model
from cosup_fast.training.log import RunLog, records_until
from cosup_fast.training.measured import TrainingSet, measure
from cosup_fast.training.metrics import Changed, HeldOut
from cosup_fast.training.ranks import digest, training_ranks
from cosup_fast.training.resume import (
    TOO_LONG,
    changes,
    check_same_data,
    check_same_run,
    checkpoint_to_resume,
    ended,
    left_out,
    saved_config,
)
from cosup_fast.training.trackers import TRACKERS, check_trackers
from cosup_fast.training.trainer import Trainer


def run_training(
    config: RunConfig,
    *,
    resume: bool = False,
    console: Console | None = None,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Trains as configured and returns the last checkpoint's folder.

    Processes that torchrun started share every step; rank 0 alone writes and prints.

    Args:
        config: the run.
        resume: resume from the newest whole checkpoint in `config.output`, or start when there is none. A run
            that has ended is left as it is. The number of ranks may be another one.
        console: where progress goes; standard error by default.
        callbacks: follow the run and may refuse to begin it (see `Callback`), as `cosup-fast train` does with
            `plan.fits.FitsIntoMemory`; every rank is given the same.

    Raises:
        ConfigError: the output folder holds another run, or the configuration differs from the one being resumed in
            what may not change.
        DataError: see `load_data`; or the data differ from those of the run being resumed.
        ValueError: see `training_ranks`; what a callback's `check` refuses; another process trains into that output;
            or another rank has another configuration, other data or other weights.
        ImportError: `training.report_to` names a tracker that is not installed.
        CheckpointError, TrainingError: see there.
        PeerError: a rank was lost, or did not come in time; it names the rank and what is saved.
        KeyboardInterrupt: Ctrl-C or SIGTERM; it says what was saved.
    """
    output = Path(config.output)
    with _endings_explained(output), training_ranks(config.training) as peers, _sole_writer(output, peers):
        leads = peers is None or peers.rank == 0
        console = (console or SafeConsole(stderr=True)) if leads else SafeConsole(quiet=True)
        try:
            return _run(config, output, resume, console, peers, callbacks)
        finally:
            gc.collect()
            return_freed_memory()


def _run(
    config: RunConfig,
    output: Path,
    resume: bool,
    console: Console,
    peers: Peers | None,
    callbacks: Sequence[Callback],
) -> Path:
    saved = saved_config(config, output, resume)
    config = inherit(config, saved)
    checkpoint = checkpoint_to_resume(config, saved, output)
    changed = {} if checkpoint is None or saved is None else changes(saved, config, told=True)
    if resume and checkpoint is None:
        console.print(f"{config.output} holds no checkpoint to resume from: a new run", markup=False)
    device = choose_device(config.training.device)
    if device.type == "cpu":
        keep_freed_memory()
    check_available(config.training.optimizer, rounded=config.rounds)
    check_trackers(config.training.report_to)
    if told := unused_gpus(device, config.training.device, torch.cuda.device_count(), peers):
        console.print(told, markup=False)
    corpus, examples, held_out, sets = load_data(config)
    evaluator = HeldOutEvaluator(held_out, corpus, config, peers) if held_out else None
    digests = {
        "training": _digest(examples, (corpus[passage] for passage in _passages(examples))),
        "held-out": _digest(held_out, evaluator.pool if evaluator else []),
    }
    if peers is not None:
        resumed = checkpoint and checkpoint.name
        run = {"configuration": config.model_dump(mode="json"), "data": digests, "checkpoint to resume": resumed}
        check_same_run(peers, "the same run", run)
    if checkpoint is not None:
        check_same_data(output, digests)
        if message := ended(checkpoint, config, len(examples) - left_out(output), evaluated=evaluator is not None):
            console.print(message, markup=False)
            return chosen_checkpoint(output) if config.training.keep_best else checkpoint
    load_on, sharded = device, config.training.sharding == "fsdp" and peers is not None
    if sharded:
        # One rank alone reads the weights, into the CPU's memory; shards go to the devices a layer at a time.
        load_on = torch.device("cpu" if peers is None or peers.rank == 0 else "meta")
    if checkpoint is None:
        initial = None if config.model.init_from is None else initial_checkpoint(config)
        if initial is not None:
            verify(initial)
        read = config if initial is None else as_in(initial, config)
        template = load_template(read.models, config.text)[0]
        trained = measure(template, config, examples, sets, corpus, console)
        _leave_out_long(evaluator, config, template, console)
        if any(map(asks, callbacks)):
            _ask(callbacks, read, template, trained, corpus, device, console, peers)
        if not config.has_embseq:
            console.print("nsp.weight=0: Gen is trained alone, and no Embseq is loaded", markup=False)
        with _reporting(peers, "the same weights"):
            model = new_model(config, load_on)
            if load_on.type != "meta":
                check_saving(model)
    else:
        _check_architecture(config, checkpoint)
        with _reporting(peers, "the same weights"):
            verify(checkpoint, *((0, 1) if peers is None else (peers.rank, peers.size)))
            model = CoSupervisionModel.load(checkpoint, device=load_on, attention=config.model.attention, merge=False)
        console.print(f"resuming from {checkpoint}", markup=False)
        for name, (before, now) in changed.items():
            console.print(f"{name} was {before}, and is {now} from here on", markup=False)
        trained = measure(model.template, config, examples, sets, corpus, console)
        _leave_out_long(evaluator, config, model.template, console)
    if peers is not None:
        check_same_run(peers, "the same weights", {"weights": None if sharded else digest(model)})
    leads = peers is None or peers.rank == 0
    told, heard = Together(callbacks), Callback()  # of metrics and warnings, ranks that do not lead hear nothing
    if leads:
        log = RunLog(output, console)
        trackers = [TRACKERS[name](log.warning) for name in config.training.report_to]
        told = heard = Together([log, *trackers, *callbacks])
    trainer = Trainer(
        model,
        config.training,
        trained.examples,
        corpus,
        output,
        lengths=trained.lengths,
        mixture=trained.mixture,
        negatives=config.data.negatives,
        peers=peers,
        device=device,
        evaluate=_observed(evaluator, told),
        on_metrics=heard.metrics,
        on_warning=heard.warning,
        on_notice=functools.partial(console.print, markup=False),
        on_saved=told.saved,
    )
    if checkpoint is not None:
        trainer.resume(checkpoint)
    if leads:
        _write_description(output, config, digests, trained.left_out)
    trainer.replay(records_until(trainer.step, output / "metrics.jsonl"))
    with contextlib.ExitStack() as stack:
        if leads:
            with _reporting(peers, "callbacks"):
                stack.enter_context(told.running(config, trainer.step, trainer.total_steps))
            if changed:
                told.metrics(Changed(trainer.step, changed))
        if peers is not None:
            peers.meet("callbacks")
        return trainer.train()


class Data(NamedTuple):
    """What a run reads."""

    corpus: Mapping[str, Passage]
    examples: list[Example]
    held_out: list[Example]
    sets: list[int]
    """Of each training example, the number of its set in `data.train`."""


def load_data(config: RunConfig) -> Data:
    """The corpus by id, its texts left on disk; the training examples and the held-out examples.

    Raises:
        DataError: what the files hold is not valid, or, without `data.allow_leaks`, what is held out is trained on:
            the same example, the same question, or the same gold passage.
    """
    data = config.data
    corpus = open_corpus_by_id(data.corpus, checksum=data.checksum)

    def load(names: list[str], limit: int | None, seed: int) -> tuple[list[Example], list[int]]:
        loaded, sets = [], []
        for number, name in enumerate(names):
            found = _examples(name, names, data, corpus)
            loaded += found
            sets += [number] * len(found)
        if limit is not None and limit < len(loaded):
            chosen = random.Random(seed).sample(range(len(loaded)), limit)
            return [loaded[i] for i in chosen], [sets[i] for i in chosen]
        return loaded, sets

    # What is held out is the same for every seed of the training, so that runs compare.
    examples, sets = load(data.train, data.train_limit, config.training.seed)
    held_out, _ = load(data.dev, data.dev_limit, seed=0)
    if not data.allow_leaks:
        try:
            if both := {e.id for e in examples} & {e.id for e in held_out}:
                raise DataError(f"example {min(both)!r} is in data.train and in data.dev ({len(both)} such ids)")
            check_splits({"train": examples, "dev": held_out}, corpus)
        except DataError as error:
            raise DataError(
                f"{error}. Held-out figures would flatter: remove it from one, or set data.allow_leaks=true"
            ) from None
    return Data(corpus, examples, held_out, sets)


def _examples(name: str, names: list[str], data: DataConfig, corpus: Mapping[str, Passage]) -> list[Example]:
    """The examples of one of several sets; the default ones are explained where they do not belong to the corpus."""
    try:
        return load_examples(name, corpus, allow_no_retrieval=data.allow_no_retrieval)
    except DataError as error:
        default = DataConfig()
        if data.corpus == default.corpus or names != default.dev:
            raise
        told = f"data.dev={names}, the default, belongs to data.corpus={default.corpus}, not to {data.corpus}"
        raise DataError(f"{told}: name held-out examples of your own, or data.dev=[] for none ({error})") from None


def _ask(
    callbacks: Sequence[Callback],
    config: RunConfig,
    template: Template,
    trained: TrainingSet,
    corpus: Mapping[str, Passage],
    device: torch.device,
    console: Console,
    peers: Peers | None,
) -> None:
    """Shows the first steps to callbacks, on rank 0; what one refuses, all ranks do."""
    training, ranks = config.training, 1 if peers is None else peers.size
    steps = StepSampler(
        trained.lengths,
        training.batch_size,
        training.seed,
        balanced=training.balance_lengths,
        mixture=trained.mixture,
    )
    if peers is None or peers.rank == 0:
        with _reporting(peers, "check"):
            batches = [
                make_batch(
                    draw_negatives(
                        [trained.examples[i] for i in steps[step]], config.data.negatives, training.seed, step
                    ),
                    corpus,
                    template,
                    training.pack_limits,
                    ranks=ranks,
                    retrieval=config.has_embseq,
                )
                for step in range(min(3, steps.steps_per_epoch))
            ]
            for callback in callbacks:
                if told := callback.check(config, batches, ranks, device):
                    console.print(told, markup=False)
    if peers is not None:
        peers.meet("check")


def _leave_out_long(
    evaluator: HeldOutEvaluator | None, config: RunConfig, template: Template, console: Console
) -> None:
    """Leaves long held-out examples out where the configuration says so, and says how many."""
    if evaluator is None or config.data.long_examples != "skip":
        return
    if dropped := evaluator.leave_out_long(template):
        told = f"left out {dropped} of {dropped + len(evaluator.examples)} held-out examples, which are too long"
        console.print(told, markup=False)


def _check_architecture(config: RunConfig, checkpoint: Path) -> None:
    """Refuses a checkpoint of other models than the run's, whose configuration may have been changed by hand."""
    for part in ("gen", "embseq"):
        name = getattr(config.model, part) or config.model.gen
        if not (checkpoint / part).is_dir():
            continue
        there = read_config(checkpoint / part).get_text_config()
        here = read_config(name).get_text_config()
        for key in ("model_type", "hidden_size", "num_attention_heads"):
            if getattr(there, key) != getattr(here, key):
                raise ConfigError(
                    f"{checkpoint / part} is of another architecture than model.{part}={name!r}: {key} is "
                    f"{getattr(there, key)} there and {getattr(here, key)} here; name the model that the run began with"
                )


def _passages(examples: Iterable[Example]) -> list[str]:
    """The ids of the passages that training reads, each once: those that are asked for and the hard negatives."""
    return list(dict.fromkeys(name for example in examples for name in (*example.asked, *example.negatives)))


def _digest(examples: Iterable[Example], passages: Iterable[Passage]) -> str:
    digest = hashlib.sha256()
    for record in itertools.chain(examples, passages):
        digest.update(record.model_dump_json(exclude_defaults=True).encode() + b"\n")
    return digest.hexdigest()


def _observed(
    evaluator: HeldOutEvaluator | None, callback: Callback
) -> Callable[[CoSupervisionModel, int], HeldOut] | None:
    """An evaluation that shows the model to a callback, too."""
    if evaluator is None:
        return None

    def evaluate(model: CoSupervisionModel, step: int) -> HeldOut:
        found = evaluator(model, step)
        callback.evaluated(model, step)
        return found

    return evaluate


def unused_gpus(device: torch.device, requested: str, visible: int, peers: Peers | None) -> str:
    """A hint where one process trains on one of several GPUs that nobody chose; else nothing."""
    if peers is not None or device.type != "cuda" or requested not in ("auto", "cuda") or visible < 2:
        return ""
    return (
        f"{visible} GPUs are visible, and one of them is used: torchrun --nproc-per-node {visible} -m cosup_fast train "
        "... shares every step among all"
    )


def _reporting(peers: Peers | None, purpose: str) -> contextlib.AbstractContextManager[None]:
    """Tells the other ranks, if there are any, of an error inside."""
    return contextlib.nullcontext() if peers is None else peers.reporting(purpose)


@contextlib.contextmanager
def _sole_writer(output: Path, peers: Peers | None) -> Iterator[None]:
    """Holds the output for this run, by rank 0 and before anything is written."""
    with contextlib.ExitStack() as stack:
        if peers is None or peers.rank == 0:
            with _reporting(peers, "output"):
                stack.enter_context(held(output, "training"))
        if peers is not None:
            peers.meet("output")
        yield


@contextlib.contextmanager
def _endings_explained(output: Path) -> Iterator[None]:
    """Says, where a `KeyboardInterrupt` or a lost rank ends the run, what there is to resume from."""
    try:
        yield
    except (KeyboardInterrupt, PeerError) as ending:
        if isinstance(ending, KeyboardInterrupt) and ending.args:
            raise
        found = checkpoints(output / "checkpoints")
        left = f"last checkpoint: {found[-1]}" if found else "nothing was saved so far"
        if isinstance(ending, KeyboardInterrupt):
            raise KeyboardInterrupt(f"stopped at once; {left}") from None
        raise PeerError(f"{ending}; {left}") from ending


def _write_description(output: Path, config: RunConfig, digests: dict[str, str], too_long: int) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        with replace_file(output / "data.json") as file:
            file.write(json.dumps({**digests, TOO_LONG: too_long}, indent=1) + "\n")
        with replace_file(output / "config.yaml") as file:
            file.write(dump_config(config))
    except OSError as error:
        raise ConfigError(f"output={config.output!r} cannot be written: {error}") from None
