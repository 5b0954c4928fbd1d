"""What tests of whole runs share."""

from __future__ import annotations

import json

import pytest

from cosup_fast.config import load_config


@pytest.fixture
def configure(data_folder, llama_folder, tmp_path):
    """A function that makes the configuration of a tiny run of two steps an epoch."""

    def configure(**changes):
        fields = {
            "output": str(tmp_path / "run"),
            "model.gen": llama_folder,
            "data.corpus": str(data_folder / "passages.jsonl"),
            "data.train": [str(data_folder / "examples.jsonl")],
            "data.dev": [],
            "training.batch_size": 2,
            "training.steps": 4,
            "training.lr": 1e-2,
        }
        changes = {name.replace("__", "."): value for name, value in changes.items()}
        return load_config(None, [f"{name}={json.dumps(value)}" for name, value in {**fields, **changes}.items()])

    return configure
