"""The examples: configurations that are the presets they are named after, and the losses in transformers.Trainer."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cosup_fast.config import load_config
from cosup_fast.plan.presets import PRESETS
from cosup_fast.plan.request import PlanRequest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["llama2-7b-8x80g", "llama2-7b-1x80g", "tinyllama-1x24g"])
def test_an_example_plans_as_the_preset_of_its_name(name):
    preset = PRESETS[name]
    expected = load_config(None, [f"{field}={json.dumps(value)}" for field, value in preset.settings.items()])
    ours = PlanRequest.of(load_config(EXAMPLES / f"{name}.yaml"), gpus=preset.gpus)
    assert ours == PlanRequest.of(expected, gpus=preset.gpus)


@pytest.fixture
def records(tmp_path, corpus):
    pairs = [("paris", "France"), ("rome", "Italy"), ("nile", "Egypt"), ("euclid", "Alexandria")]
    rows = [{"question": f"Where is {name}?", "answer": answer, "passage": corpus[name].text} for name, answer in pairs]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path, rows


@pytest.mark.filterwarnings("ignore")
def test_the_losses_drop_into_a_transformers_trainer(records, llama_folder, gpt2_folder, tmp_path):
    path, rows = records
    example = runpy.run_path(str(EXAMPLES / "transformers_trainer.py"))
    arguments = [str(path), "--gen", llama_folder, "--output", str(tmp_path / "run"), "--batch-size", "4"]
    trainer = example["main"]([*arguments, "--steps", "25", "--lr", "5e-3"])
    seen = [entry for entry in trainer.state.log_history if "ntp" in entry]
    assert seen[-1]["ntp"] < 0.7 * seen[0]["ntp"]
    assert seen[-1]["nsp"] < 0.7 * seen[0]["nsp"]
    assert (tmp_path / "run" / "gen" / "model.safetensors").is_file()

    model = trainer.model.cpu().eval()
    inputs = trainer.data_collator(rows)
    out = model(**inputs)
    logits = model.gen(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    assert float(out["ntp"]) == pytest.approx(float(expected), rel=1e-4)
    hidden = model.gen.model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    states = model.embseq(inputs["passage_ids"], attention_mask=inputs["passage_mask"]).last_hidden_state
    keys = torch.stack([state[mask.sum() - 1] for state, mask in zip(states, inputs["passage_mask"], strict=True)])
    nsp = trainer.data_collator.tokenizer.convert_tokens_to_ids("[NSP]")
    scores = F.normalize(hidden[inputs["input_ids"] == nsp], dim=-1) @ F.normalize(keys, dim=-1).T / 0.05
    assert float(out["nsp"]) == pytest.approx(float(F.cross_entropy(scores, torch.arange(4))), rel=1e-3, abs=1e-5)

    long = [{**rows[0], "question": "Paris " * 300}, {**rows[1], "question": "What is [NSP]?"}]
    batch = trainer.data_collator(long)
    assert batch["input_ids"][range(2), batch["nsp_at"]].tolist() == [nsp, nsp]
    assert batch["nsp_at"][0] == batch["input_ids"].shape[1] - 1
    assert batch["nsp_at"][1] == batch["attention_mask"][1].sum() - (batch["labels"][1] != -100).sum()
    assert torch.isfinite(model(**batch)["loss"])
