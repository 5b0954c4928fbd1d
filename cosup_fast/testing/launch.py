"""A launch as observers of the interpreter see it: its arguments and their addresses, accesses, products."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import numpy as np
from torch import Tensor

from cosup_fast.errors import CosupError

REGION_BITS = 44
"""Every argument's addresses lie within 2^43 bytes of its first element."""


class OutOfBoundsError(CosupError, IndexError):
    """A kernel touched an address outside the tensor it started from, or of no tensor at all."""


@dataclass
class Region:
    """One tensor argument of a launch and the addresses it owns."""

    argument: str
    tensor: Tensor
    base: int  # address of its first element, as the kernel sees it
    strides: list[tuple[int, int, int]] = field(init=False)  # (stride, size, dimension), widest first

    def __post_init__(self) -> None:
        shape, strides = self.tensor.shape, self.tensor.stride()
        self.strides = sorted(
            ((strides[i], shape[i], i) for i in range(len(shape)) if shape[i] > 1 and strides[i] > 0), reverse=True
        )
        self.itemsize = self.tensor.element_size()
        self.virtual = self.tensor.device.type == "meta"
        self.empty = self.tensor.numel() == 0
        self.span = 0 if self.empty else 1 + sum((n - 1) * s for s, n, _ in self.strides)
        self.dense = self.span <= prod(n for _, n, _ in self.strides)  # overlapping views have no gaps either

    @property
    def storage(self) -> int:
        return self.tensor.untyped_storage().data_ptr()

    @property
    def start(self) -> int:
        """Bytes from the storage's first to this tensor's first element."""
        return int(self.tensor.storage_offset()) * self.itemsize

    def inside(self, offsets: np.ndarray, itemsize: int) -> np.ndarray:
        """Which byte offsets hold an element of the tensor; a gap between the rows of a view does not."""
        good = (offsets >= 0) & (offsets + itemsize <= self.span * self.itemsize)
        if not self.dense:
            rest = offsets // self.itemsize
            for stride, size, _ in self.strides:
                good &= rest // stride < size
                rest = rest % stride
            good &= rest == 0
        return good

    def index(self, offset: int) -> tuple[int, ...]:
        """The index at a byte offset; out of bounds its leading entry keeps counting."""
        rest, index = offset // self.itemsize, [0] * self.tensor.ndim
        for stride, _, dimension in self.strides:
            index[dimension], rest = divmod(rest, stride)
        if not self.strides and index:
            index[0] = rest
        return tuple(index)


@dataclass
class Launch:
    """A kernel, its grid and arguments."""

    kernel: str
    grid: tuple[int, int, int]
    regions: list[Region]
    program: tuple[int, int, int] = (0, 0, 0)

    @property
    def program_number(self) -> int:
        (x, y, z), (nx, ny, _) = self.program, self.grid
        return x + nx * (y + ny * z)


@dataclass
class Access:
    """The unmasked lanes of one load, store or atomic operation within one argument."""

    kind: Literal["load", "store", "atomic"]
    launch: Launch
    region: Region | None  # None: addresses of no argument
    offsets: np.ndarray  # int64 bytes from the argument's first element, one a lane
    itemsize: int
    values: np.ndarray | None = None  # what a store writes, one a lane

    def at(self, lanes: np.ndarray) -> Access:
        values = None if self.values is None else self.values[lanes]
        return Access(self.kind, self.launch, self.region, self.offsets[lanes], self.itemsize, values)


class Observer:
    """Sees what kernels do. Override what is of interest."""

    def start(self, launch: Launch) -> None:
        """Before the first program."""

    def access(self, access: Access) -> None:
        """Lanes that touch an element of the argument."""

    def out_of_bounds(self, access: Access) -> bool:
        """Lanes that do not. True: dealt with, loads read NaN or a large integer, stores are dropped."""
        return False

    def overflow(self, launch: Launch, operator: str, left: int, right: int) -> None:
        """A sum, difference or product of int32 that int32 does not hold."""

    def dot(self, launch: Launch, precision: str, flops: int) -> None:
        """A tile's product."""

    def finish(self, launch: Launch, again: Callable[[int], None]) -> None:
        """After the last program. `again(seed)` runs all once more, unobserved: backwards for 0, else shuffled."""


def here() -> str:
    """`file:line` of the kernel or device function that is running."""
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if "interpreter_semantic" in frame.f_globals and "/triton/" not in name:
            return f"{name.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def describe_out_of_bounds(access: Access) -> str:
    program, kernel = access.launch.program, access.launch.kernel
    if access.region is None:
        return f"{access.kind} by program {program} of {kernel} at an address of no argument ({here()})"
    region, offset = access.region, int(access.offsets[0])
    return (
        f"{access.kind} by program {program} of {kernel} outside {region.argument} {tuple(region.tensor.shape)}: "
        f"index {region.index(offset)}, element {offset // region.itemsize} of {region.span} ({here()})"
    )
