"""Value and gradients of an operator by name, in the form that `assert_close_to_fp64` compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def value_and_gradients(
    f: Callable[..., Tensor], tensors: Mapping[str, Tensor], upstream: float | Tensor = 1.7, **options: Any
) -> dict[str, Tensor]:
    """Calls f at copies of tensors: "loss", its value, and the gradient of each floating-point tensor by its name.

    Args:
        f: takes the tensors and the options by name.
        tensors: what it is called with; integers have no gradient.
        upstream: the gradient of the value; other than 1, so that one that is left out shows.
        options: arguments that are not differentiated.
    """
    copies = {name: t.detach().clone().requires_grad_(t.is_floating_point()) for name, t in tensors.items()}
    value = f(**copies, **options)
    leaves = {name: t for name, t in copies.items() if t.requires_grad}
    gradients = torch.autograd.grad((value * upstream).sum(), tuple(leaves.values()))
    assert [g.dtype for g in gradients] == [t.dtype for t in leaves.values()]
    return {"loss": value.detach(), **dict(zip(leaves, gradients))}
