"""Counts the bytes of all tensors that are alive, kind by kind, operation by operation: of fake tensors or real ones.

What an operator of this package allocates inside is told to no one by its fake implementation; `transient` adds it
while the operator runs.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

Kind = Literal["parameters", "gradients", "optimizer states", "activations", "temporary"]


@dataclass
class Peak:
    """The most bytes that were alive at once, of what, and when."""

    total: int = 0
    kinds: Counter[Kind] = field(default_factory=Counter)
    phase: str = ""


@dataclass(eq=False)
class _Block:
    size: int
    kind: Kind
    reference: Any = None


class LiveMemory(TorchDispatchMode):
    """A dispatch mode under which every new storage is counted until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.transient: Callable[[Any, tuple[Any, ...]], int] = lambda operator, arguments: 0
        """The bytes that an operator needs while it runs and does not return, given it and its arguments."""
        self.peak = Peak()
        self.phase = ""
        self.kind: Kind = "temporary"
        """Of what is made in a forward pass; what a backward pass makes is temporary."""
        self._live: Counter[Kind] = Counter()
        self._blocks: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._fakes: FakeTensorMode | None = None

    def mark(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Counts tensors, if they are not counted yet, as of a kind."""
        for storage in _storages(tensors):
            block = self._blocks.get(storage)
            if block is None:
                self._add(storage, kind)
            elif block.kind != kind:
                self._live[block.kind] -= block.size
                self._live[kind] += block.size
                block.kind = kind

    def __enter__(self) -> Any:
        self._fakes = _fakes()
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:  # which no dispatch mode sees
            result = self._resize(storage, size)
            block = self._blocks.get(storage)
            if block is not None and size:  # weights that are gathered
                self._live[block.kind] -= block.size
                self._live["temporary"] += block.size
                block.kind = "temporary"
            self._update(storage)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes back as what it does to local tensors
        if func is torch.ops._c10d_functional.wait_tensor.default and self._fakes is not None:
            return args[0]  # a fake one makes a copy
        result = func(*args, **(kwargs or {}))
        if _fakes() is not self._fakes:
            return result  # DTensor works out shapes with fake tensors of its own
        backward = torch._C._current_graph_task_id() != -1
        for storage in _storages(x for x in tree_leaves(result) if isinstance(x, Tensor)):
            if storage not in self._blocks:
                self._add(storage, "temporary" if backward else self.kind)
            else:
                self._update(storage)
        self._look(self.transient(func, args))
        return result

    def _look(self, more: int) -> None:
        total = sum(self._live.values()) + more
        if total > self.peak.total:
            self.peak = Peak(total, Counter(self._live), self.phase)
            self.peak.kinds["temporary"] += more

    def _add(self, storage: torch.UntypedStorage, kind: Kind) -> None:
        block = _Block(storage.nbytes(), kind)
        block.reference = weakref.ref(storage, lambda _: self._drop(block))
        self._blocks[storage] = block
        self._live[kind] += block.size

    def _update(self, storage: torch.UntypedStorage) -> None:
        block = self._blocks.get(storage)
        if block is not None and block.size != storage.nbytes():
            self._live[block.kind] += storage.nbytes() - block.size
            block.size = storage.nbytes()

    def _drop(self, block: _Block) -> None:
        self._live[block.kind] -= block.size


@contextmanager
def phase(memory: LiveMemory, name: str, kind: Kind) -> Iterator[None]:
    """What is made meanwhile is of this kind, and a peak is in this phase."""
    before = memory.phase, memory.kind
    memory.phase, memory.kind = name, kind
    try:
        yield
    finally:
        memory.phase, memory.kind = before


def _storages(tensors: Iterable[Tensor]) -> Iterator[torch.UntypedStorage]:
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
            yield from _storages(getattr(tensor, name) for name in names)
        else:
            yield tensor.untyped_storage()


def _fakes() -> FakeTensorMode | None:
    return next((mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, FakeTensorMode)), None)
