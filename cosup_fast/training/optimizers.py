"""AdamW over the local shards of the weights: torch's fused one, or with 8-bit states from bitsandbytes or torchao.

    optimizer             states of a weight   weights in bf16
    adamw                 8 bytes              4 bytes, torchao's, with stochastic rounding
    adamw-8bit            2 bytes, blocks 256  refused: bitsandbytes rounds to nearest
    adamw-8bit-torchao    2 bytes, blocks 256  2 bytes, with stochastic rounding

A weight of deviation 0.02 in bf16 is further from its neighbours than a step of lr 2e-5 can bridge, so rounded to
nearest most of them never move. Rounded up or down with the probability of its distance, a step is kept on average
(Gupta et al. 2015, arXiv 1502.02551). Masters are fp32 unless that is given up for memory.

8-bit states: Dettmers et al. 2022, arXiv 2110.02861. Neither library steps sharded tensors, so all of them step plain
parameters that share memory with the local shards.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cosup_fast.config.training import OptimizerName, check_rounding
from cosup_fast.environment import no_downloaded_kernels
from cosup_fast.training.sharding import local

SMALL = 4096
"""Tensors of fewer elements keep fp32 states in both libraries."""
BLOCK = 256
"""Elements that share a scale; torchao quantizes nothing whose size is no multiple of it."""


class LocalOptimizer:
    """One of the above over named parameters, some or all of them sharded.

    Args:
        named: trained parameters by name, loaded and sharded already.
        name: which one.
        lr, betas: of Adam.
        rates: learning rates of their own for what stands under a module of the model, such as {"embseq": 1e-5}.
        weight_decay: of matrices; decay would pull norms, biases and scales towards 0, not towards a simpler model.
        in_backward: step each parameter as soon as its gradient is there, and free that; one backward pass a step.

    Raises:
        ValueError: a package is missing; bf16 weights with adamw-8bit; a shard that torchao would leave unquantized.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        name: OptimizerName,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        rates: Mapping[str, float] | None = None,
        weight_decay: float = 0.0,
        in_backward: bool = False,
    ):
        self.name = name
        self.parameters = {name: p for name, p in named if p.requires_grad}
        self.locals = {name: _local_parameter(p) for name, p in self.parameters.items()}
        rounded = any(p.dtype == torch.bfloat16 for p in self.locals.values())
        check_available(name, rounded=rounded)
        for shard_name, p in self.locals.items():
            if name == "adamw-8bit-torchao" and p.numel() >= SMALL and p.numel() % BLOCK:
                raise ValueError(
                    f"training.optimizer={name} would keep the states of {shard_name}, {p.numel()} elements on this "
                    f"rank, in full: that is no multiple of {BLOCK}; use adamw-8bit where weights are in fp32, or adamw"
                )

        def make(names: list[str]) -> torch.optim.Optimizer:
            groups: dict[tuple[float, float], list[nn.Parameter]] = {}
            for n in names:
                decay = weight_decay if self.parameters[n].ndim >= 2 else 0.0
                scale = (rates or {}).get(n.partition(".")[0], lr) / lr
                groups.setdefault((decay, scale), []).append(self.locals[n])
            made = [{"params": ps, "weight_decay": decay, "lr_scale": scale} for (decay, scale), ps in groups.items()]
            return _make(name, made, lr, betas, rounded)

        stepped = [n for n, p in self.locals.items() if p.numel()]
        self.inner = [make([n]) for n in stepped] if in_backward else [make(stepped)]
        self.in_backward = in_backward
        if in_backward:
            for n, optimizer in zip(stepped, self.inner, strict=True):
                self.parameters[n].register_post_accumulate_grad_hook(self._stepper(optimizer))

    def set_lr(self, lr: float) -> None:
        """The learning rate of the steps to come; those of `rates` keep their proportion to it."""
        for optimizer in self.inner:
            for group in optimizer.param_groups:
                rate = lr * group["lr_scale"]
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def step(self) -> None:
        """Steps with the gradients that the parameters have; nothing where each took its step in the backward pass."""
        if self.in_backward:
            return
        for name, p in self.locals.items():
            gradient = self.parameters[name].grad
            p.grad = None if gradient is None else local(gradient)
        for optimizer in self.inner:
            optimizer.step()
        for name, p in self.locals.items():
            if p is not self.parameters[name]:
                p.grad = None

    def zero_grad(self) -> None:
        """Frees all gradients."""
        for p in (*self.parameters.values(), *self.locals.values()):
            p.grad = None

    def owner(self, name: str) -> torch.optim.Optimizer | None:
        """The optimizer that steps a parameter; None where this rank has no part of that."""
        p = self.locals[name]
        if not p.numel():
            return None
        return next(o for o in self.inner for group in o.param_groups if any(q is p for q in group["params"]))

    def states(self) -> dict[str, dict[str, Any]]:
        """The state of every parameter that has taken a step, by its name: what the library keeps of its shard.

        Raises:
            AssertionError: a state that is to have 8 bits has more.
        """
        found: dict[str, dict[str, Any]] = {}
        for name, p in self.locals.items():
            for optimizer in self.inner:
                if state := optimizer.state.get(p):
                    found[name] = state
        if self.name != "adamw":
            for name, state in found.items():
                if self.locals[name].numel() >= SMALL:
                    assert all(_bits(state[key]) == 8 for key in _moments(state)), f"{name}: states are not 8-bit"
        return found

    def _stepper(self, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
        def step(p: Tensor) -> None:
            optimizer.step()
            p.grad = None

        return step


def check_available(name: str, *, rounded: bool) -> None:
    """Refuses what `check_rounding` does, and an optimizer that is not installed.

    Raises:
        ValueError: naming the fields and the remedy.
    """
    check_rounding(name, rounded=rounded)
    package = {"adamw": "torchao" if rounded else "", "adamw-8bit": "bitsandbytes"}.get(name, "torchao")
    if package and importlib.util.find_spec(package) is None:
        field = f"training.optimizer={name}" + (" with model.dtype=bfloat16" if rounded else "")
        raise ValueError(
            f"{field} needs the package {package}, which is not installed: pip install 'cosup-fast[gpu]', or use "
            "training.optimizer=adamw with model.dtype=float32"
        )


@contextmanager
def quiet_torchao() -> Iterator[None]:
    """torchao tells of kernels that it cannot load, and of its own enumerations, at import."""
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


def _local_parameter(p: nn.Parameter) -> nn.Parameter:
    if not isinstance(p, DTensor):
        return p
    shard = nn.Parameter(local(p.detach()))
    assert shard.untyped_storage()._cdata == local(p).untyped_storage()._cdata
    return shard


def _make(name: str, groups: list[Any], lr: float, betas: tuple[float, float], rounded: bool) -> torch.optim.Optimizer:
    if name == "adamw" and not rounded:
        device = groups[0]["params"][0].device.type
        fused = device in ("cpu", "cuda")
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused, foreach=None if fused else False)
    with no_downloaded_kernels(), quiet_torchao():
        if name == "adamw-8bit":
            return importlib.import_module("bitsandbytes.optim").AdamW8bit(groups, lr=lr, betas=betas)
        optim: Any = importlib.import_module("torchao.optim")

        factory = optim.AdamW8bit if name == "adamw-8bit-torchao" else optim._AdamW
        return factory(groups, lr=lr, betas=betas, bf16_stochastic_round=rounded)


def _moments(state: dict[str, Any]) -> list[str]:
    return [key for key in ("exp_avg", "exp_avg_sq", "state1", "state2") if key in state]


def _bits(t: Tensor) -> int:
    codes = getattr(t, "codes", t)  # torchao's state is a tensor of codes and scales
    return 8 * codes.element_size()
