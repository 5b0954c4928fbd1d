"""Watches a run for the ways in which co-supervision is known to fail, says the likely cause, and stops a wild step.

The signatures are those of Lee et al. 2024, section 6: NSP that stays high or diverges (the two spaces do not match,
too few negatives), NTP that degrades (lambda too high), retrieval that does not improve (Embseq untrained, batch too
small).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


class FailureMonitor:
    """Fed with every step and every held-out evaluation; yields a warning once per signature.

    Args:
        window: steps over which NSP is averaged; a fault of single batches must hold for most of them.
        patience: evaluations without progress before held-out figures count as a failure.
    """

    def __init__(self, window: int = 50, patience: int = 3):
        self.window = window
        self.patience = patience
        self._single: deque[bool] = deque(maxlen=window)
        self._nsp: deque[tuple[float, float]] = deque(maxlen=window)
        self._ntp: list[float] = []
        self._recall: list[float] = []
        self._warned: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """What the steps have shown, as JSON; the evaluations are shown again (`Trainer.replay`)."""
        return {"single": list(self._single), "nsp": list(self._nsp), "warned": sorted(self._warned)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what the steps had shown."""
        self._single.extend(state["single"])
        self._nsp.extend((loss, chance) for loss, chance in state["nsp"])
        self._warned.update(state["warned"])

    def step(self, nsp: float, candidates: int) -> Iterator[str]:
        """Warnings after a step with mean NSP loss `nsp` (nats) over `candidates` sequences; 0: nothing retrieved."""
        if candidates == 0:
            return
        self._single.append(candidates == 1)
        if sum(self._single) > self.window / 2:
            yield from self._once(
                "single",
                "most batches hold a single sequence, so next sequence prediction has nothing to contrast: "
                "raise training.batch_size",
            )
        if candidates == 1:
            return
        self._nsp.append((nsp, math.log(candidates)))
        if len(self._nsp) < self.window:
            return
        loss, chance = (sum(column) / self.window for column in zip(*self._nsp, strict=True))
        if loss > 1.5 * chance:
            yield from self._once(
                "diverged",
                f"NSP loss {loss:.2f} is far above chance, ln(M) = {chance:.2f}: the scores are saturated; "
                "use nsp.similarity=cosine, or a larger nsp.temperature (sqrt(D) for raw dot products)",
            )
        elif loss > 0.95 * chance:
            yield from self._once(
                "chance",
                f"NSP loss {loss:.2f} has stayed near chance, ln(M) = {chance:.2f}, for {self.window} steps: Gen and "
                "Embseq may come from different distributions, nsp.weight or training.lr may be too small, "
                "or nsp.temperature too large",
            )

    def evaluation(self, ntp: float | None, recall: float | None) -> Iterator[str]:
        """Warnings after a held-out evaluation: mean NTP loss (nats per token) and R@5; None: it is not trained."""
        if ntp is not None:
            yield from self._ntp_rises(ntp)
        if recall is not None:
            yield from self._recall_is_flat(recall)

    def _ntp_rises(self, ntp: float) -> Iterator[str]:
        self._ntp.append(ntp)
        best, recent = min(self._ntp), self._ntp[-self.patience :]
        if len(self._ntp) > self.patience and all(x > 1.02 * best for x in recent):
            yield from self._once(
                "ntp",
                f"held-out NTP loss has risen from {best:.3f} to {ntp:.3f}: nsp.weight or training.lr may be too high, "
                "or the training set is being memorised",
            )

    def _recall_is_flat(self, recall: float) -> Iterator[str]:
        self._recall.append(recall)
        best = max(self._recall[-self.patience :])
        if len(self._recall) > self.patience and best <= self._recall[0] and best < 1:
            yield from self._once(
                "recall",
                f"held-out R@5 is flat at {recall:.1%} after {len(self._recall)} evaluations: Embseq may be frozen or "
                "barely trained, or the batch too small (more in-batch negatives are what NSP learns from)",
            )

    def _once(self, signature: str, message: str) -> Iterator[str]:
        if signature not in self._warned:
            self._warned.add(signature)
            yield message


class SpikeGuard:
    """Tells a loss that jumps from one that moves, by its robust z-score among the steps before.

        z = (loss - median) / max(1.4826 MAD, FLOOR)

    MAD is the median distance from the median; 1.4826 makes it the standard deviation of a normal distribution. Only a
    rise is a spike. A loss that is not a finite number is always refused, and none is remembered.

    Args:
        factor: the largest z that passes; None: only what is not finite is refused.
        window: steps that are remembered. The first half of it must be full before anything finite is refused.
    """

    FLOOR = 0.1  # nats: where a loss hardly moves at all, a small rise is not a spike

    def __init__(self, factor: float | None, window: int = 100):
        self.factor = factor
        self._losses = {name: deque[float](maxlen=window) for name in ("NTP", "NSP")}

    def state_dict(self) -> dict[str, list[float]]:
        """The losses that are remembered, as JSON."""
        return {name: list(losses) for name, losses in self._losses.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Remembers these losses, the last ones where the window has become smaller."""
        for name, losses in self._losses.items():
            losses.extend(state[name])

    def refuse(self, ntp: float | None, nsp: float | None) -> Iterator[str]:
        """What is wrong with the losses of a step (nats; None where one is not trained, or nothing was retrieved)."""
        for name, loss in (("NTP", ntp), ("NSP", nsp)):
            before = self._losses[name]
            if loss is None:
                continue
            if not math.isfinite(loss):
                yield f"{name} loss {loss}"
            elif self.factor is not None and 2 * len(before) >= (before.maxlen or 0):
                median = statistics.median(before)
                scale = max(1.4826 * statistics.median(abs(x - median) for x in before), self.FLOOR)
                if (z := (loss - median) / scale) > self.factor:
                    yield (
                        f"{name} loss {loss:.3g} is {z:.0f} robust standard deviations above {median:.3g}, the median "
                        f"of the {len(before)} steps before"
                    )

    def accept(self, ntp: float | None, nsp: float | None) -> None:
        """Remembers the losses of a step that was taken."""
        for name, loss in (("NTP", ntp), ("NSP", nsp)):
            if loss is not None and math.isfinite(loss):
                self._losses[name].append(loss)
