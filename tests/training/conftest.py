"""What tests of whole runs share."""

from __future__ import annotations

import json
from functools import partial

import pytest

from cosup_fast.config import load_config
from cosup_fast.config.training import TrainingConfig
from cosup_fast.data.records import Segment
from cosup_fast.training.checkpoint import CheckpointWriter
from cosup_fast.training.trainer import Trainer


@pytest.fixture(scope="session")
def save_checkpoint():
    """A function that writes a checkpoint, waits for it, and removes all but the `keep` newest."""

    def save(root, step, model, optimizer, *, keep=2):
        writer = CheckpointWriter(root, keep)
        writer.start(step, model, optimizer)
        return writer.finish()

    return save


@pytest.fixture(scope="session")
def configure_in(tiny_run):
    """A function that makes the configuration of a tiny run with this output."""

    def configure(output, **changes):
        changes = {name.replace("__", "."): value for name, value in changes.items()}
        fields = {"output": str(output), **tiny_run}
        if "model.init_from" in changes:
            del fields["model.gen"]
        return load_config(None, [f"{name}={json.dumps(value)}" for name, value in {**fields, **changes}.items()])

    return configure


@pytest.fixture
def configure(configure_in, tmp_path):
    """The same with an output of its own."""
    return partial(configure_in, output=tmp_path / "run")


@pytest.fixture
def make_trainer(make_model, examples, corpus, tmp_path):
    """A function that makes a trainer of batches of two; `seen` collects its metrics."""

    def make(model=None, output=tmp_path, seen=None, chosen=examples, callbacks=None, **fields):
        config = TrainingConfig(**{"batch_size": 2, "lr": 1e-2, "eval_every": None, **fields})
        record = (lambda metrics: None) if seen is None else seen.append
        return Trainer(
            model or make_model(), config, chosen, corpus, output, **{"on_metrics": record, **(callbacks or {})}
        )

    return make


@pytest.fixture
def planted(examples):
    """Enough examples for a window, the last of which no trained model foresees."""
    plain = [examples[0].model_copy(update={"id": f"plain{i}"}) for i in range(12)]
    noise = "".join(chr(0x4E00 + 37 * i % 5000) for i in range(60))
    return [*plain, examples[0].model_copy(update={"id": "planted", "output": [Segment(text=noise)]})]
