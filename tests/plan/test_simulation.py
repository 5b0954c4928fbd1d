"""The simulation against torch.profiler on real steps, its controls, and the figures of the presets."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from cosup_fast.config import load_config
from cosup_fast.config.model import LoRAConfig, ModelConfig
from cosup_fast.functional import release_workspace
from cosup_fast.model.loading import load_language_model
from cosup_fast.plan import planner, simulate
from cosup_fast.plan.configs import model_config
from cosup_fast.plan.planner import Simulator
from cosup_fast.plan.presets import PRESETS
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


@pytest.fixture(scope="module")
def peaks():
    """MiB of every control."""
    controls = {
        "plain": {},
        "recomputed": {"activation_checkpointing": "full"},
        "partly recomputed": {"activation_checkpointing": "selective"},
        "half of the sequences": {"gen_sequences": 1, "embseq_sequences": 2},
        "8-bit": {"optimizer": "adamw-8bit"},
        "shared out": {"sharding": "fsdp", "gpus": 4},
        "frozen": {"freeze_embseq": True},
        "adapters": {"gen_lora": {"rank": 4}, "embseq_lora": {"rank": 4}},
        "two packs": {"gen_packs": 2, "embseq_packs": 2},
        "eight packs": {"gen_packs": 8, "embseq_packs": 8},
        "without NSP": {"nsp_weight": 0.0},
        "4-bit": {f"{part}_lora": {"rank": 4, "quantize": "nf4"} for part in ("gen", "embseq")},
        "shared out by one": {"sharding": "fsdp"},
    }
    return dict(zip(controls, simulated(*(request(**fields) for fields in controls.values())), strict=True))


def test_what_takes_more_memory_is_simulated_to(peaks):
    assert peaks["plain"] > peaks["partly recomputed"] > peaks["recomputed"]
    for less in ("half of the sequences", "8-bit", "shared out", "frozen", "adapters", "without NSP"):
        assert peaks["plain"] > 1.05 * peaks[less], less
    assert peaks["adapters"] > 1.1 * peaks["4-bit"]
    assert peaks["shared out by one"] == peaks["plain"]


def test_more_packs_cost_their_embeddings_alone(peaks):
    """Of 6 packs with 2 x 4 queries and 4 passages: the vectors and gradients of each, in fp32."""
    added = peaks["eight packs"] - peaks["two packs"]
    vectors = 6 * (8 + 4) * SMALL["hidden_size"] * 4 / 2**20
    assert 0 < added < 8 * vectors


def test_logits_of_every_token_would_show(monkeypatch):
    """The control of the controls: a head that forms all logits."""
    from cosup_fast.losses import LinearCrossEntropyLoss

    fused = simulate.simulate(request()).peak

    def forward(self, hidden, weight, target, *, bias=None, count=None):
        return torch.nn.functional.cross_entropy(hidden @ weight.T, target)

    monkeypatch.setattr(LinearCrossEntropyLoss, "forward", forward)
    logits = 2 * 256 * SMALL["vocab_size"] * 4  # of which the fused loss keeps a chunk of the same size, but once
    assert simulate.simulate(request()).peak > fused + logits / 2


def simulated(*asked: PlanRequest) -> list[float]:
    return [simulate.simulate(one).peak / 2**20 for one in asked]


def measured(asked: PlanRequest) -> float:
    """MiB: the most that torch's allocator held in a third step, by the profiler, the weights included."""
    torch.manual_seed(0)
    model = simulate.make_fake_model(asked, None)
    batch = simulate.make_fake_batch(asked, model)
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


def test_8_bit_states_are_counted_as_they_are():
    asked = request(optimizer="adamw-8bit")
    answer = simulate.simulate(asked)
    assert answer.breakdown["optimizer states"] == pytest.approx(2 * answer.trained, rel=0.05)
    assert answer.breakdown["parameters"] == pytest.approx(4 * answer.parameters, rel=0.01)


def test_4_bit_weights_are_counted_as_bitsandbytes_keeps_them(make_folder):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    folder = make_folder("llama", tie_word_embeddings=False, **sizes)
    settings = ModelConfig(gen=folder, gen_lora=LoRAConfig(rank=4, quantize="nf4"), freeze_embseq=True)
    real = load_language_model(folder, settings, torch.device("cpu"))
    kept = sum(
        x.nbytes
        for module in real.modules()
        if type(module).__name__ == "Linear4bit"
        for x in (module.weight.data, module.weight.quant_state.absmax, module.weight.quant_state.state2.absmax)
    )
    fake = simulate.make_fake_model(request(gen=model_config(folder), gen_lora=settings.gen_lora), None)
    ours = sum(
        x.nbytes
        for module in fake.gen.modules()
        if isinstance(module, simulate.FourBit)
        for x in (module.weight, module.scales)
    )
    assert ours == pytest.approx(kept, rel=0.002)


@pytest.mark.parametrize("depths", [(9, 9), (4, 9), (8, 10)])
def test_the_line_through_a_few_layers_leads_to_all_of_them(depths):
    gen, embseq = ({**SMALL, "num_hidden_layers": depth} for depth in depths)
    asked = request(gen=gen, embseq=embseq)

    def ask(layers):
        assert max(layers) <= 6
        return asdict(simulate.simulate(asked, layers=layers))

    line, whole = planner.peak_line(ask, planner.depths_of(asked)), simulate.simulate(asked)
    assert line["peak"] == pytest.approx(whole.peak, rel=0.02)
    assert (line["parameters"], line["trained"]) == (whole.parameters, whole.trained)
    assert sum(line["breakdown"].values()) == pytest.approx(line["peak"], abs=8)


def test_kinds_of_peaks_in_different_phases_are_not_continued():
    """A shallow model's peak may be its loss, a deeper one's its backward pass: fewer than no activations follow."""
    few = {
        3: {"peak": 90, "phase": "loss", "breakdown": {"parameters": 30, "activations": 60}},
        6: {
            "peak": 120,
            "phase": "backward of Gen",
            "breakdown": {"parameters": 60, "gradients": 50, "activations": 10},
        },
    }
    same = {"parameters": 1, "trained": 1, "weights": {"passes": [], "whole": 0}}
    line = planner.peak_line(lambda layers: few[layers[0]] | same, (12, 12))
    assert (line["peak"], line["phase"], line["breakdown"]) == (180, "backward of Gen", {})


FIGURES = [  # preset, packs of each model, GiB
    ("llama2-7b-8x80g", 1, 28.5),
    ("llama2-7b-8x80g-8bit", 1, 19.5),
    ("llama2-7b-8x80g-bf16", 1, 13.5),
    ("llama2-7b-1x80g", 1, 55.0),
    ("llama2-7b-8x80g", 32, 35.0),
    ("tinyllama-1x24g", 1, 12.5),
    ("tinyllama-1x24g", 16, 13.0),
]


def test_every_preset_has_a_figure():
    assert {name for name, _, _ in FIGURES} == set(PRESETS)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "packs", "most"), FIGURES)
def test_the_presets_fit(preset, packs, most):
    chosen = PRESETS[preset]
    config = load_config(None, [f"{name}={json.dumps(value)}" for name, value in chosen.settings.items()])
    asked = PlanRequest.of(config, gpus=chosen.gpus, gen_packs=packs, embseq_packs=packs)
    with Simulator() as simulator:
        answer = simulator.ask(asked)
    assert answer["parameters"] == pytest.approx(2.13e9 if "tiny" in preset else 13.35e9, rel=0.01)
    assert 0.8 * most < answer["peak"] / 2**30 <= most
