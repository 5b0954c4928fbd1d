"""Linear layers without gradients on x86 CPUs: oneDNN multiplies fp32 where torch would ask MKL.

torch sends fp32 products to MKL, which has no AVX-512 path on AMD and a high fixed cost for few rows on every CPU. The
same product in oneDNN, on the same weights in the same layout, costs a half to a third (benchmarks/generation.py).
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

X86 = platform.machine().lower() in ("x86_64", "amd64")
# One row against a small weight is bound by the call itself, and MKL's is the shorter one.
SMALL_WEIGHT = 1 << 18


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x w' + b for x (..., K), w (N, K) and b (N,): `torch.nn.functional.linear`, to the rounding of fp32."""
    if (
        not X86
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or x.device.type != "cpu"
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or not torch.backends.mkldnn.is_available()
        or not torch.backends.mkldnn.enabled
        or x.numel() == 0
        or (weight.numel() < SMALL_WEIGHT and x.numel() == weight.shape[1])
    ):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def plain_linears(model: nn.Module) -> list[nn.Linear]:
    """The layers that `fast_linears` takes: no subclass, which may compute something else."""
    return [module for module in model.modules() if type(module) is nn.Linear]


@contextmanager
def fast_linears(layers: Sequence[nn.Linear]) -> Iterator[None]:
    """The layers of `plain_linears` go through `linear` inside."""
    layers = [layer for layer in layers if "forward" not in layer.__dict__]
    for layer in layers:
        # An entry of the instance, past nn.Module's own bookkeeping: it comes and goes with every step.
        layer.__dict__["forward"] = lambda x, layer=layer: linear(x, layer.weight, layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]
