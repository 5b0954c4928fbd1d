"""What is measured: a loss at a shape in a dtype, and its inputs.

    z_ij = scale <x_i, w_j>      L = mean_i (logsumexp_j z_ij - z_i,y(i))

One G is one product of N x M x D: 2 NMD FLOP. The scale is a power of two, so that who multiplies x by it beforehand
loses no precision.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cosup_fast import reference

LOSSES = {
    "info-nce": "queries against keys, y(i) = i",
    "info-nce-cosine": "the same of L2-normalised rows, normalised by the loss",
    "info-nce-symmetric": "mean of queries against keys and keys against queries, M = N",
    "linear-cross-entropy": "hidden states against an LM head, scale 1",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 16.0


class Inputs(NamedTuple):
    x: Tensor  # (N, D)
    w: Tensor  # (M, D)
    target: Tensor  # (N,) int64


@dataclass(frozen=True)
class Case:
    """One loss at one shape in one dtype."""

    loss: str
    n: int
    m: int
    d: int
    dtype: str = "fp32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r}; choose from {', '.join(LOSSES)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; choose from {', '.join(DTYPES)}")
        if min(self.n, self.m, self.d) < 1:
            raise ValueError(f"shape is {self.shape}; every size must be at least 1")
        if self.loss != "linear-cross-entropy" and self.m < self.n:
            raise ValueError(f"shape is {self.shape}; {self.loss} needs M >= N, a key for each query")
        if self.loss == "info-nce-symmetric" and self.m != self.n:
            raise ValueError(f"shape is {self.shape}; {self.loss} needs M = N")

    @property
    def shape(self) -> str:
        return f"{self.n}x{self.m}x{self.d}"

    @property
    def scale(self) -> float:
        return 1.0 if self.loss == "linear-cross-entropy" else SCALE

    @property
    def product(self) -> int:
        """FLOPs of one G."""
        return 2 * self.n * self.m * self.d

    @property
    def gradient_bytes(self) -> int:
        return (self.n + self.m) * self.d * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.loss} {self.shape} {self.dtype}"

    def inputs(self) -> Inputs:
        """Rows like those of a model in training: some positives are found, some are not.

        Each call on a device returns the same.
        """
        generator = torch.Generator(self.device).manual_seed(0)
        with torch.device(self.device):
            x, w = (torch.randn(size, self.d, generator=generator) for size in (self.n, self.m))
            if self.loss == "linear-cross-entropy":
                w /= self.d**0.5  # logits of deviation 1
                target = torch.randint(self.m, (self.n,), generator=generator)
                x += torch.empty(self.n, 1).uniform_(6, 14, generator=generator) * w[target]
            else:
                target = torch.arange(self.n)
                x, w = torch.nn.functional.normalize(x), torch.nn.functional.normalize(w)
                cosine = torch.empty(self.n, 1).uniform_(0.3, 0.7, generator=generator)
                w[: self.n] = cosine * x + (1 - cosine**2).sqrt() * w[: self.n]
        dtype = DTYPES[self.dtype]
        return Inputs(x.to(dtype), w.to(dtype), target)

    def eager(self, x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        """The definition of correct, in the dtype of its inputs."""
        if self.loss == "linear-cross-entropy":
            loss = reference.linear_cross_entropy(x, w, target)
        else:
            loss = reference.info_nce(
                x,
                w,
                scale=self.scale,
                normalize=self.loss == "info-nce-cosine",
                symmetric=self.loss == "info-nce-symmetric",
            )
        assert isinstance(loss, Tensor)
        return loss


def parse_shape(text: str) -> tuple[int, int, int]:
    """N, M, D of a text like 8192x8192x1024."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if found is None:
        raise ValueError(f"shape is {text!r}; write it as NxMxD, for example 8192x8192x1024")
    n, m, d = (int(size) for size in found.groups())
    return n, m, d
