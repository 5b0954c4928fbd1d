"""`cosup-fast plan`: what it prints, what it refuses, and the straight line through a few layers."""

from __future__ import annotations

import json

import pytest

from cosup_fast.plan import planner
from cosup_fast.plan.configs import model_config
from cosup_fast.plan.presets import PRESETS

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


def test_a_plan_tells_peak_breakdown_and_verdict(cosup, deep):
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
    status, out, _ = cosup("plan", f"model.gen={deep}", "--gpu-memory", 24, "--json", "--quick", *SMALL_PACKS)
    quick = json.loads(out)
    assert not quick["exact"]
    assert quick["peak_gib"] == pytest.approx(found["peak_gib"], rel=0.03)
    assert quick["parameters"] == found["parameters"]


def test_what_does_not_fit_comes_with_advice(cosup, deep):
    status, out, _ = cosup("plan", f"model.gen={deep}", "--gpu-memory", 6, *SMALL_PACKS)
    assert status == 1
    assert "does NOT fit" in out
    for setting in ("training.activation_checkpointing=full", "adamw-8bit", "half the size"):
        assert setting in out
    assert "estimate, not measured" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "nobody"], "no such preset, only llama2-7b-8x80g"),
        (["model.gen=nowhere/config.json"], "there is no configuration 'nowhere/config.json'"),
        (["model.gen=llama2-7b", "--gen-pack", "4"], "--gen-pack '4': expected sequences x tokens"),
        (["model.gen=llama2-7b", "training.sharding=none", "--gpus", 2], "training.sharding=none is a run on one GPU"),
        (["--preset", "llama2-7b-1x80g", "--nsp-batch", 64], "training.optimizer_in_backward=true takes one"),
        (["training.optimiser=adamw"], "unknown field 'training.optimiser'"),
    ],
)
def test_what_cannot_be_planned_is_refused(cosup, arguments, words):
    status, _, err = cosup("plan", *arguments)
    assert status == 1
    assert words in err


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
        found = planner._largest(room, {1: peak[1], 2: peak[2]}, peak.__getitem__)
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


def test_every_preset_is_a_valid_configuration():
    from cosup_fast.config import load_config

    for preset in PRESETS.values():
        load_config(None, [f"{name}={json.dumps(value)}" for name, value in preset.settings.items()])
