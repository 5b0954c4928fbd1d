"""Figures of a model in training on examples that it is not trained on: both losses, and retrieval among a pool."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from cosup_fast.config import RunConfig
from cosup_fast.config.training import TrainingConfig
from cosup_fast.data.packing import make_batch
from cosup_fast.data.records import Example, Passage
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
        corpus: dict[str, Passage],
        config: RunConfig,
        peers: Peers | None = None,
    ):
        self.examples = examples
        self.corpus = corpus
        self.peers = peers
        self.training: TrainingConfig = config.training
        gold = list(dict.fromkeys(passage for example in examples for passage in example.gold))
        others = sorted(corpus.keys() - set(gold))
        extra = max(0, min(config.data.dev_pool - len(gold), len(others)))
        chosen = gold + random.Random(0).sample(others, extra)
        self.pool = [corpus[passage] for passage in chosen]

    @torch.no_grad()
    def __call__(self, model: CoSupervisionModel, step: int) -> HeldOut:
        """The figures, the same on all ranks, which share the work."""
        model.eval()
        peers = self.peers
        rank, ranks = (0, 1) if peers is None else (peers.rank, peers.size)
        sums = torch.zeros(8, dtype=torch.float64)  # NTP, tokens, NSP, queries; retrievals, and those within 1, 5, 20
        size = self.training.batch_size
        parts = [self.pool[i::ranks] for i in range(ranks)]
        with autocast(model.device, self.training.precision), passes_in_step(model, peers):
            for i in range(rank * size, len(self.examples), ranks * size):
                chosen = self.examples[i : i + size]
                batch = make_batch(chosen, self.corpus, model.template, self.training.pack_limits).to(model.device)
                out = model(batch, ntp_count=1, nsp_count=1)  # sums over the batch
                found = [float(out.ntp), batch.ntp_count, float(out.nsp), batch.nsp_count]
                sums[:4] += torch.tensor(found, dtype=torch.float64)
            embeddings = embed_passages(model, parts[rank])
        if peers is not None:
            embeddings = peers.gather(embeddings, [len(part) for part in parts])
        pool = [passage for part in parts for passage in part]
        with autocast(model.device, self.training.precision), passes_in_step(model, peers):
            places = retrieval_ranks(model, self.examples[rank::ranks], pool, embeddings=embeddings)
        sums[4:] = torch.tensor([len(places), *(sum(place < k for place in places) for k in (1, 5, 20))])
        if peers is not None:
            sums = peers.sum_(sums.to(model.device))
        ntp, tokens, nsp, queries, retrievals, *hits = sums.tolist()
        return HeldOut(step, ntp / max(1, tokens), nsp / max(1, queries), *(n / max(1, retrievals) for n in hits))
