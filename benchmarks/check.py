"""Is it the same function? Loss and gradients against fp64, before anything is timed or counted.

    error = |ours - fp64| / |fp64|  (Frobenius)      allowed: max(2 * eager's own error, FLOOR of the dtype)

fp64 is computed from the same rounded inputs; eager is `cosup_fast.reference` in the case's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs

FLOOR = {"fp32": 2**-18, "bf16": 2**-7, "fp16": 2**-10}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Result(NamedTuple):
    loss: Tensor
    x: Tensor  # gradient of x
    w: Tensor  # gradient of w


class Errors(NamedTuple):
    loss: float
    x: float
    w: float


class Truth(NamedTuple):
    exact: Result
    eager: Errors


def step(loss: Loss, inputs: Inputs) -> Result:
    """Forward and backward into fresh gradients. A loss that has run its own backward returns without a graph."""
    x, w = inputs.x, inputs.w
    x.grad = w.grad = None
    value = loss(x.requires_grad_(), w.requires_grad_(), inputs.target)
    if value.requires_grad:
        value.backward()
    if x.grad is None or w.grad is None:
        raise ValueError(f"no gradient reaches {'x' if x.grad is None else 'w'}")
    return Result(value.detach(), x.grad, w.grad)


def errors(result: Result, exact: Result) -> Errors:
    """Relative errors; NaN or a wrong shape is infinitely wrong."""

    def error(got: Tensor, want: Tensor) -> float:
        if got.shape != want.shape:
            return float("inf")
        value = ((got.to(want.dtype) - want).norm() / want.norm()).item()
        return value if value == value else float("inf")

    return Errors(*(error(got, want) for got, want in zip(result, exact)))


def truth(case: Case, inputs: Inputs) -> Truth:
    """The exact loss and gradients, and how wrong eager is."""
    wide = Inputs(inputs.x.detach().double(), inputs.w.detach().double(), inputs.target)
    exact = step(case.eager, wide)
    eager = step(case.eager, Inputs(inputs.x.detach().clone(), inputs.w.detach().clone(), inputs.target))
    return Truth(exact, errors(eager, exact))


def refusal(case: Case, found: Errors, eager: Errors) -> str | None:
    """Why this is not the same function, or None."""
    for name, error, own in zip(("loss", "dx", "dw"), found, eager):
        allowed = max(2 * own, FLOOR[case.dtype])
        if not error <= allowed:
            return f"{name} is wrong by {error:.2g}, allowed {allowed:.2g}"
    return None


def first_line(error: BaseException) -> str:
    """What an error says in a line of a table."""
    return f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0][:300]


def free(inputs: Inputs) -> None:
    """Drops the gradients of an earlier step."""
    inputs.x.grad = inputs.w.grad = None
    if inputs.x.device.type == "cuda":
        torch.cuda.empty_cache()
