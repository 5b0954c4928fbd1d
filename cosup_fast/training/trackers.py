"""Experiment trackers: figures of a run to TensorBoard, Weights & Biases or MLflow (`training.report_to`).

Each tracker's own environment variables say where figures go (`WANDB_PROJECT`, `WANDB_MODE=offline`,
`MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`). A resumed run continues the same run there, whose id is in
`output/trackers.json`. metrics.jsonl has every figure in any case: a tracker that fails later on is warned of, and
training continues.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosup_fast.files import read_object, replace_file
from cosup_fast.files.fields import flat
from cosup_fast.training.callbacks import Callback
from cosup_fast.training.metrics import Metrics, as_record

if TYPE_CHECKING:
    from cosup_fast.config import RunConfig

PROJECT = "cosup-fast"
IDS = "trackers.json"


class Tracker(Callback, ABC):
    """One tracker. A subclass opens a run of its own, sends figures to it and closes it.

    Args:
        warn: told once if figures can no longer be sent.
    """

    name: str
    """Of its package, and in `training.report_to`."""
    extra: str
    """What installs it."""

    def __init__(self, warn: Callable[[str], None]):
        self._warn = warn
        self._failed = False

    @abstractmethod
    def open(self, output: Path, config: dict[str, Any], step: int, run: str | None) -> str | None:
        """Opens the run with this id, or a new one, from a step on; returns its id."""

    @abstractmethod
    def send(self, figures: dict[str, float], step: int) -> None:
        """Sends figures of a step."""

    @abstractmethod
    def close(self, error: BaseException | None) -> None:
        """Closes the run."""

    def start(self, config: RunConfig, step: int, total: int) -> None:
        output = Path(config.output)
        known = _ids(output)
        try:
            run = self.open(output, config.model_dump(mode="json"), step, known.get(self.name))
        except Exception as error:
            raise ValueError(f"training.report_to={self.name} cannot be opened: {error}") from error
        if run is not None:
            with replace_file(output / IDS) as file:
                json.dump({**known, self.name: run}, file)

    def metrics(self, metrics: Metrics) -> None:
        record = as_record(metrics)
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        figures = {f"{record['kind']}/{name}": float(v) for name, v in numbers.items() if math.isfinite(v)}
        self._trying(lambda: self.send(figures, metrics.step) if figures else None)

    def end(self, error: BaseException | None) -> None:
        self._trying(lambda: self.close(error))

    def _trying(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            if not self._failed:
                self._warn(f"{self.name}: figures are not all recorded, but metrics.jsonl has them: {error}")
            self._failed = True


class TensorBoard(Tracker):
    """Event files in `output/tensorboard`."""

    name, extra = "tensorboard", "train"

    def open(self, output: Path, config: dict[str, Any], step: int, run: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run sent beyond its checkpoint is taken back; the checkpoint's own step stays.
        self._writer = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1 if step else 0)

    def send(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self, error: BaseException | None) -> None:
        self._writer.close()


class WeightsAndBiases(Tracker):
    """A run of Weights & Biases. The step is a figure of its own, so that steps taken again after a resume are kept."""

    name, extra = "wandb", "wandb"

    def open(self, output: Path, config: dict[str, Any], step: int, run: str | None) -> str:
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", output.name),
            dir=str(output),
            id=run or os.environ.get("WANDB_RUN_ID"),
            resume="allow",
            config=config,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        return str(self._run.id)

    def send(self, figures: dict[str, float], step: int) -> None:
        self._run.log({**figures, "step": step})

    def close(self, error: BaseException | None) -> None:
        self._run.finish(exit_code=0 if error is None else 1)


class MLflow(Tracker):
    """A run of MLflow, through its client: an active run of the program that trains is left alone."""

    name, extra = "mlflow", "mlflow"

    def open(self, output: Path, config: dict[str, Any], step: int, run: str | None) -> str:
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

        self._client = MlflowClient()
        if run is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self._client.get_experiment_by_name(name)
            number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
            run = str(self._client.create_run(number, run_name=output.name).info.run_id)
            parameters = [Param(name, str(value)[:500]) for name, value in flat(config).items()]
            for i in range(0, len(parameters), 100):  # as many as one request takes
                self._client.log_batch(run, params=parameters[i : i + 100])
        self._client.update_run(run, status="RUNNING")
        self._run = run
        return run

    def send(self, figures: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = round(1000 * time.time())
        self._client.log_batch(self._run, metrics=[Metric(name, x, now, step) for name, x in figures.items()])

    def close(self, error: BaseException | None) -> None:
        status = "FINISHED" if error is None else "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        self._client.set_terminated(self._run, status)


TRACKERS: dict[str, type[Tracker]] = {kind.name: kind for kind in (TensorBoard, WeightsAndBiases, MLflow)}


def check_trackers(names: Sequence[str]) -> None:
    """Refuses a tracker whose package is not installed.

    Raises:
        ImportError: naming it and the extra that brings it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ImportError(
                f"training.report_to={name} needs the package {name}: "
                f"pip install 'cosup-fast[{TRACKERS[name].extra}]', or omit it"
            )


def _ids(output: Path) -> dict[str, str]:
    path = output / IDS
    return read_object(path) if path.is_file() else {}
