"""Training on several ranks: replicas of shards, and copies of a weight that stay equal."""

from __future__ import annotations

import pytest
import torch

RUN = {"steps": 4, "batch_size": 4, "lr": 1e-3, "clip": 0.5, "diagnose_every": 2, "checkpoint_every": 2}
OF_THE_RANKS = ("tokens_per_second", "peak_memory_gib", "mfu", "useful_tokens")


@pytest.fixture
def train(small_world, settings, step_examples, corpus, tmp_path):
    """A function that trains on so many ranks, for what each answers."""

    def run(ranks, dtype="float64", resumed=None, output="run", **fields):
        model = settings("projected, learnt temperature", dtype)
        arguments = (model, step_examples, corpus, tmp_path / output, resumed)
        answers = small_world.run("trained", list(range(ranks)), *arguments, **{**RUN, **fields})
        for records, *_ in answers:
            for record in records:
                for name in OF_THE_RANKS:
                    record.pop(name, None)
        return answers

    return run


def assert_same(ours, expected, records):
    assert len(ours[0]) == records
    for one, other in zip(ours[0], expected[0][-records:], strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    for name, x in expected[1].items():
        assert (ours[1][name] - x).abs().max() <= 1e-6 * x.abs().max(), name


def test_replicas_of_shards_train_as_one_process(train, tmp_path):
    """The norms that clip, the diagnosis, and the states that are resumed, by another sharding too."""
    (alone,) = train(1, output="alone")
    assert any(record.get("gen_grad_norm", 0) > RUN["clip"] for record in alone[0])
    replicas = train(4, sharding="fsdp", replicas=2)
    for rank in replicas:
        assert_same(rank, alone, records=6)
    saved = tmp_path / "run" / "checkpoints" / "step-000002"
    again = train(4, sharding="fsdp", replicas=2, resumed=saved, output="again")
    assert all(torch.equal(again[0][1][name], x) for name, x in replicas[0][1].items())
    for rank in train(4, sharding="fsdp", resumed=saved, output="full"):
        assert_same(rank, alone, records=3)


def test_replicas_are_of_all_ranks(small_world):
    assert small_world.run("mesh", [2, 2, 2, 2]) == ["(2, 2)"] * 4
    (told, *_) = small_world.run("mesh", [2, 2])
    assert told == "replicas is 2 and the group has 2 of 4 ranks: give it all"


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_bf16_weights_are_rounded_alike_on_every_rank_where_dropout_differs(sharding, train):
    pytest.importorskip("torchao")
    (_, first, drawn), *others = train(3, dtype="bfloat16", sharding=sharding)
    for _, weights, _ in others:
        for name, x in weights.items():
            assert torch.equal(x, first[name]), name
    assert len({drawn, *(number for *_, number in others)}) == 3
