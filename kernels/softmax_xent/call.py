"""A call of the loss operator: its arguments, its results, and whose keys they are about, each under a name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor

from .engine import Merge
from .scores import Gradients, Needs, Softmax


class Call(NamedTuple):
    """A loss and all that it is asked: the arguments of the operator, by name and in its order.

    For fields of the scores see `Scores`.
    """

    x: Tensor  # (N, D), N > 0 in one process
    w: Tensor  # (M, D)
    scale: Tensor | None = None  # instead of fixed_scale
    bias: Tensor | None = None
    private: Tensor | None = None
    target: Tensor | None = None
    query_ids: Tensor | None = None
    key_ids: Tensor | None = None
    positive_ids: Tensor | None = None
    limit: Tensor | None = None
    fixed_scale: float = 1.0
    normalize: bool = False
    product_dtype: torch.dtype = torch.float32  # what x, w and private are rounded to before they are multiplied
    reduction: str = "mean"
    ranks: bool = False  # also return lse, positive logit, rank and top-1 of each row
    duplicates_are_positive: bool = False
    symmetric: bool = False
    margin: float | None = None  # keys whose <x, w> is above the target's less this are no candidates
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ignoring: bool = False  # a negative target means a row without loss
    checked: bool = False  # targets are known to be rows of w
    impl: str = "auto"
    needs: Sequence[bool] = (False,) * 5  # which operands want a gradient

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return self.x, self.w, self.scale, self.bias, self.private

    @property
    def at_once(self) -> bool:
        """Whether the weights of the rows are known in the forward pass."""
        return self.reduction != "none"

    @classmethod
    def schema(cls) -> str:
        """The arguments of an operator, for torch.library."""
        return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(cls).items())


_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    bool: "bool",
    torch.dtype: "ScalarType",
    str: "str",
    Sequence[bool]: "bool[]",
}


class ByRow(NamedTuple):
    """Statistics of each row, without gradient."""

    lse: Tensor | None = None
    positive_logit: Tensor | None = None
    rank: Tensor | None = None
    top1: Tensor | None = None


class Results(NamedTuple):
    """What the operator returns: one list of tensors in this order, empty ones where there is None."""

    loss: Tensor
    by_row: ByRow
    grads: Gradients
    rows: Softmax  # what backward needs where it computes the scores again
    columns: Softmax

    def flat(self) -> list[Tensor]:
        tensors = [self.loss, *self.by_row, *self.grads, *self.rows, *self.columns]
        return [self.loss.new_empty(0, dtype=torch.float32) if t is None else t for t in tensors]

    @classmethod
    def of(cls, flat: Sequence[Tensor]) -> Results:
        loss, *rest = flat
        parts = []
        for kind in (ByRow, Gradients, Softmax, Softmax):
            parts.append(kind._make(rest[: len(kind._fields)]))
            rest = rest[len(kind._fields) :]
        return cls(loss, *parts)


NOTHING = Softmax(*[None] * len(Softmax._fields))  # pyright: ignore[reportArgumentType]


class Pool:
    """Where keys come from and where their gradients go: here they are those of one process.

    `cosup_fast.distributed.info_nce.Pool` shares those of several.
    """

    merge: Merge | None = None
    """Completes the statistics of columns."""

    def needs(self, needs: Needs) -> Needs:
        """What this process has to compute, given what its own operands want."""
        return needs

    def wanted(self, needs: Needs) -> bool:
        """Whether anybody wants a gradient."""
        return any(needs)

    def gather(self, keys: Tensor) -> Tensor:
        """All keys (M, D), given this process's."""
        return keys

    def sizes(self, n: int, m: int) -> tuple[int, int]:
        """Queries and keys of all, given those of this process."""
        return n, m

    def sum(self, h: Tensor) -> Tensor:
        """Weights of columns, summed over all."""
        return h

    def give(self, dw: Tensor) -> Tensor:
        """The gradient of this process's keys, given that of all keys from this process's queries."""
        return dw


LOCAL = Pool()
