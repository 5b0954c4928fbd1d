"""The optimizers by name, a class each: what it needs, how it is made, how its states become plain tensors and back.

    optimizer             states of a weight    weights in bf16
    adamw                 two in its own dtype  torchao's, with stochastic rounding
    adamw-8bit            2 bytes, blocks 256   refused: bitsandbytes rounds to nearest
    adamw-8bit-torchao    2 bytes, blocks 256   with stochastic rounding

A weight of deviation 0.02 in bf16 is further from its neighbours than a step of lr 2e-5 can bridge, so rounded to
nearest most of them never move. Rounded up or down with the probability of its distance, a step is kept on average
(Gupta et al. 2015, arXiv 1502.02551). 8-bit states: Dettmers et al. 2022, arXiv 2110.02861.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cosup_fast.config.training import OptimizerName, check_rounding
from cosup_fast.environment import no_downloaded_kernels

SMALL = 4096
"""Tensors of fewer elements keep fp32 states in both libraries."""
BLOCK = 256
"""Elements that share a scale; torchao quantizes nothing whose size is not a multiple of it."""

Parts = dict[str, Tensor]
"""A moment of a tensor: {"values"}, or {"codes", "scale"} of its blocks in 8 bits."""
Replace = Callable[[Any, str, Any], None]


class AdamW:
    """torch's, fused where that is possible.

    Args:
        rounded: whether weights are in bf16.
    """

    package = ""
    """What has to be installed besides torch."""
    bits: int | None = None
    """Of each moment of an element, in tensors of at least `SMALL` elements; None: those of the weight."""
    moments: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    """The keys of its state; only the first one has a sign."""

    def __init__(self, *, rounded: bool):
        self.rounded = rounded

    def check_shard(self, name: str, p: Tensor) -> None:
        """Refuses a tensor that it cannot step as it promises."""

    def make(self, groups: list[Any], lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
        """The optimizer of these groups of parameters."""
        fused = groups[0]["params"][0].device.type in ("cpu", "cuda")
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused, foreach=None if fused else False)

    def count(self, steps: float, p: Tensor) -> Any:
        """How many steps a tensor has taken, as its state says it."""
        return torch.tensor(steps, device=p.device if p.is_cuda else "cpu")

    def unpack(self, state: dict[str, Any], key: str) -> Parts:
        """A moment of a state."""
        return {"values": state[key]}

    def pack(self, dense: Tensor, key: str, p: Tensor) -> Parts:
        """A moment of p, given in fp32."""
        return {"values": dense.to(p.device, torch.promote_types(p.dtype, torch.float32))}

    def put(self, inner: Any, state: dict[str, Any], key: str, parts: Parts, p: Tensor) -> None:
        """Makes a moment part of the state that `inner` keeps of p."""
        state[key] = parts["values"]

    def code_book(self, key: str) -> Tensor:
        """The 256 values of 8 bits, ascending."""
        raise AssertionError("only states in 8 bits have a code book")

    def simulate(self, replace: Replace) -> None:
        """Replaces what reads values, which fake tensors do not have; `replace(owner, name, value)` undoes it later."""


class TorchaoAdamW(AdamW):
    """torchao's for weights in bf16, with states in bf16."""

    package = "torchao"
    factory = "_AdamW"

    def make(self, groups: list[Any], lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
        with no_downloaded_kernels(), quiet_torchao():
            factory = getattr(importlib.import_module("torchao.optim"), self.factory)
            return factory(groups, lr=lr, betas=betas, bf16_stochastic_round=self.rounded)

    def count(self, steps: float, p: Tensor) -> Any:
        return torch.tensor(steps)

    def pack(self, dense: Tensor, key: str, p: Tensor) -> Parts:
        return {"values": dense.to(p.device, p.dtype)}

    def simulate(self, replace: Replace) -> None:
        with quiet_torchao():
            from torchao.optim import adam, subclass_8bit
        subclass_8bit.get_qmap_signed()  # their values are kept
        subclass_8bit.get_qmap_unsigned()
        replace(adam._AdamBase, "step", _compiled_step)


class TorchaoAdamW8bit(TorchaoAdamW):
    """torchao's with 8-bit states."""

    bits = 8
    factory = "AdamW8bit"

    def check_shard(self, name: str, p: Tensor) -> None:
        if p.numel() >= SMALL and p.numel() % BLOCK:
            raise ValueError(
                f"training.optimizer=adamw-8bit-torchao would keep the states of {name}, {p.numel()} elements on this "
                f"rank, in full: that is not a multiple of {BLOCK}; use adamw-8bit where weights are in fp32, or adamw"
            )

    def unpack(self, state: dict[str, Any], key: str) -> Parts:
        moment = state[key]
        return {"codes": moment.codes, "scale": moment.scale} if hasattr(moment, "codes") else {"values": moment}

    def pack(self, dense: Tensor, key: str, p: Tensor) -> Parts:
        return super().pack(dense, key, p) if p.numel() < SMALL else quantize(dense, self.code_book(key), p.device)

    def put(self, inner: Any, state: dict[str, Any], key: str, parts: Parts, p: Tensor) -> None:
        if "values" in parts:
            state[key] = parts["values"]
            return
        buffer = inner._new_buffer(p, key == self.moments[0])
        buffer.codes.copy_(parts["codes"].view_as(buffer.codes))
        buffer.scale.copy_(parts["scale"].view_as(buffer.scale))
        state[key] = buffer

    def code_book(self, key: str) -> Tensor:
        from torchao.optim import subclass_8bit

        signed = key == self.moments[0]
        return torch.tensor(subclass_8bit.get_qmap_signed() if signed else subclass_8bit.get_qmap_unsigned())


class BitsandbytesAdamW8bit(AdamW):
    """bitsandbytes's with 8-bit states; it rounds steps to the nearest weight."""

    package = "bitsandbytes"
    bits = 8
    moments = ("state1", "state2")

    def make(self, groups: list[Any], lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
        with no_downloaded_kernels(), quiet_torchao():
            return importlib.import_module("bitsandbytes.optim").AdamW8bit(groups, lr=lr, betas=betas)

    def count(self, steps: float, p: Tensor) -> Any:
        return int(steps)

    def unpack(self, state: dict[str, Any], key: str) -> Parts:
        scale = state.get(key.replace("state", "absmax"))
        return {"values": state[key]} if scale is None else {"codes": state[key], "scale": scale}

    def pack(self, dense: Tensor, key: str, p: Tensor) -> Parts:
        if p.numel() < SMALL:
            return super().pack(dense, key, p)
        parts = quantize(dense, self.code_book(key), p.device)
        return {**parts, "codes": parts["codes"].view(p.shape)}

    def put(self, inner: Any, state: dict[str, Any], key: str, parts: Parts, p: Tensor) -> None:
        state[key] = parts.get("values", parts.get("codes"))
        if "codes" in parts:
            book = "dynamic" if key == self.moments[0] else "udynamic"
            if not inner.name2qmap:
                inner.fill_qmap()
            inner.name2qmap[book] = inner.name2qmap[book].to(p.device)
            state[key.replace("state", "qmap")] = inner.name2qmap[book]
            state[key.replace("state", "absmax")] = parts["scale"]

    def code_book(self, key: str) -> Tensor:
        import bitsandbytes.functional as bnb

        return bnb.create_dynamic_map(signed=key == self.moments[0])

    def simulate(self, replace: Replace) -> None:
        with no_downloaded_kernels():
            from bitsandbytes.optim.optimizer import Optimizer8bit

        def fill(self: Any) -> None:
            self.name2qmap.update(dynamic=torch.empty(256), udynamic=torch.empty(256))

        replace(Optimizer8bit, "fill_qmap", fill)


OPTIMIZERS: dict[OptimizerName, tuple[type[AdamW], type[AdamW]]] = {
    "adamw": (AdamW, TorchaoAdamW),
    "adamw-8bit": (BitsandbytesAdamW8bit, BitsandbytesAdamW8bit),
    "adamw-8bit-torchao": (TorchaoAdamW8bit, TorchaoAdamW8bit),
}
"""Every `training.optimizer`, for weights in fp32 or fp64 and for those in bf16."""


def optimizer_class(name: OptimizerName, *, rounded: bool) -> type[AdamW]:
    """The class that `training.optimizer` names, for weights in bf16 (`rounded`) or not."""
    return OPTIMIZERS[name][rounded]


def state_bytes(name: OptimizerName, itemsize: int) -> int:
    """Bytes that the moments of a weight take, without the scales of blocks; `itemsize` is that of a weight."""
    kind = optimizer_class(name, rounded=itemsize < 4)
    return len(kind.moments) * (itemsize if kind.bits is None else kind.bits // 8)


def check_available(name: OptimizerName, *, rounded: bool) -> None:
    """Refuses what `check_rounding` does, and an optimizer that is not installed.

    Raises:
        ValueError: naming the fields and the remedy.
    """
    check_rounding(name, rounded=rounded)
    package = optimizer_class(name, rounded=rounded).package
    if package and importlib.util.find_spec(package) is None:
        field = f"training.optimizer={name}" + (" with model.dtype=bfloat16" if rounded else "")
        raise ValueError(
            f"{field} needs the package {package}, which is not installed: pip install 'cosup-fast[gpu]', or use "
            "training.optimizer=adamw with model.dtype=float32"
        )


def quantize(dense: Tensor, code_book: Tensor, device: torch.device) -> Parts:
    """A moment as the nearest codes (numel,) of a code book, and the scale (blocks,) of each block of `BLOCK`."""
    blocks = torch.nn.functional.pad(dense.flatten(), (0, -dense.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1).clamp(min=1e-12)
    code_book = code_book.sort().values
    middles = (code_book[1:] + code_book[:-1]) / 2
    codes = torch.bucketize((blocks / scale[:, None]).flatten()[: dense.numel()], middles).to(torch.uint8)
    return {"codes": codes.to(device), "scale": scale.to(device)}


def dequantize(parts: Parts, code_book: Tensor, shape: list[int]) -> Tensor:
    """The moment in fp32 that some codes and scales mean."""
    codes, scale = parts["codes"], parts["scale"]
    blocks = torch.nn.functional.pad(code_book[codes.flatten().int()], (0, -codes.numel() % BLOCK)).view(-1, BLOCK)
    return (blocks * scale.view(-1, 1)).flatten()[: codes.numel()].view(shape)


@contextmanager
def quiet_torchao() -> Iterator[None]:
    """Silences torchao's import, which reports kernels that it cannot load, and its own enumerations."""
    loggers = [logging.getLogger(name) for name in ("torch.utils._pytree", "torchao")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@torch.no_grad()
def _compiled_step(self: Any) -> None:
    """torchao's step, which is compiled: both moments in fp32 are all that may leave a kernel."""
    for group in self.param_groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            if not self.state[p]:
                buffers = {name: self._new_buffer(p, name == "exp_avg") for name in ("exp_avg", "exp_avg_sq")}
                self.state[p].update(step=torch.tensor(0.0), **buffers)
            moments = [torch.empty_like(p, dtype=torch.float32) for _ in range(2)]
            del moments
