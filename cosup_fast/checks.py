"""The operators' arguments: what they may be, and their validation.

Shapes, dtypes and devices are always checked; values only where reading them needs no synchronisation, see `readable`.
"""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from cosup_fast.distributed import Peers

Reduction = Literal["none", "mean", "sum"]
Duplicates = Literal["mask", "positive", "keep"]
Impl = Literal["auto", "reference", "stored", "fused", "rows", "recomputed"]
KeyGrad = Literal["global", "local"]
PositiveRows = Literal["rank", "group"]
_REAL = (numbers.Real, torch.SymInt, torch.SymFloat)  # NumPy's numbers, and those of a trace


class InfoNCEOptions(TypedDict, total=False):
    """The options of `functional.info_nce` but `return_stats`."""

    scale: float | Tensor
    normalize: bool
    symmetric: bool
    query_ids: Tensor | None
    key_ids: Tensor | None
    positive_ids: Tensor | None
    duplicates: Duplicates
    private_negatives: Tensor | None
    margin: float | None
    query_negatives: bool
    key_negatives: bool
    label_smoothing: float
    reduction: Reduction
    impl: Impl
    group: ProcessGroup | Peers | None
    key_grad: KeyGrad
    positive_rows: PositiveRows


class LinearCrossEntropyOptions(TypedDict, total=False):
    """The options of `functional.linear_cross_entropy` but `return_stats`."""

    bias: Tensor | None
    ignore_index: int | None
    scale: float | Tensor
    softcap: float | None
    z_loss: float
    label_smoothing: float
    reduction: Reduction
    impl: Impl


def check_tensor(
    name: str,
    value: Any,
    shape: tuple[int | None, ...] | None = None,
    like: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """A tensor of this shape (None: any size), on the device of `like`, of this dtype (None: floating)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; pass a torch.Tensor")
    if hasattr(value, "full_tensor"):
        raise TypeError(
            f"{name} is a DTensor, of which each rank holds a shard; pass {name}.full_tensor(), or compute the loss "
            "inside the module that FSDP gathers"
        )
    if not (value.is_floating_point() if dtype is None else value.dtype == dtype):
        raise TypeError(f"{name} has dtype {value.dtype}; convert it to {dtype or 'a floating dtype'}")
    fits = shape is None or (
        value.ndim == len(shape) and all(want is None or got == want for got, want in zip(value.shape, shape))
    )
    if shape is not None and not fits:
        if value.ndim != len(shape):
            raise ValueError(f"{name} has shape {tuple(value.shape)}; reshape it: it has {len(shape)} dimension(s)")
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(value.shape)}; the other arguments call for ({wanted})")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, the operands on {like.device}; move them to one device")


def check_operands(name: str, x: Any, other: str, w: Any, shape: tuple[int | None, ...] = (None, None)) -> torch.dtype:
    """Checks two factors of a product and says what they are rounded to before it, as torch.matmul under autocast."""
    check_tensor(name, x, (None, None))
    check_tensor(other, w, shape, x)
    if w.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"{other} has width {w.shape[-1]}, {name} has {x.shape[-1]}; project one of them to the other's width"
        )
    kind, wide = x.device.type, torch.float64 in (x.dtype, w.dtype)  # which autocast leaves alone
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and not wide:
        return torch.get_autocast_dtype(kind)
    if x.dtype != w.dtype:
        remedy = "convert one of them" if wide else "convert one of them, or use autocast"
        raise TypeError(f"{other} has dtype {w.dtype}, {name} has {x.dtype}; {remedy}")
    return x.dtype


def check_choice(name: str, value: Any, kind: Any) -> None:
    if value not in kind.__args__:
        raise ValueError(f"{name} is {value!r}; pass one of {', '.join(map(repr, get_args(kind)))}")


def check_number(name: str, value: Any, more: str = "") -> None:
    """A Python number: what a tensor holds would be read, and its gradient lost."""
    # Dynamo knows Python's numbers alone, which are all that it sees.
    real = (int, float) if torch.compiler.is_compiling() else _REAL
    if isinstance(value, bool) or not isinstance(value, real):
        raise TypeError(f"{name} is a {type(value).__name__}; pass a number{more}")


def check_flags(**flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; pass True or False")


def check_softcap(softcap: float | None) -> None:
    if softcap is not None:
        check_number("softcap", softcap, " or None")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}; pass a positive number, or None for no cap")


def check_common(x: Tensor, scale: Any, label_smoothing: float, reduction: str, impl: str) -> None:
    check_choice("reduction", reduction, Reduction)
    check_choice("impl", impl, Impl)
    check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; pass a number between 0 and 1")
    if isinstance(scale, Tensor):
        check_tensor("scale", scale, (), x)
        if scale.device.type != "cpu" or not readable(scale):
            return
        scale = scale.item()
    check_number("scale", scale, " or a 0-d tensor")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; pass a positive finite number (1 / temperature)")


def readable(t: Tensor) -> bool:
    """Whether t's values can be read here and now: it is neither fake, meta nor a batch of vmap's, nothing is compiled
    or captured."""
    if type(t) not in (Tensor, torch.nn.Parameter) or t.is_meta or torch.compiler.is_compiling():
        return False
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:  # traced, if by real tensors
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(t):  # pyright: ignore[reportAttributeAccessIssue]
        if torch._C._functorch.is_batchedtensor(t):  # pyright: ignore[reportAttributeAccessIssue]
            return False
        t = torch._C._functorch.get_unwrapped(t)  # pyright: ignore[reportAttributeAccessIssue]
    return not (t.is_cuda and torch.cuda.is_current_stream_capturing())


def check_in_range(name: str, index: Tensor, size: int, what: str) -> None:
    if not index.numel():
        return
    low, high = index.aminmax()
    if low < 0 or high >= size:
        wrong = index[(index < 0) | (index >= size)]
        allowed = f"every entry must be in 0..{size - 1}" if size else "there is none to choose among"
        raise ValueError(f"{name} holds {int(wrong[0])}; {allowed}{what}")


def check_info_nce(
    query: Tensor,
    keys: Tensor,
    positive: Tensor | None,
    *,
    scale: Any,
    normalize: bool,
    symmetric: bool,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    positive_ids: Tensor | None,
    duplicates: str,
    private_negatives: Tensor | None,
    margin: float | None,
    query_negatives: bool,
    key_negatives: bool,
    label_smoothing: float,
    reduction: str,
    impl: str,
    several_ranks: bool,
    key_grad: str,
    positive_rows: str,
) -> torch.dtype:
    """The arguments of `functional.info_nce`, and what the operands are rounded to; `several_ranks`: it has a group."""
    dtype = check_operands("query", query, "keys", keys)
    n, m = len(query), len(keys)
    if private_negatives is not None:
        check_operands("query", query, "private_negatives", private_negatives, (n, None, query.shape[1]))
    check_choice("duplicates", duplicates, Duplicates)
    check_choice("key_grad", key_grad, KeyGrad)
    check_choice("positive_rows", positive_rows, PositiveRows)
    check_common(query, scale, label_smoothing, reduction, impl)
    for name, ids, shape in (
        ("positive", positive, (n,)),
        ("key_ids", key_ids, (m,)),
        ("query_ids", query_ids, (n,)),
        ("positive_ids", positive_ids, (n, None)),
    ):
        if ids is not None:
            check_tensor(name, ids, shape, query, torch.int64)
            if key_ids is None and name != "positive":
                raise ValueError(
                    f"{name} is given but key_ids is None, so no key can match; pass the ids of the keys too"
                )
    given = positive is not None or positive_ids is not None
    if not given and m < n:
        raise ValueError(f"keys has {m} rows for {n} queries; pass positive, the key that answers each query")
    if symmetric and given and positive is None:
        raise ValueError("symmetric=True with positive_ids leaves open which key answers a query; pass positive too")
    check_flags(normalize=normalize, symmetric=symmetric, query_negatives=query_negatives, key_negatives=key_negatives)
    if margin is not None:
        check_number("margin", margin, " or None")
        if not -math.inf < margin < math.inf:
            raise ValueError(f"margin is {margin}; pass a finite number in the units of <q, k>, or None")
        if given and positive is None:
            raise ValueError(
                "margin is given and positive is None, so no score is the positive's; pass positive, or margin=None"
            )
    if query_negatives or key_negatives:
        name = "query_negatives" if query_negatives else "key_negatives"
        for option, on in (
            ("symmetric", symmetric), ("label_smoothing", label_smoothing > 0), ("group", several_ranks),
            ("positive_ids", positive_ids is not None), ("duplicates='positive'", duplicates == "positive"),
        ):  # fmt: skip
            if on:
                raise ValueError(f"{name} is True and so is {option}: which sum is whose is open; pass one of them")
    if several_ranks and impl == "reference":
        raise ValueError("impl is 'reference', which is of one process, and group is given; pass impl='auto'")
    if not given and key_ids is not None:
        if readable(key_ids) and key_ids.device.type == "cpu":
            check_positives(torch.arange(n), key_ids, None, m)
    elif not several_ranks or (positive is not None and positive_rows == "rank"):
        check_positives(positive, key_ids, positive_ids, m)
    return dtype


def check_positives(positive: Tensor | None, key_ids: Tensor | None, positive_ids: Tensor | None, m: int) -> None:
    """On CPU, that every query has a positive that is a candidate."""
    given = [t for t in (positive, key_ids, positive_ids) if t is not None]
    if not all(t.device.type == "cpu" and readable(t) for t in given):
        return
    if positive is not None:
        check_in_range("positive", positive, m, ", the rows of keys")
        padding = positive[:0] if key_ids is None else (key_ids[positive] < 0).nonzero()
        if len(padding):
            i = int(padding[0])
            raise ValueError(
                f"positive[{i}] is {int(positive[i])}, a key that key_ids marks as padding; leave that query out"
            )
    elif key_ids is not None and positive_ids is not None:
        present = (torch.isin(positive_ids, key_ids) & (positive_ids >= 0)).any(1)
        if not present.all():
            i = int((~present).nonzero()[0])
            raise ValueError(
                f"positive_ids[{i}] is {positive_ids[i].tolist()}, none of which is in key_ids; "
                "add a key that answers the query or leave the query out"
            )
