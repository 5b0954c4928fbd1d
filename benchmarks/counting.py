"""What does it cost exactly? Products, FLOPs, bytes and workspace of what torch runs; the same on every machine.

    products  FLOPs of matrix products / 2NMD, by the precision of their operands; formulas of torch.utils.flop_counter
    traffic   bytes that operations read and write, each operand once an operation (no cache, no fusion), and that
              Triton kernels load and store
    workspace most bytes alive at once in what operations returned, beside the gradients; the insides of an operation,
              such as a library's packed copies, are not seen

Operators that are written in Python (torch.library) are counted by what they run. Triton kernels run in the interpreter
of `cosup_fast.testing`, on CPU tensors, as for a GPU (`benchmarks.pretend`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.binaries import Binary, compiled, recorded
from benchmarks.cases import Case, Inputs
from benchmarks.check import Loss, Result, free, step
from benchmarks.providers import Provider
from cosup_fast.functional import release_workspace
from cosup_fast.testing.torch_ops import TorchOps

PRECISION = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Operations that touch only as much of their large operand as their small ones say.
PICKS = ("gather", "index_select", "index", "nll_loss_forward", "embedding")
PLACES = ("scatter_", "index_put_", "_index_put_impl_", "index_copy_")
OVERWRITES = ("copy_", "fill_", "zero_")
SHAPES_ONLY = ("nll_loss_backward", "new_", "zeros_like", "ones_like", "full_like", "empty_like")


class Counts(NamedTuple):
    """Of one forward and backward."""

    products: dict[str, float]  # by precision, in G
    traffic: int | None = None  # bytes; None where compiled code hides them
    workspace: int | None = None  # bytes; likewise
    launches: int = 0  # of Triton kernels
    atomics: int = 0  # elements updated atomically
    locks: int = 0  # atomic operations on locks

    @property
    def total(self) -> float:
        return sum(self.products.values())

    def flops(self, case: Case) -> int:
        return round(self.total * case.product)


def _bytes(t: Tensor) -> int:
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


def _traffic(name: str, args: list[Tensor], results: list[Tensor], place: list[Tensor]) -> int:
    """Bytes of one operation; `place` are outputs that the caller passed and the operation overwrites."""
    if name.startswith(("empty", "new_empty", "detach", "alias", "_local_scalar", "sym_")):
        return 0
    written = sum(_bytes(t) for t in results)
    if name.startswith(SHAPES_ONLY):
        return written
    if name in PICKS:
        small = sum(_bytes(t) for t in args[1:])
        return 2 * written + small if name != "nll_loss_forward" else 2 * small + written
    if name in PLACES:
        # The values read, and as many read and written where they go.
        return 2 * sum(_bytes(t) for t in args[1:])
    if name in OVERWRITES:
        place = args[:1]
    return written + sum(_bytes(t) for t in args) - sum(_bytes(t) for t in place)


class OperationCounter(TorchOps):
    """Counts while it is entered."""

    def __init__(self) -> None:
        super().__init__(self._count)
        self.flops: Counter[str] = Counter()
        self.traffic = self.peak = 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}  # what was there before counts as 0 bytes

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code stays compiled; the products it hands to a library are seen."""
        return True

    def _count(self, func: Any, args: tuple, kwargs: dict, run: Callable[[], Any]) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self._follow(given, new=False)
        out = run()
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        packet = func._overloadpacket
        # flop_registry knows addmm and not addmm_.
        product = getattr(torch.ops.aten, packet.__name__.removesuffix("_"), None)
        if product in flop_registry:
            operand = next(t for t in given if t.is_floating_point())
            flops = flop_registry[product](*args, **kwargs, out_val=out)
            self.flops[PRECISION.get(operand.dtype, str(operand.dtype))] += flops
        if not func.is_view:
            place = [t for t in tree_leaves([kwargs.get(a.name) for a in func._schema.arguments if a.is_out])
                     if isinstance(t, Tensor)]  # fmt: skip
            self.traffic += _traffic(packet.__name__, given, results, place)
        self._follow(results, new=True)
        return out

    def _follow(self, tensors: list[Tensor], new: bool) -> None:
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        for t in tensors:
            storage = t.untyped_storage()
            if storage._cdata not in self.alive:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes() if new else 0
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))


def count(case: Case, loss: Loss, inputs: Inputs, *, compiled: bool = False) -> tuple[Counts, Result]:
    """The costs of one forward and backward, and what it returned."""
    if compiled:
        step(loss, inputs)  # so that tracing is not counted
    free(inputs)
    release_workspace()  # or the scores' memory would be there before
    with OperationCounter() as seen:
        result = step(loss, inputs)
    products = {name: flops / case.product for name, flops in sorted(seen.flops.items())}
    if compiled:
        return Counts(products), result
    return Counts(products, seen.traffic, max(seen.peak - case.gradient_bytes, 0)), result


def count_kernels(case: Case, provider: Provider, inputs: Inputs) -> tuple[Counts, Result, list[Binary]]:
    """The same of a provider with Triton kernels, on a CPU, and what its kernels compile to."""
    from cosup_fast import testing

    free(inputs)
    with provider.pretence():
        loss = provider.make(case)
        with testing.count() as kernels, recorded() as launched, OperationCounter() as seen:
            result = step(loss, inputs)
    flops = sorted((seen.flops + kernels.dots).items())
    locks = sum(number for (_, argument), number in kernels.atomics.items() if "lock" in argument.lower())
    counts = Counts(
        {name: number / case.product for name, number in flops},
        seen.traffic + kernels.loaded.total() + kernels.stored.total(),
        max(seen.peak - case.gradient_bytes, 0),
        kernels.launches.total(),
        kernels.atomics.total() - locks,
        locks,
    )
    return counts, result, compiled(launched)
