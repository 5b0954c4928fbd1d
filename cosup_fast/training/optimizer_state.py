"""Optimizer states as plain tensors and numbers, for checkpoints: of the same ranks bit for bit, of others resharded.

A weight (n, ...) is shared out by rows: rank r of R holds ceil(n / R) of them from r ceil(n / R) on. States are saved
as each rank has them. Read by other ranks, those in 32 or 16 bits are cut anew and stay what they are; those in 8 bits
are blocks of 256 elements of a shard, so they are dequantized, cut, and quantized again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from cosup_fast.training.optimizers import BLOCK, SMALL, LocalOptimizer

_MOMENTS = {"adamw-8bit": ("state1", "state2")}


class SavedStates(NamedTuple):
    """What one rank saved: tensors by "parameter/key", and of each parameter its steps, its shape and its first row."""

    tensors: Mapping[str, Tensor]
    parameters: dict[str, dict[str, Any]]


def save_states(optimizer: LocalOptimizer, rank: int, ranks: int) -> SavedStates:
    """Copies of this rank's states in the CPU's memory; of what is not sharded, rank 0 has them all."""
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, dict[str, Any]] = {}
    for name, state in optimizer.states().items():
        p, whole = optimizer.locals[name], optimizer.parameters[name]
        sharded = p is not whole
        if not sharded and rank > 0:
            continue
        parameters[name] = {
            "step": float(state["step"]),
            "shape": list(p.shape),
            "row": min(rank * -(-whole.shape[0] // ranks), whole.shape[0]) if sharded else 0,
        }
        for key in _moments(optimizer):
            parts = {"codes": state[key].codes, "scale": state[key].scale} if hasattr(state[key], "codes") else {}
            if optimizer.name == "adamw-8bit" and (absmax := state.get(key.replace("state", "absmax"))) is not None:
                parts = {"codes": state[key], "scale": absmax}
            for part, x in (parts or {"values": state[key]}).items():
                tensors[f"{name}/{key}.{part}"] = x.detach().to("cpu", copy=True).contiguous()
    return SavedStates(tensors, parameters)


@torch.no_grad()
def load_states(optimizer: LocalOptimizer, saved: Sequence[SavedStates], rank: int, ranks: int) -> bool:
    """Puts saved states into an optimizer that has taken no step; returns whether 8-bit ones were quantized anew.

    Args:
        optimizer: as it was, of these ranks.
        saved: what every rank of then saved, in order.
        rank, ranks: those of now.

    Raises:
        ValueError: states of other parameters.
    """
    known = {name for one in saved for name in one.parameters}
    if unknown := known - set(optimizer.parameters):
        raise ValueError(
            f"the optimizer states are those of other parameters: {min(unknown)} is not trained here; "
            "resume with the configuration that the run was started with"
        )
    anew = False
    for name, p in optimizer.locals.items():
        inner = optimizer.owner(name)
        having = [one for one in saved if name in one.parameters]
        if not having or inner is None:
            continue
        whole = optimizer.parameters[name]
        row = min(rank * -(-whole.shape[0] // ranks), whole.shape[0]) if p is not whole else 0
        same = next((one for one in having if _is(one.parameters[name], row, p)), None)
        state: dict[str, Any] = {"step": _step(optimizer, having[0].parameters[name]["step"], p)}
        for key in _moments(optimizer):
            if same is not None:
                parts = {
                    part: same.tensors[f"{name}/{key}.{part}"].to(p.device, copy=True)
                    for part in ("codes", "scale", "values")
                    if f"{name}/{key}.{part}" in same.tensors
                }
            else:
                dense = _rows([_dense(optimizer, one, name, key) for one in having], having, name, row, p)
                parts = _packed(optimizer, dense, key, p)
                anew |= "codes" in parts
            _put(optimizer, inner, state, key, parts, p)
        inner.state[p] = state
    return anew


def _moments(optimizer: LocalOptimizer) -> tuple[str, str]:
    return cast(tuple[str, str], _MOMENTS.get(optimizer.name, ("exp_avg", "exp_avg_sq")))


def _is(saved: dict[str, Any], row: int, p: Tensor) -> bool:
    return saved["row"] == row and saved["shape"] == list(p.shape)


def _step(optimizer: LocalOptimizer, step: float, p: Tensor) -> Any:
    if optimizer.name == "adamw-8bit":
        return int(step)
    fused = optimizer.name == "adamw" and not hasattr(optimizer.inner[0], "bf16_stochastic_round")
    return torch.tensor(step, device=p.device if fused and p.is_cuda else "cpu")


def _dense(optimizer: LocalOptimizer, saved: SavedStates, name: str, key: str) -> Tensor:
    """A shard's moment in fp32, in the shard's shape."""
    shape = saved.parameters[name]["shape"]
    if (values := saved.tensors.get(f"{name}/{key}.values")) is not None:
        return values.float().view(shape)
    codes, scale = (saved.tensors[f"{name}/{key}.{part}"] for part in ("codes", "scale"))
    qmap = _code_book(optimizer, key)
    blocks = torch.nn.functional.pad(qmap[codes.flatten().int()], (0, -codes.numel() % BLOCK)).view(-1, BLOCK)
    return (blocks * scale.view(-1, 1)).flatten()[: codes.numel()].view(shape)


def _rows(shards: Sequence[Tensor], having: Sequence[SavedStates], name: str, row: int, p: Tensor) -> Tensor:
    """The rows of all shards that are this rank's."""
    starts = [one.parameters[name]["row"] for one in having]
    order = sorted(range(len(shards)), key=starts.__getitem__)
    whole = torch.cat([shards[i] for i in order])
    found = whole[row : row + len(p)] if p.ndim else whole
    if found.shape != p.shape:
        raise ValueError(f"the optimizer states of {name} have shape {tuple(found.shape)}, expected {tuple(p.shape)}")
    return found


def _packed(optimizer: LocalOptimizer, dense: Tensor, key: str, p: Tensor) -> dict[str, Tensor]:
    """A moment as the optimizer keeps it."""
    small = p.numel() < SMALL
    if optimizer.name == "adamw" or small:
        plain = optimizer.name != "adamw-8bit" and hasattr(optimizer.inner[0], "bf16_stochastic_round")
        return {"values": dense.to(p.device, p.dtype if plain else torch.promote_types(p.dtype, torch.float32))}
    blocks = torch.nn.functional.pad(dense.flatten(), (0, -dense.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1).clamp(min=1e-12)
    qmap = _code_book(optimizer, key).sort().values
    middles = (qmap[1:] + qmap[:-1]) / 2
    codes = torch.bucketize((blocks / scale[:, None]).flatten()[: dense.numel()], middles).to(torch.uint8)
    shape = p.shape if optimizer.name == "adamw-8bit" else (-1,)
    return {"codes": codes.view(shape).to(p.device), "scale": scale.to(p.device)}


def _code_book(optimizer: LocalOptimizer, key: str) -> Tensor:
    """The 256 values of 8 bits, ascending."""
    signed = key in ("state1", "exp_avg")
    if optimizer.name == "adamw-8bit":
        import bitsandbytes.functional as bnb

        return bnb.create_dynamic_map(signed=signed)
    from torchao.optim import subclass_8bit

    return torch.tensor(subclass_8bit.get_qmap_signed() if signed else subclass_8bit.get_qmap_unsigned())


def _put(
    optimizer: LocalOptimizer, inner: Any, state: dict[str, Any], key: str, parts: dict[str, Tensor], p: Tensor
) -> None:
    if optimizer.name == "adamw-8bit":
        state[key] = parts.get("values", parts.get("codes"))
        if "codes" in parts:
            book = "dynamic" if key == "state1" else "udynamic"
            if not inner.name2qmap:
                inner.fill_qmap()
            inner.name2qmap[book] = inner.name2qmap[book].to(p.device)
            state[key.replace("state", "qmap")] = inner.name2qmap[book]
            state[key.replace("state", "absmax")] = parts["scale"]
    elif "codes" in parts:
        buffer = inner._new_buffer(p, key == "exp_avg")
        buffer.codes.copy_(parts["codes"].view_as(buffer.codes))
        buffer.scale.copy_(parts["scale"].view_as(buffer.scale))
        state[key] = buffer
    else:
        state[key] = parts["values"]
