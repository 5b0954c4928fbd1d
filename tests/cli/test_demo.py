"""The demo, cut short, on the real weights and text: it runs, it continues, and it reports what it measured."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from cosup_fast.cli import demo
from cosup_fast.cli.common import load_model
from cosup_fast.data.records import Example
from cosup_fast.index import SequenceIndex


@pytest.mark.slow
def test_the_demo_runs_and_takes_up_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "QUESTIONS", 6)
    monkeypatch.setattr(demo, "ANSWERED", 4)
    monkeypatch.setattr(demo, "POOL", 20)
    short = ["training.batch_size=4", "data.dev_limit=4", "data.dev_pool=10"]
    short += ["model.gen_layers=2", "model.embseq_layers=1", "generation.max_new_tokens=3"]
    printed = []
    for steps in (2, 3):  # as a run that its minutes ended, which has steps left
        console = Console(file=io.StringIO(), width=120)
        demo.run_demo(tmp_path / "demo", console, [*short, f"training.steps={steps}"])
        printed.append(console.file.getvalue())
    for name in (
        "R@1 of 6",
        "(chance)",
        "passages of MiniLM",
        "gold passages",
        "not a title",
        "expected",
        "curves.png",
        "cosup-smollm2, the same models with more steps: R@1",
    ):
        assert name in printed[0]
    assert "correct, its own passages - no passage:" in printed[0]
    assert "Compare " in printed[0]
    for system in ("closed-book", "random", "dense-minilm", "gold", "co-supervised"):
        report = json.loads((tmp_path / "demo" / "evaluation" / system / "report.json").read_text())
        assert report["overall"]["correctness"]["count"] == 4
    ranks = json.loads((tmp_path / "demo" / "ranks" / "co-supervised.json").read_text())
    assert len(ranks["recall@1"]) == 6
    run = tmp_path / "demo" / "run"
    assert len(SequenceIndex.load(run / "index", load_model(run, "cpu"))) == 20  # as `cosup-fast serve` opens it
    assert "held out after" in printed[0]
    assert "held out after" not in printed[1]  # nothing was trained again


def _report(correct, answer_is_title):
    """What the table reads of a report: three questions, their scores and titles."""
    questions = [
        SimpleNamespace(key=str(i), titles=SimpleNamespace(answer_is_gold=title), scores={"correctness": score})
        for i, (score, title) in enumerate(zip(correct, answer_is_title, strict=True))
    ]

    def values(metric):
        return {q.key: q.scores[metric] for q in questions if metric in q.scores}

    return SimpleNamespace(questions=questions, values=values)


def test_the_table_counts_apart_what_copying_a_title_cannot_answer():
    titles = [True, False, False, None]
    reports = {name: _report([1.0, 0.0, 0.0, 0.0], titles) for name in demo.SYSTEMS}
    reports[demo.OURS] = _report([1.0, 1.0, 0.0, 0.0], titles)
    ranks = {"recall@1": {"a": 1.0, "b": 0.0}, "recall@5": {"a": 1.0, "b": 1.0}}
    recalls = dict.fromkeys(("before training", "dense:minilm", demo.OURS), ranks)
    console = Console(file=io.StringIO(), width=120)
    console.print(demo.comparison(reports, recalls, range(800)))
    rows = {
        line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:-1]]
        for line in console.file.getvalue().splitlines()
        if "│" in line
    }
    assert rows["(chance)"][:2] == ["0.1", "0.6"]
    assert rows["no passage"] == ["", "", "25.0", "0.0", ""]
    assert rows["its own passages"][:4] == ["50.0", "100.0", "50.0", "50.0"]
    assert "its own passages - no passage: +25.0, 95% interval [+0.0," in demo.gains(reports)


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
    assert asked <= set(pool.by_id)
    assert not asked & {passage for example in trained for passage in example.gold}
    assert len(pool) == demo.POOL


def test_a_kept_ranking_with_a_changed_byte_is_not_used(tmp_path):
    lists = [[("paris", 2.0), ("rome", 1.0)], [("rome", 2.0), ("paris", 1.0)]]
    questions = [Example(id=f"e{i}", question="?", output=[], gold=["paris"]) for i in range(2)]
    retriever = SimpleNamespace(rank=lambda examples, k: lists)
    bench = SimpleNamespace(system=lambda name, corpus: SimpleNamespace(retriever_of=lambda name: retriever))
    made = demo._ranked(tmp_path, "a b", lambda: bench, "", questions, SimpleNamespace(name="x"))
    assert made["recall@1"] == {"e0": 1.0, "e1": 0.0}
    assert demo._ranked(tmp_path, "a b", None, "", questions, None) == made
    (path,) = (tmp_path / "ranks").iterdir()
    path.write_text(path.read_text().replace('"e1": 0.0', '"e1": 1.0'))
    with pytest.raises(ValueError, match=r"a-b\.json is damaged: its checksum .*: remove it"):
        demo._ranked(tmp_path, "a b", None, "", questions, None)
