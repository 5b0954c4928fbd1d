"""The ranks of a process group: they meet before they talk, and who does not come is named.

A meeting is an exchange of short notes through the group's key-value store, on the host: it tells how many rows each
rank brings before tensors are sent, lets no tensor wait for the host, and notices a rank that died or waits elsewhere
where a collective would hang.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore

from cosup_fast.errors import CosupError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

TIMEOUT = 600.0
"""Seconds to wait for the other ranks, unless told otherwise."""
NOTICE = 1.0
"""Seconds after which a rank that waits in a collective looks whether it has failed for others."""
ROLL_CALL = 5.0
"""Seconds to wait for an answer from each rank once a collective has failed."""
HEARING = 20.0
"""Seconds for which a rank that reports an error waits for the others to read it: it may hold the store they read."""

# torch 2.13 renamed these; the old names warn there.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


_F = TypeVar("_F", bound=Callable[..., Any])


def outside_graphs(f: _F) -> _F:
    """A function that torch.compile leaves as it is: what ranks say to each other cannot be traced."""
    return cast(Any, torch.compiler.disable)(f)


class PeerError(CosupError, RuntimeError):
    """Other ranks did not come, were lost, or ask for something else; the message names them."""


class ReportedError(CosupError, ValueError):
    """A user error of another rank, which it reports (see `Peers.reporting`)."""


class Peers:
    """The ranks of a process group: meetings, and the collectives that negatives across ranks need.

    Every method is a collective: all ranks of the group call it, in the same order.

    Args:
        group: a process group of torch.distributed (gloo, nccl, ...); None is the default group.
        timeout: seconds to wait for the others, > 0. On nccl a collective that has begun obeys the group's own timeout.

    Raises:
        ValueError: torch.distributed is not initialised, this process is not in the group, or a timeout <= 0.
        PeerError: the group's store is gone.
    """

    def __init__(self, group: ProcessGroup | None = None, *, timeout: float = TIMEOUT):
        if not dist.is_initialized():
            raise ValueError("group is given but torch.distributed is not initialised; call init_process_group first")
        if not timeout > 0:
            raise ValueError(f"timeout is {timeout}; pass seconds > 0")
        self.group = dist.group.WORLD if group is None else group
        if not isinstance(self.group, ProcessGroup):
            raise ValueError(f"group is {group!r}; pass a process group that holds this process, or None for all ranks")
        self.timeout = timeout
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.names: list[int] = dist.get_process_group_ranks(self.group)
        """The global rank of each rank of the group: by these, errors name them."""
        try:
            self._channel = _channel(self.group)
        except dist.DistError as error:
            raise _store_is_gone("start", error) from error

    @classmethod
    @outside_graphs
    def of(cls, group: ProcessGroup | Peers) -> Peers:
        """`group` itself if it is one of these, else the peers of that process group."""
        return group if isinstance(group, Peers) else cls(group)

    def meet(self, purpose: str, note: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Waits for every rank and returns what each has to say (JSON), in rank order.

        Raises:
            PeerError: a rank has not come in time, or has come for another purpose; the store is gone.
            ReportedError: a rank reports an error of its own.
        """
        channel = self._channel
        said = {"purpose": purpose, **(note or {})}
        if self.size == 1:
            return [said]
        try:
            notes = channel.exchange(self.rank, self.size, said, self.timeout)
        except dist.DistError as error:
            raise _store_is_gone(purpose, error) from error
        if missing := [name for name, one in zip(self.names, notes) if one is None]:
            raise PeerError(
                f"{purpose}: {_ranks(missing)} did not come within {self.timeout:g} s; look there for the cause, or "
                "give Peers a longer timeout"
            )
        found: list[dict[str, Any]] = [one for one in notes if one is not None]
        for name, one in zip(self.names, found):
            if "error" in one:
                channel.hear(self.rank)
                raise ReportedError(f"rank {name}: {one['error']}")
            if one["purpose"] != purpose:
                raise PeerError(f"{purpose}: rank {name} is at {one['purpose']!r}; every rank makes the same calls")
        return found

    def mesh(self, device: str) -> DeviceMesh:
        """The ranks as a mesh of this type of device."""
        from torch.distributed.device_mesh import DeviceMesh

        return DeviceMesh.from_group(cast(ProcessGroup, self.group), device)

    @contextmanager
    def reporting(self, purpose: str) -> Iterator[None]:
        """Tells the others, at their next meeting, of a user error inside; they would wait for this rank in vain."""
        try:
            yield
        except (TypeError, ValueError) as error:
            if self.size > 1:
                self._channel.report(self.rank, self.size, {"purpose": purpose, "error": str(error)})
            raise

    def counts(self, n: int) -> list[int]:
        """The n of every rank."""
        return [one["n"] for one in self.meet("counts", {"n": n})]

    def gather(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows (n_r, ...) of all ranks in rank order, without graph, given every n_r."""
        rows, most = rows.detach(), max(counts)
        if self.size == 1 or most == 0:
            return rows
        out = rows.new_empty(self.size * most, *rows.shape[1:])
        self._run("all-gather", out, lambda: _all_gather(out, _padded(rows, most), group=self.group, async_op=True))
        if min(counts) == most:
            return out
        return torch.cat([out[i * most : i * most + n] for i, n in enumerate(counts)])

    def scatter_sum(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """This rank's n_r of the rows (sum of n_r, ...), summed over ranks: the backward of `gather`.

        Give what is summed in fp32 or fp64.
        """
        most = max(counts)
        if self.size == 1 or most == 0:
            return rows
        if min(counts) < most:
            rows = torch.cat([_padded(part, most) for part in rows.split(list(counts))])
        out = rows.new_empty(most, *rows.shape[1:])
        sent = rows.contiguous()
        self._run("reduce-scatter", out, lambda: _reduce_scatter(out, sent, group=self.group, async_op=True))
        return out[: counts[self.rank]]

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks."""
        return self.sum_(x.detach().clone(memory_format=torch.contiguous_format))

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place of a contiguous tensor."""
        return self._all_reduce(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        """The maximum over ranks."""
        return self._all_reduce(x.detach().clone(memory_format=torch.contiguous_format), dist.ReduceOp.MAX)

    def _all_reduce(self, x: Tensor, op: Any) -> Tensor:
        if self.size > 1 and x.numel():
            self._run("all-reduce", x, lambda: dist.all_reduce(x, op, group=self.group, async_op=True))
        return x

    def _run(self, what: str, out: Tensor, start: Callable[[], Any]) -> None:
        """A collective; where it fails, the ranks that answer no more are named."""
        on_host = out.device.type == "cpu"
        with self._naming(what, everything=on_host):
            work = start()
            self._wait(work) if on_host else work.wait()

    def naming(self, what: str) -> AbstractContextManager[None]:
        """Names the ranks that answer no more where a collective of somebody else's, inside, has failed for it.

        Raises:
            PeerError: in place of the failure.
        """
        return self._naming(what, everything=False)

    @contextmanager
    def _naming(self, what: str, *, everything: bool) -> Iterator[None]:
        try:
            yield
        except PeerError:
            raise
        except RuntimeError as error:
            # gloo reports a lost connection as any other error.
            if not (everything or isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            try:
                silent = [self.names[i] for i in self._channel.silent(self.rank, self.size)]
            except dist.DistError:
                silent = [0]  # who holds the store, unless a launcher does
            if not silent:
                raise
            raise PeerError(f"{what}: {_ranks(silent)} answered no more ({error}); look there for the cause") from error

    def _wait(self, work: Any) -> None:
        """Waits on the host, and no longer than until another rank has seen the collective fail.

        Only ranks that talk to a lost one notice at once; the others would wait for these until the timeout.
        """
        deadline = time.monotonic() + self.timeout
        while True:
            left = deadline - time.monotonic()
            try:
                work.wait(timedelta(seconds=max(0.001, min(NOTICE, left))))
                return
            except RuntimeError:
                if work.is_completed() or left <= NOTICE or self._channel.failed():
                    raise


class _Channel:
    """Meetings of a group in its store, each with a number, which is the same on every rank."""

    def __init__(self, group: ProcessGroup):
        # A connection of its own: waiting must not block the others that use the store.
        store: Any = group.get_group_store()
        self.store = PrefixStore("cosup_fast", store.clone())
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

    def exchange(self, rank: int, size: int, note: dict[str, Any], timeout: float) -> list[dict[str, Any] | None]:
        """The note of every rank; None for those that left none in time."""
        self.post(rank, note)
        keys = [f"{self.number}/{i}" for i in range(size)]
        missing = self._await(keys, timeout)
        if missing:
            return [None if key in missing else json.loads(self.store.get(key)) for key in keys]
        # Everyone has come here, so everyone has read the meeting before.
        self.store.delete_key(f"{self.number - 1}/{rank}")
        return [json.loads(text) for text in self.store.multi_get(keys)]

    def failed(self) -> bool:
        """Whether a collective since this meeting has failed for some rank."""
        return self.store.check([f"{self.number}/failed"])

    def silent(self, rank: int, size: int) -> list[int]:
        """Ranks that do not say that a collective since this meeting has failed for them too."""
        self.store.set(f"{self.number}/failed", "")
        self.store.set(f"{self.number}/failed/{rank}", "")
        keys = [f"{self.number}/failed/{i}" for i in range(size)]
        missing = self._await(keys, ROLL_CALL)
        return [i for i, key in enumerate(keys) if key in missing]

    def _await(self, keys: list[str], timeout: float) -> set[str]:
        """Those keys that are not there in time. Polls: the store's own wait hears no Ctrl-C."""
        deadline, pause = time.monotonic() + timeout, 1e-4
        while not self.store.check(keys):
            if time.monotonic() > deadline:
                return {key for key in keys if not self.store.check([key])}
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        return set()


_channels: WeakKeyDictionary[ProcessGroup, _Channel] = WeakKeyDictionary()


def _channel(group: ProcessGroup) -> _Channel:
    if group not in _channels:
        _channels[group] = _Channel(group)
    return _channels[group]


def _store_is_gone(purpose: str, error: Exception) -> PeerError:
    return PeerError(
        f"{purpose}: the store of the process group is gone ({error}); rank 0 holds it, or the launcher does"
    )


def _padded(rows: Tensor, n: int) -> Tensor:
    missing = n - len(rows)
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows.contiguous()


def _ranks(names: Sequence[int]) -> str:
    return f"rank{'s' if len(names) > 1 else ''} {', '.join(map(str, names))}"
