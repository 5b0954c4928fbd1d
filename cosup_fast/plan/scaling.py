"""What travels in a step over many nodes, by collective, and how long it takes: a model, of which nothing is measured.

G GPUs in nodes of g; R replicas of the weights, each shared out over S = G / R ranks; P weights of a model, P' of them
trained, a step of k packs of it on each GPU. M passages of width D in a step over all GPUs.

    weights                  all-gather       b P      times 3 k - 1: forward, backward, first pass of the grad cache
    gradients                reduce-scatter   4 P'     times k (fp32, after every pack)
    gradients of replicas    all-reduce       4 P'/S   times k, over R ranks
    gradients (ddp)          all-reduce       4 P'     once
    keys                     all-gather       b M D    once, over all ranks
    gradients of keys        reduce-scatter   4 M D    once, over all ranks

b is 2 with products in bf16, else the bytes of a weight. A rank of n receives (n - 1) / n of what is gathered, sends as
much of what is reduced, and both for an all-reduce. A node of which n' ranks take part passes its share of the traffic
over the n' links that it has to others: time is the longer one of both, at the links' full rate and hidden behind
nothing. Latency is left out, so that small messages take longer than this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cosup_fast.plan.configs import decoder
from cosup_fast.plan.request import PlanRequest
from cosup_fast.plan.time import count_weights

KEY_BYTES = 2 + 4
"""Of an element of the gathered keys: itself in bf16 and its gradient in fp32, both whole on every rank."""


@dataclass(frozen=True)
class Cluster:
    """Nodes that are alike."""

    gpus_per_node: int = 8
    node_gb_s: float = 300.0
    """GB/s that a GPU sends to others of its node: NVLink of an A100, by its data sheet."""
    network_gb_s: float = 25.0
    """GB/s of each GPU's link to other nodes: 200 Gbit/s."""


@dataclass(frozen=True)
class Traffic:
    """One collective of a step, all its calls together."""

    what: str
    collective: str
    ranks: int
    gigabytes: float  # 10^9 bytes that each GPU sends
    seconds: float


def step_traffic(request: PlanRequest, cluster: Cluster) -> list[Traffic]:
    """What a step sends, largest first; nothing on one GPU.

    Raises:
        ValueError: the models have adapters, whose traffic is not modelled.
    """
    if request.gen_lora.rank or request.embseq_lora.rank:
        raise ValueError(
            "what travels between nodes is not modelled for adapters: plan without --nodes, or without "
            "model.gen_lora.rank and model.embseq_lora.rank"
        )
    gpus, shards = request.gpus, request.gpus // request.replicas
    if gpus == 1:
        return []
    each = 2 if request.precision == "bfloat16" else _itemsize(request.dtype)
    sharded = request.sharding == "fsdp"
    gathered = reduced = between = 0.0
    for config, packs, trains in _models(request):
        weights = count_weights(config)
        if sharded:
            gathered += each * weights * (3 * packs - 1 if trains and request.has_embseq else packs * (1 + trains))
            reduced += 4 * weights * packs * trains
            between += 4 * weights / shards * packs * trains
        else:
            reduced += 4 * weights * trains / (2 if request.shared and request.has_embseq else 1)
    found: list[Traffic] = []

    def add(what: str, collective: str, ranks: int, total: float, stride: int = 1) -> None:
        if ranks > 1 and total:
            sent, seconds = _cost(total * (2 if collective == "all-reduce" else 1), ranks, stride, cluster)
            found.append(Traffic(what, collective, ranks, sent / 1e9, seconds))

    if sharded:
        add("weights", "all-gather", shards, gathered)
        add("gradients", "reduce-scatter", shards, reduced)
        add("gradients of replicas", "all-reduce", request.replicas, between, stride=shards)
    else:
        add("gradients", "all-reduce", gpus, reduced)
    if request.has_embseq:
        elements = keys_of_step(request) * decoder(request.gen).hidden_size
        add("keys", "all-gather", gpus, each * elements)
        add("gradients of keys", "reduce-scatter", gpus, 4.0 * elements)
    return sorted(found, key=lambda one: -one.gigabytes)


def keys_of_step(request: PlanRequest) -> int:
    """Passages of a step over all GPUs."""
    return request.gpus * request.embseq_packs * request.embseq_sequences * request.has_embseq


def keys_for_share(request: PlanRequest, share: float) -> int:
    """Passages of a step whose embeddings, with their gradients, send this share of what weights and gradients send."""
    sent = {one.what: one.gigabytes for one in step_traffic(request, Cluster())}
    keys = sum(sent.pop(name, 0.0) for name in ("keys", "gradients of keys"))
    return round(keys_of_step(request) * share * sum(sent.values()) / keys) if keys else 0


def keys_for_memory(request: PlanRequest, gib: float) -> int:
    """Passages whose gathered embeddings and gradients take so many GiB of every GPU; a ring would hold 1/G of them."""
    return int(gib * 2**30 // (KEY_BYTES * decoder(request.gen).hidden_size))


def _models(request: PlanRequest) -> list[tuple[dict[str, Any], int, bool]]:
    """The configuration of each model, its packs on a GPU, and whether it is trained."""
    models = [(request.gen, request.gen_packs, True)]
    if request.has_embseq:
        trains = not request.freeze_embseq
        models.append((request.gen if request.shared else request.embseq or request.gen, request.embseq_packs, trains))
    return models


def _cost(total: float, ranks: int, stride: int, cluster: Cluster) -> tuple[float, float]:
    """Bytes that a rank sends and seconds: of `total` bytes over so many ranks, `stride` apart."""
    sent = total * (ranks - 1) / ranks
    here = max(1, min(ranks, cluster.gpus_per_node // stride))  # ranks of the collective in one node
    nodes = ranks / here
    within = sent / (cluster.node_gb_s * 1e9) if here > 1 else 0.0
    across = total * (nodes - 1) / nodes / (here * cluster.network_gb_s * 1e9)
    return sent, max(within, across)


def _itemsize(dtype: str) -> int:
    return {"bfloat16": 2, "float64": 8}.get(dtype, 4)
