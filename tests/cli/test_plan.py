"""`cosup-fast plan`: what it prints, what it refuses, and the straight line through a few layers."""

from __future__ import annotations

import json

import pytest

from cosup_fast.cli.plan import show
from cosup_fast.config import load_config
from cosup_fast.plan import planner
from cosup_fast.plan.configs import decoder, model_config
from cosup_fast.plan.request import PlanRequest
from cosup_fast.plan.time import StepTime, estimate_step

SMALL_PACKS = ["--gen-pack", "2x64", "--embseq-pack", "4x32"]


@pytest.fixture
def deep(tmp_path):
    """A configuration of eight layers, which is more than a quick plan simulates."""
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path / "config.json")


@pytest.mark.slow
def test_a_plan_tells_peak_breakdown_verdict_and_advice(cosup, deep, capsys):
    status, out, _ = cosup("plan", f"model.gen={deep}", "--gpu-memory", 24, "--json", *SMALL_PACKS)
    found = json.loads(out)
    assert status == 0
    assert found["verdict"] == "fits"
    assert found["exact"]
    assert found["peak_gib"] == pytest.approx(sum(found["breakdown_gib"].values()), abs=0.01)
    assert found["margin_gib"] == 6.0
    assert found["largest_batch"] > 10
    assert found["phase"]
    assert found["step_time"]["utilization"] == 0.4
    advised = {switch["setting"]: switch["peak_gib"] for switch in found["advice"]}
    for setting in ("training.activation_checkpointing=full", "training.optimizer=adamw-8bit"):
        assert advised[setting] < found["peak_gib"]

    # What a person reads of the same, and the quick form on a GPU that is too small.
    found.pop("verdict")
    switches = tuple(planner.Switch(**switch) for switch in found["advice"])
    show(planner.MemoryPlan(**{**found, "advice": switches, "step_time": StepTime(**found["step_time"])}), "title")
    said = capsys.readouterr().out
    for words in ("fits: 6.", "every layer simulated", "largest batch", "half the size", *advised):
        assert words in said
    status, out, _ = cosup("plan", f"model.gen={deep}", "--gpu-memory", 6, "--quick", *SMALL_PACKS)
    assert status == 1
    assert "does NOT fit" in out
    assert "simulated with a few layers" in out
    assert "estimate, not measured" in out
    assert "largest batch" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "nobody"], "no such preset, only llama2-7b-8x80g"),
        (["model.gen=nowhere/config.json"], "there is no configuration 'nowhere/config.json'"),
        (["model.gen=llama2-7b", "--gen-pack", "4"], "--gen-pack '4': expected sequences x tokens"),
        (["model.gen=llama2-7b", "training.sharding=none", "--gpus", 2], "training.sharding=none is a run on one GPU"),
        (["--preset", "llama2-7b-1x80g", "--nsp-batch", 64], "training.optimizer_in_backward=true takes one"),
        (["--preset", "llama2-7b-1x80g", "--gpus", 2], "training.optimizer_in_backward=true is a run on one GPU"),
        (["model.gen=llama2-7b", "model.embseq_layers=33"], "llama2-7b has 32 layers, 33 were asked for"),
        (["training.optimiser=adamw"], "unknown field 'training.optimiser'"),
    ],
)
def test_what_cannot_be_planned_is_refused(cosup, arguments, words):
    status, _, err = cosup("plan", *arguments)
    assert status == 1
    assert words in err


@pytest.mark.parametrize(
    ("gpus", "overrides", "count"),
    [
        (1, ["training.sharding=ddp"], 6),
        (1, ["training.sharding=fsdp"], 6),
        (2, ["training.sharding=ddp"], 6),
        (2, ["training.sharding=fsdp"], 5),
        (2, ["model.gen_lora.rank=4", "model.gen_lora.quantize=nf4"], 5),
    ],
)
def test_what_is_advised_can_be_set(gpus, overrides, count):
    overrides = ["model.gen=smollm2-135m", *overrides]
    packs = {"gen_sequences": 4, "embseq_sequences": 8}
    found = planner.find_alternatives(PlanRequest.of(load_config(None, overrides), gpus=gpus, **packs))
    assert len(found) == count
    for setting, changed in found.items():
        if setting.startswith("packs of half the size"):
            assert (changed.gen_sequences, changed.gen_packs) == (2, 2)
            continue
        ours = PlanRequest.of(load_config(None, [*overrides, *setting.split()]), gpus=gpus, **packs)
        same = {"sharding": "none"} if changed.optimizer_in_backward else {}  # in one process each is
        assert ours.model_copy(update=same) == changed


@pytest.mark.parametrize(
    ("arguments", "packs"),
    [
        ([], (4, 1024, 16, 256, 1)),
        (["training.tokens_per_micro_batch=4096"], (4, 1024, 16, 256, 1)),
        (["training.tokens_per_micro_batch=8192", "training.batch_size=512"], (8, 1024, 32, 256, 8)),
        (["training.tokens_per_micro_batch=600"], (1, 600, 2, 256, 8)),
        (["training.micro_batch_size=2", "--nsp-batch", 4], (2, 1024, 2, 256, 1)),
        (["training.tokens_per_micro_batch=4096", "--gen-pack", "3x7", "--embseq-pack", "5x6"], (3, 7, 5, 6, 4)),
    ],
)
def test_packs_are_those_of_the_configuration(cosup, monkeypatch, arguments, packs):
    def seen(request, memory, *, quick):
        found = (request.gen_sequences, request.gen_length, request.embseq_sequences, request.embseq_length)
        raise ValueError(f"{(*found, request.gen_packs)} with NSP {request.nsp_weight:g}")

    monkeypatch.setattr(planner, "make_plan", seen)
    _, _, err = cosup("plan", "model.gen=llama2-7b", "--gpus", 2, "nsp.weight=0.5", *arguments)
    assert err == f"error: {packs} with NSP 0.5"


def test_layers_are_cut_from_the_decoder_of_any_configuration(tmp_path):
    text = {"model_type": "gemma3_text", "num_hidden_layers": 9, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    cut = decoder(model_config(str(tmp_path / "config.json"), 3))
    assert (cut.num_hidden_layers, len(cut.layer_types), cut.hidden_size) == (3, 3, 64)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mpt", "n_layers": 4, "d_model": 32}))
    assert decoder(model_config(str(tmp_path / "config.json"), 2)).num_hidden_layers == 2
    asked = PlanRequest(gen=model_config(str(tmp_path / "config.json")), gpus=1)
    assert estimate_step(asked).seconds >= 0


def test_what_is_not_trained_takes_less_time():
    def pflop(**fields) -> float:
        gen = model_config("llama2-7b")
        return estimate_step(PlanRequest(gen=gen, activation_checkpointing="none", **fields)).pflop

    assert pflop(embseq_lora={"rank": 8}) < 0.9 * pflop()
    assert pflop(freeze_embseq=True) < 0.9 * pflop(embseq_lora={"rank": 8})
    assert pflop(nsp_weight=0) < 0.9 * pflop(freeze_embseq=True)  # there is none
    assert pflop(ntp_weight=0) < pflop()  # no head


def test_a_failed_simulation_says_why(cosup, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    status, _, err = cosup("plan", f"model.gen={tmp_path / 'config.json'}", "--quick")
    assert status == 1
    assert "the simulation of this step failed" in err
    assert "ViTConfig" in err


def test_the_largest_batch_fits_and_is_nearly_the_last_that_does():
    peak = {times: max(10 + 2 * times, 4 * times) for times in range(1, 100)}  # convex: another phase takes over
    for room in (11, 12, 20, 40, 41, 200):
        expected = max((times for times, found in peak.items() if found <= room), default=None)
        found = planner.largest_fitting(room, {1: peak[1], 2: peak[2]}, peak.__getitem__)
        assert found == expected if expected is None else 0.9 * expected <= found <= expected


def test_known_configurations_have_the_published_numbers_of_parameters():
    expected = {"llama2-7b": 6_738_415_616, "tinyllama-1.1b": 1_100_048_384, "smollm2-135m": 134_515_008}
    for name, count in expected.items():
        config = model_config(name)
        width, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
        head = width // config["num_attention_heads"] * config["num_key_value_heads"]
        layer = width * (2 * width + 2 * head + 3 * inner + 2)
        embeddings = vocabulary * width * (1 if config["tie_word_embeddings"] else 2)
        assert config["num_hidden_layers"] * layer + embeddings + width == count
