"""Held-out figures, recomputed by hand one sequence at a time, and the data that they are of."""

from __future__ import annotations

import json
import random

import pytest
import torch
from torch.nn.functional import cross_entropy

from cosup_fast.config import load_config
from cosup_fast.data.mapped import MappedCorpus
from cosup_fast.data.packing import Pack
from cosup_fast.data.records import Passage, write_jsonl
from cosup_fast.training import held_out
from cosup_fast.training.held_out import HeldOutEvaluator
from cosup_fast.training.run import load_data

FILLERS = [Passage(id=f"filler{i}", title=f"{i}", text=f"Page {i * i} of {i}.") for i in range(60)]
GOLD = ["paris", "seine", "rome", "go"]


def _config(**fields):
    return load_config(None, [f"{name}={json.dumps(value)}" for name, value in fields.items()])


def _by_hand(model, examples, pool, corpus, batch_size):
    """NTP per supervised token, NSP per query, and every query's scores against the pool with the row of its gold."""
    ntp = nsp = tokens = queries = 0
    ranked = []

    def embed(passages):
        return torch.cat([model.embed(Pack.of([model.template.sequence(p)])) for p in passages]).float()

    for start in range(0, len(examples), batch_size):
        asked, asking = [], []
        for example in examples[start : start + batch_size]:
            sequence = model.template.gen_sequence(example, corpus)
            hidden = model.hidden_states(Pack.of([sequence.input_ids]))
            labels = torch.tensor(sequence.labels)
            logits = hidden.float() @ model.gen.lm_head.weight.T.float()
            ntp += float(cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
            tokens += sum(label != -100 for label in sequence.labels)
            asking.append(model.queries(hidden, torch.tensor(sequence.query_rows)).float())
            asked += sequence.query_passages
        distinct = list(dict.fromkeys(asked))
        scores = torch.cat(asking) @ embed([corpus[p] for p in distinct]).T
        positive = torch.tensor([distinct.index(p) for p in asked])
        nsp += float(cross_entropy(scores / model.nsp.temperature, positive, reduction="sum"))
        queries += len(asked)
        in_pool = torch.cat(asking) @ embed(pool).T
        ranked += [(row, [p.id for p in pool].index(p)) for row, p in zip(in_pool, asked, strict=True)]
    return ntp / tokens, nsp / queries, ranked


@pytest.mark.parametrize(("precision", "error"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@torch.no_grad()
def test_figures_are_those_computed_by_hand(precision, error, make_model, gpt2_folder, examples, corpus):
    corpus = corpus | {p.id: p for p in FILLERS}
    config = _config(**{"training.batch_size": 3, "training.precision": precision, "data.dev_pool": 40})
    evaluator = HeldOutEvaluator(examples, corpus, config)
    model = make_model(embseq=gpt2_folder, seed=23).train()  # dropout is off while it evaluates
    seen = set()
    hooks = [
        module.register_forward_hook(lambda module, inputs, y: seen.add(y.dtype))
        for module in model.gen.model.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    found = evaluator(model, 7)
    assert seen == {getattr(torch, precision)}
    for hook in hooks:
        hook.remove()
    model.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        ntp, nsp, ranked = _by_hand(model, examples, evaluator.pool, corpus, batch_size=3)
    assert found.step == 7
    assert found.ntp == pytest.approx(ntp, rel=error)
    assert found.nsp == pytest.approx(nsp, rel=error)
    recalls = []
    for k, recall in ((1, found.recall_at_1), (5, found.recall_at_5), (20, found.recall_at_20)):
        low, high = (
            sum(int((row > row[gold] + margin).sum()) - (margin < 0) < k for row, gold in ranked) / len(ranked)
            for margin in (-error, error)
        )
        assert low <= recall <= high
        assert precision == "bfloat16" or low == high
        recalls.append(recall)
    assert 0 < recalls[0] < recalls[1] < recalls[2] < 1  # each one tells something


def test_recall_counts_ranks_from_zero(make_model, examples, corpus, monkeypatch):
    evaluator = HeldOutEvaluator(examples, corpus, _config())
    monkeypatch.setattr(held_out, "retrieval_ranks", lambda model, examples, pool, embeddings: [0, 1, 4, 5, 19, 20])
    found = evaluator(make_model(), 0)
    assert (found.recall_at_1, found.recall_at_5, found.recall_at_20) == (1 / 6, 3 / 6, 5 / 6)


@pytest.fixture
def many(data_folder, examples, tmp_path):
    """Overrides that name 40 training examples and 20 held-out ones."""
    first, other = examples[0], examples[2]
    write_jsonl(
        tmp_path / "train.jsonl",
        [first.model_copy(update={"id": f"t{i}", "question": f"question {i}"}) for i in range(40)],
    )
    write_jsonl(
        tmp_path / "dev.jsonl", [other.model_copy(update={"id": f"d{i}", "question": f"held {i}"}) for i in range(20)]
    )
    return {
        "data.corpus": str(data_folder / "passages.jsonl"),
        "data.train": [str(tmp_path / "train.jsonl")],
        "data.dev": [str(tmp_path / "dev.jsonl")],
    }


@pytest.mark.parametrize("size", [1, 4, 5, 20, 71, 200])
def test_the_pool_is_the_gold_passages_and_the_same_others_for_every_seed(tmp_path, passages, examples, size):
    passages = [*FILLERS, *passages]
    write_jsonl(tmp_path / "passages.jsonl", passages)
    corpus = {passage.id: passage for passage in passages}
    others = sorted(set(corpus) - set(GOLD))
    drawn = random.Random(0).sample(others, min(max(0, size - len(GOLD)), len(others)))
    for seed, held in enumerate((corpus, MappedCorpus(tmp_path / "passages.jsonl", tmp_path))):
        config = _config(**{"data.dev_pool": size, "training.seed": seed})
        pool = HeldOutEvaluator(examples, held, config).pool
        assert [passage.id for passage in pool] == GOLD + drawn


def test_limits_draw_by_the_seed_for_training_and_alike_for_what_is_held_out(many):
    drawn = []
    for seed in (0, 0, 1):
        _, train, dev, _ = load_data(
            _config(**many, **{"data.train_limit": 8, "data.dev_limit": 5, "training.seed": seed})
        )
        drawn.append(([e.id for e in train], [e.id for e in dev]))
    assert [len(set(ids)) for ids in drawn[0]] == [8, 5]
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[2][0]
    assert drawn[0][1] == drawn[2][1]


def test_what_a_limit_draws_stays_with_its_set(many):
    sets = [*many["data.train"], *many["data.dev"]]
    fields = {"data.train": sets, "data.dev": [], "data.train_limit": 12}
    _, train, _, numbers = load_data(_config(**many | fields))
    assert numbers == [int(example.id.startswith("d")) for example in train]
    assert sorted(numbers) != numbers
    _, train, dev, _ = load_data(_config(**many, **{"data.train_limit": 40, "data.dev_limit": 20}))
    assert [e.id for e in train + dev] == [f"t{i}" for i in range(40)] + [f"d{i}" for i in range(20)]
