"""A sanitizer for Triton kernels: each access is checked against what programs on a GPU may rely on.

| kind | a kernel ... |
|---|---|
| bounds | loads, stores or updates an address outside the tensor its pointer came from; gaps between rows are outside |
| overflow | adds, subtracts or multiplies int32 past 2^31 |
| race | stores an element that another program stores or loads, or two values to one element in one store |
| unwritten | loads, or torch reads, an element of a `torch.empty` tensor that nothing has written |
| order | leaves other bits when its programs run in another order |
| atomic | updates an element atomically: the order of such updates, and with it a sum's last bits, is the hardware's |

Programs run one after another here: what is checked is that no program relies on another of the same launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from cosup_fast.errors import CosupError
from cosup_fast.testing.interpreter import Programs, observe
from cosup_fast.testing.launch import Access, Launch, Observer, Region, here
from cosup_fast.testing.torch_ops import TorchOps, is_plain

KINDS = ("bounds", "overflow", "race", "unwritten", "order", "atomic")
MANY, ATOMIC = -1, -2

_FACTORIES = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}


@dataclass
class Finding:
    """One fault; further lanes and programs at the same place are counted, not listed."""

    kind: str
    kernel: str
    program: tuple[int, int, int] | None
    argument: str
    index: tuple[int, ...] | None
    message: str
    where: str
    count: int = 1

    def __str__(self) -> str:
        program = "" if self.program is None else f" program {self.program}"
        index = "" if self.index is None else f"[{', '.join(map(str, self.index))}]"
        times = "" if self.count == 1 else f", {self.count} times"
        return f"{self.kind}: {self.kernel}{program} {self.argument}{index}: {self.message} ({self.where}{times})"


class SanitizerError(CosupError, AssertionError):
    """What a sanitizer found."""

    def __init__(self, findings: list[Finding]):
        super().__init__(f"{len(findings)} faults\n" + "\n".join(map(str, findings)))
        self.findings = findings


@dataclass
class _Shadow:
    """Who touched each cell of a storage in the current launch; a cell is the smallest element stored there."""

    cell: int  # bytes
    writer: np.ndarray  # program number + 1, 0 nobody, ATOMIC
    reader: np.ndarray  # program number + 1, 0 nobody, MANY


@dataclass
class _Unwritten:
    tensor: Tensor  # holds the storage, so that its address is not given to another
    bytes: np.ndarray  # bool, one a byte


@dataclass
class Sanitizer(Observer):
    """Collects findings. `poison` and `written` tell it what it cannot see."""

    shuffles: int = 1
    findings: list[Finding] = field(default_factory=list)
    _places: dict[tuple, Finding] = field(default_factory=dict)
    _shadows: dict[int, _Shadow] = field(default_factory=dict)
    _unwritten: dict[int, _Unwritten] = field(default_factory=dict)
    _before: dict[int, tuple[Region, Tensor]] = field(default_factory=dict)

    def poison(self, tensor: Tensor) -> Tensor:
        """Marks a tensor as written by nobody, and fills it with NaN (large integers, True)."""
        storage = tensor.untyped_storage()
        entry = self._unwritten.setdefault(
            storage.data_ptr(), _Unwritten(tensor, np.zeros(storage.nbytes(), dtype=bool))
        )
        self._mark(entry, tensor, True)
        with _disable_current_modes():
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.detach().fill_(math.nan)
            else:
                tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max // 2)
        return tensor

    def written(self, tensor: Tensor) -> Tensor:
        """Marks a tensor as written, by numpy for example."""
        entry = self._unwritten.get(tensor.untyped_storage().data_ptr())
        if entry is not None:
            self._mark(entry, tensor, False)
        return tensor

    def kinds(self) -> set[str]:
        return {finding.kind for finding in self.findings}

    def table(self) -> str:
        """The findings, one a line."""
        return "\n".join(map(str, self.findings))

    # Accesses of kernels

    def start(self, launch: Launch) -> None:
        self._shadows = {}
        for storage in {r.storage for r in launch.regions if not r.virtual and not r.empty}:
            regions = [r for r in launch.regions if not r.virtual and not r.empty and r.storage == storage]
            nbytes = regions[0].tensor.untyped_storage().nbytes()
            cell = math.gcd(nbytes, *(r.itemsize for r in regions), *(r.start for r in regions))
            size = nbytes // cell
            self._shadows[storage] = _Shadow(cell, np.zeros(size, np.int64), np.zeros(size, np.int64))
        self._before = {}
        if self.shuffles:
            for region in launch.regions:
                if region.storage in self._shadows and region.storage not in self._before:
                    self._before[region.storage] = (region, _snapshot(region))

    def access(self, access: Access) -> None:
        region = access.region
        if region is None or region.virtual:
            if access.kind == "atomic":
                self._report("atomic", access, slice(None), "updated atomically")
            return
        shadow, me = self._shadows[region.storage], access.launch.program_number + 1
        cells = (access.offsets + region.start) // shadow.cell
        each = access.itemsize // shadow.cell
        if each > 1:
            cells = (cells[:, None] + np.arange(each)).reshape(-1)
        unwritten = self._unwritten.get(region.storage)
        writer = shadow.writer[cells]
        if access.kind != "store":
            if unwritten is not None:
                never = unwritten.bytes.reshape(-1, shadow.cell)[cells].any(1)
                self._report("unwritten", access, never, "read, but nothing has written it", each)
            if access.kind == "load":
                other = (writer > 0) & (writer != me)
                self._race(access, other, "loaded here, stored by", writer, each)
                reader = shadow.reader[cells]
                shadow.reader[cells] = np.where((reader == 0) | (reader == me), me, MANY)
                return
        if access.kind == "atomic":
            self._report("atomic", access, slice(None), "updated atomically")
            self._race(access, (writer > 0) & (writer != me), "updated here, stored by", writer, each)
            shadow.writer[cells] = ATOMIC
        else:
            other = (writer != 0) & (writer != me)
            self._race(access, other, "stored here, and by", writer, each)
            reader = shadow.reader[cells]
            other = (reader != 0) & (reader != me)
            self._race(access, other, "stored here, loaded by", reader, each)
            self._two_values(access)
            shadow.writer[cells] = me
        if unwritten is not None:
            unwritten.bytes.reshape(-1, shadow.cell)[cells] = False

    def _race(self, access: Access, lanes: np.ndarray, what: str, programs: np.ndarray, each: int) -> None:
        if lanes.any():
            number = int(programs[lanes][0])
            (nx, ny, _), i = access.launch.grid, number - 1
            program = (i % nx, i // nx % ny, i // (nx * ny))
            who = {MANY: "several programs", ATOMIC: "others atomically"}.get(number, f"program {program}")
            self._report("race", access, lanes, f"{what} {who}", each)

    def _two_values(self, access: Access) -> None:
        assert access.values is not None
        if (np.diff(access.offsets) > 0).all():
            return
        order = np.argsort(access.offsets, kind="stable")
        offsets, values = access.offsets[order], access.values[order]
        same = offsets[1:] == offsets[:-1]
        if same.any():
            bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
            lanes = np.zeros(len(offsets), dtype=bool)
            lanes[order[1:][same & (bits[1:] != bits[:-1])]] = True
            self._report("race", access, lanes, "two lanes of one store bring different values")

    def out_of_bounds(self, access: Access) -> bool:
        region = access.region
        if region is None:
            message = f"{access.kind} at an address of no argument"
        else:
            element = int(access.offsets[0]) // region.itemsize
            message = f"{access.kind} outside shape {tuple(region.tensor.shape)}, element {element} of {region.span}"
        self._report("bounds", access, slice(None), message)
        return True

    def overflow(self, launch: Launch, operator: str, left: int, right: int) -> None:
        message = f"{left} {operator} {right} does not fit int32; take offsets in int64"
        self._add(Finding("overflow", launch.kernel, launch.program, "", None, message, here()), 1)

    def finish(self, launch: Launch, again: Callable[[int], None]) -> None:
        if not self._before or math.prod(launch.grid) == 1:
            return
        with _disable_current_modes():
            after = {storage: _snapshot(region) for storage, (region, _) in self._before.items()}
            for seed in range(self.shuffles):
                self._restore({storage: before for storage, (_, before) in self._before.items()})
                again(seed)
                for storage, (region, _) in self._before.items():
                    different = (_bytes(region) != after[storage]).nonzero()
                    if len(different):
                        index = region.index(int(different[0]) - region.start)
                        message = "other bits when the programs run in another order"
                        self._add(
                            Finding("order", launch.kernel, None, region.argument, index, message, f"order {seed}"), 1
                        )
            self._restore(after)

    def _restore(self, contents: dict[int, Tensor]) -> None:
        for storage, content in contents.items():
            _bytes(self._before[storage][0]).copy_(content)

    def _report(self, kind: str, access: Access, lanes: Any, message: str, each: int = 1) -> None:
        """Files the first of the marked lanes; `each` marks belong to one lane."""
        if each > 1 and not isinstance(lanes, slice):
            lanes = lanes.reshape(-1, each).any(1)
        offsets = access.offsets[lanes]
        if not len(offsets):
            return
        region = access.region
        argument, index = ("?", None) if region is None else (region.argument, region.index(int(offsets[0])))
        finding = Finding(kind, access.launch.kernel, access.launch.program, argument, index, message, here())
        self._add(finding, len(offsets))

    def _add(self, finding: Finding, lanes: int) -> None:
        where = "" if finding.kind == "order" else finding.where
        place = (finding.kind, finding.kernel, finding.argument, where)
        if place in self._places:
            self._places[place].count += lanes
        else:
            finding.count = lanes
            self._places[place] = finding
            self.findings.append(finding)

    # Operations of torch

    def _see(self, op: OpOverload, args: tuple, kwargs: dict, run: Callable[[], Any]) -> Any:
        if op.overloadpacket in _FACTORIES:
            out = run()
            if is_plain(out) and out.layout == torch.strided and out.numel() and not out.is_quantized:
                self.poison(out)
            return out
        if not self._unwritten:
            return run()
        name = op.overloadpacket._qualified_op_name
        fresh = name.endswith("_like") or "::new_" in name
        stored = []
        for i, argument in enumerate(op._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            tensors = [t for t in tree_leaves(value) if is_plain(t)]
            if argument.alias_info is not None:
                stored += tensors if argument.alias_info.is_write else []
            elif not fresh:
                for tensor in tensors:
                    self._read(name, argument.name, tensor)
        out = run()
        for tensor in stored:
            self.written(tensor)
        return out

    def _read(self, op: str, argument: str, tensor: Tensor) -> None:
        entry = self._unwritten.get(tensor.untyped_storage().data_ptr())
        if entry is None or tensor.numel() == 0:
            return
        never = _elements(entry, tensor).any(-1)
        if never.any():
            index = tuple(int(i) for i in np.argwhere(never)[0])
            message = "read by torch, but nothing has written it"
            self._add(Finding("unwritten", op, None, argument, index, message, "torch"), int(never.sum()))

    def _mark(self, entry: _Unwritten, tensor: Tensor, value: bool) -> None:
        if tensor.numel():
            _elements(entry, tensor)[...] = value


def _elements(entry: _Unwritten, tensor: Tensor) -> np.ndarray:
    """The marks of a tensor's elements: its shape, then one a byte."""
    size = tensor.element_size()
    return np.lib.stride_tricks.as_strided(
        entry.bytes[tensor.storage_offset() * size :], (*tensor.shape, size), (*(s * size for s in tensor.stride()), 1)
    )


def _bytes(region: Region) -> Tensor:
    """All bytes of the storage behind an argument, without copying them."""
    return torch.empty(0, dtype=torch.uint8).set_(region.tensor.untyped_storage())  # pyright: ignore


def _snapshot(region: Region) -> Tensor:
    with _disable_current_modes():
        return _bytes(region).clone()


@contextmanager
def sanitize(
    *,
    allow: Collection[str] = (),
    shuffles: int = 1,
    programs: Programs = "all",
    check: bool = True,
) -> Iterator[Sanitizer]:
    """Checks the Triton kernels launched inside, and reads of tensors that `torch.empty` made inside.

    Raises `SanitizerError` at the end if it found anything but the allowed kinds. Opens `interpret()`.

    Args:
        allow: kinds of findings that are listed but no error, such as "atomic".
        shuffles: how often a launch is run again to compare bits: first backwards, then in random orders.
        programs: which programs run; see `interpret`.
        check: False only collects.
    """
    unknown = set(allow) - set(KINDS)
    if unknown:
        raise ValueError(f"allow holds {sorted(unknown)}; kinds are {', '.join(KINDS)}")
    sanitizer = Sanitizer(shuffles)
    try:
        with observe(sanitizer, programs=programs), TorchOps(sanitizer._see):
            yield sanitizer
    except Exception as error:
        if sanitizer.findings:
            error.add_note(f"found before:\n{sanitizer.table()}")
        raise
    faults = [finding for finding in sanitizer.findings if finding.kind not in allow]
    if check and faults:
        raise SanitizerError(faults)
