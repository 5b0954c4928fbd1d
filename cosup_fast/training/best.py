"""The best checkpoint of a run by a held-out figure, and when to stop looking for a better one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosup_fast.config.training import BestMetric
from cosup_fast.training.checkpoint import checkpoint_folder, is_checkpoint


class Best:
    """Fed with every held-out evaluation of a run, in order.

    Args:
        metric: which figure: of the losses the lowest is best, of the recalls the highest; None: nothing is chosen.
        patience: evaluations without a better one before the run ends; None: it never does.
    """

    def __init__(self, metric: BestMetric | None, patience: int | None = None):
        self.metric = metric
        self.patience = patience
        self.step: int | None = None
        """The step of the best evaluation so far."""
        self._value = -math.inf
        self._since = 0

    def update(self, record: Mapping[str, Any]) -> bool:
        """Whether an evaluation (see `metrics.as_record`) is the best so far; one that is not a number never is."""
        if not self.improved(record):
            self._since += 1
            return False
        self.step, self._value, self._since = record["step"], self._worth(record), 0
        return True

    def replay(self, record: Mapping[str, Any], root: Path) -> None:
        """`update` with an evaluation of an earlier part of the run, unless its checkpoint under `root` is gone."""
        if not self.improved(record) or is_checkpoint(checkpoint_folder(root, record["step"])):
            self.update(record)

    def improved(self, record: Mapping[str, Any]) -> bool:
        """Whether `update` would find it the best so far."""
        return self.metric is not None and self._worth(record) > self._value

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self._since >= self.patience

    def _worth(self, record: Mapping[str, Any]) -> float:
        assert self.metric is not None
        value = record.get(self.metric)
        if value is None:
            return -math.inf
        return -value if self.metric in ("ntp", "nsp") else value
