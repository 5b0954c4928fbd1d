"""The ranks of a process group: they meet before they talk, and who does not come is named.

A meeting is an exchange of short notes through the group's key-value store, on the host: it tells how many rows each
rank brings before tensors are sent, lets no tensor wait for the host, and notices a rank that died or waits elsewhere
where a collective would hang.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from cosup_fast.distributed.channel import PROGRESS, channel_of
from cosup_fast.errors import CosupError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

TIMEOUT = 600.0
"""Seconds to wait for the other ranks, unless told otherwise."""
NOTICE = 1.0
"""Seconds after which a rank that waits in a collective looks whether it has failed for others."""

# torch 2.13 renamed these; the old names warn there.
all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


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

    Every method but `progress`, `progressing`, `reporting` and `naming` is a collective: all ranks of the group call
    it, in the same order.

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
            self._channel = channel_of(self.group, timeout)
        except dist.DistError as error:
            raise _store_is_gone("start", error) from error
        self._told = -PROGRESS

    @classmethod
    def present(cls, *, timeout: float = TIMEOUT) -> Self | None:
        """The ranks of the default group; None where this process is alone."""
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return cls(timeout=timeout) if several else None

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
            found, late = channel.exchange(self.rank, self.size, said, self.timeout)
        except dist.DistError as error:
            raise _store_is_gone(purpose, error) from error
        if late:
            raise absent(purpose, [self.names[i] for i in late], self.timeout)
        for name, one in zip(self.names, found):
            if "error" in one:
                channel.hear(self.rank)
                raise ReportedError(f"rank {name}: {one['error']}")
            if one["purpose"] != purpose:
                raise PeerError(f"{purpose}: rank {name} is at {one['purpose']!r}; every rank makes the same calls")
        return found

    def mesh(self, device: str, replicas: int = 1) -> DeviceMesh:
        """The ranks as a mesh of this type of device.

        Args:
            device: "cpu" or "cuda".
            replicas: R > 1, a divisor of the number of ranks, gives a mesh (replicas, shards) of R rows of consecutive
                ranks, which a launcher starts on the same node.

        Raises:
            ValueError: replicas where these are only some of the ranks that were started.
        """
        from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

        if replicas == 1:
            return DeviceMesh.from_group(cast(ProcessGroup, self.group), device)
        if self.size != (started := dist.get_world_size()):
            raise ValueError(f"replicas is {replicas} and the group has {self.size} of {started} ranks: give it all")
        return init_device_mesh(device, (replicas, self.size // replicas), mesh_dim_names=("replicas", "shards"))

    @contextmanager
    def reporting(self, purpose: str) -> Iterator[None]:
        """Reports an error inside to the others at their next meeting, where they would wait until they time out."""
        try:
            yield
        except PeerError:
            raise
        except Exception as error:
            if self.size > 1:
                kind = "" if isinstance(error, OSError | TypeError | ValueError) else f"{type(error).__name__}: "
                self._channel.report(self.rank, self.size, {"purpose": purpose, "error": f"{kind}{error}"})
            raise

    @contextmanager
    def together(self, purpose: str) -> Iterator[None]:
        """Ends when every rank has done its part; a user error in one of them is raised on all.

        Raises:
            PeerError, ReportedError: see `meet`.
        """
        with self.reporting(purpose):
            yield
        self.meet(purpose)

    def progress(self) -> None:
        """Tells the ranks that wait for this one that it is still at work: their timeout starts again.

        Cheap enough to be called in a loop. Not a collective.
        """
        if self.size > 1 and time.monotonic() >= self._told + PROGRESS:
            self._channel.progress(self.rank)
            self._told = time.monotonic()

    @contextmanager
    def progressing(self) -> Iterator[None]:
        """Makes `progress` from a thread, for a long call that cannot: only this rank's death is noticed then."""
        done = threading.Event()

        def tell() -> None:
            while not done.wait(PROGRESS):
                self.progress()

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def counts(self, n: int) -> list[int]:
        """The n of every rank."""
        return [one["n"] for one in self.meet("counts", {"n": n})]

    def gather(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows (n_r, ...) of all ranks in rank order, without graph, given every n_r."""
        rows, most = rows.detach(), max(counts)
        if self.size == 1 or most == 0:
            return rows
        out = rows.new_empty(self.size * most, *rows.shape[1:])
        self.run_collective(
            "all-gather", out, lambda: all_gather(out, _padded(rows, most), group=self.group, async_op=True)
        )
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
        self.run_collective("reduce-scatter", out, lambda: reduce_scatter(out, sent, group=self.group, async_op=True))
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
            self.run_collective("all-reduce", x, lambda: dist.all_reduce(x, op, group=self.group, async_op=True))
        return x

    def run_collective(self, what: str, out: Tensor, start: Callable[[], Any]) -> None:
        """A collective; where it fails, the ranks that stopped answering are named."""
        on_host = out.device.type == "cpu"
        with self._naming(what, everything=on_host):
            work = start()
            self._wait(work) if on_host else work.wait()

    def naming(self, what: str) -> AbstractContextManager[None]:
        """Names the ranks that stopped answering where a collective of somebody else's, inside, has failed for it.

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
            raise PeerError(
                f"{what}: {_ranks(silent)} stopped answering ({error}); look there for the cause"
            ) from error

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


def _store_is_gone(purpose: str, error: Exception) -> PeerError:
    return PeerError(
        f"{purpose}: the store of the process group is gone ({error}); rank 0 holds it, or the launcher does"
    )


def absent(purpose: str, ranks: Sequence[int], timeout: float) -> PeerError:
    """The error that names ranks who did not come."""
    return PeerError(
        f"{purpose}: {_ranks(ranks)} did not come within {timeout:g} s; look there for the cause, or set a longer "
        "timeout (training.rank_timeout, --rank-timeout, Peers(timeout=...))"
    )


def _padded(rows: Tensor, n: int) -> Tensor:
    missing = n - len(rows)
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows.contiguous()


def _ranks(names: Sequence[int]) -> str:
    return f"rank{'s' if len(names) > 1 else ''} {', '.join(map(str, names))}"
