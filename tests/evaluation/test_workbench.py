"""One loaded model, many systems and test sets: nothing is embedded twice, and each set searches its own corpus."""

from __future__ import annotations

import json

import pytest

from cosup_fast.data.records import Example, Passage, Segment
from cosup_fast.evaluation import SYSTEMS, Corpus, Report, System, TestSet, Workbench, evaluate
from cosup_fast.evaluation import workbench as module
from cosup_fast.generation import GenerationConfig
from cosup_fast.index import SequenceIndex

CONFIG = GenerationConfig(ret_first=True, max_new_tokens=8, max_retrievals=1, candidates=2)

RIVERS = [
    Passage(id="paris", title="Paris, Texas", text="Not the one on the Seine."),  # an id of the other corpus, too
    Passage(id="rhine", title="Rhine", text="The Rhine flows from the Alps to the North Sea."),
    Passage(id="oder", title="Oder", text="The Oder is a river of 840 km."),
]


@pytest.fixture(scope="module")
def tests(examples) -> list[TestSet]:
    rivers = [
        Example(id="r1", dataset="rivers", question="Which river rises in the Alps?", output=[], answers=["Rhine"],
                gold=["rhine"]),
        Example(id="r2", dataset="rivers", question="How long is the Oder?", output=[], answers=["840 km"],
                gold=["oder"]),
        Example(id="r3", dataset="rivers", question="What lies in Texas?", output=[], answers=["Paris"],
                gold=["paris"]),
    ]  # fmt: skip
    return [TestSet("cities", examples, "in-domain", "leads"), TestSet("rivers", rivers, "out-of-domain", "rivers")]


@pytest.fixture(scope="module")
def corpora(passages) -> list[Corpus]:
    return [Corpus(passages, "leads"), Corpus(RIVERS, "rivers")]


@pytest.fixture
def bench(model) -> Workbench:
    return Workbench(model, progress=False)


def test_every_set_searches_its_own_corpus(bench, model, corpora, tests):
    for name in ("co-supervised", "bm25", "random", "gold"):
        report = evaluate(bench.system(name, corpora), tests, CONFIG, progress=False)
        for record in report.questions:
            own = {"leads": corpora[0], "rivers": corpora[1]}[record.corpus].by_id
            assert all(own[c.passage].title == c.title for r in record.answer.retrievals for c in r.candidates)
            assert all(own[name] == passage for name, passage in record.evidence.items())
            assert len(record.answer.retrievals) == record.scores["retrievals"] == 1
        # As if the set had been evaluated alone, with an index of its own.
        for corpus, test in zip(corpora, tests):
            alone = evaluate(bench.system(name, corpus), [test], CONFIG, progress=False)
            assert alone.questions == tuple(r for r in report.questions if r.corpus == corpus.name)
    index = SequenceIndex.build(model, RIVERS, progress=False)
    assert (bench.index("", corpora[1]).embeddings - index.embeddings).abs().max() < 1e-6


def test_chance_is_that_of_the_own_corpus(bench, corpora, tests):
    report = evaluate(bench.system("co-supervised", corpora), tests, CONFIG, progress=False)
    by_name = {part.dataset: part.chance for part in report.datasets}
    assert by_name["rivers"] == {"recall@1": 1 / 3, "recall@5": 1, "recall@20": 1}
    assert by_name["cities"] == pytest.approx({"recall@1": 1 / 11, "recall@5": 5 / 11, "recall@20": 1})
    assert evaluate(bench.system("gold", corpora), tests, CONFIG, progress=False).chance == {}


def test_a_corpus_is_embedded_once(bench, corpora, tests, monkeypatch):
    embedded = []
    embed = module.embed_passages
    monkeypatch.setattr(
        module,
        "embed_passages",
        lambda model, passages, **o: embedded.append(len(passages)) or embed(model, passages, **o),
    )
    bench.add_searcher("twin", bench.model)
    for _ in range(2):
        for name in ("co-supervised", "pair:twin"):
            evaluate(bench.system(name, corpora), tests, CONFIG, progress=False)
    assert embedded == [11, 3] * 2  # for the model, and for the one that the pair names


def test_a_resumed_evaluation_gives_the_same_records(bench, corpora, tests, tmp_path):
    calls = []
    system = bench.system("bm25", corpora)
    first = evaluate(system, tests, CONFIG, folder=tmp_path, progress=lambda *call: calls.append(call))
    assert ("Answering", 7, 7) in calls
    assert ("Ranking", 7, 7) in calls
    assert [done for stage, done, _ in calls if stage == "Answering"] == list(range(8))
    journal = tmp_path / "answers.jsonl"
    journal.write_bytes(b"\n".join(journal.read_bytes().split(b"\n")[:4]) + b"\n")
    again = evaluate(system, tests, CONFIG, folder=tmp_path, progress=False)
    assert again.questions == first.questions
    assert Report.load(tmp_path).rows() == again.rows()
    # One more set resumes, too; another corpus of the same name is searched afresh.
    extra = TestSet("more", [tests[1].examples[0].model_copy(update={"id": "r9"})], "", "rivers")
    assert len(evaluate(system, [*tests, extra], CONFIG, folder=tmp_path, progress=False).questions) == 8
    other = [corpora[0], Corpus(RIVERS[1:], "rivers")]
    changed = evaluate(bench.system("bm25", other), [tests[0], TestSet("r", tests[1].examples[:2], "", "rivers")],
                       CONFIG, folder=tmp_path, progress=False)  # fmt: skip
    assert changed.questions[-1].chance["recall@1"] == 1 / 2


def test_rows_are_plain_records(bench, corpora, tests):
    report = evaluate(bench.system("gold", corpora), tests, CONFIG, progress=False)
    rows = json.loads(json.dumps(report.rows()))
    assert [row["key"] for row in rows] == [record.key for record in report.questions]
    by_key = {row["key"]: row for row in rows}
    assert by_key["rivers/r2"]["retrieved"] == by_key["rivers/r2"]["gold"] == ["oder"]
    assert by_key["rivers/r2"]["answer_is_gold_title"] is False
    assert by_key["rivers/r1"]["answer_is_gold_title"] is by_key["rivers/r1"]["answer_is_retrieved_title"] is True
    assert by_key["dates/e4"]["answer_is_gold_title"] is None  # no gold answer
    beyond = [row for row in rows if "beyond_titles" in row["scores"]]
    assert {row["key"] for row in beyond} == {"cities/e2", "dates/e3", "rivers/r2", "rivers/r3"}
    assert all(row["scores"]["beyond_titles"] == row["scores"]["correctness"] for row in beyond)


def test_closed_book_knows_titles_of_corpora_it_does_not_read(bench, corpora, tests):
    report = evaluate(bench.system("closed-book", corpora), tests, CONFIG, progress=False)
    assert {r.key for r in report.questions if "beyond_titles" in r.scores} == {
        "cities/e2", "dates/e3", "rivers/r2", "rivers/r3"
    }  # fmt: skip
    assert not any("retrievals" in r.scores or r.evidence for r in report.questions)


def test_a_model_that_writes_titles_is_seen(trained, passages):
    example = Example(
        id="t", dataset="d", question="What is the capital of France?", output=[], answers=["Paris"], gold=["paris"]
    )
    bench = Workbench(trained, progress=False)
    record = evaluate(bench.system("gold", Corpus(passages)), [example], CONFIG, progress=False).questions[0]
    assert (record.titles.answer_is_gold, record.titles.wrote_retrieved) == (True, False)
    copied = record.answer.model_copy(update={"text": " paris."})
    from cosup_fast.evaluation.scoring import titles

    assert titles(example, copied, Corpus(passages)).wrote_retrieved is True


def test_what_a_workbench_refuses(bench, corpora, tests):
    with pytest.raises(ValueError, match=r"system 'bm25' retrieves: give it a corpus"):
        bench.system("bm25")
    with pytest.raises(ValueError, match=r"system 'pair:runs/x': give the workbench a `load`"):
        bench.system("pair:runs/x", corpora)
    with pytest.raises(ValueError, match="no retriever for the corpus 'rivers': it has leads"):
        evaluate(bench.system("bm25", corpora[:1]), tests, CONFIG, progress=False)
    with pytest.raises(ValueError, match="has a corpus for each test set: leads, rivers"):
        dict(bench.system("bm25", corpora).passages)
    assert isinstance(bench.system("closed-book"), System)
    assert list(SYSTEMS) == ["co-supervised", "closed-book", "gold", "random", "bm25", "dense", "pair", "untrained"]


def test_written_text_reaches_the_retriever_of_its_corpus(bench, corpora, passages):
    example = Example(id="x", question="?", output=[Segment(text="Rhine", passage="rhine")], gold=["rhine"])
    (found,) = bench.system("bm25", corpora).retriever_of("rivers").rank([example], 2)
    assert {name for name, _ in found} <= {p.id for p in RIVERS}
