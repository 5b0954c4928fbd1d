"""A run that does not fit into memory is refused before a model is loaded, where it is asked."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console

from cosup_fast.config import load_config
from cosup_fast.data.packing import make_batch
from cosup_fast.data.records import Passage
from cosup_fast.model import CoSupervisionModel
from cosup_fast.plan import fits
from cosup_fast.plan.configs import model_config
from cosup_fast.plan.planner import PlanError
from cosup_fast.plan.request import PlanRequest
from cosup_fast.training.callbacks import Callback
from cosup_fast.training.run import run_training


@pytest.fixture
def overrides(arguments):
    sizes = {"training.steps": 1, "training.batch_size": 4, "training.micro_batch_size": 2}
    return arguments(**sizes, **{"training.device": "cpu"})


@pytest.fixture
def config(overrides):
    return load_config(None, overrides)


def test_train_refuses_what_does_not_fit_before_a_model_is_loaded_unless_forced(
    cosup, overrides, monkeypatch, tmp_path
):
    monkeypatch.setattr(fits, "memory_bytes", lambda device: 2**20)
    with monkeypatch.context() as patch:
        patch.setattr(CoSupervisionModel, "from_pretrained", None)
        status, _, err = cosup("train", *overrides)
    assert status == 1
    for words in ("does not fit", "by simulation", "of which 0.0 are to be left", "cosup-fast plan", "train --force"):
        assert words in err
    assert not (tmp_path / "run").exists()
    status, out, err = cosup("train", *overrides, "--force")
    assert status == 0, err
    assert "step-000001" in out
    assert "memory:" not in err


def test_what_fits_is_told(cosup, overrides, monkeypatch):
    monkeypatch.setattr(fits, "SMALL", 0.0)
    status, _, err = cosup("train", *overrides)
    assert status == 0, err
    assert re.search(r"memory: 0\.\d GiB in the .+, by simulation, of \d+\.\d GiB", err)


def test_a_run_from_python_is_checked_by_what_it_is_given(config, tmp_path):
    asked = []

    class Refuses(Callback):
        def check(self, config, batches, ranks, device):
            asked.append((len(batches), ranks, device))
            raise ValueError("not today")

    quiet = Console(file=io.StringIO())
    with pytest.raises(ValueError, match="not today"):
        run_training(config, callbacks=[Refuses()], console=quiet)
    assert asked == [(1, 1, torch.device("cpu"))]
    assert not (tmp_path / "run").exists()
    assert run_training(config, console=quiet).name == "step-000001"


def test_what_cannot_be_simulated_may_run_all_the_same(config, monkeypatch, model, examples, corpus):
    def broken(*arguments, **options):
        raise PlanError("the simulation of this step failed: it reads values")

    monkeypatch.setattr(fits, "SMALL", 0.0)
    monkeypatch.setattr(fits, "make_plan", broken)
    batch = make_batch(examples, corpus, model.template)
    told = fits.check_fits(config, [batch], 1, torch.device("cpu"))
    assert told == "memory: not known before the run; the simulation of this step failed: it reads values"


def test_weights_are_weighed_as_they_are_trained(config):
    gen = model_config("llama2-7b")
    billion = 6.74 * 2
    for fields, bytes_each in (
        ({}, 16),
        ({"optimizer": "adamw-8bit"}, 10),
        ({"dtype": "bfloat16"}, 8),
        ({"gpus": 8, "sharding": "fsdp"}, 2),
        ({"freeze_embseq": True}, 10),
        ({"gen_lora": {"rank": 8}, "embseq_lora": {"rank": 8, "quantize": "nf4"}}, 2.25),
    ):
        asked = PlanRequest(gen=gen, **{"gpus": 1, "sharding": "none", **fields})
        assert fits.least_bytes(asked) == pytest.approx(billion * 1e9 * bytes_each, rel=0.01), fields


def test_what_is_small_beside_a_cpus_memory_costs_no_simulation(config, monkeypatch, model, examples, corpus):
    monkeypatch.setattr(fits, "make_plan", None)
    batch = make_batch(examples, corpus, model.template)
    assert fits.check_fits(config, [batch], 1, torch.device("cpu")) == ""


def test_the_packs_are_those_of_the_first_steps(config, model, examples, corpus: dict[str, Passage]):
    batches = [make_batch(examples[:2], corpus, model.template), make_batch(examples, corpus, model.template)]
    asked = fits.plan_request(config, batches, 1, "cpu")
    gen, embseq = batches[1].gen[0].pack, batches[1].passages[0]
    assert asked.gen_sequences == len(gen.lengths)
    assert asked.gen_sequences * asked.gen_length >= len(gen.input_ids) > asked.gen_sequences * (asked.gen_length - 1)
    assert asked.embseq_sequences == len(embseq.lengths)
    assert asked.queries_per_sequence * asked.gen_sequences >= batches[1].nsp_count


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{", '{"model_type": "nothing"}'])
def test_a_configuration_that_cannot_be_read_is_named(content, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"there is no configuration '.*x\.json'"):
        model_config(str(tmp_path / "x.json"))
