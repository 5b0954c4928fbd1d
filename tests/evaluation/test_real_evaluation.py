"""Real weights, real text: SmolLM2 writes, MiniLM retrieves, and every baseline goes through the same harness."""

from __future__ import annotations

import random

import pytest

from cosup_fast.config.model import ModelConfig
from cosup_fast.data.prepared.prepare import prepare
from cosup_fast.data.sources import load_corpus, load_examples
from cosup_fast.data.template import TextConfig
from cosup_fast.evaluation import (
    DenseRetriever,
    FluencyModel,
    GoldRetriever,
    IndexRetriever,
    RandomRetriever,
    System,
    TestSet,
    compare,
    evaluate,
)
from cosup_fast.generation import GenerationConfig
from cosup_fast.index import SequenceIndex
from cosup_fast.model import CoSupervisionModel

CONFIG = GenerationConfig(max_new_tokens=4, max_retrievals=1, ret_first=True)


@pytest.mark.slow
def test_the_baselines_on_real_questions(tmp_path):
    for name in ("smollm2-135m", "minilm", "wiki-leads", "questions"):
        prepare(name)
    corpus = load_corpus("wiki-leads")
    known = {passage.id for passage in corpus}
    draw = random.Random(0)
    tests = [
        TestSet(name, draw.sample([e for e in load_examples(name, known) if e.answers], 12), domain)
        for name, domain in (("questions/test-in", "in-domain"), ("questions/test-out", "out-of-domain"))
    ]
    gold = {name for test in tests for example in test.examples for name in example.gold}
    pool = [p for p in corpus if p.id in gold] + draw.sample([p for p in corpus if p.id not in gold], 150)
    text = TextConfig(max_passage_tokens=64, long_passages="truncate")
    model = CoSupervisionModel.from_pretrained(ModelConfig(gen="smollm2-135m", gen_layers=3, shared=True), text)
    systems = {
        "co-supervised": IndexRetriever(model, SequenceIndex.build(model, pool, progress=False)),
        "dense:minilm": DenseRetriever("minilm", pool, text.passage),
        "gold": GoldRetriever(pool),
        "random": RandomRetriever(pool),
        "closed-book": None,
    }
    fluency = FluencyModel("smollm2-135m")
    reports = {
        name: evaluate(
            System(name, model, retriever), tests, CONFIG, fluency=fluency, folder=tmp_path / name[:5], progress=False
        )
        for name, retriever in systems.items()
    }
    found = {name: report.overall.get("passage_recall") for name, report in reports.items()}
    assert found["gold"].mean == 1
    assert found["dense:minilm"].mean > 0.6
    assert found["random"].mean < 0.2
    assert found["closed-book"] is None
    dense = reports["dense:minilm"]
    assert dense.overall["recall@5"].mean > 0.8
    assert list(dense.averages) == ["all", "in-domain", "out-of-domain"]
    assert dense.overall["answer_in_passage"].mean > 0.5
    for report in reports.values():
        assert 1 < report.overall["perplexity"].mean < 1e6
    (recall,) = [
        row.gain
        for row in compare(reports["random"], dense, ["recall@5"]).metrics
        if row.metric == "recall@5" and not row.dataset
    ]
    assert recall.p_value < 0.001
    assert "in-domain" in (tmp_path / "dense" / "report.html").read_text()


@pytest.mark.slow
def test_fluent_text_is_less_perplexing():
    prepare("smollm2-135m")
    fluent, shuffled = FluencyModel("smollm2-135m").nats_per_token(
        ["The Nile flows north through Egypt and into the sea.", "north The into sea Egypt flows the and Nile through."]
    )
    assert fluent < shuffled - 1
