"""What travels in a step over many nodes, by collective, and how long it takes: a model, of which nothing is measured.

G GPUs in nodes of g; R replicas of the weights, each shared out over S = G / R ranks. Of a model: B bytes of decoder
layers and B' of everything else as they are gathered, T bytes of gradients of what is trained; a step of k packs of it
on each GPU. M passages of width D in a step over all GPUs, b bytes of an element of a key.

    layers                   all-gather       B        times 3 k - 1: forward, backward, first pass of the grad cache
    embeddings, head, norm   all-gather       B'       times k: they stay gathered until a backward pass is through
    gradients                reduce-scatter   T        times k (fp32, after every pack)
    gradients of replicas    all-reduce       T / S    times k, over R ranks
    gradients (ddp)          all-reduce       T        once
    keys                     all-gather       b M D    once, over all ranks
    gradients of keys        reduce-scatter   4 M D    once, over all ranks, where keys are trained on all queries

Frozen weights are gathered like others, so adapters leave B as it is and make T small. Of a frozen Embseq, layers are
gathered k times, and the rest, which no backward pass frees, once and for all. A rank of n receives (n - 1) / n of what
is gathered, sends as much of what is reduced, and both for an all-reduce. A node of which n' ranks take part passes its
share of the traffic over the n' links that it has to others: time is the longer one of both, at the links' full rate
and hidden behind nothing. Latency is left out, so that small messages take longer than this.
"""

from __future__ import annotations

from dataclasses import dataclass

from cosup_fast.plan.configs import decoder
from cosup_fast.plan.request import PlanRequest

KEY_BYTES = 2 + 4
"""Of an element of the gathered keys: itself in bf16 and its gradient in fp32, both whole on every rank."""


@dataclass(frozen=True)
class PassWeights:
    """Bytes of one pass of a model."""

    layers: int
    """Decoder layers as they are gathered, each by itself."""
    rest: int
    """Embeddings, final norm, head: gathered together."""
    gradients: int
    """Of trained parameters that the pass uses, as they are summed over ranks."""


@dataclass(frozen=True)
class StepWeights:
    """Bytes of the models of a step."""

    passes: tuple[PassWeights, ...]
    """Of Gen and, where passages are embedded, of what embeds them."""
    whole: int
    """Gradients that no pass reduces: of a projection, or of all that is trained where weights are not sharded."""


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


def step_traffic(request: PlanRequest, weights: StepWeights, cluster: Cluster) -> list[Traffic]:
    """What a step sends, largest first; nothing on one GPU.

    Args:
        request: the run.
        weights: of its models, as a plan has them (`MemoryPlan.weights`).
        cluster: the GPUs and their links.
    """
    gpus, shards = request.gpus, request.gpus // request.replicas
    if gpus == 1:
        return []
    gathered = reduced = 0
    for one, packs, trains in zip(weights.passes, *_packs(request)):
        forwards = 2 * packs - 1 if trains and request.has_embseq else packs
        gathered += one.layers * (forwards + packs * trains) + one.rest * packs * trains
        reduced += one.gradients * packs * trains
    found: list[Traffic] = []

    def add(what: str, collective: str, ranks: int, total: float, stride: int = 1) -> None:
        if ranks > 1 and total:
            sent, seconds = _cost(total * (2 if collective == "all-reduce" else 1), ranks, stride, cluster)
            found.append(Traffic(what, collective, ranks, sent / 1e9, seconds))

    if request.sharding == "fsdp":
        add("weights", "all-gather", shards, gathered)
        add("gradients", "reduce-scatter", shards, reduced)
        add("gradients of replicas", "all-reduce", request.replicas, reduced / shards, stride=shards)
        add("gradients of the projection", "all-reduce", gpus, weights.whole)
    else:
        add("gradients", "all-reduce", gpus, weights.whole)
    if request.has_embseq:
        elements = keys_of_step(request) * decoder(request.gen).hidden_size
        each = 2 if request.precision == "bfloat16" else _itemsize(request.dtype)
        add("keys", "all-gather", gpus, each * elements)
        if request.key_grad == "global" and (not request.freeze_embseq or request.projects):
            add("gradients of keys", "reduce-scatter", gpus, max(4, _itemsize(request.dtype)) * elements)
    return sorted(found, key=lambda one: -one.gigabytes)


def keys_of_step(request: PlanRequest) -> int:
    """Passages of a step over all GPUs."""
    return request.gpus * request.embseq_packs * request.embseq_sequences * request.has_embseq


def keys_for_share(request: PlanRequest, weights: StepWeights, share: float) -> int:
    """Passages of a step whose embeddings, with their gradients, send this share of what weights and gradients send."""
    sent = {one.what: one.gigabytes for one in step_traffic(request, weights, Cluster())}
    keys = sum(sent.pop(name, 0.0) for name in ("keys", "gradients of keys"))
    return round(keys_of_step(request) * share * sum(sent.values()) / keys) if keys else 0


def keys_for_memory(request: PlanRequest, gib: float) -> int:
    """Passages whose gathered embeddings and gradients take so many GiB of every GPU; a ring would hold 1/G of them."""
    return int(gib * 2**30 // (KEY_BYTES * decoder(request.gen).hidden_size))


def _packs(request: PlanRequest) -> tuple[tuple[int, int], tuple[bool, bool]]:
    """Packs of Gen and of what embeds passages on a GPU, and which of them are trained."""
    return (request.gen_packs, request.embseq_packs), (True, not request.freeze_embseq)


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
