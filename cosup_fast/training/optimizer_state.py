"""Optimizer states as plain tensors and numbers, for checkpoints: of the same ranks bit for bit, of others resharded.

A weight is shared out by rows (see `sharding.Share`). States are saved as each rank of the first replica has them. Read
by other ranks, those in 32 or 16 bits are cut again and stay what they are; those in 8 bits are blocks of 256 elements
of a shard, so they are dequantized, cut, and quantized again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from cosup_fast.training.adamw import Parts, dequantize
from cosup_fast.training.optimizers import LocalOptimizer
from cosup_fast.training.sharding import Share


class SavedStates(NamedTuple):
    """What one rank saved: tensors by "parameter/key", and of each parameter its steps, its shape and its first row."""

    tensors: Mapping[str, Tensor]
    parameters: dict[str, dict[str, Any]]


def save_states(optimizer: LocalOptimizer, rank: int) -> SavedStates:
    """Copies of this rank's states in the CPU's memory; what several ranks have is saved by the first of them."""
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, dict[str, Any]] = {}
    for name, state in optimizer.states().items():
        p = optimizer.locals[name]
        row, replica = _share(optimizer, name, rank)
        if replica > 0:
            continue
        parameters[name] = {
            "step": float(state["step"]),
            "shape": list(p.shape),
            "row": row,
        }
        for key in optimizer.kind.moments:
            for part, x in optimizer.kind.unpack(state, key).items():
                tensors[f"{name}/{key}.{part}"] = x.detach().to("cpu", copy=True).contiguous()
    return SavedStates(tensors, parameters)


@torch.no_grad()
def load_states(optimizer: LocalOptimizer, saved: Sequence[SavedStates], rank: int) -> bool:
    """Puts saved states into an optimizer that has taken no step; returns whether 8-bit ones were quantized again.

    Args:
        optimizer: as it was, of these ranks.
        saved: what every rank that saved it had, in order.
        rank: the current one.

    Raises:
        ValueError: states of other parameters.
    """
    known = {name for one in saved for name in one.parameters}
    if unknown := known - set(optimizer.parameters):
        raise ValueError(
            f"the optimizer states are those of other parameters: {min(unknown)} is not trained here; "
            "resume with the configuration that the run was started with"
        )
    kind, requantized = optimizer.kind, False
    for name, p in optimizer.locals.items():
        inner = optimizer.owner(name)
        having = [one for one in saved if name in one.parameters]
        if not having or inner is None:
            continue
        row, _ = _share(optimizer, name, rank)
        same = next((one for one in having if _is(one.parameters[name], row, p)), None)
        state: dict[str, Any] = {"step": kind.count(having[0].parameters[name]["step"], p)}
        for key in kind.moments:
            if same is not None:
                parts = {part: x.to(p.device, copy=True) for part, x in _parts(same, name, key).items()}
            else:
                dense = _rows([densified(optimizer, one, name, key) for one in having], having, name, row, p)
                parts = kind.pack(dense, key, p)
                requantized |= "codes" in parts
            kind.put(inner, state, key, parts, p)
        inner.state[p] = state
    return requantized


def _share(optimizer: LocalOptimizer, name: str, rank: int) -> Share:
    whole = optimizer.parameters[name]
    return Share.of(whole) if isinstance(whole, DTensor) else Share(row=0, replica=rank)


def _is(saved: dict[str, Any], row: int, p: Tensor) -> bool:
    return saved["row"] == row and saved["shape"] == list(p.shape)


def _parts(saved: SavedStates, name: str, key: str) -> Parts:
    """A moment as it was saved."""
    found = {part: saved.tensors.get(f"{name}/{key}.{part}") for part in ("values", "codes", "scale")}
    return {part: x for part, x in found.items() if x is not None}


def densified(optimizer: LocalOptimizer, saved: SavedStates, name: str, key: str) -> Tensor:
    """A shard's moment in fp32, in the shard's shape."""
    shape, parts = saved.parameters[name]["shape"], _parts(saved, name, key)
    if "values" in parts:
        return parts["values"].float().view(shape)
    return dequantize(parts, optimizer.kind.code_book(key), shape)


def _rows(shards: Sequence[Tensor], having: Sequence[SavedStates], name: str, row: int, p: Tensor) -> Tensor:
    """The rows of all shards that are this rank's."""
    starts = [one.parameters[name]["row"] for one in having]
    order = sorted(range(len(shards)), key=starts.__getitem__)
    whole = torch.cat([shards[i] for i in order])
    found = whole[row : row + len(p)] if p.ndim else whole
    if found.shape != p.shape:
        raise ValueError(f"the optimizer states of {name} have shape {tuple(found.shape)}, expected {tuple(p.shape)}")
    return found
