"""What ranks write to each other in a key-value store: the notes of a meeting, errors, and signs of progress."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore

ROLL_CALL = 5.0
"""Seconds to wait for an answer from each rank once a collective has failed."""
HEARING = 20.0
"""Seconds for which a rank that reports an error waits for the others to read it: it may hold the store they read."""
PROGRESS = 1.0
"""Seconds between two signs of progress, and between two looks for them."""


class Channel:
    """Meetings in a store, each with a number, which is the same on every rank.

    Args:
        store: the process group's.
        timeout: seconds to wait for it to answer.
    """

    def __init__(self, store: Any, timeout: float):
        # A connection of its own: waiting must not block the others that use the store.
        before = store.timeout
        store.set_timeout(min(before, timedelta(seconds=timeout)))
        try:
            self.store = PrefixStore("cosup_fast", store.clone())
        finally:
            store.set_timeout(before)
        self.store.set_timeout(before)
        self.number = 0

    def post(self, rank: int, note: dict[str, Any]) -> None:
        """Leaves this rank's note of the next meeting."""
        self.number += 1
        self.store.set(f"{self.number}/{rank}", json.dumps(note))

    def report(self, rank: int, size: int, note: dict[str, Any]) -> None:
        """Leaves an error as this rank's note of the next meeting, and gives the others time to read it."""
        self.post(rank, note)
        with suppress(dist.DistError):
            self.hear(rank)
            self._await([f"{self.number}/heard/{i}" for i in range(size)], HEARING)

    def hear(self, rank: int) -> None:
        """Tells who reported an error at this meeting that this rank knows of it."""
        self.store.set(f"{self.number}/heard/{rank}", "")

    def exchange(
        self, rank: int, size: int, note: dict[str, Any], timeout: float
    ) -> tuple[list[dict[str, Any]], list[int]]:
        """The note of every rank, or no notes and the ranks that did not come in time."""
        self.post(rank, note)
        keys = [f"{self.number}/{i}" for i in range(size)]
        if late := self._await(keys, timeout):
            return [], late
        # Everyone has come here, so everyone has read the meeting before.
        self.store.delete_key(f"{self.number - 1}/{rank}")
        return [json.loads(text) for text in self.store.multi_get(keys)], []

    def progress(self, rank: int) -> None:
        """Gives whoever waits for this rank its time again."""
        with suppress(dist.DistError):  # the next meeting says that the store is gone
            self.store.add(f"progress/{rank}", 1)

    def leave(self, rank: int, size: int, *, last: bool) -> None:
        """Tells that this rank is done with the store; the one that goes last waits for the others."""
        with suppress(dist.DistError):
            self.store.set(f"left/{rank}", "")
            if last:
                self._await([f"left/{i}" for i in range(size)], HEARING)

    def failed(self) -> bool:
        """Whether a collective since this meeting has failed for some rank."""
        return self.store.check([f"{self.number}/failed"])

    def silent(self, rank: int, size: int) -> list[int]:
        """Ranks that do not say that a collective since this meeting has failed for them too."""
        self.store.set(f"{self.number}/failed", "")
        self.store.set(f"{self.number}/failed/{rank}", "")
        return self._await([f"{self.number}/failed/{i}" for i in range(size)], ROLL_CALL)

    def _await(self, keys: list[str], timeout: float) -> list[int]:
        """The ranks, one a key, whose key is not there after so many seconds without a sign of progress.

        Polls: the store's own wait hears no Ctrl-C.
        """
        heard = {i: (0, time.monotonic()) for i in range(len(keys))}
        look, pause = time.monotonic() + min(PROGRESS, timeout), 1e-4
        while not self.store.check(keys):
            if (now := time.monotonic()) >= look:
                missing = [i for i, key in enumerate(keys) if not self.store.check([key])]
                for i in missing:
                    if (signs := self.store.add(f"progress/{i}", 0)) != heard[i][0]:
                        heard[i] = signs, now
                if late := [i for i in missing if now >= heard[i][1] + timeout]:
                    return late
                look = now + min(PROGRESS, timeout / 4)
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        return []


_channels: WeakKeyDictionary[ProcessGroup, Channel] = WeakKeyDictionary()


def channel_of(group: ProcessGroup, timeout: float) -> Channel:
    """The channel of a process group, the same each time: meetings are counted.

    The first call connects, which takes no longer than `timeout` seconds where the store is gone.
    """
    if group not in _channels:
        _channels[group] = Channel(group.get_group_store(), timeout)
    return _channels[group]
