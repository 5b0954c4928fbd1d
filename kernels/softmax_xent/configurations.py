"""Tiles of the score kernels: those shipped, by GPU and by what an epilogue has to do, and the matrix they compile to.

A GPU without its own runs those of its `tuning.nearest`. They are chosen by what compiles without spills, in bf16 on
Triton 3.6 to 3.9 for sm_80, sm_90 and sm_100; none has been timed. The widest tile goes to the losses of plain
training. An epilogue with more to hold than its scores, their bias and their exponentials takes their columns in more
parts.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import torch

from ..tuning import Configuration, runs_as
from . import kernels_product as product
from . import kernels_rows as rows


def _tiles(
    m: int, n: int, k: int, warps: int, stages: int, parts: int = 1, maxnreg: int | None = None, programs: int = 1
) -> Configuration:
    return Configuration({"BM": m, "BN": n, "BK": k, "PARTS": parts, "GROUP": 8}, warps, stages, maxnreg, programs)


_INTERPRETER = {"interpreter": Configuration({"BM": 32, "BN": 32, "BK": 32, "PARTS": 2, "GROUP": 2})}
PLAIN = {
    "sm_80": _tiles(128, 128, 64, 8, 4),
    "sm_86": _tiles(128, 128, 64, 8, 3),
    "sm_90": _tiles(128, 256, 64, 8, 3, parts=4),
    "sm_100": _tiles(128, 128, 64, 8, 4),
    "sm_120": _tiles(128, 128, 64, 8, 3),
    "gfx942": _tiles(128, 128, 64, 8, 2),
    **_INTERPRETER,
}
# In four parts Triton 3.6 and 3.9 spill it.
PLAIN_GRADIENT = {**PLAIN, "sm_90": _tiles(128, 256, 64, 8, 3, parts=8)}
HEAVY = {
    "sm_80": _tiles(128, 128, 64, 8, 4, parts=4),
    "sm_86": _tiles(128, 128, 64, 8, 3, parts=4),
    "sm_90": _tiles(128, 128, 64, 8, 4, parts=4),
    # A grid of one program a multiprocessor gains nothing from registers that ptxas saves, and spills, for a second.
    "sm_100": _tiles(128, 128, 64, 8, 4, parts=4, maxnreg=255),
    "sm_120": _tiles(128, 128, 64, 8, 3, parts=4),
    "gfx942": _tiles(128, 128, 64, 8, 2, parts=4),
    **_INTERPRETER,
}
# For tcgen05 no Triton to 3.9 compiles this epilogue in parts, and in one part its tile has to be narrow.
SEVERAL_STORED = {**HEAVY, "sm_100": _tiles(128, 64, 64, 8, 4)}
SEVERAL_SYMMETRIC = {**HEAVY, "sm_100": _tiles(128, 128, 64, 8, 4, parts=8, maxnreg=255)}
SINGLE = {**dict.fromkeys(PLAIN, _tiles(64, 64, 32, 8, 3)), **_INTERPRETER}
SINGLE_SEVERAL = {**dict.fromkeys(PLAIN, _tiles(64, 64, 32, 8, 3, parts=2)), **_INTERPRETER}

_PLAIN_CANDIDATES = [
    _tiles(128, 128, 64, 8, 3, parts=2),
    _tiles(128, 128, 64, 4, 3, parts=4, programs=2),
    _tiles(128, 256, 64, 8, 3, parts=8),
    _tiles(256, 128, 64, 8, 3, parts=4),
]
_HEAVY_CANDIDATES = [
    _tiles(128, 128, 64, 8, 3, parts=2),
    _tiles(128, 64, 64, 8, 4),
    _tiles(128, 256, 64, 8, 3, parts=8),
]
_SINGLE_CANDIDATES = [_tiles(64, 128, 32, 8, 3), _tiles(128, 64, 32, 8, 3), _tiles(64, 64, 32, 4, 3)]

MERGE = Configuration({"BT": 32, "BR": 32})
WEIGHTS = Configuration({"BR": 256})
DESCRIPTORS = ("sm_90", "sm_100")
"""GPUs whose products load and store through tensor descriptors, where addresses allow it."""


def product_tiles(
    kernel: Any, dtype: torch.dtype, options: Set[str]
) -> tuple[dict[str, Configuration], list[Configuration]]:
    """Of a product whose epilogue has these arguments and flags: by target, and what a search tries beside them."""
    forward = kernel is product.scores_fwd_kernel
    if dtype.itemsize == 4:
        wide = "SEVERAL" not in options or (forward and "out" in options)
        return SINGLE if wide else SINGLE_SEVERAL, _SINGLE_CANDIDATES
    if not options & {"SEVERAL", "columns", "ranks"} and not {"SMOOTHING", "key_ids"} <= options:
        alone = not options & {"bias", "key_ids", "limit", "softcap"}
        return PLAIN_GRADIENT if alone and not forward else PLAIN, _PLAIN_CANDIDATES
    if forward and "SEVERAL" in options:
        ours = SEVERAL_STORED if "out" in options else SEVERAL_SYMMETRIC if "columns" in options else HEAVY
        return ours, _HEAVY_CANDIDATES
    return HEAVY, _HEAVY_CANDIDATES


def part_width(configuration: Configuration) -> int:
    """Columns that the epilogue takes at a time, and so the width of a partial."""
    return configuration.constexprs["BN"] // configuration.constexprs["PARTS"]


def row_tiles(target: str) -> Configuration:
    return Configuration({"BM": 16, "BN": 64} if target == "interpreter" else {"BM": 32, "BN": 128}, num_warps=8)


def stored_tiles(target: str, width: int) -> Configuration:
    """For exponentials of tiles this wide."""
    # ptxas would keep to 64 registers and spill, in fp32 with all options on.
    maxnreg = 128 if target.startswith("sm_") else None
    return Configuration({"BM": 16 if target == "interpreter" else 32, "BN": width}, num_warps=8, maxnreg=maxnreg)


def levelled_rows(target: str, width: int) -> Configuration:
    """For exponentials above their rows' positives, with partials of tiles this wide."""
    return Configuration({"BM": 16 if target == "interpreter" else 32, "BN": width}, num_warps=4)


FULL = ("sm_80", "sm_90", "sm_100")
TARGETS = (*FULL, "sm_86", "sm_89", "sm_120", "gfx942")
"""Compiled for: everything, and each loss in bf16."""
LOSSES: dict[str, set[str]] = {
    "targets alone": {"target"},
    "in-batch negatives": {"target", "key_ids", "query_ids"},
    "vocabulary": {"target", "bias", "softcap", "SMOOTHING", "smoothing", "z_loss", "count"},
    "several positives": {"target", "key_ids", "query_ids", "positive_ids", "SEVERAL"},
    "symmetric": {"target", "key_ids", "query_ids", "columns"},
    "margin": {"target", "key_ids", "query_ids", "limit"},
}
LOSSES["smoothed several positives"] = LOSSES["several positives"] | {"SMOOTHING", "smoothing", "count"}
LOSSES["everything"] = set().union(*LOSSES.values())
"""What losses are made of: arguments that are not None, and flags."""

_TYPES = {"scale": "fp32", "softcap": "fp32", "smoothing": "fp32", "z_loss": "fp32", "ranks": "*i32", "count": "*i64"}
_TYPES |= dict.fromkeys(("target", "key_ids", "query_ids", "positive_ids"), "*i32")
_TYPES |= dict.fromkeys(("stride_x", "stride_w", "stride_out", "stride_a", "stride_e", "D"), "i32:16")
_TYPES |= dict.fromkeys(("N", "M", "T", "P"), "i32")
_TYPES |= dict.fromkeys(("x", "w", "e", "out"), "*{dtype}")
_TYPES["again"] = "*i32"
_OPTIONAL = set().union(*LOSSES.values()) | {"ranks", "tops", "reference", "positive", "again", "limit"}


def _held(options: Set[str]) -> set[str]:
    """What of a loss's options exponentials can be held for."""
    return {*options, "out"} - {"softcap", "columns" if "SEVERAL" in options else ""}


def _case(
    kernel: Any, name: str, options: Set[str], configuration: Configuration, targets: Sequence[str],
    types: Mapping[str, str] | None = None, constexprs: Mapping[str, Any] | None = None, **fields: Any,
) -> dict[str, Any]:  # fmt: skip
    """A kernel with these options on; an argument without a type of its own is an fp32 pointer."""
    values: dict[str, Any] = {**configuration.constexprs, **(constexprs or {})}
    signature = {}
    for parameter in inspect.signature(kernel.fn).parameters.values():
        if parameter.name in values:
            continue
        if "constexpr" in str(parameter.annotation):
            values[parameter.name] = parameter.name in options
        elif parameter.name in _OPTIONAL and parameter.name not in options:
            values[parameter.name] = None
        else:
            signature[parameter.name] = {**_TYPES, **(types or {})}.get(parameter.name, "*fp32")
    return {
        "kernel": kernel, "name": name, "signature": signature, "constexprs": values,
        "options": configuration.options, "targets": targets, **fields,
    }  # fmt: skip


def _product_case(kernel: Any, name: str, options: Set[str], target: str, dtypes: Sequence[str]) -> dict[str, Any]:
    half = dtypes[0] != "fp32"
    shipped, _ = product_tiles(kernel, torch.bfloat16 if half else torch.float32, options)
    configuration = shipped[runs_as(target)]
    tma, stored = target in DESCRIPTORS, "out" in options
    types = {}
    if tma:
        types |= {"x": "tensordesc<{dtype}[BM, BK]>", "w": "tensordesc<{dtype}[BN, BK]>"}
    if tma and stored:
        types["out"] = f"tensordesc<{{dtype}}[BM, {part_width(configuration)}]>"
    if name.startswith("everything"):
        types["scale"] = "*fp32"
    constexprs = {"TMA": tma, "PRECISION": "ieee"} | ({} if stored else {"out": None})
    fields = {"dtypes": dtypes, "tensor_cores": half, "programs": configuration.programs}
    return _case(kernel, name, options, configuration, [target], types, constexprs, **fields)


def _product_cases(target: str) -> Iterator[dict[str, Any]]:
    """Each loss by each kernel that computes it, where `FULL` with ranks; fp16 and fp32 for two losses."""
    forward, backward = product.scores_fwd_kernel, product.scores_bwd_logits_kernel
    for loss, options in LOSSES.items():
        options = options | (set() if "SEVERAL" in options else {"positive"})
        held, back = _held(options), (options - {"positive"}) | {"out"}
        broad = target in FULL and loss in ("vocabulary", "everything")
        for dtypes in (["bf16", "fp16"], ["fp32"]) if broad else (["bf16"],):
            forms = [(f"{loss}, stored", held), (loss, options)]
            if target in FULL and "SEVERAL" not in options:
                forms += [(f"{name}, ranks", these | {"ranks", "reference"}) for name, these in forms]
            if not options & {"SEVERAL", "SMOOTHING", "columns"}:
                level = held | {"LEVEL", "reference"}
                forms += [(f"{loss}, levelled", level), (f"{loss}, levelled, ranks", level | {"ranks", "tops"})]
            for name, these in forms:
                yield _product_case(forward, name, these, target, dtypes)
            yield _product_case(backward, loss, back, target, dtypes)
        if loss == "symmetric":
            yield _product_case(backward, "symmetric, again", back | {"again"}, target, ["bf16"])


def _row_cases() -> Iterator[dict[str, Any]]:
    for loss in ("in-batch negatives", "vocabulary", "symmetric", "everything"):
        options = LOSSES[loss] | (set() if "SEVERAL" in LOSSES[loss] else {"positive"})
        for kernel, dtypes in (
            (rows.rows_fwd_kernel, ["fp32"]),
            (rows.ranks_fwd_kernel, ["fp32"]),
            (rows.rows_bwd_logits_kernel, ["bf16", "fp32"]),
        ):
            ranked = options | {"ranks", "reference"}
            yield _case(kernel, loss, ranked, row_tiles("sm_80"), FULL, dtypes=dtypes)
        held = _held(options)
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            shipped, _ = product_tiles(product.scores_fwd_kernel, dtype, held)
            widths = {target: part_width(shipped[target]) for target in FULL}
            for width in sorted(set(widths.values())):
                targets = [target for target in FULL if widths[target] == width]
                configuration = stored_tiles("sm_80", width)
                kernel, made = rows.stored_bwd_logits_kernel, f"{loss}, tiles of {width}"
                yield _case(kernel, made, held, configuration, targets, dtypes=[name])
        if "columns" in held:
            tile = Configuration({"BM": 128, "BN": 128, "HEIGHT": 128, "WIDTH": 32}, num_warps=4)
            types = {"rows": "*fp32", "columns": "*fp32", "F": "i32"}
            yield _case(rows.underflow_bwd_kernel, loss, held | {"again"}, tile, FULL, types, dtypes=["fp32"])
        yield _case(rows.merge_fwd_kernel, loss, options, MERGE, FULL, dtypes=["fp32"])
        yield _case(rows.weights_bwd_kernel, loss, options, WEIGHTS, FULL, dtypes=["fp32"])


def _levelled_cases() -> Iterator[dict[str, Any]]:
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        tiles = [product_tiles(product.scores_fwd_kernel, dtype, {"out", *more})[0] for more in ((), ("ranks",))]
        for target in FULL:
            for width in sorted({part_width(shipped[target]) for shipped in tiles}):
                yield _case(
                    rows.levelled_bwd_kernel, f"tiles of {width}", {"target", "reference"},
                    levelled_rows(target, width), [target], {"e": f"*{name}", "out": "*fp32"}, dtypes=[name],
                )  # fmt: skip


def _positive_cases() -> Iterator[dict[str, Any]]:
    for target in FULL:
        for dtypes in (["bf16", "fp16"], ["fp32"]):
            half = dtypes[0] != "fp32"
            options = {"target", "bias", "softcap", "ranks"}
            ours, _ = product_tiles(product.scores_fwd_kernel, torch.bfloat16 if half else torch.float32, options)
            tile = replace(ours[target], constexprs={k: ours[target].constexprs[k] for k in ("BM", "BN", "BK")})
            constexprs = {"TRANSPOSED": target in DESCRIPTORS, "PRECISION": "ieee"}
            kernel = product.positives_fwd_kernel
            yield _case(
                kernel, "", options, tile, [target], {"out": "*fp32"}, constexprs, dtypes=dtypes, tensor_cores=half
            )


COMPILE_CASES = [
    *(case for target in TARGETS for case in _product_cases(target)),
    *_row_cases(),
    *_levelled_cases(),
    *_positive_cases(),
]
