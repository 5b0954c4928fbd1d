"""8-bit states against those of 32 bits on a real model and real text: 200 steps, the same losses within 1%."""

from __future__ import annotations

import pytest
import torch

from cosup_fast.config import load_config
from cosup_fast.data.prepared.prepare import prepare
from tests.training.runs import records, train

WINDOW = 20
"""Steps that a point of a curve is the mean of: a single step is four examples."""


@pytest.mark.hours
@pytest.mark.timeout(7200)
def test_8_bit_states_train_smollm2_as_those_of_32_bits_do(tmp_path):
    for name in ("smollm2-135m", "wiki-leads", "questions"):
        prepare(name)
    curves = {}
    for optimizer in ("adamw", "adamw-8bit"):
        settings = {
            "output": tmp_path / optimizer, "training.optimizer": optimizer, "model.embseq_layers": 6,
            "text.max_passage_tokens": 48, "text.long_passages": "truncate", "data.train": '["questions/train"]',
            "data.train_limit": 1000, "data.dev": "[]", "training.steps": 200, "training.batch_size": 4,
            "training.lr": 2e-5, "training.eval_every": "null", "training.diagnose_every": "null",
            "training.checkpoint_every": "null", "training.device": "cpu",
        }  # fmt: skip
        config = load_config(None, [f"{name}={value}" for name, value in settings.items()])
        train(config)
        losses = torch.tensor([record["loss"] for record in records(tmp_path / optimizer)])
        assert len(losses) == 200
        curves[optimizer] = losses.unfold(0, WINDOW, 1).mean(dim=1)
    full, quantized = curves.values()
    assert full[-1] < 0.9 * full[0]
    assert ((quantized - full).abs() / full).max() < 0.01
