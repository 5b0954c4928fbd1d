"""The losses as modules: InfoNCE, linear cross-entropy, and their sum for co-supervision.

    L = ntp_weight * NTP + nsp_weight * NSP

NTP is the cross-entropy of the next token, NSP the InfoNCE of a query against the sequence embeddings of the batch
(Lee et al. 2024, arXiv 2403.09024, section 3).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from cosup_fast.checks import check_number
from cosup_fast.functional import (
    Duplicates,
    Impl,
    KeyGrad,
    PositiveRows,
    Reduction,
    Stats,
    info_nce,
    linear_cross_entropy,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from cosup_fast.distributed import Peers


def _over(result: Any, count: int | Tensor | None) -> Any:
    """A sum, with or without its statistics, divided by a count of the caller's."""
    if count is None:
        return result
    if isinstance(count, Tensor):
        if count.numel() != 1:
            raise ValueError(f"count has shape {tuple(count.shape)}; pass a number or a 0-d tensor")
        count = count.reshape(()).clamp(min=1)
    else:
        check_number("count", count, " or a 0-d tensor")
        count = max(count, 1)
    if isinstance(result, tuple):
        return result[0] / count, result[1]
    return result / count


def _shown(**options: Any) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items() if value is not None)


class InfoNCELoss(nn.Module):
    """InfoNCE of queries (N, D) against keys (M, D); the equation and the errors are those of `functional.info_nce`.

    Args:
        temperature: logits are divided by it; give this or scale, or neither for plain dot products as in the paper.
        scale: 1 / temperature.
        learnable_scale: train the scale, as the parameter `log_scale` = log(scale), fp32.
        max_scale: each forward first clamps log_scale in place to at most log(max_scale), so that its gradient at the
            bound stays alive and a step can lead away from it (100 as in CLIP, Radford et al. 2021, section 2.5).
        normalize, symmetric, margin, query_negatives, key_negatives, label_smoothing, duplicates, reduction, impl,
            key_grad: as in `functional.info_nce`.

    Raises:
        TypeError: temperature or scale is not a number.
        ValueError: both temperature and scale are given; a value out of range.
    """

    def __init__(
        self,
        *,
        temperature: float | None = None,
        scale: float | None = None,
        learnable_scale: bool = False,
        max_scale: float = 100.0,
        normalize: bool = False,
        symmetric: bool = False,
        margin: float | None = None,
        query_negatives: bool = False,
        key_negatives: bool = False,
        label_smoothing: float = 0.0,
        duplicates: Duplicates = "mask",
        reduction: Reduction = "mean",
        impl: Impl = "auto",
        key_grad: KeyGrad = "global",
    ) -> None:
        super().__init__()
        for name, value in (("temperature", temperature), ("scale", scale)):
            if value is not None:
                check_number(name, value, ", with learnable_scale=True to train it")
        check_number("max_scale", max_scale)
        if not max_scale > 0:
            raise ValueError(f"max_scale is {max_scale}; pass a positive number")
        if temperature is not None:
            if scale is not None:
                raise ValueError(
                    f"temperature is {temperature} and scale is {scale}; scale = 1 / temperature, pass one"
                )
            if not 0 < temperature < math.inf:
                raise ValueError(f"temperature is {temperature}; pass a positive finite number")
            scale = 1 / temperature
        scale = 1.0 if scale is None else scale
        if not 0 < scale < math.inf:
            raise ValueError(f"scale is {scale}; pass a positive finite number (1 / temperature)")
        if learnable_scale and scale > max_scale:
            raise ValueError(f"scale is {scale}, above max_scale {max_scale}; raise max_scale or lower scale")
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale), dtype=torch.float32)) if learnable_scale else None
        self.fixed_scale, self.max_scale = scale, max_scale
        self.normalize, self.symmetric, self.label_smoothing = normalize, symmetric, label_smoothing
        self.margin, self.query_negatives, self.key_negatives = margin, query_negatives, key_negatives
        self.duplicates: Duplicates = duplicates
        self.reduction: Reduction = reduction
        self.impl: Impl = impl
        self.key_grad: KeyGrad = key_grad
        self(torch.empty(0, 1), torch.empty(0, 1))  # options are checked now, not at the first batch

    def extra_repr(self) -> str:
        learnt = self.log_scale is not None
        return _shown(
            scale=f"exp(log_scale), at most {self.max_scale:g}" if learnt else f"{self.fixed_scale:g}",
            normalize=self.normalize or None,
            symmetric=self.symmetric or None,
            margin=self.margin,
            query_negatives=self.query_negatives or None,
            key_negatives=self.key_negatives or None,
            label_smoothing=self.label_smoothing or None,
            duplicates=self.duplicates,
            reduction=self.reduction,
            impl=self.impl,
        )

    @property
    def scale(self) -> float | Tensor:
        """What the scores are multiplied by: a float, or exp(log_scale) with its gradient."""
        return self.fixed_scale if self.log_scale is None else self.log_scale.exp()

    def forward(
        self,
        query: Tensor,  # (N, D)
        keys: Tensor,  # (M, D)
        positive: Tensor | None = None,  # (N,)
        *,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        positive_ids: Tensor | None = None,
        private_negatives: Tensor | None = None,
        count: int | Tensor | None = None,
        group: ProcessGroup | Peers | None = None,
        positive_rows: PositiveRows = "rank",
        return_stats: bool = False,
    ) -> Any:
        """The loss, or (loss, Stats). With `count` it is the sum over these queries divided by max(count, 1).

        With `group` the keys of all its ranks are candidates and the loss is this rank's share, as in
        `functional.info_nce`; what `count` counts is up to the caller then too.
        """
        if self.log_scale is not None:
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(self.max_scale))
        result = info_nce(
            query,
            keys,
            positive,
            scale=self.scale,
            normalize=self.normalize,
            symmetric=self.symmetric,
            query_ids=query_ids,
            key_ids=key_ids,
            positive_ids=positive_ids,
            duplicates=self.duplicates,
            private_negatives=private_negatives,
            margin=self.margin,
            query_negatives=self.query_negatives,
            key_negatives=self.key_negatives,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction if count is None else "sum",
            return_stats=return_stats,
            impl=self.impl,
            group=group,
            key_grad=self.key_grad,
            positive_rows=positive_rows,
        )
        return _over(result, count)


class LinearCrossEntropyLoss(nn.Module):
    """Next-token cross-entropy of hidden states (T, D) against an LM head (V, D) without the logits.

    The options, the equation and the errors are those of `functional.linear_cross_entropy`.
    """

    def __init__(
        self,
        *,
        ignore_index: int | None = -100,
        scale: float = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.ignore_index, self.scale, self.softcap = ignore_index, scale, softcap
        self.z_loss, self.label_smoothing = z_loss, label_smoothing
        self.reduction: Reduction = reduction
        self.impl: Impl = impl
        self(torch.empty(0, 1), torch.empty(1, 1), torch.empty(0, dtype=torch.int64))  # checks the options

    def extra_repr(self) -> str:
        return _shown(
            ignore_index=self.ignore_index,
            scale=None if self.scale == 1.0 else self.scale,
            softcap=self.softcap,
            z_loss=self.z_loss or None,
            label_smoothing=self.label_smoothing or None,
            reduction=self.reduction,
            impl=self.impl,
        )

    def forward(
        self,
        hidden: Tensor,  # (T, D)
        weight: Tensor,  # (V, D)
        target: Tensor,  # (T,)
        *,
        bias: Tensor | None = None,  # (V,)
        count: int | Tensor | None = None,
        return_stats: bool = False,
    ) -> Any:
        """The loss, or (loss, Stats). With `count` it is the sum over these rows divided by max(count, 1)."""
        result = linear_cross_entropy(
            hidden,
            weight,
            target,
            bias=bias,
            ignore_index=self.ignore_index,
            scale=self.scale,
            softcap=self.softcap,
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction if count is None else "sum",
            return_stats=return_stats,
            impl=self.impl,
        )
        return _over(result, count)


class CoSupervisionOutput(NamedTuple):
    """0-d losses, fp32 (fp64 for fp64 inputs); only `loss` carries the weights."""

    loss: Tensor
    ntp: Tensor
    nsp: Tensor
    stats: Stats | None
    """`Stats` of the queries; None where there was none."""


class CoSupervisionLoss(nn.Module):
    """Token and sequence supervision of one step: loss = ntp_weight * NTP + nsp_weight * NSP.

    Args:
        nsp_weight: lambda, 0.01 in the published code. With 0, NSP is still reported but costs no gradient.
        ntp: `LinearCrossEntropyLoss()` by default.
        nsp: `InfoNCELoss()` by default: plain dot products, no temperature, as in the paper.
        ntp_weight: with 0, NTP is a constant 0: no product with the head, and hidden states, head and targets may be
            None.

    Raises:
        ValueError: a weight is negative or not finite, or both are 0; ntp or nsp does not reduce by "mean".
    """

    def __init__(
        self,
        nsp_weight: float = 0.01,
        ntp: LinearCrossEntropyLoss | None = None,
        nsp: InfoNCELoss | None = None,
        *,
        ntp_weight: float = 1.0,
    ) -> None:
        super().__init__()
        for name, weight in (("nsp_weight", nsp_weight), ("ntp_weight", ntp_weight)):
            check_number(name, weight)
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} is {weight}; pass a finite number >= 0")
        if nsp_weight == ntp_weight == 0:
            raise ValueError("nsp_weight and ntp_weight are both 0, which leaves nothing to train; raise one of them")
        self.nsp_weight, self.ntp_weight = nsp_weight, ntp_weight
        self.ntp = LinearCrossEntropyLoss() if ntp is None else ntp
        self.nsp = InfoNCELoss() if nsp is None else nsp
        for name, part in (("ntp", self.ntp), ("nsp", self.nsp)):
            if part.reduction != "mean":
                raise ValueError(f"{name} has reduction {part.reduction!r}; a sum of two losses needs 'mean'")

    def extra_repr(self) -> str:
        return _shown(
            ntp_weight=None if self.ntp_weight == 1.0 else self.ntp_weight,
            nsp_weight=self.nsp_weight,
        )

    def combine(self, ntp: Tensor, nsp: Tensor, nsp_weight: float | None = None) -> Tensor:
        """The weighted sum of the two losses, with another lambda if one is given; a loss of weight 0 stays out."""
        nsp_weight = self.nsp_weight if nsp_weight is None else nsp_weight
        if self.ntp_weight == 0:
            return nsp_weight * nsp
        weighted = ntp if self.ntp_weight == 1 else self.ntp_weight * ntp
        return weighted + nsp_weight * nsp if nsp_weight else weighted

    def forward(
        self,
        hidden: Tensor | None,  # (T, D)
        lm_head_weight: Tensor | None,  # (V, D)
        target: Tensor | None,  # (T,)
        *,
        query: Tensor | None,  # (N, E)
        keys: Tensor | None,  # (M, E)
        positive: Tensor | None = None,  # (N,)
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        positive_ids: Tensor | None = None,
        private_negatives: Tensor | None = None,
        bias: Tensor | None = None,
        ntp_count: int | Tensor | None = None,
        nsp_count: int | Tensor | None = None,
        group: ProcessGroup | Peers | None = None,
    ) -> CoSupervisionOutput:
        """The loss of a micro-batch.

        Args:
            hidden, lm_head_weight, target, bias: as in `functional.linear_cross_entropy`; target[t] is the label of
                hidden[t], already shifted. With ntp_weight = 0 none of them is read.
            query, keys, positive and the ids: as in `functional.info_nce`. Without queries (None, or N = 0) NSP is a
                constant 0.
            ntp_count, nsp_count: how many supervised tokens and queries the whole accumulated step holds, over all
                micro-batches (and ranks, where gradients are summed over them). The sums of this micro-batch are
                divided by them, so that the micro-batches' gradients add up to those of the step in one piece,
                however unequal they are. By default the counts of this micro-batch, on all ranks of `group` if that is
                given.
            group: the ranks whose keys are candidates, see `functional.info_nce`. All losses are then this rank's
                shares of those of the group, and every rank takes part, if with queries and keys of shape (0, E).

        Raises:
            ValueError: group is given, and query or keys is None; ntp_weight is 0 and there is no query either;
                ntp_weight is above 0, and hidden, lm_head_weight or target is None; and see `functional`.
        """
        if group is not None:
            if query is None or keys is None:
                name = "query" if query is None else "keys"
                raise ValueError(f"{name} is None and group is given; pass (0, E): every rank of the group takes part")
            if ntp_count is None and target is not None and self.ntp_weight:
                from cosup_fast.distributed import Peers

                every, ignored = target.new_tensor(target.numel()), self.ntp.ignore_index
                ntp_count = Peers.of(group).sum(every if ignored is None else (target != ignored).sum())
        ntp = self._ntp(hidden, lm_head_weight, target, bias, ntp_count, query)
        if query is None or (len(query) == 0 and group is None):
            nsp = torch.zeros_like(ntp)
            return CoSupervisionOutput(self.combine(ntp, nsp), ntp, nsp, None)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.nsp_weight > 0):
            nsp, stats = self.nsp(
                query,
                keys,
                positive,
                query_ids=query_ids,
                key_ids=key_ids,
                positive_ids=positive_ids,
                private_negatives=private_negatives,
                count=nsp_count,
                group=group,
                return_stats=True,
            )
        return CoSupervisionOutput(self.combine(ntp, nsp), ntp, nsp, stats)

    def _ntp(
        self,
        hidden: Tensor | None,
        weight: Tensor | None,
        target: Tensor | None,
        bias: Tensor | None,
        count: int | Tensor | None,
        query: Tensor | None,
    ) -> Tensor:
        if self.ntp_weight:
            for name, given in (("hidden", hidden), ("lm_head_weight", weight), ("target", target)):
                if given is None:
                    raise ValueError(f"{name} is None, and ntp_weight is {self.ntp_weight}; pass it, or ntp_weight=0")
            return self.ntp(hidden, weight, target, bias=bias, count=count)
        if query is None:
            raise ValueError("query is None and ntp_weight is 0, which leaves no loss; pass queries and keys")
        return query.new_zeros((), dtype=torch.promote_types(query.dtype, torch.float32))
