"""An evaluation from end to end: what it measures, keeps, resumes and refuses."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from rich.console import Console

from cosup_fast.data.records import Example, write_jsonl
from cosup_fast.evaluation import (
    FluencyModel,
    IndexRetriever,
    RandomRetriever,
    Report,
    System,
    TestSet,
    Verdict,
    evaluate,
)
from cosup_fast.evaluation.suites import METRICS, SUMMARY
from cosup_fast.files import Journal
from cosup_fast.generation import GenerationConfig
from cosup_fast.index import SequenceIndex

CONFIG = GenerationConfig(ret_first=True, max_new_tokens=15, candidates=2)


def test_what_is_learnt_by_heart_is_answered_right(trained, passages, examples):
    index = SequenceIndex.build(trained, passages, progress=False)
    report = evaluate(System("co-supervised", trained, IndexRetriever(trained, index)), examples, progress=False)
    for record, example in zip(report.questions, examples, strict=True):
        assert [(s.text, s.passage) for s in record.answer.segments] == [(s.text, s.passage) for s in example.output]
        assert record.answer.stop_reason == "end"
        assert set(record.ranks) == {1}
    for name in ("recall@1", "mrr", "ndcg@10", "rprec", "passage_f1", "containment", "retrieval", "correctness"):
        assert report.overall[name].mean == 1, name
    assert [len(record.verdicts) for record in report.questions] == [1, 2, 1, 2]
    assert report.overall["grounded"].mean == 1


@pytest.fixture(scope="module")
def tests(examples) -> list[TestSet]:
    return [
        TestSet("first", examples, {"cities": "in-domain", "dates": "out-of-domain"}),
        TestSet("second", [examples[0].model_copy(update={"dataset": "nq"})], "in-domain"),
    ]


@pytest.fixture(scope="module")
def report(model, index, tests, llama_folder) -> Report:
    system = System("co-supervised", model, IndexRetriever(model, index), {"checkpoint": "here"})
    return evaluate(system, tests, CONFIG, fluency=FluencyModel(llama_folder), metrics=["rouge_l"], progress=False)


def test_report_is_the_mean_over_its_questions(report, examples):
    assert [record.key for record in report.questions] == [*(f"{e.dataset}/{e.id}" for e in examples), "nq/e1"]
    assert [(part.dataset, part.domain, part.questions) for part in report.datasets] == [
        ("cities", "in-domain", 2), ("dates", "out-of-domain", 2), ("nq", "in-domain", 1)
    ]  # fmt: skip
    assert [(part.retrieval, part.correctness) for part in report.datasets] == [
        ("passage_f1", "containment"), ("passage_f1", "containment"), ("answer_in_passage", "containment")
    ]  # fmt: skip
    for metric in [*METRICS, *SUMMARY]:
        values = report.values(metric)
        if metric in ("label_accuracy", "string_em", "unigram_f1"):
            assert not values  # no suite here has them
            continue
        geometric = metric == "perplexity"

        def mean(values, geometric=geometric):
            return math.exp(np.mean(np.log(values))) if geometric else np.mean(values)

        assert report.overall[metric].mean == pytest.approx(mean(list(values.values())))
        assert report.overall[metric].count == len(values)
        for part in report.datasets:
            inside = [values[r.key] for r in report.questions if r.example.dataset == part.dataset and r.key in values]
            if inside:
                assert part.metrics[metric].mean == pytest.approx(mean(inside))
            else:
                assert metric not in part.metrics
    assert report.overall["containment"].count == 4  # e4 has no answers
    assert report.overall["f1"].count == 3  # e3 has patterns
    assert report.overall["rouge_l"].count == 3
    with pytest.raises(ValueError, match="metric='bleu'"):
        report.values("bleu")


def test_averages_count_data_sets_alike(report):
    assert list(report.averages) == ["all", "in-domain", "out-of-domain"]
    by_name = {part.dataset: part.metrics for part in report.datasets}
    for name in SUMMARY:
        inside = [by_name[d][name].mean for d in ("cities", "nq") if name in by_name[d]]
        assert report.averages["in-domain"][name].mean == pytest.approx(np.mean(inside))
        if name in by_name["dates"]:
            assert report.averages["out-of-domain"][name].mean == pytest.approx(by_name["dates"][name].mean)
            assert report.averages["all"][name].mean == pytest.approx(np.mean([*inside, by_name["dates"][name].mean]))


def test_report_says_what_was_measured(report, model, llama_folder):
    settings = report.settings
    assert settings["generation"]["max_new_tokens"] == 15
    assert settings["retriever"]["passages"] == 11
    assert settings["checkpoint"] == settings["retriever"]["index"] == model.fingerprint()
    assert settings["sources"] == {"checkpoint": "here"}
    assert (settings["judge"], settings["fluency"]) == ("lexical", llama_folder)
    assert [test["questions"] for test in settings["tests"]] == [4, 1]
    assert {"torch", "transformers", "cosup-fast"} == set(settings["versions"])
    for record in report.questions:
        assert len(record.answer.retrievals) == 1
        assert set(record.evidence) == {record.answer.retrievals[0].best.passage}
        assert len(record.verdicts) == sum(segment.passage is not None for segment in record.answer.segments)


def test_report_survives_saving(report, tmp_path):
    for _ in range(2):
        report.save(tmp_path / "report")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["report", "report.json"]
    assert Report.load(tmp_path / "report") == Report.load(tmp_path / "report" / "report.json") == report
    path = tmp_path / "report" / "report.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    assert (data["format"], data["format_version"]) == ("cosup-fast evaluation", 2)
    del data["crc32"]
    for damage in ({**data, "format_version": 7}, {"overall": {}}, [1], {**data, "questions": [{"key": "x"}]}):
        path.write_text(json.dumps(damage))
        with pytest.raises(ValueError, match="is not a report that can be read"):
            Report.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not a report that can be read"):
        Report.load(path)
    with pytest.raises(ValueError, match="is not a report that can be read"):
        Report.load(tmp_path / "absent")


def test_table_shows_the_main_numbers(report):
    console = Console(width=170, file=io.StringIO())
    console.print(report.table())
    text = console.file.getvalue()
    for title in (
        "cities",
        "out-of-domain",
        "average of 3",
        "R@1",
        "R@20",
        "chance",
        "contains",
        "grounded",
        "perplexity",
    ):
        assert title in text
    assert f"{100 * report.datasets[0].metrics['recall@5'].mean:.1f}" in text
    assert "chance 45.5" in text  # 5 of 11


class Counting:
    """A judge that counts what it is asked."""

    name = "counting"

    def __init__(self):
        self.asked = 0

    def judge(self, pairs):
        self.asked += len(pairs)
        return [Verdict(entailed=True, score=1.0, why="so it is") for _ in pairs]


def test_a_rerun_does_nothing_twice(system, examples, tmp_path, monkeypatch):
    judge = Counting()
    first = evaluate(system, examples, CONFIG, judge=judge, folder=tmp_path / "out", progress=False)
    asked = judge.asked
    assert asked > 0
    answered = []
    answer = System.answer
    monkeypatch.setattr(
        System, "answer", lambda self, e, *a, **k: answered.extend(x.question for x in e) or answer(self, e, *a, **k)
    )
    assert evaluate(system, examples, CONFIG, judge=judge, folder=tmp_path / "out", progress=False) == first
    assert (answered, judge.asked) == ([], asked)
    # Another judge judges again, and more examples are answered on top.
    more = [*examples, examples[0].model_copy(update={"id": "e5", "question": "And Rome?"})]
    other = evaluate(system, more, CONFIG, folder=tmp_path / "out", progress=False)
    assert answered == ["And Rome?"]
    assert other.settings["judge"] == "lexical"
    assert [r.answer for r in other.questions[:4]] == [r.answer for r in first.questions]
    # The same id with another question is another question.
    changed = [examples[0].model_copy(update={"question": "What else?"})]
    evaluate(system, changed, CONFIG, folder=tmp_path / "out", progress=False)
    assert answered == ["And Rome?", "What else?"]


def test_a_question_that_fails_harms_no_other(model, passages, examples, tmp_path, monkeypatch):
    """A passage that is too long is found out only when it is retrieved."""
    retriever = RandomRetriever(passages)
    system, retrieve = System("random", model, retriever), retriever.retrieve

    def broken(requests, k):
        if any(request.example.id == "e2" for request in requests):
            raise ValueError("passage 'x' is too long")
        return retrieve(requests, k)

    with monkeypatch.context() as patch:
        patch.setattr(retriever, "retrieve", broken)
        with pytest.raises(ValueError, match=r"1 of 4 questions could not be answered, first 'e2': passage 'x' is too"):
            evaluate(system, examples, CONFIG, folder=tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "answers.jsonl").read_text().count('"key"') == 3
    assert not (tmp_path / "out" / "report.json").exists()
    assert len(evaluate(system, examples, CONFIG, folder=tmp_path / "out", progress=False).questions) == 4


def test_other_settings_are_refused_where_answers_are(system, model, examples, tmp_path):
    evaluate(system, examples[:1], CONFIG, folder=tmp_path / "out", progress=False)
    longer = CONFIG.model_copy(update={"max_new_tokens": 16})
    with pytest.raises(ValueError, match=r"another generation.max_new_tokens \(15, now 16\): give another --output"):
        evaluate(system, examples[:1], longer, folder=tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match=r'another system \("co-supervised", now "closed-book"\)'):
        evaluate(System("closed-book", model), examples[:1], CONFIG, folder=tmp_path / "out", progress=False)


def test_a_killed_evaluation_goes_on_where_it_was(make_model, llama_folder, passages, tmp_path):
    """A real process, killed while it answers; what it had is kept, and the whole is what an undisturbed run gives."""
    examples = [Example(id=f"q{i}", question=f"What is number {i}?", output=[], gold=["go"]) for i in range(40)]
    write_jsonl(tmp_path / "examples.jsonl", examples)
    write_jsonl(tmp_path / "passages.jsonl", passages)
    script = f"""
from cosup_fast.data.records import read_examples, read_passages
from cosup_fast.evaluation import RandomRetriever, System, evaluate
from cosup_fast.generation import GenerationConfig
from cosup_fast.config.model import ModelConfig
from cosup_fast.model import CoSupervisionModel
model = CoSupervisionModel.from_pretrained(ModelConfig(gen={llama_folder!r}, shared=True))
examples = read_examples({str(tmp_path / "examples.jsonl")!r}, None, allow_no_retrieval=True)
system = System("random", model, RandomRetriever(read_passages({str(tmp_path / "passages.jsonl")!r})))
config = GenerationConfig(max_new_tokens=15, ret_first=True, candidates=2)
evaluate(system, examples, config, folder={str(tmp_path / "out")!r}, progress=False)
"""
    answers = tmp_path / "out" / "answers.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment)
    deadline = time.monotonic() + 300
    while not answers.is_file() or answers.read_bytes().count(b"\n") < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    kept = answers.read_bytes().split(b"\n")[:-1]
    assert 4 <= len(kept) < 41
    answers.write_bytes(b"\n".join(kept) + b'\n{"key": "half a li')
    system = System("random", make_model(shared=True), RandomRetriever(passages))
    resumed = evaluate(system, examples, CONFIG, folder=tmp_path / "out", progress=False)
    assert answers.read_bytes().split(b"\n")[: len(kept)] == kept
    assert resumed == evaluate(system, examples, CONFIG, progress=False)


def test_journal(tmp_path):
    path = tmp_path / "deep" / "journal.jsonl"
    with Journal(path, {"a": {"b": 1}}) as journal:
        journal.add("x", {"é": None})
        journal.add("y", [1.5])
    with Journal(path, {"a": {"b": 1}}) as journal:
        assert journal.done == {"x": {"é": None}, "y": [1.5]}
    with pytest.raises(ValueError, match=r"another a.b \(1, now 2\)"):
        Journal(path, {"a": {"b": 2}})
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"x"', b'"x'))
    with pytest.raises(ValueError, match=r"journal.jsonl:2 is damaged"):
        Journal(path, {"a": {"b": 1}})
    path.write_bytes(whole)
    with Journal(path, {"a": {"b": 2}}, restart=True) as journal:
        assert journal.done == {}
        journal.add("z", 1)
    with Journal(path, {"a": {"b": 2}}) as journal:
        assert journal.done == {"z": 1}
    with Journal(path, {"a": {"b": 2}}), pytest.raises(ValueError, match="is being written by another process"):
        Journal(path, {"a": {"b": 2}})
    with Journal(None, {}) as journal:
        journal.add("k", 1)
        assert journal.done == {"k": 1}


def test_one_question_has_no_interval(system, examples):
    report = evaluate(system, examples[:1], CONFIG, progress=False)
    assert report.overall["recall@20"].low is None
    console = Console(width=140, file=io.StringIO())
    console.print(report.table())
    assert f"{100 * report.overall['recall@20'].mean:.1f}" in console.file.getvalue()


def test_wrong_requests_are_refused_before_any_work(system, examples, monkeypatch):
    monkeypatch.setattr(system.retriever, "rank", None)  # the work
    with pytest.raises(ValueError, match="at least one example, got none"):
        evaluate(system, [], progress=False)
    with pytest.raises(ValueError, match="'cities/e1' occurs more than once"):
        evaluate(system, [examples[0], examples[0]], progress=False)
    with pytest.raises(ValueError, match="metric 'blue' is unknown"):
        evaluate(system, examples, metrics=["blue"], progress=False)
    with pytest.raises(ValueError, match=r"'cities/e1': its prompt has \d+ tokens, .* 512 positions of Gen"):
        evaluate(system, [examples[0].model_copy(update={"question": "long " * 600})], progress=False)
    with pytest.raises(ValueError, match=r"'e3': the answer pattern '\(open' is invalid"):
        evaluate(system, [examples[2].model_copy(update={"answers": ["fine", "(open"]})], progress=False)
