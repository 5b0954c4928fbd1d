"""What a run's folder says about resuming it, and ranks of one another: what may change, and what is left to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cosup_fast.config import ConfigError, RunConfig, load_config
from cosup_fast.data.records import DataError
from cosup_fast.distributed import Peers
from cosup_fast.files import read_object
from cosup_fast.files.fields import differences
from cosup_fast.training.best import Best
from cosup_fast.training.checkpoint import checkpoints, step_of
from cosup_fast.training.log import read_metrics
from cosup_fast.training.schedule import count_steps

# What may change between the parts of one run: steps already taken and the order of the data stay as they are.
RESUMABLE = {
    "training.steps", "training.epochs", "training.max_minutes", "training.log_every", "training.eval_every",
    "training.checkpoint_every", "training.checkpoint_minutes", "training.keep_checkpoints", "training.keep_best",
    "training.patience", "training.device", "output", "training.diagnose_every", "training.spike_factor",
    "training.spike_window", "training.on_spike", "training.max_skips", "training.rank_timeout", "training.sharding",
    "training.replicas",
    "training.lr", "training.embseq_lr", "training.temperature_lr", "training.schedule", "training.min_lr",
    "training.lr_decay", "training.clip", "training.weight_decay", "data.allow_leaks", "data.checksum",
    "training.report_to", "training.peak_tflops",
}  # fmt: skip
# Of these, what changes nothing that is trained, so that metrics do not tell of it.
UNTOLD = {
    "output", "training.device", "training.log_every", "training.rank_timeout", "data.allow_leaks", "data.checksum",
    "training.report_to", "training.peak_tflops",
}  # fmt: skip

TOO_LONG = "training examples left out"
"""The field of data.json that counts them."""

# What a run that was killed at its beginning may have written before config.yaml.
OWN = {"checkpoints", "curves.png", "data.json", "metrics.jsonl", "refused-step.json", "tensorboard", "warnings.log"}


def saved_config(config: RunConfig, output: Path, resume: bool) -> RunConfig | None:
    """The configuration of the run in the output, if there is one; refuses an output that holds something else."""
    saved = output / "config.yaml"
    if saved.is_file() and not resume:
        raise ConfigError(f"output={config.output!r} holds a run already: add --resume to continue it, or name another")
    if not saved.is_file() and (strange := _strange(output)):
        raise ConfigError(
            f"output={config.output!r} holds something else than a run, such as {strange!r}: name a new or empty folder"
        )
    return load_config(saved) if saved.is_file() else None


def checkpoint_to_resume(config: RunConfig, saved: RunConfig | None, output: Path) -> Path | None:
    """The checkpoint to resume from, if any; refuses what may not change."""
    found = checkpoints(output / "checkpoints")
    if saved is None or not found:
        return None
    changed = {name: values for name, values in changes(saved, config).items() if name not in RESUMABLE}
    for name, (before, now) in changed.items():
        more = f" ({len(changed) - 1} more fields differ)" if len(changed) > 1 else ""
        raise ConfigError(
            f"--resume: {name}={now!r}, but the run in {config.output!r} was started with {before!r}{more}"
            ": give the same value, or start a new run in another output"
        )
    return found[-1]


def changes(saved: RunConfig, config: RunConfig, *, told: bool = False) -> dict[str, list[Any]]:
    """The fields that differ, by dotted name: before and now; with `told` those that metrics tell of."""
    found = differences(saved.model_dump(mode="json"), config.model_dump(mode="json"))
    return {name: values for name, values in found.items() if not told or name not in UNTOLD}


def _strange(output: Path) -> str | None:
    """A file or folder that no run has written, if there is one."""
    names = (path.name for path in output.iterdir()) if output.is_dir() else ()
    return min((name for name in names if name not in OWN and not name.startswith(".")), default=None)


def left_out(output: Path) -> int:
    """How many training examples the run left out because they are too long."""
    path = output / "data.json"
    count = read_object(path).get(TOO_LONG, 0) if path.is_file() else 0
    if not isinstance(count, int):
        raise DataError(f"{path} is damaged: {TOO_LONG}={count!r:.60}")
    return count


def check_same_data(output: Path, digests: dict[str, str]) -> None:
    """Refuses other data than those that the run in the output was started with.

    Raises:
        DataError: naming which.
    """
    path = output / "data.json"
    before = read_object(path) if path.is_file() else {}
    for name, now in digests.items():
        if (then := before.get(name, now)) != now:
            raise DataError(
                f"--resume: the {name} examples or their passages are not those that the run in {str(output)!r} was "
                f"started with (sha256 {str(then)[:12]}… then by {path}, {now[:12]}… now): restore them, or start "
                "a new run in another output"
            )


def check_same_run(peers: Peers, purpose: str, note: dict[str, Any]) -> None:
    """Refuses ranks that would train something else; none of them has written anything yet.

    Raises:
        ValueError: naming the ranks and the first field that differs, with both values.
    """
    for rank, other in zip(peers.names, peers.meet(purpose, note), strict=True):
        for name, (there, here) in differences({section: other.get(section) for section in note}, note).items():
            what, _, field = name.partition(".")
            raise ValueError(
                f"rank {rank} has another {what} than rank {peers.names[peers.rank]} ({field + '=' if field else ''}"
                f"{there!r} there, {here!r} here): start all ranks with the same files and arguments"
            )


def ended(checkpoint: Path, config: RunConfig, examples: int, *, evaluated: bool) -> str | None:
    """What is said where there is nothing left to do: the last step is taken, and evaluated where the run evaluates; or
    patience has run out."""
    step = step_of(checkpoint)
    records = [r for r in read_metrics(Path(config.output) / "metrics.jsonl") if r["kind"] == "held-out"]
    best = Best(config.training.keep_best, config.training.patience)
    for record in records:
        best.replay(record, checkpoint.parent)
    if best.exhausted and records[-1]["step"] == step:
        return f"{checkpoint} is the end of this run, out of patience; a larger training.patience continues it"
    if step < count_steps(config.training, examples)[1]:
        return None
    shown = any(r["step"] == step for r in records)
    if shown or not evaluated or config.training.eval_every is None:
        return f"{checkpoint} is the end of this run; a larger training.steps continues it"
    return None
