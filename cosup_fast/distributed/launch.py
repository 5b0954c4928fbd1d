"""The processes that torchrun started join a process group; one that does not come is named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from cosup_fast.distributed.channel import Channel
from cosup_fast.distributed.peers import TIMEOUT, PeerError, Peers, absent


def world_size() -> int:
    """How many processes there are: joined already, or started by torchrun."""
    joined = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if joined else int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined_ranks(backend: str = "gloo", *, timeout: float = TIMEOUT) -> Iterator[Peers | None]:
    """The ranks that torchrun started, or that are joined already; None where this process is the only one.

    Args:
        backend: of the process group, as `torch.distributed.init_process_group` takes it.
        timeout: seconds that ranks wait for one another.

    Raises:
        ValueError: `WORLD_SIZE` is set without the other variables that torchrun sets.
        PeerError: a rank did not come.
    """
    if world_size() == 1:
        yield None
        return
    if dist.is_initialized():
        yield Peers.present(timeout=timeout)
        return
    if unset := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ValueError(f"WORLD_SIZE is set and {', '.join(unset)} is not: start the ranks by torchrun")
    rank, size, patience = int(os.environ["RANK"]), world_size(), timedelta(seconds=timeout)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    holder = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun itself
    try:
        # The types of torch forget that this is public.
        new_store: Any = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
        store = new_store(host, port, size, holder, patience, wait_for_workers=False, multi_tenant=True)
        channel = Channel(PrefixStore("launch", store), timeout)
        _, late = channel.exchange(rank, size, {}, timeout)
    except dist.DistError as error:
        raise PeerError(f"start: no store at {host}:{port} ({error}); rank 0 holds it, or the launcher does") from error
    if late:
        raise absent("start", late, timeout)
    dist.init_process_group(
        backend, store=PrefixStore("default_pg", store), rank=rank, world_size=size, timeout=patience
    )
    try:
        peers = Peers(timeout=timeout)
        peers.meet("start")
        yield peers
        channel.leave(rank, size, last=holder)
    finally:
        dist.destroy_process_group()
