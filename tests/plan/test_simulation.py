"""The simulation against torch.profiler on real steps, its controls, and the figures of the presets."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from cosup_fast.functional import release_workspace
from cosup_fast.plan import simulate
from cosup_fast.plan.planner import run_simulations
from cosup_fast.plan.request import PlanRequest
from cosup_fast.training.optimizers import LocalOptimizer
from cosup_fast.training.step import accumulate_gradients

SMALL = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8000, "max_position_embeddings": 1024,
}  # fmt: skip


def request(**fields) -> PlanRequest:
    here = {"gpus": 1, "sharding": "none", "device": "cpu", "precision": "float32", "activation_checkpointing": "none"}
    packs = {"gen_sequences": 2, "gen_length": 256, "embseq_sequences": 4, "embseq_length": 96}
    return PlanRequest(**{"gen": SMALL, **here, **packs, **fields})


def simulated(*asked: PlanRequest) -> list[float]:
    return [answer["peak"] / 2**20 for answer in run_simulations([(one, None) for one in asked])]


def measured(asked: PlanRequest) -> float:
    """MiB: the most that torch's allocator held in a third step, by the profiler, the weights included."""
    torch.manual_seed(0)
    model = simulate._make_model(asked, None)
    batch = simulate._make_batch(asked, model)
    optimizer = LocalOptimizer(model.named_parameters(), asked.optimizer, lr=1e-5)

    def step():
        accumulate_gradients(model, batch, precision=asked.precision, ntp_count=1, nsp_count=1)
        if asked.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        optimizer.step()
        optimizer.zero_grad()

    def held() -> int:
        tensors = [*model.parameters(), *model.buffers()]
        tensors += [x for state in optimizer.states().values() for x in state.values() if isinstance(x, torch.Tensor)]
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())

    step()
    step()
    release_workspace()
    before = held()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    total = peak = 0
    events = sorted(
        (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    )
    for event in events:
        total += event.nbytes()
        peak = max(peak, total)
    return (before + peak) / 2**20


@pytest.mark.parametrize(
    "fields",
    [{}, {"activation_checkpointing": "full"}, {"gen_packs": 2, "embseq_packs": 3}, {"shared": True}],
    ids=lambda fields: "-".join(fields) or "plain",
)
def test_a_simulated_step_takes_what_a_real_one_does(fields):
    asked = request(**fields)
    (ours,), real = simulated(asked), measured(asked)
    assert ours == pytest.approx(real, rel=0.02)
