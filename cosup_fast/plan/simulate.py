"""One rank's training step on fake tensors: the modules, the sharding, the step and the optimizer of a real run.

A process of its own, which `planner.Simulator` talks to. It pretends to be one of so many ranks, whose collectives move
nothing, and patches what no fake tensor can do. Everything is on the CPU, where allocations are the same but for the
rounding of a GPU.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from cosup_fast import functional
from cosup_fast.config.model import NSPConfig, NTPConfig
from cosup_fast.data.packing import CoSupervisionBatch, GenPack, Pack, StepCounts
from cosup_fast.kernels.softmax_xent.call import Call
from cosup_fast.kernels.softmax_xent.chunk_torch import operand_dtype
from cosup_fast.model import CoSupervisionModel, attention, backbone
from cosup_fast.model import model as modeling
from cosup_fast.model.adapters import add_adapters
from cosup_fast.model.attention import PACKED_SDPA
from cosup_fast.model.loading import keep_layers
from cosup_fast.plan.memory import LiveMemory, phase
from cosup_fast.plan.request import PlanRequest
from cosup_fast.plan.scaling import StepWeights
from cosup_fast.plan.weights import count_step_weights
from cosup_fast.training.adamw import optimizer_class
from cosup_fast.training.optimizers import LocalOptimizer
from cosup_fast.training.sharding import local, shard, unsharded_parameters
from cosup_fast.training.step import accumulate_gradients


@dataclass(frozen=True)
class Simulated:
    """What a step of one rank takes at its highest, in bytes."""

    peak: int
    phase: str
    breakdown: dict[str, int]
    parameters: int  # of both models, trained or not
    trained: int
    weights: StepWeights


class _Template:
    """What the model asks of a template here."""

    nsp = context_start = context_end = pad = 0


class _Repeated(Pack):
    """Stands for several packs of its size: the rows of all of them are read from this one.

    Nothing but those rows outlives a pack, so that a step of many packs has its peak with two.
    """

    times: int

    @property
    def last_rows(self) -> Tensor:
        return super().last_rows.repeat(self.times)


def simulate(request: PlanRequest, *, layers: tuple[int, int] | None = None) -> Simulated:
    """The peak of the second of two steps: in the first one optimizer states are not there yet.

    Args:
        request: the run.
        layers: give Gen and Embseq so many decoder layers instead of their own.
    """
    with ExitStack() as stack:
        mesh = None
        if request.sharding == "fsdp" and request.gpus > 1:  # one process has nobody to share with
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.gpus)
            stack.callback(dist.destroy_process_group)
            shape = (request.replicas, request.gpus // request.replicas)
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))
            mesh = mesh if request.replicas > 1 else mesh["shards"]
        stack.enter_context(_patched(request))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model = make_fake_model(request, layers)
        weights = count_step_weights(model, request)
        if mesh is not None:
            shard(model, mesh, precision=request.precision)
        batch = make_fake_batch(request, model)
        memory = LiveMemory()
        memory.transient = _workspace(request, memory)
        memory.mark((local(p.data) for p in model.parameters()), "parameters")
        memory.mark(model.buffers(), "parameters")
        memory.mark(_tensors(batch), "activations")
        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: memory.mark([local(p.grad)], "gradients"))
        optimizer = LocalOptimizer(
            model.named_parameters(), request.optimizer, lr=1e-5, in_backward=request.optimizer_in_backward
        )
        _follow(model, memory, request)
        with memory:
            for _ in range(2):
                memory.peak = type(memory.peak)()
                with phase(memory, "loss", "activations"):
                    accumulate_gradients(
                        model,
                        batch,
                        precision=request.precision,
                        ntp_count=1,
                        nsp_count=1,
                    )
                with phase(memory, "sum of gradients over ranks", "temporary"):
                    if request.gpus > 1:
                        _reduce([p for p in unsharded_parameters(model) if p.requires_grad])
                with phase(memory, "optimizer step", "temporary"):
                    if request.clip and not request.optimizer_in_backward:
                        _clip([local(p.grad) for p in model.parameters() if p.grad is not None])
                    optimizer.step()
                    states = (x for state in optimizer.states().values() for x in state.values())
                    memory.mark((x for x in states if isinstance(x, Tensor)), "optimizer states")
                optimizer.zero_grad()
        peak = memory.peak
        count = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        kinds = {str(kind): size for kind, size in peak.kinds.items()}
        return Simulated(peak.total, peak.phase, kinds, count, trained, weights)


def make_fake_model(request: PlanRequest, layers: tuple[int, int] | None) -> CoSupervisionModel:
    """The model of a run without its weights, of these depths where `layers` says so."""
    dtype = getattr(torch, request.dtype)

    def make(values: dict[str, Any], factory: Any, depth: int | None) -> Any:
        config = AutoConfig.for_model(**values)
        if depth is not None:
            keep_layers(config, depth, config.model_type)
        return factory.from_config(config, dtype=dtype, attn_implementation=PACKED_SDPA, trust_remote_code=False)

    depths = layers or (None, None)
    gen = make(request.gen, AutoModelForCausalLM, depths[0])
    gen.resize_token_embeddings(gen.get_input_embeddings().num_embeddings + request.new_tokens, mean_resizing=False)
    second = request.has_embseq and not request.shared
    embseq = make(request.embseq or request.gen, AutoModel, depths[1]) if second else None
    template: Any = _Template()
    model = CoSupervisionModel(
        gen,
        embseq,
        template,
        NSPConfig(weight=request.nsp_weight),
        ntp=NTPConfig(weight=request.ntp_weight),
        freeze_embseq=request.freeze_embseq and request.has_embseq,
        has_embseq=request.has_embseq,
    )
    model.train()
    for part, lora in ((gen, request.gen_lora), (embseq, request.embseq_lora)):
        if part is not None and lora.rank:
            if lora.quantize:
                _quantize(part)
            add_adapters(part, lora, [0, 1, 2, 3] if part is gen else [])
    model.enable_activation_checkpointing(request.activation_checkpointing)
    return model


class FourBit(nn.Linear):
    """A linear layer whose weight is bytes of two elements, whole only within a product, as bitsandbytes has it."""

    def __init__(self, layer: Any):
        out, within = layer.weight.T.shape if type(layer).__name__ == "Conv1D" else layer.weight.shape
        super().__init__(within, out, bias=False, device="meta")
        self.weight = nn.Parameter(torch.empty(out * within // 2, dtype=torch.uint8), requires_grad=False)
        self.bias = layer.bias
        # One byte for 64 elements, of which 256 share one of four more (double quantization).
        self.register_buffer("scales", torch.empty(out * within // 64 + out * within // 4096, dtype=torch.uint8))

    def forward(self, input: Tensor) -> Tensor:
        product = _FourBitProduct.apply(input, self.out_features)
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _FourBitProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, out: int) -> Tensor:
        ctx.shape = out, x.shape[-1]
        return x @ x.new_empty(ctx.shape).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] @ gradients[0].new_empty(ctx.shape), None


def _quantize(part: Any) -> None:
    """Puts 4-bit weights in place of those that transformers would quantize: every linear layer but the head."""
    head = part.get_output_embeddings()
    for name, module in list(part.named_modules()):
        if module is not head and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            part.set_submodule(name, FourBit(module))


def make_fake_batch(request: PlanRequest, model: CoSupervisionModel) -> CoSupervisionBatch:
    """A step's packs, full of tokens."""
    gen_packs, passage_packs = min(2, request.gen_packs), min(2, request.embseq_packs)

    def pack(sequences: int, length: int, times: int) -> Pack:
        made = Pack.of([[0] * length] * sequences)
        found = _Repeated(made.input_ids, made.position_ids, made.cu_seqlens, made.lengths, made.count)
        object.__setattr__(found, "times", times)
        return found

    def shares(total: int, packs: int) -> list[int]:
        return [total // packs + (i < total % packs) for i in range(packs)]

    rows = request.gen_sequences * request.gen_length
    queries = request.gen_sequences * request.queries_per_sequence * request.has_embseq
    gen = tuple(
        GenPack(
            pack(request.gen_sequences, request.gen_length, 1),
            torch.arange(rows),
            torch.zeros(rows, dtype=torch.int64),
            torch.zeros(queries * times, dtype=torch.int64),
        )
        for times in shares(request.gen_packs, gen_packs)
    )
    passages = tuple(
        pack(request.embseq_sequences, request.embseq_length, times)
        for times in shares(request.embseq_packs, passage_packs)
        if request.has_embseq
    )
    keys = request.embseq_sequences * request.embseq_packs * request.has_embseq
    asked = queries * request.gen_packs
    return CoSupervisionBatch(
        gen,
        passages,
        positive=torch.zeros(asked, dtype=torch.int64),
        key_ids=torch.zeros(keys, dtype=torch.int64),
        positive_ids=None,
        step=StepCounts(rows * request.gen_packs, asked, keys, rows),
    )


def _follow(model: CoSupervisionModel, memory: LiveMemory, request: PlanRequest) -> None:
    """Names the phases of a step, and shows NSP the passages of the other ranks."""

    def named(forward: Any, what: str) -> Any:
        def run(*args: Any) -> Any:
            kind = "activations" if torch.is_grad_enabled() else "temporary"
            with phase(memory, f"forward of {what}", kind):
                out = forward(*args)
            for t in out if isinstance(out, tuple) else (out,):
                if t.requires_grad:
                    t.register_hook(lambda _: setattr(memory, "phase", f"backward of {what}"))
            return out

        return run

    found: Any = model
    found.gen_losses = named(model.gen_losses, "Gen")
    found.query_embeddings = named(model.query_embeddings, "Gen")
    found.sequence_states = named(model.sequence_states, "Embseq")
    if request.gpus == 1:
        return
    alone = model.nsp_loss

    def nsp_loss(query: Tensor, keys: Tensor, batch: CoSupervisionBatch, *, count: int, group: None) -> Any:
        others = keys.new_empty((request.gpus - 1) * len(keys), keys.shape[1])
        return alone(query, torch.cat([keys, others]), batch, count=count)

    found.nsp_loss = nsp_loss


def _workspace(request: PlanRequest, memory: LiveMemory) -> Any:
    """What the losses hold beside their results: a chunk of scores, as `functional.explain` has it.

    On a CPU the largest chunk is kept from one loss to the next.
    """
    plans: dict[Any, Any] = {}
    kept: list[Tensor] = []

    def transient(operator: Any, args: tuple[Any, ...]) -> int:
        if operator is not torch.ops.cosup_fast.softmax_xent.default:
            return 0
        call = Call._make(args)
        x, w = call.x, call.w
        key = len(x), len(w), x.shape[1], call.product_dtype, sum(call.needs[:2])
        if key not in plans:
            with _disable_current_modes():
                plans[key] = functional.explain(*key[:3], dtype=key[3], device=request.device, gradients=key[4])
        plan = plans[key]
        if request.device != "cpu":
            return plan.workspace
        chunk = plan.rows * len(w) * operand_dtype(key[3], x.device, key[0] * key[1] * key[2]).itemsize
        if not kept or kept[0].numel() < chunk:
            kept[:] = [torch.empty(chunk, dtype=torch.uint8)]
            memory.mark(kept, "temporary")
        return max(0, plan.workspace - kept[0].numel())

    return transient


@contextmanager
def _patched(request: PlanRequest) -> Iterator[None]:
    """Without what reads values, which fake tensors do not have."""
    with ExitStack() as stack:

        def replace(owner: Any, name: str, value: Any) -> None:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        replace(modeling, "find_final_norm", _named_norm)
        replace(attention, "LONGEST", {})  # a CPU's alone
        if request.gen_lora.rank or request.embseq_lora.rank:
            replace(nn.Module, "to", lambda self, *args, **kwargs: self)  # fake parameters cannot be moved in place
        rounded = request.dtype == "bfloat16"
        optimizer_class(request.optimizer, rounded=rounded)(rounded=rounded).simulate(replace)
        yield


def _named_norm(model: nn.Module) -> backbone.FinalNorm | None:
    """As `find_final_norm` would find it, by its class alone."""
    for name in backbone._NORMS:
        norm = getattr(model, name, None)
        if norm is not None and "RMSNorm" in type(norm).__name__:
            return backbone.FinalNorm(name, 1e-6, 0.0)
    return None


def _reduce(parameters: list[nn.Parameter]) -> None:
    """What summing whole gradients over ranks takes, see `training.ranks`."""
    for p in parameters:
        if p.grad is not None:
            flat = p.grad.flatten().float().clone()
            p.grad = flat.view_as(p).to(p.dtype)


def _clip(gradients: list[Tensor]) -> None:
    norm = nn.utils.get_total_norm(gradients, foreach=False)
    for gradient in gradients:
        gradient.mul_(norm)


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, tuple | list):
        for one in x:
            yield from _tensors(one)
    elif hasattr(x, "__dataclass_fields__"):
        for name in x.__dataclass_fields__:
            yield from _tensors(getattr(x, name, None))


def main() -> None:
    """Reads requests, one a line: {"request": ..., "layers": null}; writes answers, or {"error": ...}.

    The end of the input is that of the process, also within a simulation: whoever asked is gone then, perhaps killed.
    """
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        asked = json.loads(lines.get())
        try:
            answer = asdict(simulate(PlanRequest.model_validate(asked["request"]), layers=asked.get("layers")))
        except Exception as error:  # of a configuration that cannot work, or that cannot be simulated; others may
            words = str(error).strip().splitlines() or [type(error).__name__]
            answer = {"error": words[0]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
