"""The gradients of one step, over micro-batches: w NTP + lambda NSP, every passage a negative of every query.

    1. each pack forward without a graph, only the last one of each model with it: queries q (N, D), passages k (M, D)
    2. NSP of q against k: dq = d(lambda NSP) / dq, dk = d(lambda NSP) / dk
    3. one pack after the other, the last first: forward again, with a graph, unless it has one already; backward from
       dk through Embseq, and through Gen from dq and from NTP, which is part of that forward

Nothing but q and k outlives a pack: memory is that of the largest pack of each model, however large N and M are. A
pack costs as much as 4 forwards instead of 3 (5 instead of 4 with activation checkpointing), the last of each model 3,
so that a step of one pack each is the plain one. Pass 3 draws the random numbers of pass 1 again: dropout is the same
in both. Nothing is computed that nobody reads: a pack without [NSP] has no pass 1, one of a frozen Embseq no pass 3.
With w = 0 no supervised row is gathered and no product with the head is formed, and a pack without [NSP] has no pass at
all; without an Embseq (lambda = 0) there is pass 3 of Gen alone.

Ranks that share a step (`make_batch(rank=, ranks=)`) each do this with their own packs; in 2 the queries of each meet
the passages of all. The losses are then shares, and the gradients parts, of those of the step: both add up over ranks.

Source: Gao et al. 2021, arXiv 2101.06983 (GradCache); here a query's sequence carries a token loss of its own.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from cosup_fast.data.packing import CoSupervisionBatch, GenPack
from cosup_fast.distributed import Peers
from cosup_fast.losses import CoSupervisionOutput
from cosup_fast.model import CoSupervisionModel
from cosup_fast.reference import Stats
from cosup_fast.training.embedding_gradient import embedding_rows

T = TypeVar("T")


def accumulate_gradients(
    model: CoSupervisionModel,
    batch: CoSupervisionBatch,
    *,
    precision: str = "float32",
    ntp_count: int | None = None,
    nsp_count: int | None = None,
    nsp_weight: float | None = None,
    group: Peers | None = None,
) -> CoSupervisionOutput:
    """Adds the gradients of `model(batch).loss` to the parameters: those of its backward, but for rounding.

    Args:
        batch: what the step contrasts, cut into packs by `make_batch`, on the model's device.
        precision: "bfloat16" runs the forwards under autocast.
        ntp_count: what the sum of NTP is divided by; the supervised tokens of the step by default.
        nsp_count: what the sum of NSP is divided by; the queries of the step by default.
        nsp_weight: lambda of this step, where it moves towards `model.nsp.weight`; that is the default, and with 0
            there is no NSP.
        group: the ranks that the step is shared by; all of them call this.

    Returns:
        The losses, without a graph, and the statistics of the queries.
    """
    ntp_count = batch.step.ntp if ntp_count is None else ntp_count
    nsp_count = batch.step.nsp if nsp_count is None else nsp_count
    with embedding_rows(model):
        weight = model.nsp.weight if nsp_weight is None else nsp_weight
        return _accumulate(model, batch, precision, ntp_count, nsp_count, weight, group)


def _accumulate(
    model: CoSupervisionModel,
    batch: CoSupervisionBatch,
    precision: str,
    ntp_count: int,
    nsp_count: int,
    weight: float,
    group: Peers | None,
) -> CoSupervisionOutput:
    """`weight` is lambda."""
    device, contrasts, learning = model.device, model.nsp.weight > 0, not model.freeze_embseq
    gen = [_GenPasses(model, part, precision, ntp_count) for part in batch.gen]
    embseq = [_EmbseqPasses(model, pack, precision) for pack in batch.passages if contrasts]

    def nsp_loss(query: Tensor, state: Tensor) -> tuple[Tensor, Stats | None]:
        with autocast(device, precision):
            return model.nsp_loss(query, model.project(state), batch, count=nsp_count, group=group)

    # Ranks that share out weights gather them in every pass, so all of them make the same passes.
    asking = [one for one in gen if contrasts and (model.sharded or len(one.pack.query_rows))]
    queries = [one.first(keep=one is asking[-1])[1].detach() for one in asking]
    states = [one.first(keep=learning and one is embseq[-1]).detach() for one in embseq]
    nsp, stats = torch.zeros((), device=device), None
    d_queries: list[Tensor] = []
    if contrasts and batch.step.nsp:
        query = rows(queries, model.width, model).requires_grad_()
        state = rows(states, model.embseq_width, model).requires_grad_(learning)
        nsp, stats = nsp_loss(query, state)
        (weight * nsp).backward()
        d_queries = _split_like(query.grad, queries)
        if learning:
            for one, d_state in zip(reversed(embseq), reversed(_split_like(state.grad, states)), strict=True):
                one.second().backward(d_state)

    ntp = torch.zeros((), device=device)
    for one in reversed(gen):
        asks = one in asking and len(d_queries) > 0
        if not asks and not model.ntp.weight:
            continue
        loss, query = one.second()
        ntp += loss.detach()
        outputs, gradients = [], []
        if model.ntp.weight:
            outputs.append(loss)
            gradients.append(loss.new_tensor(model.ntp.weight))
        if asks:
            outputs.append(query)
            gradients.append(d_queries.pop())
        torch.autograd.backward(outputs, gradients)
    nsp = nsp.detach()
    return CoSupervisionOutput(model.criterion.combine(ntp, nsp, weight), ntp, nsp, stats)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bfloat16 when asked for."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


class _Passes(ABC, Generic[T]):
    """One forward, run without a graph and then, on the same random numbers, with one."""

    def __init__(self, model: CoSupervisionModel, pack: Any, precision: str):
        self.model, self.pack, self.precision = model, pack, precision
        self.device = model.device
        self.kept: T | None = None
        self.random: dict[str, Tensor] | None = None

    @abstractmethod
    def forward(self, *, whole: bool) -> T:
        """The forward; `whole`: with what only pass 3 reads."""

    def first(self, *, keep: bool) -> T:
        """Pass 1; with `keep` it has a graph and is pass 3 too."""
        self.random = random_state(self.device)
        with torch.set_grad_enabled(keep):
            out = self._run(whole=keep)
        self.kept = out if keep else None
        return out

    def second(self) -> T:
        """Pass 3, which is what `first` kept, or a forward with a graph; random numbers continue where they were."""
        if self.kept is not None:
            out, self.kept = self.kept, None
            return out
        if self.random is None:
            return self._run(whole=True)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            set_random_state(self.random, self.device)
            return self._run(whole=True)

    def _run(self, *, whole: bool) -> T:
        with autocast(self.device, self.precision):  # each its own: autocast's copies of weights know one grad mode
            return self.forward(whole=whole)


class _GenPasses(_Passes[tuple[Tensor, Tensor]]):
    """NTP and queries of a pack of Gen's; NTP in pass 3 alone."""

    def __init__(self, model: CoSupervisionModel, pack: GenPack, precision: str, ntp_count: int):
        super().__init__(model, pack, precision)
        self.ntp_count = ntp_count

    def forward(self, *, whole: bool) -> tuple[Tensor, Tensor]:
        if whole and self.model.ntp.weight:
            return self.model.gen_losses(self.pack, self.ntp_count)
        query = self.model.query_embeddings(self.pack.pack, self.pack.query_rows)
        return query.new_zeros(()), query


class _EmbseqPasses(_Passes[Tensor]):
    """What Embseq makes of a pack of passages."""

    def forward(self, *, whole: bool) -> Tensor:
        return self.model.sequence_states(self.pack)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the random number generators that training draws from, by name."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Restores what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def rows(parts: list[Tensor], width: int, model: CoSupervisionModel) -> Tensor:
    """The parts (n, width) as one tensor, also where there is none."""
    return torch.cat(parts) if parts else torch.empty(0, width, dtype=model.dtype, device=model.device)


def _split_like(gradient: Tensor | None, parts: list[Tensor]) -> list[Tensor]:
    if not parts:
        return []
    assert gradient is not None
    return list(gradient.split([len(part) for part in parts]))
