"""One rank of a world that tests send work to; conftest.py runs it. Not a test module.

It is given RANK, SIZE, PORT and PIPE, and answers each (function, arguments) with (ok, result or error).
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cosup_fast import functional, losses
from cosup_fast.config.training import TrainingConfig
from cosup_fast.data.packing import CoSupervisionBatch, PackLimits, make_batch
from cosup_fast.distributed import PeerError, Peers, channel, peers
from cosup_fast.kernels.softmax_xent import engine
from cosup_fast.model import CoSupervisionModel
from cosup_fast.training.diagnostics import Diagnosis, diagnose
from cosup_fast.training.held_out import HeldOutEvaluator
from cosup_fast.training.ranks import reduce_gradients
from cosup_fast.training.resume import check_same_run
from cosup_fast.training.sharding import agree_on_norms, shard
from cosup_fast.training.step import accumulate_gradients
from cosup_fast.training.trainer import Trainer
from tests.distributed.variants import build

RANK, SIZE, PORT, PIPE = (globals()[name] for name in ("RANK", "SIZE", "PORT", "PIPE"))
groups: dict[int, dist.ProcessGroup] = {}
whole_model = functools.cache(build)


def start() -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{PORT}",
        rank=RANK,
        world_size=SIZE,
        timeout=datetime.timedelta(seconds=60),
    )
    for size in range(1, SIZE + 1):
        groups[size] = dist.new_group(range(size))


def leaves(part: dict[str, Tensor], frozen: tuple[str, ...] = ()) -> dict[str, Tensor]:
    return {k: v.detach().clone().requires_grad_(v.is_floating_point() and k not in frozen) for k, v in part.items()}


@contextlib.contextmanager
def chunks_of(rows: int | None) -> Iterator[None]:
    """A workspace that no chunk of more than so many rows fits."""
    if rows is None:
        yield
        return
    before, engine.MIN_ROWS = engine.MIN_ROWS, rows
    os.environ["COSUP_WORKSPACE_BYTES"] = "1"
    try:
        yield
    finally:
        engine.MIN_ROWS = before
        del os.environ["COSUP_WORKSPACE_BYTES"]


def info_nce(
    size: int, part: dict[str, Any], *, chunk_rows=None, autocast=False, compiled=False, **options: Any
) -> dict[str, Tensor]:
    """This rank's share of the loss, its statistics and the gradients of its tensors."""
    upstream = part.pop("upstream", None)
    tensors = leaves(part, part.pop("frozen", ()))

    def call(**tensors: Tensor) -> Any:
        return functional.info_nce(**tensors, group=groups[size], return_stats=True, **options)

    if compiled:
        call = torch.compile(call, backend="aot_eager")
    with chunks_of(chunk_rows), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, stats = call(**tensors)
        total = loss.sum() if upstream is None else (loss * upstream).sum()
        if total.requires_grad:
            total.backward()
    grads = {f"d{k}": v.grad for k, v in tensors.items() if v.grad is not None}
    return {"loss": loss.detach(), **stats._asdict(), **grads}


def traffic(size: int, part: dict[str, Tensor], **options: Any) -> dict[str, list[str]]:
    """The dtypes in which rows are gathered and their gradients scattered."""
    seen: dict[str, list[str]] = {"gathered": [], "scattered": []}
    gather, scatter = peers.all_gather, peers.reduce_scatter

    def watch_gather(out: Tensor, rows: Tensor, **more: Any) -> Any:
        seen["gathered"].append(str(rows.dtype))
        return gather(out, rows, **more)

    def watch_scatter(out: Tensor, rows: Tensor, **more: Any) -> Any:
        seen["scattered"].append(str(rows.dtype))
        return scatter(out, rows, **more)

    peers.all_gather, peers.reduce_scatter = watch_gather, watch_scatter
    try:
        info_nce(size, part, **options)
    finally:
        peers.all_gather, peers.reduce_scatter = gather, scatter
    return seen


def shared_weights(size: int, part: dict[str, Tensor], weight: Tensor, rounds: int, ddp: bool = False) -> dict:
    """Gradients of a projection that all ranks share, accumulated over rounds, then reduced over the ranks."""
    group = groups[size]
    module = torch.nn.Linear(*weight.T.shape, bias=False, dtype=weight.dtype)
    module.weight.data.copy_(weight)
    model = torch.nn.parallel.DistributedDataParallel(module, process_group=group) if ddp else module
    criterion = losses.InfoNCELoss(scale=3.0, learnable_scale=True, normalize=True)
    criterion.to(weight.dtype)
    counts = [sum(Peers(group).counts(len(part[f"query{k}"]))) for k in range(rounds)]
    for k in range(rounds):
        both = model(torch.cat([part[f"query{k}"], part[f"keys{k}"]]))
        query, keys = both.split([len(part[f"query{k}"]), len(part[f"keys{k}"])])
        loss = criterion(query, keys, count=sum(counts), group=group)
        (loss * size if ddp else loss).backward()
    scale = Peers(group).sum(criterion.log_scale.grad)
    if ddp:  # averages gradients, which is why the loss is multiplied; the scale is outside of it
        return {"weight": module.weight.grad, "log_scale": scale / size}
    return {"weight": Peers(group).sum(module.weight.grad), "log_scale": scale}


def co_supervision(size: int, part: dict[str, Tensor], ignore_index: int | None) -> dict[str, Tensor]:
    """This rank's shares of the joint loss."""
    ntp = losses.LinearCrossEntropyLoss(ignore_index=ignore_index)
    criterion = losses.CoSupervisionLoss(0.5, ntp=ntp, nsp=losses.InfoNCELoss(scale=2.0))
    out = criterion(**leaves(part), group=groups[size])
    out.loss.backward()
    return {"loss": out.loss.detach(), "ntp": out.ntp.detach(), "nsp": out.nsp.detach()}


def grad_cache(size: int, part: dict[str, Tensor], weight: Tensor, rows: int) -> Tensor:
    """Two passes: embeddings without graph, the loss on them, then `rows` at a time with the embeddings' gradients."""
    weight = weight.clone().requires_grad_()
    with torch.no_grad():
        embeddings = {k: part[k] @ weight.T for k in ("query", "keys")}
    tensors = leaves(embeddings)
    functional.info_nce(**tensors, scale=0.7, group=groups[size]).backward()
    for name, leaf in tensors.items():
        for x, g in zip(part[name].split(rows), leaf.grad.split(rows)):
            (x @ weight.T).backward(g)
    return Peers(groups[size]).sum(torch.zeros_like(weight) if weight.grad is None else weight.grad)


def shards(peers: Peers, settings: str, replicas: int = 1) -> CoSupervisionModel:
    """The model of these settings, its weights read by the first rank and shared out."""
    model = build(settings, "cpu" if peers.rank == 0 else "meta")
    agree_on_norms(model, peers)
    shard(model, peers.mesh("cpu", replicas), precision="float32")
    return model


def prepared(
    size: int, rank: int, settings: str, examples: list, corpus: dict, limits: tuple, sharded: bool, replicas: int = 1
) -> tuple[Peers, CoSupervisionModel, CoSupervisionBatch]:
    peers = Peers(groups[size])
    model = shards(peers, settings, replicas) if sharded else whole_model(settings)
    batch = make_batch(examples, corpus, model.template, PackLimits(*limits), rank=rank, ranks=size, even=sharded)
    return peers, model, batch


def no_dropout(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def step(size: int, rank: int, *given: Any, sharded=False, recompute="none", key_grad="global") -> dict:
    """The gradients of a step that ranks share, their losses, and what is counted."""
    peers, model, batch = prepared(size, rank, *given, sharded)
    if sharded:
        model.enable_activation_checkpointing(recompute)
        no_dropout(model)
        model.train()  # activations are recomputed in training alone
    model.criterion.nsp.key_grad = key_grad
    model.zero_grad(set_to_none=True)
    out = accumulate_gradients(model, batch, group=peers)
    reduce_gradients(model, peers)
    losses = {name: peers.sum(getattr(out, name)) for name in ("loss", "ntp", "nsp")}
    gradients = {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
    counts = {"packs": len(batch.gen), "passages": batch.key_ids.tolist(), "tokens": batch.tokens, "step": batch.step}
    hits = 0 if out.stats is None else int((out.stats.rank == 0).sum())
    return {"gradients": gradients | losses, "hits": hits, **counts}


class CollectiveBytes(TorchDispatchMode):
    """Counts the bytes of floating-point tensors in collectives: of the larger side, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes back as what it does to local tensors
        if func.namespace == "c10d":
            tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.is_floating_point()]
            self.found[func.__name__.split(".")[0]] += max((x.nbytes for x in tensors), default=0)
        return func(*args, **(kwargs or {}))


def sent(size: int, rank: int, *given: Any) -> dict[str, Any]:
    """The bytes of a second step's collectives, and its packs."""
    peers, model, batch = prepared(size, rank, *given)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        with CollectiveBytes() as counted:
            accumulate_gradients(model, batch, group=peers)
            reduce_gradients(model, peers)
    packs = {"gen_packs": len(batch.gen), "embseq_packs": len(batch.passages)}
    return {"bytes": dict(counted.found), "passages": len(batch.key_ids), **packs}


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def diagnosis(size: int, rank: int, *given: Any) -> Diagnosis:
    peers, model, batch = prepared(size, rank, *given)
    model.criterion.nsp.key_grad = "global"
    return diagnose(model, batch, 7, precision="float32", peers=peers)


def trained(
    size: int, rank: int, settings: str, examples: list, corpus: dict, output: Path, resumed: Path | None, **fields: Any
) -> tuple[list, dict, float]:
    """What a run records of its steps, its last weights, and the random number that dropout would draw next."""
    peers, config = (Peers(groups[size]) if size > 1 else None), TrainingConfig(**fields)
    device = "meta" if rank and config.sharding == "fsdp" else "cpu"
    if resumed is None:
        model = build(settings, device)
    else:
        model = CoSupervisionModel.load(resumed, device=device, merge=False)
    no_dropout(model)
    records: list = []
    options = {"peers": peers, "device": torch.device("cpu"), "on_metrics": records.append}
    trainer = Trainer(model, config, examples, corpus, output, **options)
    if resumed is not None:
        trainer.resume(resumed)
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step, which takes longer than all else
        trainer.train()
    weights = {n: whole(p.detach()).clone() for n, p in model.named_parameters()}
    return [vars(one) for one in records], weights, float(torch.rand(()))


def same_run(size: int, part: dict) -> str:
    """What is said of ranks with such notes."""
    try:
        check_same_run(Peers(groups[size]), "the same run", part)
    except ValueError as error:
        return str(error)
    return ""


def held_out(size: int, rank: int, settings: str, examples: list, corpus: dict, config: Any, sharded: bool) -> Any:
    peers = Peers(groups[size])
    model = shards(peers, settings) if sharded else whole_model(settings)
    tokens: list[int] = []
    embed = model.gen.get_input_embeddings()
    hook = embed.register_forward_pre_hook(lambda module, arguments: tokens.append(arguments[0].numel()))
    found = HeldOutEvaluator(examples, corpus, config, peers)(model, 7)
    hook.remove()
    return found, sum(tokens)


def mesh(size: int, replicas: int) -> str:
    """What is said of so many replicas."""
    try:
        return str(Peers(groups[size]).mesh("cpu", replicas).shape)
    except ValueError as error:
        return str(error)


def primitives(size: int, part: Tensor) -> dict:
    ranks = Peers(groups[size])
    counts = ranks.counts(len(part))
    everything = ranks.gather(part, counts)
    return {
        "counts": counts,
        "all": everything,
        "own": ranks.scatter_sum(everything.double() * (ranks.rank + 1), counts),
        "sum": ranks.sum(part.sum()),
        "max": ranks.max(part.sum()),
        "graph": everything.requires_grad,
    }


def counted(size: int, part: dict[str, Tensor], **options: Any) -> int:
    """FLOP of the matrix products of one loss and its gradients."""
    with FlopCounterMode(display=False) as counter:
        info_nce(size, part, **options)
    return counter.get_total_flops()


def refusal(size: int, part: dict[str, Any]) -> tuple[str, str]:
    """The error that a call ends in; the group works on behind it."""
    try:
        functional.info_nce(**part, group=groups[size])
        found = "", ""
    except (ValueError, TypeError) as error:
        found = type(error).__name__, str(error)
    assert Peers(groups[size]).counts(RANK) == list(range(size))
    return found


def changed(size: int, part: dict[str, Tensor]) -> str:
    """What is said where an operand is changed in place between a loss and its gradient."""
    tensors = leaves(part)
    loss = functional.info_nce(**tensors, group=groups[size], reduction="none").sum()
    with torch.no_grad():
        tensors["query"].mul_(2.0)
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return ""


def purposes(size: int, part: None) -> str:
    try:
        Peers(groups[size]).meet("evaluation" if RANK == 1 else "counts", {"n": 1})
    except PeerError as error:
        return str(error)
    return ""


def lost(how: str, when: str, who: int, timeout: float) -> tuple[str, float]:
    """What the others see when one rank dies or stops before they meet at all, before, or in the middle of, a loss."""
    peers.NOTICE, channel.ROLL_CALL = 0.3, 1.5

    def vanish() -> None:
        os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)

    if when == "first":
        if who == RANK:
            vanish()
        time.sleep(1)
        start = time.monotonic()
        try:
            Peers(groups[SIZE], timeout=timeout)
        except PeerError as error:
            return str(error), time.monotonic() - start
    start = time.monotonic()
    try:
        ranks = Peers(groups[SIZE], timeout=timeout)  # the others may still be at it when one vanishes
        if who == RANK and when == "before":
            vanish()
        if who == RANK:
            ranks.run_collective = lambda *collective: vanish()
        start = time.monotonic()
        functional.info_nce(torch.randn(3, 4), torch.randn(3, 4, requires_grad=True), group=ranks)
    except PeerError as error:
        return str(error), time.monotonic() - start
    return "", time.monotonic() - start


if __name__ == "worker":
    start()
    PIPE.send(True)
    while True:
        try:
            name, arguments, options = PIPE.recv()
        except EOFError:
            os._exit(0)
        try:
            PIPE.send((True, globals()[name](*arguments, **options)))
        except Exception as error:
            PIPE.send((False, f"rank {RANK}: {type(error).__name__}: {error}"))
