"""Score products whose epilogues are a softmax: exponentials and statistics of a tile, or its gradient.

Scores never reach memory. Programs are persistent: each walks over tiles, in an order that keeps operands in the cache,
and owns all that is stored of them. Never materialised: scores, fp32 anything.

Legend: N rows, M candidates, D width; tiles of (BM, BN) scores, T columns of tiles; F fields of a partial.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportOptionalOperand=false

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .logit_tile import (
    LOSSES,
    compile_case,
    logit_gradient,
    logits,
    part_of,
    positives,
    product_tile,
    scored,
    store_positive,
    store_ranks,
    store_softmax,
    store_tile,
    tile_at,
)
from .tuning import Configuration


@triton.jit
def scores_fwd_kernel(
    x, w, out, stride_out, rows, columns, positive, ranks, reference,
    N, M, D, stride_x, stride_w,
    scale, bias, softcap, target, key_ids, query_ids, positive_ids, P,
    SEVERAL: tl.constexpr, DUPLICATES_ARE_POSITIVE: tl.constexpr, SMOOTHING: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A program owns, of each of its tiles, the exponentials `out`, the partials of rows and columns, and the ranks.

    The logit of a row's one positive belongs to the tile that holds it.
    """
    BC: tl.constexpr = BN // PARTS
    tiles_m, tiles_n = tl.cdiv(N, BM), tl.cdiv(M, BN)
    for i_t in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        i_m, i_n = tile_at(i_t, tiles_m, tiles_n, GROUP)
        b_a = product_tile(x, w, i_m, i_n, N, M, D, stride_x, stride_w, BM, BN, BK, TMA, PRECISION)
        o_m = tl.cast(i_m, tl.int64) * BM + tl.arange(0, BM)
        for i_p in tl.static_range(PARTS):
            i_c = i_n * PARTS + i_p
            o_n = i_c * BC + tl.arange(0, BC)
            m_pos = positives(
                o_m, o_n, N, M, target, key_ids, query_ids, positive_ids, P, SEVERAL, DUPLICATES_ARE_POSITIVE
            )
            b_z = logits(
                part_of(b_a, i_p, PARTS), o_m, o_n, N, M, m_pos, scale, bias, softcap, key_ids, query_ids,
                DUPLICATES_ARE_POSITIVE,
            )  # fmt: skip
            if positive is not None:
                store_positive(b_z, m_pos, positive, target, o_m, i_c, N, BC)
            if ranks is not None:
                store_ranks(b_z, m_pos, ranks, reference, i_c, o_m, N, BC)
            if columns is not None:
                store_softmax(b_z, m_pos, columns, i_m, o_n, M, 0, SEVERAL, SMOOTHING)
            b_e = store_softmax(b_z, m_pos, rows, i_c, o_m, N, 1, SEVERAL, SMOOTHING)
            if out is not None:
                store_tile(out, stride_out, b_e, i_m, i_c, o_m, o_n, N, M, BM, BC, TMA)


@triton.jit
def scores_bwd_logits_kernel(
    x, w, out, stride_out, rows, columns,
    N, M, D, stride_x, stride_w,
    scale, bias, softcap, target, key_ids, query_ids, positive_ids, P,
    SEVERAL: tl.constexpr, DUPLICATES_ARE_POSITIVE: tl.constexpr, SMOOTHING: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A program owns the gradient `out` of each of its tiles, formed from the weights of its rows and columns."""
    BC: tl.constexpr = BN // PARTS
    tiles_m, tiles_n = tl.cdiv(N, BM), tl.cdiv(M, BN)
    for i_t in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        i_m, i_n = tile_at(i_t, tiles_m, tiles_n, GROUP)
        b_a = product_tile(x, w, i_m, i_n, N, M, D, stride_x, stride_w, BM, BN, BK, TMA, PRECISION)
        o_m = tl.cast(i_m, tl.int64) * BM + tl.arange(0, BM)
        for i_p in tl.static_range(PARTS):
            i_c = i_n * PARTS + i_p
            o_n = i_c * BC + tl.arange(0, BC)
            m_pos = positives(
                o_m, o_n, N, M, target, key_ids, query_ids, positive_ids, P, SEVERAL, DUPLICATES_ARE_POSITIVE
            )
            b_z = logits(
                part_of(b_a, i_p, PARTS), o_m, o_n, N, M, m_pos, scale, bias, softcap, key_ids, query_ids,
                DUPLICATES_ARE_POSITIVE,
            )  # fmt: skip
            b_d = logit_gradient(b_z, m_pos, rows, columns, o_m, o_n, N, M, softcap, SEVERAL, SMOOTHING)
            store_tile(out, stride_out, b_d, i_m, i_c, o_m, o_n, N, M, BM, BC, TMA)


@triton.jit
def positives_fwd_kernel(
    x, w, out, N, D, stride_x, stride_w, scale, bias, softcap, target, BR: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """A program owns the logits `out` (N,) of BR rows' targets."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_k = tl.arange(0, BK)
    m_r = o_r < N
    b_target = tl.load(target + o_r, mask=m_r, other=0)
    b_sum = tl.zeros((BR,), dtype=tl.float32)
    for i_k in range(0, D, BK):
        m = m_r[:, None] & (o_k < D - i_k)[None, :]
        b_x = tl.load(x + o_r[:, None] * stride_x + (i_k + o_k)[None, :], mask=m, other=0.0).to(tl.float32)
        b_w = tl.load(w + b_target[:, None] * stride_w + (i_k + o_k)[None, :], mask=m, other=0.0).to(tl.float32)
        b_sum += tl.sum(b_x * b_w, 1)
    if bias is not None:
        b_z = scored(b_sum, scale, tl.load(bias + b_target, mask=m_r, other=0.0), softcap)
    else:
        b_z = scored(b_sum, scale, None, softcap)
    tl.store(out + o_r, b_z, mask=m_r)


def _tiles(m: int, n: int, k: int, warps: int, stages: int, parts: int = 1) -> Configuration:
    return Configuration({"BM": m, "BN": n, "BK": k, "PARTS": parts, "GROUP": 8}, warps, stages)


_INTERPRETER = Configuration({"BM": 32, "BN": 32, "BK": 32, "PARTS": 2, "GROUP": 2})
_HALF = {
    "sm_80": _tiles(128, 128, 64, 8, 3),
    "sm_90": _tiles(128, 128, 64, 8, 4),
    "sm_100": _tiles(128, 128, 64, 8, 4),
    "sm_120": _tiles(128, 128, 64, 8, 2),
    "gfx942": _tiles(128, 128, 64, 8, 2),
    "interpreter": _INTERPRETER,
}
_SINGLE = {**dict.fromkeys(_HALF, _tiles(64, 64, 32, 8, 3)), "interpreter": _INTERPRETER}
_HALF_CANDIDATES = [
    _tiles(128, 128, 64, 8, 3),
    _tiles(128, 128, 64, 4, 4),
    _tiles(128, 256, 64, 8, 3),
    _tiles(256, 128, 64, 8, 3),
]
_SINGLE_CANDIDATES = [_tiles(64, 128, 32, 8, 3), _tiles(128, 64, 32, 8, 3), _tiles(64, 64, 32, 4, 3)]


def part_width(configuration: Configuration) -> int:
    """Columns that the epilogue takes at a time, and so the width of a partial."""
    return configuration.constexprs["BN"] // configuration.constexprs["PARTS"]


POSITIVES = Configuration({"BR": 16, "BK": 128})


def configurations(kernel: str, dtype: torch.dtype) -> tuple[dict[str, Configuration], list[Configuration]]:
    """Of a product kernel: those shipped, by target, and what a search tries beside them."""
    return (_HALF, _HALF_CANDIDATES) if dtype.itemsize == 2 else (_SINGLE, _SINGLE_CANDIDATES)


DESCRIPTORS = ("sm_90", "sm_100")
"""GPUs whose products load and store through tensor descriptors, where addresses allow it."""


def _cases(kernel: Any, name: str, options: set[str], target: str, dtypes: Sequence[str]) -> Iterator[dict[str, Any]]:
    def case(dtypes: Sequence[str], configuration: Configuration, tensor_cores: bool) -> dict[str, Any]:
        tma, stored = target in DESCRIPTORS, "out" in options
        types = {"x": "tensordesc<{dtype}[BM, BK]>", "w": "tensordesc<{dtype}[BN, BK]>"} if tma else {}
        if tma and stored:
            types["out"] = f"tensordesc<{{dtype}}[BM, {part_width(configuration)}]>"
        constexprs = {"TMA": tma, "PRECISION": "ieee"} | ({} if stored else {"out": None})
        return compile_case(
            kernel, name, options, configuration, [target], types, constexprs,
            dtypes=dtypes, tensor_cores=tensor_cores,
        )  # fmt: skip

    if half := [dtype for dtype in dtypes if dtype != "fp32"]:
        yield case(half, _HALF[target], True)
    if "fp32" in dtypes:
        yield case(["fp32"], _SINGLE[target], False)


def _compile_cases() -> Iterator[dict[str, Any]]:
    for target in (target for target in _HALF if target != "interpreter"):
        for loss, options in LOSSES.items():
            dtypes = ["bf16", "fp16", "fp32"] if loss in ("vocabulary", "everything") else ["bf16"]
            single = set() if "SEVERAL" in options else {"positive"}
            ranked = {"ranks", "reference"} if loss == "in-batch negatives" else set()
            if "columns" not in options:
                yield from _cases(
                    scores_fwd_kernel,
                    f"{loss}, stored",
                    (options - {"softcap"}) | single | ranked | {"out"},
                    target,
                    dtypes,
                )
            yield from _cases(scores_fwd_kernel, loss, options | single | ranked, target, dtypes)
            yield from _cases(scores_bwd_logits_kernel, loss, options | {"out"}, target, dtypes)


COMPILE_CASES = [
    *_compile_cases(),
    compile_case(
        positives_fwd_kernel,
        "",
        {"target", "bias", "softcap"},
        POSITIVES,
        list(_HALF)[:-1],
        {"out": "*fp32"},
        dtypes=["bf16", "fp32"],
    ),
]
