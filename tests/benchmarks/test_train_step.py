"""The recipe and its switches are one function; products and memory of the step are those that it claims."""

from __future__ import annotations

import csv
import sys

import pytest
import torch

from benchmarks import cli, train_step
from benchmarks.counting import OperationCounter
from benchmarks.recipe import OURS, VARIANTS, step
from benchmarks.train_step import CACHED, ONE, PLAIN, Setting, peak_of
from cosup_fast.data.packing import PackLimits, make_batch


@pytest.fixture
def setting(llama_folder, data_folder):
    corpus, examples = str(data_folder / "passages.jsonl"), str(data_folder / "examples.jsonl")
    return Setting(model=llama_folder, corpus=corpus, examples=[examples], batch_size=4, checkpointing=False, threads=1)


@pytest.fixture
def bench(setting):
    return setting.bench()


def gradients(model, run):
    model.zero_grad()
    out = run()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {
        "ntp": out.ntp,
        "nsp": out.nsp,
    }


def test_every_variant_has_the_same_losses_and_gradients(bench):
    batch = bench.batch(bench.chosen(0, 4) + bench.chosen(1, 4))
    assert len(batch.key_ids) < batch.nsp_count
    expected = gradients(bench.model, step("recipe", bench.model, batch))
    for name in [*VARIANTS, OURS]:
        ours = gradients(bench.model, step(name, bench.model, batch))
        assert ours.keys() == expected.keys()
        for key, b in expected.items():
            assert (ours[key] - b).abs().max() <= 1e-4 * b.abs().max(), (name, key)


def test_each_switch_saves_what_it_says(bench):
    batch = bench.batch(bench.chosen(0, 4))
    flops = {name: bench.count(step(name, bench.model, batch)) for name in [*VARIANTS, OURS]}
    for name in ("packed", "supervised", "fused", "once"):
        assert flops[name] < flops["recipe"], name
    assert flops["norm rows"] == flops["recipe"]  # no product
    assert flops[OURS] == flops["all switches"] == min(flops.values())


def test_the_head_multiplies_supervised_rows_alone(bench):
    """Three products of supervised rows x vocabulary x width; the recipe's are of every row."""
    model = bench.model
    (part,) = make_batch(bench.examples, bench.corpus, model.template).gen
    hidden = torch.randn(len(part.targets), model.width, requires_grad=True)
    product = 2 * len(part.targets) * model.vocabulary * model.width
    assert bench.count(lambda: model.ntp_loss(hidden, part.targets).backward()) == 3 * product
    batch = bench.batch(bench.chosen(0, 4))
    one = {name: bench.count(step(name, model, batch)) for name in ("recipe", "supervised")}
    rows = len(batch.gen[0].pack.lengths) * max(batch.gen[0].pack.lengths)
    saved = 3 * 2 * (rows - batch.ntp_count) * model.vocabulary * model.width
    assert one["recipe"] - one["supervised"] == saved


@pytest.mark.parametrize(("checkpointing", "most"), [(False, 4 / 3), (True, 5 / 4)])
def test_products_of_the_cache(checkpointing, most, bench):
    """At most 4/3 of one piece, 5/4 with checkpointing, and less by the pack of each model that runs once."""
    model, examples = bench.model, bench.examples * 2
    if checkpointing:
        model.enable_activation_checkpointing()

    def flops(limits):
        batch = make_batch(examples, bench.corpus, model.template, limits)
        return bench.count(step(OURS, model, batch))

    one, some, many = flops(PackLimits()), flops(PackLimits(sequences=4)), flops(PackLimits(sequences=1))
    assert 1 < some / one < many / one < most


def test_memory_does_not_grow_with_the_batch(bench):
    """The bytes that a step holds at most, of 8 times as many examples in packs of the same size."""
    model = bench.model
    peaks = []
    for times in (1, 8):
        batch = make_batch(bench.examples * times, bench.corpus, model.template, PackLimits(sequences=4))
        assert len(batch.gen) == times
        model.zero_grad(set_to_none=False)
        step(OURS, model, batch)()
        with OperationCounter() as seen:
            step(OURS, model, batch)()
        peaks.append(seen.peak)
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize("flags", [["--variant", "recipe", "--variant", "ours"], ["--cache", "--factor", "2"]])
def test_the_command_writes_a_folder(flags, setting, tmp_path, monkeypatch, capsys):
    arguments = ["train-step", "--model", setting.model, "--corpus", setting.corpus, "--examples", setting.examples[0],
                 "--batch-size", "2", "--rounds", "2", "--measure", "products", "--measure", "time", "--threads", "1",
                 "--output", str(tmp_path / "x"), *flags]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    cli.app(arguments, standalone_mode=False)
    text = (tmp_path / "x" / "README.md").read_text()
    assert f"python -m benchmarks {' '.join(arguments)}" in text
    with (tmp_path / "x" / "rounds.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = ["recipe", "ours"] if "--variant" in flags else [CACHED, PLAIN, ONE]
    assert [row["name"] for row in rows] == expected
    for row in rows:
        assert row["name"] in text
        assert float(row["loss_error"]) < 1e-5
        assert int(row["flops"]) > 0
        assert float(row["seconds_1"]) > 0


@pytest.mark.parametrize(("option", "value"), [("variant", "recipes"), ("measure", "tme")])
def test_an_unknown_word_is_named(option, value):
    with pytest.raises(ValueError, match=f"{option} is '{value}'; choose from"):
        cli.app(["train-step", f"--{option}", value], standalone_mode=False)


def test_a_wrong_loss_is_not_timed(setting, monkeypatch):
    from benchmarks import recipe

    monkeypatch.setitem(recipe.VARIANTS, "once", recipe.Switches(once=True))
    wrong = recipe.dense_cross_entropy
    monkeypatch.setattr(recipe, "linear_cross_entropy", lambda *args: wrong(*args) * 1.0001)
    with pytest.raises(ValueError, match="fused has losses"):
        train_step.measure(setting, ["recipe", "fused"], 1, ["products"], say=lambda text: None)


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(setting):
    assert peak_of(setting, OURS) > 0
