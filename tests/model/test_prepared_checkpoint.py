"""Adapters that a run packs and `cosup-fast data prepare` puts in place: the same model in bf16, found by its name."""

from __future__ import annotations

import hashlib
import json
import runpy
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from cosup_fast.cli.common import load_model
from cosup_fast.cli.systems import open_system
from cosup_fast.config import RunConfig, config_of, dump_config, load_config
from cosup_fast.config.training import TrainingConfig
from cosup_fast.data import sources
from cosup_fast.data.packing import make_batch
from cosup_fast.data.prepared import catalog, prepare
from cosup_fast.data.prepared.catalog import ADAPTERS
from cosup_fast.data.prepared.models import build_adapters
from cosup_fast.data.records import DataError
from cosup_fast.generation import GenerationConfig, Generator
from cosup_fast.index import SequenceIndex
from cosup_fast.model import CoSupervisionModel
from cosup_fast.training.initial import initial_checkpoint
from cosup_fast.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
NAME = "cosup-smollm2"
pack = runpy.run_path(str(ROOT / "scripts" / "pack_adapters.py"))["pack"]


@pytest.fixture
def run(make_model, examples, corpus, tmp_path):
    """The folder of a run that trained adapters, and the model that it ended with."""
    model = make_model(gen_lora={"rank": 4}, embseq_lora={"rank": 2})
    training = TrainingConfig(batch_size=2, lr=1e-2, eval_every=None, steps=2)
    Trainer(model.train(), training, examples, corpus, tmp_path / "run").train()
    (tmp_path / "run" / "config.yaml").write_text(dump_config(RunConfig(generation={"max_new_tokens": 7})))
    return tmp_path / "run", model


@pytest.fixture
def prepared(run, tmp_path, monkeypatch):
    """The home folder where the packed adapters of that run are prepared."""
    archive = tmp_path / "tiny.zip"
    pack(run[0], archive)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    entry = catalog.Prepared(
        name=NAME,
        what="tiny",
        licence="none",
        source="here",
        build=build_adapters,
        packages=(catalog.Published("tiny.zip", digest, archive.stat().st_size),),
        kind="checkpoint",
    )
    for module in (catalog, prepare, sources):
        monkeypatch.setattr(module, "CATALOG", {NAME: entry})
    monkeypatch.setattr("cosup_fast.data.prepared.fetch.CLONE", tmp_path)
    monkeypatch.setenv("COSUP_HOME", str(tmp_path / "home"))
    return prepare.prepare(NAME)


def test_packed_and_prepared_it_is_the_model_that_was_trained(run, prepared, examples, corpus, tmp_path):
    model = run[1].eval()
    again = CoSupervisionModel.load(NAME).eval()
    batch = make_batch(examples, corpus, model.template)
    with torch.no_grad():
        ours, theirs = model(batch), again(batch)
    assert float(theirs.ntp) == pytest.approx(float(ours.ntp), rel=1e-2)
    assert float(theirs.nsp) == pytest.approx(float(ours.nsp), rel=1e-2)
    with torch.no_grad():
        for name, x in model.merge().named_parameters():
            torch.testing.assert_close(again.get_parameter(name), x, atol=2e-2 * float(x.abs().max()), rtol=0)
    checkpoint = next((run[0] / "checkpoints").iterdir())
    for part in ("gen", "embseq"):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (prepared / part / file).read_bytes() == (checkpoint / part / file).read_bytes()
        tensors = load((prepared / part / "adapter_model.safetensors").read_bytes())
        assert {x.dtype for x in tensors.values()} == {torch.bfloat16}


def test_commands_runs_and_python_find_it_by_its_name(prepared, tmp_path, monkeypatch):
    assert sources.resolve_checkpoint(Path(NAME)) == prepared
    assert config_of(prepared).generation.max_new_tokens == 7
    assert isinstance(load_model(Path(NAME), "cpu"), CoSupervisionModel)
    assert initial_checkpoint(RunConfig(model={"init_from": NAME})) == prepared
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()  # a folder of the user's comes first
    assert sources.resolve_checkpoint(Path(NAME)) == Path(NAME)


def test_a_pair_and_the_index_commands_know_it_too(prepared, model, passages, tmp_path, cosup):
    model.save(tmp_path / "writer")
    SequenceIndex.build(CoSupervisionModel.load(NAME), passages, prepared / "index", progress=False)
    status, out, err = cosup("index", "info", NAME)
    assert status == 0, err
    assert str(len(passages)) in out
    system = open_system(f"pair:{NAME}", tmp_path / "writer", lambda folder: load_model(folder, "cpu"))
    assert system.sources["index"] == str(prepared / "index")


def test_damaged_or_missing_it_says_how_to_have_it(prepared):
    path = prepared / "gen" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"expected sha256 .*remove .* and run `cosup-fast data prepare {NAME}`"):
        CoSupervisionModel.load(NAME)
    prepared.rename(prepared.with_name("elsewhere"))
    with pytest.raises(DataError, match=rf"found nothing: run `cosup-fast data prepare {NAME}`"):
        CoSupervisionModel.load(NAME)


def test_packing_twice_gives_the_same_bytes(run, tmp_path):
    for name in ("a.zip", "b.zip"):
        pack(run[0], tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_the_committed_archive_is_the_pinned_one_and_small(tmp_path):
    archive = ROOT / ADAPTERS.path
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == ADAPTERS.sha256
    assert archive.stat().st_size == ADAPTERS.size
    size = 0
    with zipfile.ZipFile(archive) as packed:
        for name in packed.namelist():
            if name.endswith("adapter_model.safetensors"):
                size += sum(x.numel() * x.element_size() for x in load(packed.read(name)).values())
        description = json.loads(packed.read("cosup.json"))
        (tmp_path / "config.yaml").write_bytes(packed.read("config.yaml"))
    assert size <= 8e6
    assert [base["name"] for base in description["adapters"].values()] == ["smollm2-135m", "smollm2-135m"]
    assert load_config(tmp_path / "config.yaml") == load_config(ROOT / "examples" / "cosup-smollm2.yaml")


@pytest.mark.slow
def test_the_published_adapters_find_passages_that_they_were_not_trained_on():
    for name in (NAME, "wiki-leads", "questions"):
        prepare.prepare(name)
    model = CoSupervisionModel.load(NAME).eval()
    corpus = {passage.id: passage for passage in sources.load_corpus("wiki-leads")}
    asked = sources.load_examples("questions/test-in", corpus.keys())[:24]
    gold = {passage for example in asked for passage in example.gold}
    pool = [passage for name, passage in corpus.items() if name in gold] + list(corpus.values())[:200]
    index = SequenceIndex.build(model, list({p.id: p for p in pool}.values()), progress=False)
    generator = Generator(model, index, GenerationConfig(ret_first=True, max_retrievals=1, max_new_tokens=4))
    answers = generator.generate_all([example.question for example in asked])
    found = [a.retrievals[0].best.passage in e.gold for a, e in zip(answers, asked, strict=True)]
    assert sum(found) >= 8  # of 24; at random one in two hundred
