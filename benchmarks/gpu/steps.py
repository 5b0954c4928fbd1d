"""Training steps of two models with random weights, made on the device: nothing is read but configurations.

A step is that of the training loop, without logging: gradients over the packs, then the optimizer. Tokens are random,
lengths are not: those of the plan that its peak is compared with, or as uneven as text is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from benchmarks.check import first_line
from benchmarks.gpu.limits import peak, synchronize
from benchmarks.gpu.session import AbsentError, Setting
from benchmarks.timing import Spread
from cosup_fast.config import load_config
from cosup_fast.config.model import NSPConfig
from cosup_fast.data.packing import CoSupervisionBatch, GenPack, Pack, StepCounts
from cosup_fast.model import CoSupervisionModel
from cosup_fast.model.attention import choose_attention
from cosup_fast.plan.planner import GIB, make_plan
from cosup_fast.plan.request import PlanRequest
from cosup_fast.plan.time import estimate_step
from cosup_fast.training.optimizers import LocalOptimizer
from cosup_fast.training.step import accumulate_gradients

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "tie_word_embeddings": False,
}  # fmt: skip
WARM_UP = 2


def llama2_7b(setting: Setting, seconds: float) -> dict[str, Any]:
    """As examples/llama2-7b-1x80g.yaml trains it, in the packs that `cosup-fast plan` takes unless told otherwise.

    Raises:
        AbsentError: the optimizer's package is missing, or the GPU is too small.
    """
    request = PlanRequest.of(load_config(EXAMPLES / "llama2-7b-1x80g.yaml"), gpus=1)
    if setting.device == "cuda" and torch.cuda.get_device_properties(0).total_memory < 70 * GIB:
        raise AbsentError(f"needs a GPU of 80 GB, this one has {torch.cuda.mem_get_info()[1] / GIB:.0f} GiB")
    return measure(_request(setting, request), setting, seconds)


def llama2_7b_gradients(setting: Setting, seconds: float) -> dict[str, Any]:
    """The same step up to its gradients, which are all kept: what can be measured without an 8-bit optimizer."""
    request = PlanRequest.of(load_config(EXAMPLES / "llama2-7b-1x80g.yaml"), gpus=1)
    request = _request(setting, request).model_copy(update={"optimizer_in_backward": False})
    return measure(request, setting, seconds, stepped=False)


def smollm2_135m(setting: Setting, seconds: float) -> dict[str, Any]:
    """SmolLM2-135M with itself, fp32 weights under bf16 autocast, sequences as uneven as real ones."""
    config = load_config(None, ["model.gen=smollm2-135m", "training.precision=bfloat16"])
    packs = {"gen_sequences": 32, "gen_length": 512, "embseq_sequences": 64, "embseq_length": 256}
    update = {"activation_checkpointing": "none", "sharding": "none"}
    request = PlanRequest.of(config, gpus=1, **packs).model_copy(update=update)
    return measure(_request(setting, request), setting, seconds, uneven=True)


def _request(setting: Setting, request: PlanRequest) -> PlanRequest:
    if not setting.rehearse:
        return request
    small = {"gen_sequences": 2, "gen_length": 24, "embseq_sequences": 4, "embseq_length": 12}
    plain = {"dtype": "float32", "precision": "float32", "optimizer": "adamw", "device": "cpu"}
    return request.model_copy(update={"gen": TINY, "embseq": TINY, **small, **plain})


def measure(
    request: PlanRequest, setting: Setting, seconds: float, *, stepped: bool = True, uneven: bool = False
) -> dict[str, Any]:
    """Seconds of steps, tokens/s, the peak beside the planned one, and the share of what the GPU can do.

    Args:
        request: models, packs and optimizer.
        setting: of the run.
        seconds: for all of it.
        stepped: with the optimizer.
        uneven: lengths from an eighth up to those of the request.

    Raises:
        AbsentError: the optimizer's package is missing.
    """
    end = time.monotonic() + 0.8 * seconds
    with ThreadPoolExecutor(1) as pool:
        planned = pool.submit(_planned, request, setting) if stepped and not uneven else None
        model = make_model(request, torch.device(setting.device))
        optimizer = _optimizer(model, request) if stepped else None
        batch = make_batch(request, model, uneven).to(torch.device(setting.device))
        times: list[float] = []
        loss = torch.zeros(())
        found: dict[str, Any] = {"attention": model.gen.config._attn_implementation}
        for i in range(WARM_UP + setting.size(20, 1)):
            if i == WARM_UP and setting.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            synchronize(setting)
            begin = time.perf_counter()
            loss = accumulate_gradients(model, batch, precision=request.precision).loss
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            else:
                model.zero_grad(set_to_none=False)
            synchronize(setting)
            times.append(time.perf_counter() - begin)
            if len(times) > WARM_UP and time.monotonic() + times[-1] > end:
                break
        found["plan"] = None if planned is None else planned.result()
    if setting.device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
        found["reserved_bytes"] = torch.cuda.max_memory_reserved()
    spread = Spread.of(times[WARM_UP:])
    found |= {
        "request": request.model_dump(exclude={"gen", "embseq"}),
        "warm_up_seconds": times[:WARM_UP],
        "seconds": times[WARM_UP:],
        "tokens": batch.tokens,
        "tokens/s": batch.tokens / spread.median,
        "loss": float(loss),
        "weights": sum(p.numel() for p in model.parameters()),
    }
    if not uneven:
        rate = estimate_step(request).pflop * 1e15 / spread.median
        top = peak(setting)
        found |= {"FLOP/s with recomputation": rate, "share of the data sheet's peak": top and rate / top}
    return found


def make_model(request: PlanRequest, device: torch.device) -> CoSupervisionModel:
    """Both models with the weights that transformers starts a model with, in training mode."""
    dtype = getattr(torch, request.dtype)
    attention = choose_attention("auto", device)

    def make(values: dict[str, Any], factory: Any) -> Any:
        with device:
            made = factory.from_config(AutoConfig.for_model(**values), dtype=dtype, attn_implementation=attention)
        return made.to(dtype)

    gen = make(request.gen, AutoModelForCausalLM)
    gen.resize_token_embeddings(gen.get_input_embeddings().num_embeddings + request.new_tokens, mean_resizing=False)
    embseq = make(request.embseq or request.gen, AutoModel)
    template: Any = SimpleNamespace(nsp=0, context_start=1, context_end=2, pad=3)
    model = CoSupervisionModel(gen, embseq, template, NSPConfig(weight=request.nsp_weight)).to(device)
    model.enable_activation_checkpointing(request.activation_checkpointing)
    return model.train()


def _optimizer(model: CoSupervisionModel, request: PlanRequest) -> LocalOptimizer:
    try:
        return LocalOptimizer(
            model.named_parameters(), request.optimizer, lr=1e-5, in_backward=request.optimizer_in_backward
        )
    except ValueError as error:  # the package is missing
        raise AbsentError(str(error)) from None


def make_batch(request: PlanRequest, model: CoSupervisionModel, uneven: bool) -> CoSupervisionBatch:
    """One pack for each model, of random tokens. Every other token is supervised, and queries ask for passages in turn.

    A passage answers as many queries as there are queries for each.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(model.vocabulary, AutoConfig.for_model(**(request.embseq or request.gen)).vocab_size)

    def pack(count: int, longest: int) -> Pack:
        sizes = [longest if not uneven else max(1, longest * (1 + i * 5 % 8) // 8) for i in range(count)]
        return Pack.of([torch.randint(vocabulary, (size,), generator=generator).tolist() for size in sizes])

    gen = pack(request.gen_sequences, request.gen_length)
    passages = pack(request.embseq_sequences, request.embseq_length)
    rows = torch.arange(0, len(gen.input_ids) - 1, 2)
    queries = _queries(gen.lengths, request.queries_per_sequence)
    asked = torch.arange(len(queries)) % request.embseq_sequences
    return CoSupervisionBatch(
        (GenPack(gen, rows, gen.input_ids[rows + 1], queries),),
        (passages,),
        positive=asked,
        key_ids=torch.arange(request.embseq_sequences),
        positive_ids=None,
        step=StepCounts(len(rows), len(queries), request.embseq_sequences, gen.tokens + passages.tokens),
    )


def _queries(lengths: Sequence[int], each: int) -> Tensor:
    """Rows of [NSP], evenly through every sequence."""
    rows, start = [], 0
    for length in lengths:
        rows += [start + length * (i + 1) // (each + 1) for i in range(each)]
        start += length
    return torch.tensor(sorted(set(rows)))


def _planned(request: PlanRequest, setting: Setting) -> dict[str, Any]:
    """What `cosup-fast plan` foresees, from a process of its own on the CPU."""
    total = torch.cuda.get_device_properties(0).total_memory / GIB if setting.device == "cuda" else 80.0
    try:
        plan = make_plan(request, total, quick=True)
    except ValueError as error:
        return {"error": first_line(error)}
    return {"peak_bytes": int(plan.peak_gib * GIB), "breakdown_gib": plan.breakdown_gib, "phase": plan.phase}
