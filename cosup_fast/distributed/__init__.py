"""Training across processes: what ranks say to one another, and InfoNCE with the negatives of all of them."""

from cosup_fast.distributed.launch import joined_ranks, world_size
from cosup_fast.distributed.peers import PeerError, Peers, ReportedError

__all__ = ["PeerError", "Peers", "ReportedError", "joined_ranks", "world_size"]
