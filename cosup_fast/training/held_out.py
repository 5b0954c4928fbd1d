"""Held-out figures while a model trains: both losses, and retrieval among a pool."""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence

import torch

from cosup_fast.config import RunConfig
from cosup_fast.config.training import TrainingConfig
from cosup_fast.data.mapped import sorted_ids
from cosup_fast.data.packing import make_batch
from cosup_fast.data.records import Example, Passage
from cosup_fast.data.sampling import is_too_long
from cosup_fast.data.template import Template
from cosup_fast.distributed import Peers
from cosup_fast.evaluation import retrieval_ranks
from cosup_fast.index import embed_passages
from cosup_fast.model import CoSupervisionModel
from cosup_fast.training.metrics import HeldOut
from cosup_fast.training.sharding import passes_in_step
from cosup_fast.training.step import autocast


class HeldOutEvaluator:
    """Losses and retrieval on held-out examples, among a fixed pool of passages that holds their gold ones."""

    def __init__(
        self,
        examples: Sequence[Example],
        corpus: Mapping[str, Passage],
        config: RunConfig,
        peers: Peers | None = None,
    ):
        self.examples = examples
        self.corpus = corpus
        self.peers = peers
        self.training: TrainingConfig = config.training
        self.pool: list[Passage] = []
        """The passages that are searched; none where there is no Embseq."""
        self.retrieval = config.has_embseq
        if self.retrieval:
            gold = list(dict.fromkeys(passage for example in examples for passage in example.gold))
            ids = sorted_ids(corpus)
            # Drawn by place among the ids that are not gold: the ids of a large corpus are never held at once.
            places = sorted(bisect_left(ids, name) for name in gold)
            others = len(ids) - len(gold)
            extra = max(0, min(config.data.dev_pool - len(gold), others))
            before = [place - i for i, place in enumerate(places)]  # ids that are not gold, before each gold one
            drawn = random.Random(0).sample(range(others), extra)
            self.pool = [corpus[name] for name in gold]
            self.pool += [corpus[ids[other + bisect_right(before, other)]] for other in drawn]

    def leave_out_long(self, template: Template) -> int:
        """Drops the examples that are longer than a micro-batch or than the model's positions, and counts them.

        Raises:
            ValueError: all of them are.
        """
        limits, retrieval = self.training.pack_limits, self.retrieval
        found = [e for e in self.examples if not is_too_long(e, self.corpus, template, limits, retrieval=retrieval)]
        if not found:
            raise ValueError(f"all of the {len(self.examples)} examples of data.dev are too long: shorten them")
        dropped, self.examples = len(self.examples) - len(found), found
        return dropped

    @torch.no_grad()
    def __call__(self, model: CoSupervisionModel, step: int) -> HeldOut:
        """The figures, the same on all ranks, which share the work."""
        model.eval()
        peers = self.peers
        rank, ranks = (0, 1) if peers is None else (peers.rank, peers.size)
        sums = torch.zeros(8, dtype=torch.float64)  # NTP, tokens, NSP, queries; retrievals, and those within 1, 5, 20
        size, limits = self.training.batch_size, self.training.pack_limits
        with autocast(model.device, self.training.precision), passes_in_step(model, peers):
            for i in range(rank * size, len(self.examples), ranks * size):
                chosen = self.examples[i : i + size]
                batch = make_batch(chosen, self.corpus, model.template, limits, retrieval=model.has_embseq)
                out = model(batch.to(model.device), ntp_count=1, nsp_count=1)  # sums over the batch
                found = [float(out.ntp), batch.ntp_count, float(out.nsp), batch.nsp_count]
                sums[:4] += torch.tensor(found, dtype=torch.float64)
        if model.has_embseq:
            sums[4:] = torch.tensor(self._retrieval(model, rank, ranks))
        if peers is not None:
            sums = peers.sum_(sums.to(model.device))
        ntp, tokens, nsp, queries, retrievals, *hits = sums.tolist()
        if not model.has_embseq:
            return HeldOut(step, ntp / max(1, tokens), None, None, None, None)
        return HeldOut(step, ntp / max(1, tokens), nsp / max(1, queries), *(n / max(1, retrievals) for n in hits))

    def _retrieval(self, model: CoSupervisionModel, rank: int, ranks: int) -> list[int]:
        """Of this rank's examples: retrievals, and those whose own passage is among the first 1, 5 and 20."""
        peers, precision = self.peers, self.training.precision
        parts = [self.pool[i::ranks] for i in range(ranks)]
        with autocast(model.device, precision), passes_in_step(model, peers):
            embeddings = embed_passages(model, parts[rank])
        if peers is not None:
            embeddings = peers.gather(embeddings, [len(part) for part in parts])
        pool = [passage for part in parts for passage in part]
        with autocast(model.device, precision), passes_in_step(model, peers):
            places = retrieval_ranks(model, self.examples[rank::ranks], pool, embeddings=embeddings)
        return [len(places), *(sum(place < k for place in places) for k in (1, 5, 20))]
