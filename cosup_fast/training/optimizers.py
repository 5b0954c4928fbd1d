"""One optimizer over named parameters, which steps the local shards of the weights; `adamw.py` has the kinds.

No library steps sharded tensors in 8 bits, so all of them step plain parameters that share memory with the local
shards. Masters are fp32 unless that is given up for memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cosup_fast.config.training import OptimizerName, TrainingConfig
from cosup_fast.training.adamw import SMALL, check_available, optimizer_class
from cosup_fast.training.sharding import local


class LocalOptimizer:
    """One of `adamw.OPTIMIZERS` over named parameters, some or all of them sharded.

    Args:
        named: trained parameters by name, loaded and sharded already.
        name: which one.
        lr, betas: of Adam.
        rates: learning rates of their own for what is under a module of the model, such as {"embseq": 1e-5}.
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
        self.kind = optimizer_class(name, rounded=rounded)(rounded=rounded)
        for shard_name, p in self.locals.items():
            self.kind.check_shard(shard_name, p)

        def make(names: list[str]) -> torch.optim.Optimizer:
            groups: dict[tuple[float, float], list[nn.Parameter]] = {}
            for n in names:
                decay = weight_decay if self.parameters[n].ndim >= 2 else 0.0
                scale = (rates or {}).get(n.partition(".")[0], lr) / lr
                groups.setdefault((decay, scale), []).append(self.locals[n])
            made = [{"params": ps, "weight_decay": decay, "lr_scale": scale} for (decay, scale), ps in groups.items()]
            return self.kind.make(made, lr, betas)

        stepped = [n for n, p in self.locals.items() if p.numel()]
        # Ranks draw more or fewer random numbers for their shards; what all have whole is rounded apart from these.
        whole = [n for n in stepped if self.locals[n] is self.parameters[n]]
        apart = [[n] for n in stepped] if in_backward else [whole, [n for n in stepped if n not in whole]]
        self.inner = [make(names) for names in apart if names]
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

    def step(self, seed: int | None = None) -> None:
        """Steps with the gradients that the parameters have; nothing where each took its step in the backward pass.

        Args:
            seed: of the random numbers by which bf16 weights are rounded; another one for each step, and the same on
                all ranks, whose copies of a weight would drift apart otherwise. None: torch's, as they come.
        """
        if self.in_backward:
            return
        for name, p in self.locals.items():
            gradient = self.parameters[name].grad
            p.grad = None if gradient is None else local(gradient)
        seeded = self.kind.rounded and seed is not None
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()), enabled=seeded):
            for optimizer in self.inner:
                if seeded:
                    torch.manual_seed(seed)
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
        if self.kind.bits == 8:
            for name, state in found.items():
                if self.locals[name].numel() >= SMALL:
                    moments = [self.kind.unpack(state, key).get("codes") for key in self.kind.moments]
                    assert all(x is not None and x.element_size() == 1 for x in moments), (
                        f"{name}: states are not 8-bit"
                    )
        return found

    def _stepper(self, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
        def step(p: Tensor) -> None:
            optimizer.step()
            p.grad = None

        return step


def _local_parameter(p: nn.Parameter) -> nn.Parameter:
    if not isinstance(p, DTensor):
        return p
    shard = nn.Parameter(local(p.detach()))
    assert shard.untyped_storage()._cdata == local(p).untyped_storage()._cdata
    return shard


def check_rates(model: nn.Module, config: TrainingConfig) -> None:
    """Refuses a learning rate of its own for what the model does not have, or does not train.

    Raises:
        ValueError: naming the field.
    """
    trained = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    for field, parts, reason in (
        ("embseq_lr", {"embseq", "projection"}, "Embseq is frozen (model.freeze_embseq), or Gen itself (model.shared)"),
        ("temperature_lr", {"criterion"}, "the temperature is fixed (nsp.learnable_temperature)"),
    ):
        rate = getattr(config, field)
        if rate is not None and not parts & trained:
            raise ValueError(f"training.{field}={rate} has nothing to train: {reason}; omit it")
