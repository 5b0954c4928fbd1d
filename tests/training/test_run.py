"""A run and its folder: continuation as one run, data that must not change or leak, and what Ctrl-C says."""

from __future__ import annotations

import io
import json
import re
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from cosup_fast.config import ConfigError
from cosup_fast.data.records import DataError, write_jsonl
from cosup_fast.model import CoSupervisionModel
from cosup_fast.training.checkpoint import CheckpointError, checkpoints, chosen_checkpoint
from cosup_fast.training.log import read_metrics
from cosup_fast.training.measured import measure
from cosup_fast.training.run import load_data, run_training
from cosup_fast.training.trainer import Trainer
from tests.training.runs import during, records, steps_of, train


@pytest.fixture
def write(tmp_path, passages, examples):
    """A function that writes the data of the run: two examples train, two are held out, no passage is in both."""

    def write(passages=passages, train=examples[:2], dev=examples[2:]):
        for name, rows in (("passages", passages), ("train", train), ("dev", dev)):
            write_jsonl(tmp_path / f"{name}.jsonl", rows)

    write()
    return write


@pytest.fixture
def configure(configure, write, tmp_path):
    """The same, of these data, with held-out evaluations on the way."""
    files = {"data.corpus": str(tmp_path / "passages.jsonl"), "data.train": [str(tmp_path / "train.jsonl")]}
    files["data.dev"] = [str(tmp_path / "dev.jsonl")]
    return partial(configure, **files, **{"training.eval_every": 2})


def _changed(records, place, **fields):
    return [r.model_copy(update=fields) if i == place else r for i, r in enumerate(records)]


@pytest.mark.parametrize("what", ["question", "order", "passage", "held out", "pool"])
def test_changed_data_end_a_resume(what, configure, write, passages, examples):
    train(configure())
    write()
    train(configure(training__steps=5), resume=True)
    write(
        **{
            "question": {"train": _changed(examples[:2], 0, question="What is the capital of Gaul?")},
            "order": {"train": examples[1::-1]},
            "passage": {"passages": _changed(passages, 0, text="Paris is on the Seine.")},
            "held out": {"dev": _changed(examples[2:], 0, question="When was Rome built?")},
            "pool": {"passages": _changed(passages, 9, text="The Nile is long.")},
        }[what]
    )
    which = "held-out" if what in ("held out", "pool") else "training"
    with pytest.raises(DataError, match=rf"--resume: the {which} examples or their passages are not those"):
        train(configure(training__steps=6), resume=True)
    assert steps_of(configure().output, "step") == [1, 2, 3, 4, 5]
    train(configure(output=configure().output + "-new"), resume=True)


def test_a_run_that_has_ended_is_left_as_it_is(configure, monkeypatch):
    config = configure()
    ended, _ = train(config)
    before = read_metrics(Path(config.output) / "metrics.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(CoSupervisionModel, "load", None)  # the work
        again, printed = train(config, resume=True)
        assert again == ended
        assert "is the end of this run" in printed
        assert train(configure(training__eval_every=None), resume=True)[0] == ended
        assert train(configure(training__steps=3), resume=True)[0] == ended
        assert train(configure(data__allow_leaks=True), resume=True)[0] == ended
    assert read_metrics(Path(config.output) / "metrics.jsonl") == before
    assert steps_of(config.output, "held-out") == [0, 2, 4]
    train(configure(training__steps=6, training__max_minutes=1e-9), resume=True)  # no step, so nothing new to evaluate
    assert steps_of(config.output, "held-out") == [0, 2, 4]


def test_a_run_killed_before_its_last_evaluation_makes_it_up(configure):
    config = configure()
    ended, _ = train(config)
    path = Path(config.output) / "metrics.jsonl"
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    assert train(config, resume=True)[0] == ended
    assert path.read_text() == whole


def test_a_changed_bit_of_metrics_and_of_the_choice_of_the_best_is_refused(configure):
    """Whichever it is: a figure decides what is best, and what is best which checkpoint is used."""
    config = configure(training__keep_best="recall_at_5", training__eval_every=2)
    train(config)
    metrics = Path(config.output) / "metrics.jsonl"
    record = next(line for line in metrics.read_bytes().splitlines() if b"held-out" in line) + b"\n"
    best = metrics.parent / "checkpoints" / "best.json"
    for path, whole, read, error in (
        (metrics, record, lambda: read_metrics(metrics), DataError),
        (best, best.read_bytes(), lambda: chosen_checkpoint(metrics.parent), CheckpointError),
    ):
        for i in range(len(whole) - 1):
            for bit in (1, 4, 64):
                path.write_bytes(whole[:i] + bytes([whole[i] ^ bit]) + whole[i + 1 :])
                with pytest.raises(error, match=path.name):
                    read()
        path.write_bytes(whole)
        read()


@pytest.mark.parametrize("name", ["metrics.jsonl", "warnings.log", "curves.png"])
def test_a_link_in_the_output_is_refused_before_the_work(name, configure, tmp_path):
    train(configure())
    mine = tmp_path / "mine"
    mine.write_text("")
    path = Path(configure().output) / name
    path.unlink(missing_ok=True)
    path.symlink_to(mine)
    with pytest.raises(ValueError, match=rf"{name} is a link to .*mine: name that file itself"):
        train(configure(training__steps=6), resume=True)
    assert steps_of(configure().output, "step") == ([] if name == "metrics.jsonl" else [1, 2, 3, 4])
    assert mine.read_text() == ""


def test_the_failure_monitor_sees_the_run_as_one(configure):
    """R@5 is flat over four evaluations, two of them before the interruption."""
    fields = {"training__lr": 1e-9, "training__eval_every": 1}
    for steps, warnings in ((1, 0), (3, 1), (5, 1)):
        config = configure(training__steps=steps, **fields)
        train(config, resume=True)
        path = Path(config.output) / "warnings.log"
        found = path.read_text().splitlines() if path.is_file() else []
        assert len([line for line in found if "R@5 is flat" in line]) == warnings
    assert steps_of(config.output, "held-out") == [0, 1, 2, 3, 4, 5]
    assert 0 < read_metrics(path.with_name("metrics.jsonl"))[0]["recall_at_5"] < 1


def test_the_seed_decides_the_projection(configure, gpt2_folder):
    losses = []
    for state, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(state)
        config = configure(output=f"{configure().output}{state}{seed}", model__embseq=gpt2_folder, training__seed=seed)
        train(config)
        losses.append(read_metrics(Path(config.output) / "metrics.jsonl")[0]["nsp"])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_says_what_it_does_and_what_was_saved(presses, configure, monkeypatch, keyboard):
    during(monkeypatch, 2, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(presses)])
    console = Console(file=io.StringIO(), width=200)
    config = configure(training__checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        run_training(config, console=console)
    folder = Path(config.output) / "checkpoints"
    assert (
        str(interrupt.value)
        == {
            1: f"stopped after step 3; saved {folder / 'step-000003'}",
            2: f"stopped at once; last checkpoint: {folder / 'step-000002'}",
        }[presses]
    )
    assert checkpoints(folder)[-1] == folder / f"step-00000{4 - presses}"
    message = "finishing this step, then saving; press Ctrl-C again to stop at once"
    assert console.file.getvalue().count(message) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_while_loading_says_that_nothing_was_saved(configure, monkeypatch, keyboard):
    monkeypatch.setattr(CoSupervisionModel, "from_pretrained", lambda *a, **k: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match=r"^stopped at once; nothing was saved so far$"):
        train(configure())


def test_what_is_held_out_must_not_be_trained_on(configure, write, passages, examples):
    load_data(configure())
    first, other = examples[0], examples[2]
    leaks = {
        r"example 'e1' is in data\.train and in data\.dev": first,
        "expected gold passages of no other split, found 'paris'": other.model_copy(update={"gold": ["paris"]}),
        "expected a question of no other split": other.model_copy(update={"question": "what is the capital of FRANCE"}),
    }
    for message, leak in leaks.items():
        write(dev=[examples[3], leak])
        with pytest.raises(DataError, match=message) as error:
            load_data(configure())
        assert "data.allow_leaks=true" in str(error.value)
        _, _, held_out, _ = load_data(configure(data__allow_leaks=True))
        assert held_out == [examples[3], leak]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"training__tokens_per_micro_batch": 40}, r"example 'e1' has \d+ tokens, more than the 40 of a micro-batch"),
        ({"text__max_passage_tokens": 5}, r"passage 'paris' has \d+ tokens, more than text.max_passage_tokens=5"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_model_is_loaded(fields, message, configure, monkeypatch):
    monkeypatch.setattr(CoSupervisionModel, "from_pretrained", None)
    config = configure(**fields)
    with pytest.raises(ValueError, match=message):
        train(config)
    assert not Path(config.output).exists()


@pytest.fixture
def mixed(configure, write, passages, examples, tmp_path):
    """A function that configures a run on two sets with weights, of which one has hard negatives."""
    hard = [
        e.model_copy(update={"negatives": [p.id for p in passages if p.id not in e.gold][:5]}) for e in examples[:2]
    ]
    write(train=hard, dev=[])
    write_jsonl(tmp_path / "other.jsonl", examples[2:])

    def mixed(**changes):
        train = [str(tmp_path / f"{name}.jsonl") for name in ("train", "other")]
        fields = {"data__train": train, "data__dev": [], "data__weights": [3, 1], "data__negatives": 2}
        return configure(**{**fields, "training__steps": 9, "training__eval_every": None, **changes})

    return mixed


def test_weights_and_drawn_negatives_resume_exactly(mixed, monkeypatch):
    seen = []
    read = Trainer.batch_examples

    def reading(self, step):
        chosen = read(self, step)
        seen.append((step, [(e.id, tuple(e.negatives)) for e in chosen]))
        return chosen

    monkeypatch.setattr(Trainer, "batch_examples", reading)
    _, printed = train(mixed())
    assert re.search(r"an epoch: \d+ of \S+train\.jsonl, 1 of \S+other\.jsonl", printed)
    whole, once = dict(seen), read_metrics(Path(mixed().output) / "metrics.jsonl")
    seen.clear()
    parts = {"output": mixed().output + "-parts", "training__schedule": "constant"}
    for steps in (4, 9):
        train(mixed(**parts, training__steps=steps), resume=True)
    assert dict(seen) == whole
    twice = records(parts["output"])
    assert [(r["loss"], r["gen_grad_norm"]) for r in twice] == [(r["loss"], r["gen_grad_norm"]) for r in once]
    assert {len(negatives) for step in whole.values() for _, negatives in step} == {0, 2}
    assert len({negatives for step in whole.values() for _, negatives in step}) > 3
    with pytest.raises(
        ConfigError, match=r"--resume: data\.weights=\[1\.0, 1\.0\], but the run .* with \[3\.0, 1\.0\]"
    ):
        train(mixed(**parts, data__weights=[1, 1]), resume=True)


def test_long_examples_are_left_out_and_counted_when_asked(configure, write, examples):
    long = examples[0].model_copy(update={"id": "long", "question": "why " * 200, "gold": examples[0].gold})
    write(train=[*examples[:2], long], dev=[*examples[2:], long.model_copy(update={"id": "dev"})])
    fields = {"data__allow_leaks": True, "training__steps": None}
    with pytest.raises(ValueError, match=r"example 'long' has \d+ tokens, more than the 512 positions"):
        train(configure(**fields))
    config = configure(**fields, data__long_examples="skip", training__epochs=2)
    ended, printed = train(config)
    assert "left out 1 of 3 training examples, which are too long: example 'long' has" in printed
    assert "left out 1 of 3 held-out examples, which are too long" in printed
    assert ended.name == "step-000002"  # an epoch of the two that are left is one step
    assert json.loads((Path(config.output) / "data.json").read_text())["training examples left out"] == 1
    assert "is the end of this run" in train(config, resume=True)[1]
    write(dev=[long])
    with pytest.raises(ValueError, match=r"all of the 1 examples of data\.dev are too long"):
        train(configure(**fields, data__long_examples="skip", output=config.output + "-dev"))


def test_what_is_measured_stays_with_its_example_where_long_ones_are_left_out(configure, model, corpus, examples):
    long = examples[0].model_copy(update={"id": "long", "question": "why " * 200})
    config = configure(data__long_examples="skip", data__train=["a", "b"], data__weights=[1, 2])

    def measured(chosen, sets):
        return measure(model.template, config, chosen, sets, corpus, Console(quiet=True))

    found, alone = measured([long, *examples], [0, 0, 0, 1, 1]), measured(examples, [0, 0, 1, 1])
    assert (found.examples, found.left_out) == (examples, 1)
    assert found.lengths == alone.lengths
    assert len(set(found.lengths)) == len(examples)
    assert found.mixture == alone.mixture


def test_there_is_a_weight_for_each_set(configure):
    with pytest.raises(ConfigError, match=r"data\.weights=\[1\.0, 2\.0\] has 2 entries for the 1 sets of data\.train"):
        configure(data__weights=[1, 2])
    with pytest.raises(ConfigError, match=r"data\.weights\.0: Input should be greater than 0"):
        configure(data__weights=[0])
