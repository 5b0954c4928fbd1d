"""`cosup-fast plan`: whether a run fits into the memory of its GPUs, before it starts."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from cosup_fast.cli.common import err, interruptible, out, run_config, say
from cosup_fast.terminal import FigureTable

if TYPE_CHECKING:
    from cosup_fast.data.packing import PackLimits
    from cosup_fast.plan.planner import MemoryPlan
    from cosup_fast.plan.request import PlanRequest
    from cosup_fast.plan.scaling import Cluster, StepWeights, Traffic


def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG.yaml] [section.field=value]...", help="a configuration and overrides"),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="a known run, which overrides may change")] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs of each node, one process each; default: 1, or the preset's")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="nodes; also reports what travels in a step")] = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="hybrid sharding: instead of training.replicas, which sets it for a run")
    ] = None,
    nvlink: Annotated[
        float | None, typer.Option(min=1, help="with --nodes: GB/s from a GPU to others of its node; default: 300")
    ] = None,
    network: Annotated[
        float | None, typer.Option(min=0.1, help="with --nodes: GB/s of each GPU's link to other nodes; default: 25")
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(min=1, help="GiB of each GPU; default: 80, or the preset's")
    ] = None,
    gen_pack: Annotated[
        str | None,
        typer.Option(
            help="sequences x tokens of a pack of Gen's on each GPU; default: 4x1024, or of as many tokens as "
            "training.tokens_per_micro_batch says"
        ),
    ] = None,
    embseq_pack: Annotated[
        str | None,
        typer.Option(help="sequences x tokens of a pack of Embseq's; default: 16x256, or by the same setting"),
    ] = None,
    nsp_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="passages of a step over all GPUs, in packs (GradCache); default: one pack, or one passage for each "
            "of training.batch_size examples where steps are cut into micro-batches",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Let a few layers stand for all; give no advice.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Simulate a training step and report the memory it takes on each GPU; needs no weights and no GPU.

    The step, the sharding and the optimizer are those of a real run, on tensors that have shapes and no data. What is
    not simulated (CUDA context, NCCL, cuBLAS, scratch of attention, fragmentation) is left a margin. Exits with 1 if it
    does not fit.
    """
    from cosup_fast.plan.planner import make_plan
    from cosup_fast.plan.presets import PRESETS
    from cosup_fast.plan.request import PlanRequest
    from cosup_fast.plan.scaling import Cluster, step_traffic
    from cosup_fast.training.initial import as_in, inherit, initial_checkpoint

    given = arguments or []
    known = None
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"--preset {preset}: there is no such preset, only {', '.join(PRESETS)}")
        known = PRESETS[preset]
        given = [f"{name}={json.dumps(value)}" for name, value in known.settings.items()] + given
    per_node = gpus or (known.gpus if known else 1)
    gpus = per_node * (nodes or 1)
    gpu_memory = gpu_memory or (known.gpu_memory_gib if known else 80.0)
    config = inherit(run_config(given))
    if config.model.init_from is not None:
        config = as_in(initial_checkpoint(config), config)
    limits = config.training.pack_limits
    gen = _pack("--gen-pack", gen_pack) if gen_pack is not None else _default_pack(4, 1024, limits)
    embseq = _pack("--embseq-pack", embseq_pack) if embseq_pack is not None else _default_pack(16, 256, limits)
    if nsp_batch is None and (limits.tokens or limits.sequences):
        nsp_batch = config.training.batch_size
    packs = 1 if nsp_batch is None else math.ceil(nsp_batch / (gpus * embseq[0]))
    if nodes is None and (nvlink or network):
        option = "--nvlink" if nvlink else "--network"
        raise ValueError(f"{option} is the speed of links of a cluster: name its size with --nodes, or omit it")
    request = PlanRequest.of(
        config,
        gpus=gpus,
        replicas=replicas,
        gen_sequences=gen[0],
        gen_length=gen[1],
        gen_packs=packs,
        queries_per_sequence=math.ceil(embseq[0] / gen[0]),
        embseq_sequences=embseq[0],
        embseq_length=embseq[1],
        embseq_packs=packs,
    )
    if request.optimizer_in_backward and packs > 1:
        raise ValueError(
            f"--nsp-batch {nsp_batch} is {packs} packs on each GPU, and training.optimizer_in_backward=true takes one"
        )
    with interruptible("no plan was made"), err.status("simulating a step"):
        made = make_plan(request, gpu_memory, quick=quick)
    cluster = None if nodes is None else Cluster(per_node, nvlink or 300.0, network or 25.0)
    traffic = [] if cluster is None else step_traffic(request, made.weights, cluster)
    if as_json:
        print(json.dumps(made.to_json() | ({} if nodes is None else {"traffic": [asdict(one) for one in traffic]})))
    else:
        title = f"{_words(gen)} tokens of Gen, {_words(embseq)} of Embseq, {packs} of each a step"
        where = f"{gpus} GPUs" if request.replicas == 1 else f"{gpus} GPUs, {request.replicas} replicas"
        show(made, f"{title}; {where}" if gpus > 1 else title)
        if cluster is not None:
            show_traffic(request, made.weights, traffic, cluster)
    if not made.fits:
        raise typer.Exit(1)


def show(made: MemoryPlan, title: str) -> None:
    """Prints a plan."""
    table = FigureTable("", "GiB on each GPU", title=title, title_justify="left")
    for kind, size in sorted(made.breakdown_gib.items(), key=lambda item: -item[1]):
        table.add_row(kind, f"{size:.2f}")
    table.add_section()
    how = "every layer simulated" if made.exact else "simulated with a few layers, the others in a straight line"
    table.add_row(f"peak, in the {made.phase} ({how})", Text(f"{made.peak_gib:.2f}", style="bold"))
    table.add_row(
        "margin for what is not simulated: CUDA context, NCCL, cuBLAS, fragmentation", f"{made.margin_gib:.2f}"
    )
    table.add_row("memory", f"{made.gpu_memory_gib:.2f}")
    out.print(table)
    verdict = "fits" if made.fits else "does NOT fit"
    say(f"{verdict}: {made.peak_gib + made.margin_gib:.1f} of {made.gpu_memory_gib:g} GiB with the margin")
    say(f"trained: {made.trained / 1e9:.2f} of {made.parameters / 1e9:.2f} billion parameters")
    if made.largest_batch is not None:
        say(f"largest batch: packs with {made.largest_batch} times these sequences (estimate)")
    for switch in made.advice:
        say(f"  with {switch.setting}: about {switch.peak_gib:.2f} GiB")
    if (time := made.step_time) is not None:
        say(
            f"estimate, not measured: {time.seconds:.2g} s a step ({_flop(time.pflop)} at {time.utilization:.0%} of "
            f"{time.tflops_per_gpu:g} TFLOP/s on each GPU)"
        )


def show_traffic(request: PlanRequest, weights: StepWeights, traffic: list[Traffic], cluster: Cluster) -> None:
    """Prints what travels in a step, and from how many passages on that is more."""
    from cosup_fast.plan.scaling import keys_for_memory, keys_for_share, keys_of_step

    links = f"{cluster.node_gb_s:g} GB/s within a node, {cluster.network_gb_s:g} between nodes"
    table = FigureTable(
        "collective", "of", "GB a GPU sends", "seconds", "ranks", names=2, title=links, title_justify="left"
    )
    for one in traffic:
        table.add_row(one.collective, one.what, f"{one.gigabytes:.3g}", f"{one.seconds:.2g}", str(one.ranks))
    out.print(table)
    say("a model's prediction, not measured: links at their full rate, nothing hidden behind computation")
    if traffic and request.has_embseq:
        one, ten = (keys_for_share(request, weights, share) for share in (0.01, 0.1))
        say(f"embeddings of {keys_of_step(request):,} passages; with gradients they send 1% of what weights and their")
        say(f"  gradients send at {one:,} passages, 10% at {ten:,}; gathered on every GPU they take 8 GiB at")
        say(f"  {keys_for_memory(request, 8):,}: beyond that they would have to go round in a ring")


def _default_pack(sequences: int, length: int, limits: PackLimits) -> tuple[int, int]:
    """So many sequences, or those that the limits of a run leave room for."""
    if limits.tokens is not None:
        length = min(length, limits.tokens)
        sequences = limits.tokens // length
    return min(sequences, limits.sequences or sequences), length


def _flop(pflop: float) -> str:
    return f"{pflop:.3g} PFLOP" if pflop >= 1 else f"{1e3 * pflop:.3g} TFLOP"


def _words(pack: tuple[int, int]) -> str:
    return f"{pack[0]} x {pack[1]}"


def _pack(option: str, text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise ValueError(f"{option} {text!r}: expected sequences x tokens, as in 4x1024")
    return int(found[1]), int(found[2])
