"""The demo, cut short, on the real weights and text: it runs, it continues, and it reports what it measured."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from cosup_fast.cli import demo


@pytest.mark.slow
def test_the_demo_runs_and_takes_up_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "QUESTIONS", 6)
    monkeypatch.setattr(demo, "ANSWERED", 4)
    monkeypatch.setattr(demo, "POOL", 20)
    short = ["training.steps=2", "training.batch_size=4", "data.dev_limit=4", "data.dev_pool=10"]
    short += ["model.gen_layers=2", "model.embseq_layers=1", "generation.max_new_tokens=3"]
    printed = []
    for _ in range(2):
        console = Console(file=io.StringIO(), width=120)
        demo.run_demo(tmp_path / "demo", console, short)
        printed.append(console.file.getvalue())
    for name in ("R@1", "answer in the output", "paired 95% interval", "expected", "curves.png"):
        assert name in printed[0]
    after = json.loads((tmp_path / "demo" / "after" / "report.json").read_text())
    assert after["overall"]["recall@1"]["count"] == 4
    assert len(json.loads((tmp_path / "demo" / "after.ranks.json").read_text())) == 6
    assert "held out after" in printed[0]
    assert "held out after" not in printed[1]  # nothing was trained again


def test_no_held_out_question_has_a_passage_that_is_trained_on():
    """On whatever is prepared here; the splits themselves are checked where they are made."""
    from cosup_fast.config import RunConfig
    from cosup_fast.data.records import DataError
    from cosup_fast.data.sources import load_corpus, load_examples

    try:
        known = {passage.id for passage in load_corpus("wiki-leads")}
        trained = [e for name in RunConfig().data.train for e in load_examples(name, known)]
    except DataError:
        pytest.skip("wiki-leads and questions are not prepared: cosup-fast data prepare questions")
    questions, pool = demo.held_out_questions(RunConfig())
    asked = {passage for example in questions for passage in example.gold}
    assert asked <= {passage.id for passage in pool}
    assert not asked & {passage for example in trained for passage in example.gold}
    assert len(pool) == demo.POOL
