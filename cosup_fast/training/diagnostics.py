"""What the two losses do to each other and to the space of sequences, looked at every so many steps.

    g_NTP = d (w NTP) / d Gen,  g_NSP = d (lambda NSP) / d Gen,  cosine = g_NTP . g_NSP / (|g_NTP| |g_NSP|)
    alignment = E |q - k+|^2                    of queries and their own passages
    uniformity = log E exp(-2 |x - y|^2)        of pairs of different queries, and of different passages

A cosine near -1 says that the losses pull Gen apart, near 0 that they do not meet. Alignment and uniformity are those
of L2-normalised embeddings (Wang & Isola 2020, arXiv 2005.10242): lower is better, a uniformity near 0 is a collapse.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cosup_fast.data.packing import CoSupervisionBatch, GenPack
from cosup_fast.distributed import Peers
from cosup_fast.model import CoSupervisionModel
from cosup_fast.training.ranks import reduce_gradients
from cosup_fast.training.sharding import copies, local
from cosup_fast.training.step import autocast, rows


@dataclass(frozen=True)
class Diagnosis:
    """Of the batch of a step and the weights before it. None: the batch has too few queries, or a weight is 0."""

    step: int
    ntp_grad_norm: float | None  # |g_NTP|
    nsp_grad_norm: float | None  # |g_NSP|
    grad_cosine: float | None
    alignment: float | None
    query_uniformity: float | None
    passage_uniformity: float | None


def diagnose(
    model: CoSupervisionModel,
    batch: CoSupervisionBatch,
    step: int,
    *,
    precision: str,
    nsp_weight: float | None = None,
    peers: Peers | None = None,
) -> Diagnosis:
    """Two extra backward passes over a step's batch; parameters and random numbers stay as they are.

    Needs the memory of one more gradient of Gen, or of a rank's part of it where ranks share out the weights. Gradients
    that the parameters have already are not kept. Ranks that share the step all call this, and all have the same
    answer.
    """
    passes = _Passes(model, precision, peers)
    weight = model.nsp.weight if nsp_weight is None else nsp_weight
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        asked = batch.step.nsp > 0 and model.nsp.weight > 0
        query, keys = passes.embeddings(batch) if asked else (torch.empty(0, 1),) * 2
        nsp = passes.nsp_gradients(batch, query, keys, weight) if asked and weight else None
        ntp = passes.ntp_gradients(batch) if model.ntp.weight else None
    ntp_norm, nsp_norm = (None if g is None else math.sqrt(passes.dot(g, g)) for g in (ntp, nsp))
    cosine = None
    if ntp is not None and nsp is not None and ntp_norm and nsp_norm:
        cosine = passes.dot(ntp, nsp) / (ntp_norm * nsp_norm)
    q, k = (normalize(x.detach().to(torch.promote_types(x.dtype, torch.float32)), dim=-1) for x in (query, keys))
    positive = batch.positive
    if peers is not None and asked:
        counts = peers.counts(len(q))
        q, positive = peers.gather(q, counts), peers.gather(positive, counts)
        k = peers.gather(k, peers.counts(len(k)))
    aligned = float((q - k[positive]).square().sum(dim=-1).mean()) if len(q) else None
    return Diagnosis(step, ntp_norm, nsp_norm, cosine, aligned, uniformity(q), uniformity(k))


@torch.no_grad()
def uniformity(x: Tensor) -> float | None:
    """log E exp(-2 |x_i - x_j|^2) over i < j of the first 4,096 unit vectors (N, D); None where there is no pair."""
    x = x[:4096]
    return float(torch.pdist(x).square().mul(-2).exp().mean().log()) if len(x) > 1 else None


class _Passes:
    """Forwards of packs, each with random numbers of its own: the same whenever the pack is run again."""

    def __init__(self, model: CoSupervisionModel, precision: str, peers: Peers | None):
        self.model = model
        self.precision = precision
        self.peers = peers
        self.seed = torch.initial_seed() >> 1
        self.gen = [p for p in model.gen.parameters() if p.requires_grad]

    @torch.no_grad()
    def embeddings(self, batch: CoSupervisionBatch) -> tuple[Tensor, Tensor]:
        """Queries (N, D) and passages (M, D) of a batch."""
        queries = [self._query(part, i) for i, part in enumerate(batch.gen)]
        states = [self._passage(part, i) for i, part in enumerate(batch.passages)]
        with autocast(self.model.device, self.precision):
            keys = self.model.project(rows(states, self.model.embseq_width, self.model))
        return rows(queries, self.model.width, self.model), keys

    def nsp_gradients(
        self, batch: CoSupervisionBatch, query: Tensor, keys: Tensor, weight: float
    ) -> list[Tensor | None]:
        """d (lambda NSP) / d Gen; where Gen is Embseq too, through its passages as well."""
        shared = self.model.shared
        query.requires_grad_()
        keys.requires_grad_(shared)
        with autocast(self.model.device, self.precision):
            loss, _ = self.model.nsp_loss(query, keys, batch, count=batch.step.nsp, group=self.peers)
        inputs = [query, keys] if shared else [query]
        d_query, *d_keys = torch.autograd.grad(weight * loss, inputs)
        with self._gradients() as found:
            asked = [len(part.query_rows) for part in batch.gen]
            for i, (part, gradient) in enumerate(zip(batch.gen, _split(d_query, asked), strict=True)):
                if self.model.sharded or len(gradient):  # ranks that share out weights make the same passes
                    self._query(part, i).backward(gradient)
            if shared:
                counts = [part.count for part in batch.passages]
                for i, (part, gradient) in enumerate(zip(batch.passages, _split(d_keys[0], counts), strict=True)):
                    self._passage(part, i).backward(gradient)
        return found

    def ntp_gradients(self, batch: CoSupervisionBatch) -> list[Tensor | None]:
        """d (w NTP) / d Gen."""
        with self._gradients() as found:
            for i, part in enumerate(batch.gen):
                loss = self._run(lambda part: self.model.gen_losses(part, batch.step.ntp)[0], part, i)
                (self.model.ntp.weight * loss).backward()
        return found

    def dot(self, a: list[Tensor | None], b: list[Tensor | None]) -> float:
        """The inner product of two gradients, in fp32 at least and summed in fp64; what has none is 0."""
        total = torch.zeros((), dtype=torch.float64, device=self.model.device)
        for x, y in zip(a, b, strict=True):
            if x is not None and y is not None:
                same, x, y = copies(x), local(x), local(y)
                total += torch.sum(x * y.to(torch.promote_types(y.dtype, torch.float32)), dtype=torch.float64) / same
        return float(self.peers.sum(total) if self.peers is not None and self.model.sharded else total)

    def _query(self, part: GenPack, i: int) -> Tensor:
        return self._run(lambda part: self.model.query_embeddings(part.pack, part.query_rows), part, i)

    def _passage(self, part: Any, i: int) -> Tensor:
        return self._run(self.model.sequence_states, part, -1 - i)

    def _run(self, forward: Callable[[Any], Any], part: Any, number: int) -> Any:
        torch.manual_seed((self.seed + number) % 2**63)
        with autocast(self.model.device, self.precision):
            return forward(part)

    @contextlib.contextmanager
    def _gradients(self) -> Iterator[list[Tensor | None]]:
        """A list that holds, after the block, what its backward passes on all ranks left in Gen; the model has none."""
        found: list[Tensor | None] = []
        self.model.zero_grad(set_to_none=True)
        yield found
        reduce_gradients(self.model, self.peers)
        found += [p.grad for p in self.gen]
        self.model.zero_grad(set_to_none=True)


def _split(gradient: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
    return gradient.split(counts) if counts else ()
