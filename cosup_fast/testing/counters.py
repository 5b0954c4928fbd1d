"""What a computation costs, counted exactly: products by precision, bytes by argument, atomics, launches.

    FLOP of a dot = 2 x rows x columns x depth of its tile, padding and masked lanes included: what the hardware does
    bytes         = unmasked lanes x element size, each load and store as often as it is executed

Bytes are what programs ask for, not what reaches memory: caches serve most repeated reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cosup_fast.testing.interpreter import observe
from cosup_fast.testing.launch import Access, Launch, Observer
from cosup_fast.testing.torch_ops import TorchOps

SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


@dataclass
class Counts(Observer):
    """The cost of what ran inside `count()`."""

    dots: Counter[str] = field(default_factory=Counter)
    """FLOP of the kernels' dots by precision: bf16, fp16, tf32, tf32x3, fp32 (IEEE), fp64, fp8, int8."""
    torch_products: Counter[str] = field(default_factory=Counter)
    """FLOP of torch's own products by dtype, as FlopCounterMode counts them."""
    loaded: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Bytes loaded by (kernel, argument)."""
    stored: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Bytes stored by (kernel, argument)."""
    atomics: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Elements updated atomically by (kernel, argument)."""
    launches: Counter[str] = field(default_factory=Counter)
    """Launches by kernel."""
    programs: Counter[str] = field(default_factory=Counter)
    """Programs in the grids of these launches."""

    @property
    def flops(self) -> int:
        """FLOP of all products, the kernels' and torch's."""
        return self.dots.total() + self.torch_products.total()

    def products(self, n: int, m: int, d: int) -> float:
        """All products in units of one (n, d) x (d, m) product."""
        return self.flops / (2 * n * m * d)

    def start(self, launch: Launch) -> None:
        self.launches[launch.kernel] += 1
        nx, ny, nz = launch.grid
        self.programs[launch.kernel] += nx * ny * nz

    def access(self, access: Access) -> None:
        assert access.region is not None
        key, lanes = (access.launch.kernel, access.region.argument), len(access.offsets)
        if access.kind == "atomic":
            self.atomics[key] += lanes
        else:
            (self.loaded if access.kind == "load" else self.stored)[key] += lanes * access.itemsize

    def dot(self, launch: Launch, precision: str, flops: int) -> None:
        self.dots[precision] += flops

    def _see(self, op: OpOverload, args: tuple, kwargs: dict, run: Callable[[], Any]) -> Any:
        formula = flop_registry.get(op.overloadpacket)
        out = run()
        if formula is None:
            return out
        dtype = next((t.dtype for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)), torch.float32)
        flops = int(formula(*args, **kwargs, out_val=out))
        self.torch_products[SHORT.get(dtype, str(dtype).removeprefix("torch."))] += flops
        return out

    def table(self) -> str:
        """The counts as a Markdown table, one line a figure."""
        lines = [("product", f"{name} dot", f"{flops:,} FLOP") for name, flops in sorted(self.dots.items())]
        lines += [
            ("product", f"{name} by torch", f"{flops:,} FLOP") for name, flops in sorted(self.torch_products.items())
        ]
        for what, counter, unit in (
            ("load", self.loaded, "bytes"),
            ("store", self.stored, "bytes"),
            ("atomic", self.atomics, "elements"),
        ):
            lines += [(what, f"{k}.{a}", f"{number:,} {unit}") for (k, a), number in sorted(counter.items())]
        lines += [
            ("launch", kernel, f"{number:,} x {self.programs[kernel] // number:,} programs")
            for kernel, number in sorted(self.launches.items())
        ]
        rows = [f"| {a} | {b} | {c} |" for a, b, c in lines]
        return "\n".join(["| what | where | how much |", "|---|---|--:|", *rows])


@contextmanager
def count() -> Iterator[Counts]:
    """Counts what the Triton kernels and the torch operations inside cost. Opens `interpret()`."""
    counts = Counts()
    with observe(counts), TorchOps(counts._see):
        yield counts
