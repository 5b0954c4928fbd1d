"""How a program follows a run, and may stop it: the methods of `Callback`, which do nothing by default."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from cosup_fast.config import RunConfig
    from cosup_fast.data.packing import CoSupervisionBatch
    from cosup_fast.model import CoSupervisionModel
    from cosup_fast.training.metrics import Metrics


class Callback:
    """Override what you need, and give instances to `run_training(config, callbacks=[...])`.

    Methods are called in the order of the list (`end` in reverse), on rank 0 alone unless they say otherwise. An
    exception ends the run, which can be resumed from its last checkpoint. What is shown is not to be changed.
    """

    def check(self, config: RunConfig, batches: Sequence[CoSupervisionBatch], ranks: int, device: torch.device) -> str:
        """Before a new run loads its model: may raise ValueError, so that the run does not begin.

        Args:
            config: the run.
            batches: rank 0's part of the first steps.
            ranks: how many there are.
            device: of rank 0.

        Returns:
            What is printed, if anything.
        """
        return ""

    def start(self, config: RunConfig, step: int, total: int) -> None:
        """Before the first step: `step` is 0, or where the run resumes, of `total`."""

    def metrics(self, metrics: Metrics) -> None:
        """Every `training.log_every` steps, and after every diagnosis and held-out evaluation."""

    def warning(self, message: str) -> None:
        """When the failure monitor warns."""

    def evaluated(self, model: CoSupervisionModel, step: int) -> None:
        """After every held-out evaluation, on every rank, with the model as it is after so many steps."""

    def saved(self, checkpoint: Path) -> None:
        """When a checkpoint is whole and has its name. Older ones may be removed after `training.keep_checkpoints`."""

    def end(self, error: BaseException | None) -> None:
        """When the run ends, with what ended it if it did not reach its end: also Ctrl-C, a `KeyboardInterrupt`.

        It is called for every callback whose `start` was.
        """


class Together(Callback):
    """Several callbacks as one."""

    def __init__(self, callbacks: Sequence[Callback]):
        self.callbacks = callbacks

    def metrics(self, metrics: Metrics) -> None:
        for callback in self.callbacks:
            callback.metrics(metrics)

    def warning(self, message: str) -> None:
        for callback in self.callbacks:
            callback.warning(message)

    def evaluated(self, model: CoSupervisionModel, step: int) -> None:
        for callback in self.callbacks:
            callback.evaluated(model, step)

    def saved(self, checkpoint: Path) -> None:
        for callback in self.callbacks:
            callback.saved(checkpoint)

    @contextmanager
    def running(self, config: RunConfig, step: int, total: int) -> Iterator[None]:
        """`start` of each, and `end` of those that started."""
        with ExitStack() as stack:
            for callback in self.callbacks:
                callback.start(config, step, total)
                stack.push(_ending(callback))
            yield


def _ending(callback: Callback) -> Callable[..., None]:
    """Calls a callback's `end`, whose return value suppresses no error."""

    def end(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        callback.end(error)

    return end


def asks(callback: Callback) -> bool:
    """Whether a callback has a `check` of its own, for which batches are made."""
    return type(callback).check is not Callback.check
