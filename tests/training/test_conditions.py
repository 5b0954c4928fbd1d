"""Every condition of a comparison by configuration: each loss alone, a second stage, moving lambda, the best step."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from cosup_fast.config import ConfigError, config_of
from cosup_fast.data.records import Example, Segment, write_jsonl
from cosup_fast.model import CoSupervisionModel
from cosup_fast.training.best import Best
from cosup_fast.training.checkpoint import checkpoint_folder, checkpoints, chosen_checkpoint
from cosup_fast.training.initial import inherit, new_model
from cosup_fast.training.metrics import HeldOut, as_record
from tests.training.runs import records, train


@pytest.fixture(scope="module")
def configure(configure_in, data_folder):
    """A function that makes the configuration of a run of two steps, evaluated on what it is trained on."""
    held_out = {"data.dev": [str(data_folder / "examples.jsonl")], "data.allow_leaks": True}
    return partial(configure_in, **held_out, **{"training.steps": 2, "training.eval_every": 1})


@pytest.fixture(scope="module")
def trained(configure, tmp_path_factory):
    """A function that runs a condition once and returns the run's folder."""
    runs = {}

    def trained(name, **changes):
        if name not in runs:
            runs[name] = tmp_path_factory.mktemp("runs") / name
            train(configure(runs[name], **changes))
        return runs[name]

    return trained


CONDITIONS = {
    "both": {"nsp__learnable_temperature": True, "training__lr": 1e-3},
    "ntp": {"nsp__weight": 0},
    "nsp": {"ntp__weight": 0},
}


def test_ntp_alone_is_a_gen_without_an_embseq(trained, cosup):
    folder = trained("ntp", **CONDITIONS["ntp"])
    saved = checkpoints(folder / "checkpoints")[-1]
    assert not (saved / "embseq").exists()
    steps, held_out = records(folder, "step"), records(folder, "held-out")
    assert [(r["nsp"], r["in_batch_accuracy"], r["candidates"], r["nsp_weight"]) for r in steps] == [
        (None, None, 0, 0)
    ] * 2
    assert all(r["loss"] == r["ntp"] > 0 for r in steps)
    assert [r["ntp"] > 0 for r in held_out] == [True] * 3
    assert {r[name] for r in held_out for name in ("nsp", "recall_at_1", "recall_at_5", "recall_at_20")} == {None}
    assert (folder / "curves.png").stat().st_size > 0
    model = CoSupervisionModel.load(saved)
    assert (model.has_embseq, model.shared, model.embseq) == (False, False, None)
    status, out, err = cosup("generate", folder, "Who?", "--max-retrievals", 0, "--max-new-tokens", 3)
    assert (status, err) == (0, "")
    for command in (
        ("index", "build", folder, "--corpus", config_of(folder).data.corpus),
        ("generate", folder, "Who?"),
        ("evaluate", folder, "--examples", config_of(folder).data.train[0]),
        ("export", folder, folder / "out"),
    ):
        status, _, err = cosup(*command)
        assert status == 1, command
        assert "this model is a Gen without an Embseq, trained with nsp.weight=0" in err, command


def test_nsp_alone_forms_no_logits_and_still_shows_ntp_held_out(trained, monkeypatch, configure, tmp_path):
    folder = trained("nsp", **CONDITIONS["nsp"])
    steps, held_out = records(folder, "step"), records(folder, "held-out")
    assert [r["ntp"] for r in steps] == [None] * 2
    assert all(r["loss"] == r["nsp"] > 0 for r in steps)
    assert all(r["ntp"] > 0 and r["recall_at_5"] is not None for r in held_out)
    model = CoSupervisionModel.load(checkpoints(folder / "checkpoints")[-1])
    assert model.ntp.weight == 0
    assert model.has_embseq
    monkeypatch.setattr(CoSupervisionModel, "ntp_loss", None)
    train(configure(tmp_path / "run", ntp__weight=0, training__eval_every=None))


@pytest.mark.parametrize("kind", ["ntp", "nsp"])
def test_a_loss_alone_resumes_with_the_same_bits(kind, trained, configure, tmp_path):
    whole = trained(kind, **CONDITIONS[kind])
    for steps in (1, 2):
        config = configure(tmp_path / "parts", **CONDITIONS[kind], training__steps=steps)
        train(config, resume=True)
    names = ("step", "loss", "gen_grad_norm", "lr")
    ours, theirs = ([[r[n] for n in names] for r in records(f, "step")] for f in (tmp_path / "parts", whole))
    assert ours == theirs


def test_examples_that_ask_for_nothing_are_refused_where_nsp_learns(configure, tmp_path):
    silent = [Example(id=f"s{i}", question="What?", output=[Segment(text="That.")]) for i in range(2)]
    write_jsonl(tmp_path / "silent.jsonl", silent)
    fields = {"data__train": [str(tmp_path / "silent.jsonl")], "data__allow_no_retrieval": True, "data__dev": []}
    with pytest.raises(ValueError, match=r"none of the 2 examples of data\.train asks for a passage.*nsp\.weight=0"):
        train(configure(tmp_path / "run", **fields))
    assert not (tmp_path / "run" / "config.yaml").exists()
    train(configure(tmp_path / "run", **fields, nsp__weight=0))


def test_questions_with_gold_alone_are_trained(configure, tmp_path):
    """As MS MARCO's pairs and converted KILT files are: no output, and the passage that answers."""
    pairs = [Example(id=name, question=f"{name}?", output=[], gold=[name]) for name in ("paris", "rome", "go", "nile")]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    files = [str(tmp_path / "pairs.jsonl")]
    fields = {"data__train": files, "data__dev": files, "training__steps": 30, "training__batch_size": 4}
    train(configure(tmp_path / "run", ntp__weight=0, training__eval_every=30, **fields))
    first, last = (records(tmp_path / "run", "step")[i] for i in (0, -1))
    assert first["candidates"] == 4
    assert last["nsp"] < 0.5 * first["nsp"]
    before, after = (r["recall_at_1"] for r in records(tmp_path / "run", "held-out"))
    assert after > max(before, 0.5)


def test_each_part_has_its_learning_rate(make_model, make_trainer, gpt2_folder):
    model = make_model(embseq=gpt2_folder, nsp={"learnable_temperature": True})
    rates = {"lr": 1e-3, "embseq_lr": 1e-2, "temperature_lr": 1e-1}
    schedule = {"steps": 4, "warmup": 0.5, "schedule": "linear"}
    trainer = make_trainer(model, batch_size=4, weight_decay=0.0, clip=None, **schedule, **rates)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert trainer.take_step().lr == 0.5e-3
    for name, p in model.named_parameters():
        moved = float((p.detach() - before[name]).abs().max())
        part = name.partition(".")[0]
        rate = {"gen": "lr", "embseq": "embseq_lr", "projection": "embseq_lr", "criterion": "temperature_lr"}[part]
        assert moved == pytest.approx(0.5 * rates[rate], rel=1e-2) or moved == 0, name  # Adam's first step is lr
    assert not torch.equal(model.criterion.nsp.log_scale, before["criterion.nsp.log_scale"])


def test_a_learning_rate_of_nothing_is_refused(make_model, make_trainer):
    with pytest.raises(ValueError, match=r"training\.embseq_lr=0\.001 has nothing to train: .*freeze_embseq"):
        make_trainer(make_model(freeze_embseq=True), embseq_lr=1e-3)


def test_lambda_moves_and_is_recorded(trained):
    folder = trained("ramp", nsp__weight=1.0, nsp__initial_weight=0, nsp__ramp=2, training__steps=3)
    found = [(r["nsp_weight"], r["loss"] - r["ntp"], r["nsp"]) for r in records(folder, "step")]
    assert [weight for weight, _, _ in found] == [0.0, 0.5, 1.0]
    for weight, share, nsp in found:
        assert share == pytest.approx(weight * nsp, rel=1e-4)


class TestStageTwo:
    """A run that starts from the models of another one."""

    @pytest.fixture
    def first(self, trained):
        return trained("both", **CONDITIONS["both"])

    def test_it_starts_from_its_weights_and_its_temperature(self, first, configure, tmp_path):
        config = configure(tmp_path / "second", model__init_from=str(first), training__lr=1e-30, training__steps=1)
        train(config)
        there, here = (checkpoints(f / "checkpoints")[-1] for f in (first, tmp_path / "second"))
        for name in ("gen/model.safetensors", "embseq/model.safetensors", "heads.safetensors"):
            one, other = load_file(there / name), load_file(here / name)
            assert one.keys() == other.keys()
            for key in one:
                torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-7)
        assert records(tmp_path / "second", "held-out")[0]["ntp"] == pytest.approx(
            records(first, "held-out")[-1]["ntp"], rel=1e-5
        )
        written = config_of(tmp_path / "second")
        assert written.model.gen == config_of(first).model.gen
        assert written.nsp.learnable_temperature
        learnt = load_file(there / "heads.safetensors")["criterion.nsp.log_scale"]
        assert written.nsp.temperature == pytest.approx(math.exp(-float(learnt)))
        assert written.nsp.temperature != 0.05

    def test_untrained_it_is_the_first_run(self, first, configure, tmp_path):
        """As `evaluate --system untrained` has it."""
        untrained = new_model(inherit(configure(tmp_path / "x", model__init_from=str(first))))
        trained = CoSupervisionModel.load(checkpoints(first / "checkpoints")[-1])
        assert all(map(torch.equal, untrained.parameters(), trained.parameters()))

    def test_it_resumes_also_when_the_first_run_is_gone(self, first, configure, tmp_path):
        fields = {"model__init_from": str(tmp_path / "first"), "training__eval_every": None}
        (tmp_path / "first").symlink_to(first)
        train(configure(tmp_path / "whole", **fields))
        train(configure(tmp_path / "parts", **fields, training__steps=1))
        (tmp_path / "first").unlink()
        train(configure(tmp_path / "parts", **fields), resume=True)
        ours, theirs = ([r["loss"] for r in records(tmp_path / f, "step")] for f in ("parts", "whole"))
        assert ours == theirs
        with pytest.raises(ConfigError, match=r"model\.init_from='.*first': .* is neither a checkpoint"):
            inherit(configure(tmp_path / "third", **fields))

    def test_what_is_given_counts_unless_the_weights_contradict(self, first, configure, tmp_path, gpt2_folder):
        def second(**fields):
            return inherit(configure(tmp_path / "x", model__init_from=str(first), **fields))

        assert second().nsp.weight == 1.0
        assert second(nsp__weight=0.3, nsp__temperature=0.2, text__max_passage_tokens=99).nsp.temperature == 0.2
        assert second(model__freeze_embseq=True).model.freeze_embseq
        gen = config_of(first).model.gen
        assert second(model__gen=gen, model__embseq=gen).model.gen == gen
        for field, value in (("gen", gpt2_folder), ("embseq", gpt2_folder), ("shared", True), ("gen_layers", 1),
                             ("dtype", "bfloat16"), ("gen_lora", {"rank": 4})):  # fmt: skip
            with pytest.raises(ConfigError, match=rf"model\.{field}=.*but what model\.init_from=.* was trained with"):
                second(**{f"model__{field}": value})

    def test_a_copied_checkpoint_stands_alone(self, first, configure, tmp_path):
        saved = checkpoints(first / "checkpoints")[-1]
        (tmp_path / "copy").symlink_to(saved)
        config = inherit(configure(tmp_path / "x", model__init_from=str(tmp_path / "copy")))
        assert config.model.gen == str(tmp_path / "copy" / "gen")

    def test_one_model_of_it_or_both(self, first, trained, configure, tmp_path):
        config = configure(tmp_path / "gen", model__init_from=str(first), nsp__weight=0)
        train(config)
        assert not (checkpoints(tmp_path / "gen" / "checkpoints")[-1] / "embseq").exists()
        alone = trained("ntp", **CONDITIONS["ntp"])
        with pytest.raises(ConfigError, match=r"is a Gen without an Embseq, and nsp\.weight=1\.0 needs one"):
            inherit(configure(tmp_path / "x", model__init_from=str(alone), nsp__weight=1))
        assert inherit(configure(tmp_path / "x", model__init_from=str(alone))).nsp.weight == 0

    def test_adapters_are_trained_further(self, trained, configure, tmp_path):
        first = trained("adapters", model__gen_lora={"rank": 2}, model__embseq_lora={"rank": 2}, training__steps=1)
        config = configure(tmp_path / "second", model__init_from=str(first), training__lr=1e-30, training__steps=1)
        train(config)
        there, here = (checkpoints(f / "checkpoints")[-1] / "gen" for f in (first, tmp_path / "second"))
        one, other = (load_file(f / "adapter_model.safetensors") for f in (there, here))
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-7)


@pytest.fixture
def keep(make_trainer):
    """A function that makes a trainer whose held-out figures are given."""

    def make(figures, seen=None, **fields):
        def evaluate(model, step):
            return HeldOut(step, figures[step], 1.0, figures[step], figures[step], figures[step])

        fields = {"lr": 1e-3, "eval_every": 1, "checkpoint_every": None, "keep_checkpoints": 1, **fields}
        return make_trainer(seen=seen, callbacks={"evaluate": evaluate}, steps=len(figures) - 1, **fields)

    return make


@pytest.mark.parametrize(("metric", "best"), [("ntp", 3), ("recall_at_5", 2)])
def test_the_best_checkpoint_is_kept_and_meant_by_the_runs_folder(metric, best, keep, tmp_path):
    found = keep([0.5, 0.4, 0.9, 0.2, 0.6, math.nan], keep_best=metric).train()
    assert found.name == f"step-00000{best}"
    assert chosen_checkpoint(tmp_path) == found
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == [found.name, "step-000005"]


@pytest.mark.parametrize("metric", ["ntp", "recall_at_5"])
def test_of_equal_evaluations_the_first_is_the_best_and_patience_counts_the_rest(metric):
    best = Best(metric, patience=2)
    assert [best.update({"step": step, metric: 0.5}) for step in range(3)] == [True, False, False]
    assert (best.step, best.exhausted) == (0, True)


def test_a_replayed_best_is_one_whose_checkpoint_is_there(tmp_path):
    """As after someone removed it: the best is then another one, and whatever is there is found."""
    figures = {1: 0.9, 2: 0.4, 3: 0.3}
    kept = checkpoint_folder(tmp_path, 2)
    kept.mkdir()
    (kept / "manifest.json").touch()
    best = Best("recall_at_5", patience=2)
    for step, figure in figures.items():
        best.replay({"step": step, "recall_at_5": figure}, tmp_path)
    assert (best.step, best.exhausted) == (2, False)


def test_patience_ends_a_run_and_a_resumed_one_counts_on(keep, tmp_path):
    figures = [0.1, 0.5, 0.4, 0.3, 0.2, 0.9, 0.1]
    seen = []
    trainer = keep(figures, seen, keep_best="recall_at_1", patience=3)
    assert trainer.train().name == "step-000001"
    assert trainer.step == 4
    history = [as_record(m) for m in seen]
    trainer = keep(figures, keep_best="recall_at_1", patience=4)
    trainer.resume(checkpoints(tmp_path / "checkpoints")[-1])
    trainer.replay(history)
    assert trainer.train().name == "step-000005"
