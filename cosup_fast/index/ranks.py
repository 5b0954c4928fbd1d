"""The processes that build an index together: who does what, and errors that all of them learn of."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")

# Ranks wait for one another while shards are embedded, which takes as long as it takes.
_PATIENCE = datetime.timedelta(days=30)


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes that torchrun started, if it did and they are not joined yet."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Ranks:
    """This process among those of `torch.distributed`'s default group; alone where there is none."""

    def __init__(self):
        self.several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self.several else 0
        self.count = dist.get_world_size() if self.several else 1
        # A group of its own on the CPU: the default one may be NCCL's, which gives up after ten minutes.
        self._group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE) if self.several else None

    @property
    def leads(self) -> bool:
        """Whether this is the process that keeps the folder and shows progress."""
        return self.rank == 0

    def mine(self, work: Sequence[T]) -> Sequence[T]:
        """This process's part of some work."""
        return work[self.rank :: self.count]

    def gather(self, value: T) -> list[T]:
        """What every process gave, in the order of ranks; all processes call it."""
        if not self.several:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self._group)
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """Ends when every process has done its part; an error in one of them is raised in all.

        Raises:
            ValueError: another process failed.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        others = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, message in enumerate(others):
            if message is not None:
                raise ValueError(f"rank {rank} failed: {message}")

    def close(self) -> None:
        """Leaves the group."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
