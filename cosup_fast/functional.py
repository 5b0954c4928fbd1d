"""The operators: check the arguments, choose an implementation.

`impl="stored"` is the chunked engine of `kernels/softmax_xent/engine.py`: any device, the N x M scores never
materialised, loss and gradients formed together in the forward pass. `impl="fused"`, `impl="rows"` and
`impl="recomputed"` are its Triton kernels for a GPU. `impl="reference"` is `cosup_fast.reference`, which materialises
every score and can be differentiated twice or in forward mode. `impl="auto"` is `stored`, and on a CUDA device the
least expensive of all but the reference by the cost model of `kernels/softmax_xent/dispatch.py`. An implementation
that is asked for by name is the one that runs, or a `ValueError` that says why it cannot. `explain` says what a loss
costs and which implementation runs.

Losses and statistics are fp32 (fp64 for fp64 inputs), gradients have their input's dtype. Under autocast the
operands of products are cast as `torch.matmul` casts them. Shapes, dtypes and devices are always checked; values
(an index out of range, a query without an answer) only where reading them needs no synchronisation: on CPU
tensors outside torch.compile. COSUP_CHECK_TARGETS=1 turns an index out of range into a device assertion everywhere.

The losses are differentiated in reverse mode, once, also by torch.func.grad and vjp; forward mode, second derivatives
and vmap are errors that name impl="reference".
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import torch
from torch import Tensor

from cosup_fast import reference
from cosup_fast.checks import (
    Duplicates,
    Impl,
    InfoNCEOptions,
    KeyGrad,
    LinearCrossEntropyOptions,
    PositiveRows,
    Reduction,
    check_common,
    check_in_range,
    check_info_nce,
    check_number,
    check_operands,
    check_positives,
    check_softcap,
    check_tensor,
    readable,
)
from cosup_fast.explain import explain
from cosup_fast.kernels.last_hidden import op as last_hidden
from cosup_fast.kernels.numerics import accumulator
from cosup_fast.kernels.softmax_xent.joint import joint_softmax_xent
from cosup_fast.kernels.softmax_xent.op import softmax_xent
from cosup_fast.kernels.workspace import release_workspace
from cosup_fast.reference import Stats

__all__ = ["explain", "gather_last_hidden", "info_nce", "linear_cross_entropy", "release_workspace"]

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from cosup_fast.distributed import Peers


@overload
def info_nce(
    query: Tensor,
    keys: Tensor,
    positive: Tensor | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[InfoNCEOptions],
) -> Tensor: ...
@overload
def info_nce(
    query: Tensor,
    keys: Tensor,
    positive: Tensor | None = None,
    *,
    return_stats: Literal[True],
    **options: Unpack[InfoNCEOptions],
) -> tuple[Tensor, Stats]: ...
@overload
def info_nce(
    query: Tensor,
    keys: Tensor,
    positive: Tensor | None = None,
    *,
    return_stats: bool,
    **options: Unpack[InfoNCEOptions],
) -> Tensor | tuple[Tensor, Stats]: ...
def info_nce(
    query: Tensor,  # (N, D)
    keys: Tensor,  # (M, D)
    positive: Tensor | None = None,  # (N,)
    *,
    scale: float | Tensor = 1.0,
    normalize: bool = False,
    symmetric: bool = False,
    query_ids: Tensor | None = None,  # (N,)
    key_ids: Tensor | None = None,  # (M,)
    positive_ids: Tensor | None = None,  # (N, P)
    duplicates: Duplicates = "mask",
    private_negatives: Tensor | None = None,  # (N, K, D)
    margin: float | None = None,
    query_negatives: bool = False,
    key_negatives: bool = False,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    return_stats: bool = False,
    impl: Impl = "auto",
    group: ProcessGroup | Peers | None = None,
    key_grad: KeyGrad = "global",
    positive_rows: PositiveRows = "rank",
) -> Tensor | tuple[Tensor, Stats]:
    """InfoNCE of queries against keys, every key a candidate of every query.

        z_ij = scale <q_i, k_j>        L_i = log sum_{j in C_i} exp(z_ij) - log sum_{j in P_i} exp(z_ij)

    C_i are the candidates of query i, P_i its positives. Label smoothing e turns L_i into
    (1 - e) L_i + e (lse_i - mean_{C_i} z_ij).

    Args:
        query: (N, D) floating.
        keys: (M, D), dtype and device of query. M may exceed N: the others are negatives of every query.
        positive: (N,) int64, which key answers each query; 0..N-1 (needs M >= N) unless this or
            positive_ids is given.
        scale: 1 / temperature, a number > 0 or a 0-d tensor, which receives its gradient.
        normalize: L2-normalise query, keys and private_negatives first. A vector no longer than 1e-12 becomes 0 and
            receives no gradient.
        symmetric: L_i = (L_i + Lcol_i) / 2, where Lcol_i is the loss of key positive[i] over all queries by the same
            candidates and positives, transposed. A key that answers no query has none; one that answers several is
            counted once a query and has them all as positives. Private negatives take no part in Lcol.
        query_ids: (N,) int64, the id of the passage that answers each query, key_ids[positive] by default. Needs
            key_ids.
        key_ids: (M,) int64. A negative id marks padding: never a candidate, but multiplied, so it must be finite.
        positive_ids: (N, P) int64, negative for padding: every key of one of these ids is a positive, besides
            `positive` if that is given. Needs key_ids.
        duplicates: what a key other than positive[i] is whose id is query_ids[i]: "mask" no candidate, "positive" one
            more positive, "keep" a negative.
        private_negatives: (N, K, D), dtype and device of query: further negatives, each of one query only.
        margin: false negatives by their score: a key, or private negative, of <q_i, k_j> above the positive's less this
            is not a candidate. 0.1 keeps keys that score at least 0.1 below `positive`, -0.1 all but those that score
            more than 0.1 above it. In the units of <q, k>, before the scale; needs positive.
        query_negatives: joint denominators: scores of a query against the other queries join the sum of its candidates,
            but for queries of the same answer (query_ids).
        key_negatives: so do the scores of the key that answers it against the other keys, but for those of its id.
            Both need positive, one process, and the plain loss: neither symmetric, label_smoothing, positive_ids nor
            duplicates="positive". `Stats.lse` is of the joint sum; ranks are among keys. 4 products a block of scores.
        label_smoothing: in [0, 1].
        reduction: "mean" over queries, "sum", or "none": (N,).
        return_stats: also return `Stats` of each query (of rows, also where symmetric).
        impl: see the module; "reference" is of one process.
        group: a process group, or `distributed.Peers` with a timeout: the keys and ids of all its ranks are the
            candidates of every query. Every rank calls this, with queries and keys of its own, however many (none is
            (0, D)); `positive` counts this rank's keys, `Stats.top1` those of all ranks, in rank order. The loss is
            this rank's share: the shares add up to the loss of the whole batch, "mean" is over all ranks' queries;
            "none" gives the losses of this rank's queries.
            Gradients of shared parameters are to be SUMMED over ranks: see `cosup_fast.distributed`.
        key_grad: "global", each key has its gradient from the queries of all ranks; "local", from those of its own rank
            alone, as in the published code.
        positive_rows: with a group, what `positive` counts: "rank", this rank's keys; "group", those of all ranks in
            rank order, so that the key that answers a query may be another rank's.

    Returns:
        The loss, or (loss, Stats). With N = 0 the loss is 0 (or empty) and every gradient is 0.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype; operands of different dtypes outside autocast.
        ValueError: shapes or devices that do not fit; M < N without positive; ids without key_ids; symmetric with
            positive_ids but without positive, which leaves open which key answers a query; an option out of its
            range, or not the same on every rank; on CPU also an index out of range, a query whose positives are all
            padding or absent, or one to which a margin leaves no other candidate. Elsewhere, and under torch.compile, a
            query without an answer has an infinite loss, one whose index is out of range NaN (every query, if
            symmetric), in the loss and in its gradient, and one without another candidate 0. What is wrong on one rank
            is raised on all.
        PeerError: another rank did not come in time, or was lost; the message names it.

    Sources: van den Oord et al. 2018, arXiv 1807.03748, equation 4; as next sequence prediction Lee et al. 2024,
    arXiv 2403.09024, section 3. With normalize and scale = 20 it is the MultipleNegativesRankingLoss of
    sentence-transformers. The margin of false negatives: Zhang et al. 2025 (Qwen3 Embedding), arXiv 2506.05176,
    section 3.1, where it is -0.1.
    """
    peers = None
    if group is not None:
        from cosup_fast.distributed import Peers
        from cosup_fast.distributed.info_nce import info_nce as across_ranks

        peers = Peers.of(group)
    with nullcontext() if peers is None else peers.reporting("info_nce"):
        dtype = check_info_nce(
            query, keys, positive, scale=scale, normalize=normalize, symmetric=symmetric, query_ids=query_ids,
            key_ids=key_ids, positive_ids=positive_ids, duplicates=duplicates, private_negatives=private_negatives,
            margin=margin, query_negatives=query_negatives, key_negatives=key_negatives,
            label_smoothing=label_smoothing, reduction=reduction, impl=impl, several_ranks=peers is not None,
            key_grad=key_grad, positive_rows=positive_rows,
        )  # fmt: skip
    n = len(query)
    if positive is None and positive_ids is None:
        positive, positive_rows = torch.arange(n, device=query.device), "rank"
    elsewhere = peers is not None and positive_rows == "group"
    options = {"scale": scale, "normalize": normalize, "symmetric": symmetric, "positive_ids": positive_ids}
    options |= {"margin": margin, "label_smoothing": label_smoothing, "reduction": reduction}
    if n == 0 and peers is None:
        loss, stats = _nothing((query, keys, scale, private_negatives), reduction)
    elif impl == "reference":
        ids = {"query_ids": query_ids, "key_ids": key_ids, "duplicates": duplicates}
        options |= {"private_negatives": private_negatives, "return_stats": return_stats}
        options |= {"query_negatives": query_negatives, "key_negatives": key_negatives}
        return reference.info_nce(query, keys, positive, **ids, **options)
    elif query_negatives or key_negatives:
        assert positive is not None
        loss, *stats = joint_softmax_xent(
            query, keys, target=positive, queries=query_negatives, keys=key_negatives,
            unit=reference.unit if normalize else None, answers=query_ids, key_ids=key_ids,
            query_ids=None if duplicates == "keep" or key_ids is None else _answers(query_ids, key_ids, positive),
            scale=scale, product_dtype=dtype, private=private_negatives, ranks=return_stats,
            checked=readable(query) and query.device.type == "cpu", impl=impl, margin=margin, reduction=reduction,
        )  # fmt: skip
    else:
        checked = readable(query) and query.device.type == "cpu"
        if key_ids is not None and positive is not None and not elsewhere:
            query_ids = _answers(query_ids, key_ids, positive)
        options |= {
            "private": private_negatives,
            "product_dtype": dtype,
            "ranks": return_stats,
            "query_ids": None if duplicates == "keep" else query_ids,
            "duplicates_are_positive": duplicates == "positive",
            "impl": impl,
        }
        if peers is None:
            loss, *stats = softmax_xent(query, keys, target=positive, key_ids=key_ids, checked=checked, **options)
        else:
            loss, *stats = across_ranks(
                peers,
                query,
                keys,
                target=positive,
                key_ids=key_ids,
                key_grad=key_grad,
                elsewhere=elsewhere,
                keep_duplicates=duplicates == "keep",
                check=check_positives,
                **options,
            )
    return (loss, Stats(*stats)) if return_stats else loss


def _answers(query_ids: Tensor | None, key_ids: Tensor, positive: Tensor) -> Tensor:
    """The ids of the keys that answer, where they are not given; of no matter which key where one is out of range."""
    return key_ids[positive.clamp(0, len(key_ids) - 1)] if query_ids is None else query_ids


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[LinearCrossEntropyOptions],
) -> Tensor: ...
@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    return_stats: Literal[True],
    **options: Unpack[LinearCrossEntropyOptions],
) -> tuple[Tensor, Stats]: ...
@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    return_stats: bool,
    **options: Unpack[LinearCrossEntropyOptions],
) -> Tensor | tuple[Tensor, Stats]: ...
def linear_cross_entropy(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (T,)
    *,
    bias: Tensor | None = None,  # (V,)
    ignore_index: int | None = -100,
    scale: float | Tensor = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    return_stats: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Stats]:
    """Cross-entropy of the next token without the logits.

        a_tv = scale <h_t, w_v> + b_v      z = softcap tanh(a / softcap)      L_t = lse_t - z_t,y(t) + z_loss lse_t^2

    Label smoothing e replaces lse_t - z_t,y(t) by (1 - e) of it + e (lse_t - mean_v z_tv).

    Args:
        hidden: (T, D) floating.
        weight: (V, D), dtype and device of hidden.
        target: (T,) int64; target[t] is the label of hidden[t], already shifted.
        bias: (V,) floating, or None. A token of bias -inf is not a candidate: label smoothing passes it over too.
        ignore_index: a row of this target is not supervised: it has no loss and no gradient and enters no product.
            Supervised rows are gathered first, which on an accelerator waits for target; under torch.compile, CUDA
            graph capture and fake tensors every row is computed and the losses of the others are dropped, so they must
            hold finite numbers. None: every row is supervised, and nothing is gathered or waited for.
        scale: a number > 0 or a 0-d tensor, which receives its gradient.
        softcap: bound of |z|, > 0, or None.
        z_loss: weight of lse^2, >= 0.
        label_smoothing: in [0, 1].
        reduction: "mean" over supervised rows, "sum", or "none": (T,) with 0 at ignored rows.
        return_stats: also return `Stats` of each row; lse and positive_logit are 0, rank and top1 -1 at ignored rows.
        impl: see the module.

    Returns:
        The loss, or (loss, Stats). If every row is ignored the loss is 0 and every gradient is 0.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype; operands of different dtypes outside autocast.
        ValueError: shapes or devices that do not fit; an option out of its range; on CPU also a supervised target
            outside 0..V-1. Elsewhere, and under torch.compile, its loss and gradient are NaN.

    Sources: next token prediction of Lee et al. 2024, arXiv 2403.09024, section 3; z_loss of Chowdhery et al. 2022,
    arXiv 2204.02311, section 5; softcap of the Gemma 2 report, arXiv 2408.00118, section 2.
    """
    dtype = check_operands("hidden", hidden, "weight", weight)
    t, v = len(hidden), len(weight)
    check_tensor("target", target, (t,), hidden, torch.int64)
    check_common(hidden, scale, label_smoothing, reduction, impl)
    if v == 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, no token to predict; pass the LM head's (V, D) weight"
        )
    if bias is not None:
        check_tensor("bias", bias, (v,), hidden)
    check_softcap(softcap)
    check_number("z_loss", z_loss)
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss is {z_loss}; pass a number >= 0")
    supervised = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    if readable(target) and target.device.type == "cpu":
        check_in_range("target", target[supervised], v, f" or ignore_index ({ignore_index})")
    options = {"bias": bias, "scale": scale, "softcap": softcap, "z_loss": z_loss}
    options |= {"label_smoothing": label_smoothing, "reduction": reduction}
    if impl == "reference":
        return reference.linear_cross_entropy(
            hidden,
            weight,
            target,
            ignore_index=-100 if ignore_index is None else ignore_index,
            return_stats=return_stats,
            **options,
        )
    gather = readable(target) and ignore_index is not None
    if gather:
        rows = supervised.nonzero().squeeze(1)
        hidden, target = hidden.index_select(0, rows), target[rows]
    else:
        # Neither a wrong target nor an ignored one is the other.
        rows, target = None, target.where(target >= 0, v).where(supervised, -1)
    if len(hidden) == 0:
        loss, stats = _nothing((hidden, weight, scale, bias), reduction)
    else:
        loss, *stats = softmax_xent(
            hidden,
            weight,
            product_dtype=dtype,
            ranks=return_stats,
            target=target,
            ignoring=not gather and ignore_index is not None,
            checked=readable(target) and target.device.type == "cpu",
            impl=impl,
            **options,
        )
    if rows is not None and reduction == "none":
        loss = _scatter(loss, rows, t, 0)
    if not return_stats:
        return loss
    blanks = (0, 0, -1, -1)
    if rows is not None:
        return loss, Stats(*(_scatter(s, rows, t, blank) for s, blank in zip(stats, blanks)))
    return loss, Stats(*(s.where(supervised, blank) for s, blank in zip(stats, blanks)))


def gather_last_hidden(
    hidden: Tensor,  # (..., D)
    rows: Tensor,  # (R,)
    *,
    norm_weight: Tensor | None = None,  # (D,)
    eps: float = 1e-6,
    normalize: bool = False,
) -> Tensor:
    """Embeddings from hidden states: rows gathered, RMS-normalised if norm_weight is given, L2-normalised if asked.

        x_r = hidden[rows_r]        h = x rsqrt(mean(x^2) + eps) norm_weight        y = h / |h|

    Only the gathered rows are normalised; backward writes the dense gradient of hidden once.

    Args:
        hidden: (..., D) floating; rows count over its flattened leading dimensions: b * S + s in a (B, S, D) batch.
        rows: (R,) int64, in any order, repetitions allowed.
        norm_weight: (D,) floating, the weight of the model's final RMSNorm where hidden is what precedes it.
        eps: of the RMSNorm, >= 0.
        normalize: divide by the L2 norm; a vector no longer than 1e-12 becomes 0 and receives no gradient.

    Returns:
        (R, D) in hidden's dtype, computed in fp32 (fp64 for fp64) and rounded once.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: shapes or devices that do not fit; eps < 0; on CPU also a row out of range.

    Source: query and sequence embeddings of Lee et al. 2024, arXiv 2403.09024, section 3.
    """
    check_tensor("hidden", hidden)
    if hidden.ndim < 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; pass (..., D) with at least one leading dimension")
    hidden = hidden.flatten(0, -2)
    check_tensor("rows", rows, (None,), hidden, torch.int64)
    if readable(rows) and rows.device.type == "cpu":
        check_in_range("rows", rows, len(hidden), ", the flattened leading dimensions of hidden")
    if norm_weight is not None:
        check_tensor("norm_weight", norm_weight, (hidden.shape[1],), hidden)
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; pass a number >= 0")
    return last_hidden.gather_last_hidden(hidden, rows, norm_weight, eps, normalize)


def _nothing(inputs: tuple[Any, ...], reduction: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss of no rows, 0 with gradients of 0, and its statistics."""
    loss = sum(t.flatten()[:0].sum() for t in inputs if isinstance(t, Tensor))
    assert isinstance(loss, Tensor)
    loss = loss.to(accumulator(loss.dtype))
    none, index = loss.new_empty(0), loss.new_empty(0, dtype=torch.int64)
    return loss.expand(0) if reduction == "none" else loss, (none, none, index, index)


def _scatter(values: Tensor, rows: Tensor, size: int, blank: int) -> Tensor:
    return values.new_full((size,), blank).index_copy(0, rows, values)
