"""The study's test sets: what each published format becomes, the committed sample, and what pins it."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from cosup_fast.data.prepared import benchmarks, bigbench
from cosup_fast.data.prepared.benchmarks import BENCHMARKS, LEADS, build_benchmark, read_table
from cosup_fast.data.prepared.catalog import CATALOG, GROUPS, PINS, is_corpus
from cosup_fast.data.prepared.splits import read_table as read_splits
from cosup_fast.data.records import Example, Passage, Segment, read_examples, read_passages, write_jsonl


def tasks(tmp_path, *examples, name="x.json"):
    file = tmp_path / name
    file.write_text(json.dumps({"examples": examples}))
    return file


def lead(title, text):
    return Passage(id=f"wiki:{title}", title=title, text=text)


def test_squad_keeps_its_ids_titles_and_every_answer_once(tmp_path):
    qas = [{"id": "7", "question": "Who  won?", "answers": [{"text": "The Broncos"}, {"text": "Broncos"}] * 2}]
    articles = [{"title": "Super_Bowl_50%21", "paragraphs": [{"context": "Broncos\nwon.", "qas": qas}]}]
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": articles}))
    ((example, passage),) = bigbench.read_squad(file, titled=True)
    assert passage == Passage(id="squad:0-0", title="Super Bowl 50!", text="Broncos won.")
    assert (example.id, example.question, example.answers) == ("squad-7", "Who won?", ["The Broncos", "Broncos"])
    assert example.gold == ["squad:0-0"]
    ((_, untitled),) = bigbench.read_squad(file, titled=False)
    assert untitled.title == ""


def substituted(question, text, there="Griselda", original="Jeremy"):
    return {
        "input": f"\nQuestion: {question}\nContext: {text}",
        "target": there,
        "target_scores": {there: 1, original: 0},
    }


def test_nq_is_restored_or_left_as_it_is_under_the_same_number(tmp_path):
    file = tasks(
        tmp_path,
        substituted("who?", "She likes Griselda . Ann says that Griselda likes her ."),
        substituted("both?", "Griselda and Griselda sing ."),
        substituted("again?", "She likes Griselda . Ann says that Griselda likes her ."),
    )
    restored, left = list(bigbench.read_nq(file, True)), list(bigbench.read_nq(file, False))
    assert [example.id for example, _ in restored] == ["nq-restored-0", "nq-restored-2"]
    assert [example.id for example, _ in left] == ["nq-substituted-0", "nq-substituted-2"]
    assert restored[0][1].text == "She likes Jeremy . Ann says that Jeremy likes her ."
    assert restored[0][1].id == restored[1][1].id == "nq-restored:0"
    assert restored[0][0].answers == ["Jeremy"]
    assert left[0][0].answers == ["Griselda"]
    assert "Griselda" in left[0][1].text


def test_quoref_keeps_questions_with_one_answer(tmp_path):
    one = {"input": "Passage: Ann met Bob.\nHe left. \nQuestion: Who left? ", "target": ["Bob."]}
    file = tasks(tmp_path, one, {**one, "target": ["Ann.", "Bob."]})
    ((example, passage),) = bigbench.read_quoref(file)
    assert passage.text == "Ann met Bob. He left."
    assert (example.question, example.answers, example.output[0].text) == ("Who left?", ["Bob"], "Bob")


@pytest.mark.parametrize(
    ("label", "gold"), [("True", "SUPPORTS"), ("False", "REFUTES"), ("Neither", "NOT ENOUGH INFO")]
)
def test_vitaminc_has_labels_and_titles(tmp_path, label, gold):
    scores = {"True": 0, "False": 0, "Neither": 0, label: 1}
    file = tasks(tmp_path, {"input": "Argo -LRB-film-RRB-: It won .\nClaim: It lost .", "target_scores": scores})
    ((example, passage),) = bigbench.read_vitaminc(file)
    assert (passage.title, passage.text) == ("Argo (film)", "It won .")
    assert (example.question, example.answers) == ("It lost .", [gold])
    assert example.instruction.startswith("Say whether the claim")


def test_fever_goes_with_the_pages_that_decide_it(tmp_path):
    said = "On June 2017, the following claim was made: Rome is old.\nQ: Was this claim true or false?"
    task = {"id": 3, "input": said, "target_scores": {"true": 1, "false": 0}}
    file = tasks(tmp_path, task, {**task, "id": 4})
    pages = [lead("Rome", "Old."), lead("Italy", "Here.")]
    ((example, passage),) = bigbench.read_fever(file, {"3": pages})
    assert (example.id, example.question, example.answers) == ("fever-3", "Rome is old.", ["SUPPORTS"])
    assert example.gold == ["wiki:Rome", "wiki:Italy"]
    assert passage == pages[0]


def test_wikidata_asks_what_the_lead_says(tmp_path):
    file = tasks(
        tmp_path,
        {"input": "The capital of Kenya is", "target": ["Nairobi", "x"]},
        {"input": "The capital of Peru is", "target": "Lima"},
        {"input": "The language used in Kingdom of Kenya is", "target": "Nairobi"},
        {"input": "Odd", "target": "Nairobi"},
    )
    leads = {p.id: p for p in (lead("Kenya", "Its capital is Nairobi."), lead("Peru", "A country."))}
    ((relation, example, _),) = bigbench.read_wikidata(file, leads)
    assert (relation, example.question, example.output[0].text) == ("capital", "The capital of Kenya is", "Nairobi")


def test_only_the_members_that_are_read_are_extracted(tmp_path):
    root = "bigbench-1.0.0/bigbench/benchmark_tasks/"
    (tmp_path / "file").write_text("{}")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        for member in (*bigbench.MEMBERS.values(), "other/task.json", "../../setup.py"):
            archive.add(tmp_path / "file", root + member)
    (tmp_path / "out").mkdir()
    bigbench.build_bigbench([tmp_path / "x.tar.gz"], tmp_path, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").rglob("*")} == set(bigbench.MEMBERS)


def test_a_set_is_the_sample_of_the_table_without_what_is_trained(tmp_path, monkeypatch):
    for name in ("cloze", "questions"):
        (tmp_path / name).mkdir()
        for split in ("train", "dev"):
            write_jsonl(
                tmp_path / name / f"{split}.jsonl",
                [Example(id="t", question="Asked, before!", output=[Segment(text="x", passage="p")])],
            )
    passages = [Passage(id=f"s:{i}", title="", text=f"text {i}") for i in range(4)]
    asked = ["one?", "asked before", "three?", "four?"]
    read = [
        ("", Example(id=f"s-{i}", question=q, output=[Segment(text="x", passage=p.id)]), p)
        for i, (q, p) in enumerate(zip(asked, passages, strict=True))
    ]
    benchmark = benchmarks.Benchmark("s", "", "in-domain", "containment", False, True, "", "", lambda home: read)
    table = {("s", "question"): ["s-0", "s-3"], ("s", "passage"): ["s:0", "s:1", "s:3"]}
    monkeypatch.setattr(benchmarks, "read_table", lambda: table)
    (tmp_path / "out").mkdir()
    build_benchmark(benchmark)([], tmp_path, tmp_path / "out")
    ids = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert [e.id for e in read_examples(ids["test.jsonl"], None)] == ["s-0", "s-3"]
    assert [e.id for e in read_examples(ids["whole.jsonl"], None)] == ["s-0", "s-2", "s-3"]
    assert [p.id for p in read_passages(ids["passages.jsonl"])] == ["s:0", "s:1", "s:3"]
    assert len(read_passages(ids["passages-whole.jsonl"])) == 4


def test_the_committed_sample_is_small_and_asks_about_no_trained_page():
    table = read_table()
    trained = {item.page for item in read_splits() if item.split in ("train", "dev")}
    questions = {f"{item.dataset}-{item.source}": item for item in read_splits()}
    assert len(BENCHMARKS) >= 12
    for name in BENCHMARKS:
        ids = table[name, "question"]
        assert 0 < len(ids) == len(set(ids)) <= 200
        for id in ids if name in ("nq", "triviaqa", "new-topics", "webquestions", "curatedtrec") else ():
            assert questions[id].page not in trained
    for (_, kind), ids in table.items():
        assert len(ids) == len(set(ids)) <= (200 if kind == "question" else 2010)
    assert set(table[LEADS, "passage"]) & trained  # others of the corpus may be trained on; none of them is gold
    twins = {id.replace("restored", "substituted") for id in table["nq-restored", "question"]}
    assert twins == set(table["nq-substituted", "question"])


def test_every_test_set_is_pinned_and_in_the_group():
    assert set(PINS) == {LEADS, *BENCHMARKS}
    for name, benchmark in BENCHMARKS.items():
        entry = CATALOG[name]
        assert "test.jsonl" in entry.files
        assert any(is_corpus(file) for file in entry.files) == benchmark.own_corpus
        assert all(len(digest) == 64 for digest in entry.files.values())
        assert benchmark.name == name
    assert set(GROUPS["study"]) >= {LEADS, *BENCHMARKS, *GROUPS["starter"]}


def test_the_table_of_the_docs_says_what_there_is():
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    shown = {row[0].strip("`"): row for row in rows if row[0].strip("`") in BENCHMARKS and len(row) == 9}
    assert list(shown) == list(BENCHMARKS)
    table = read_table()
    for name, (_, test, _, corpus, _, domain, correctness, title, licence) in shown.items():
        benchmark = BENCHMARKS[name]
        assert int(test) == len(table[name, "question"])
        spec, size = corpus.split()
        assert spec == f"`{benchmark.corpus}`"
        assert (benchmark.corpus, "passage") not in table or int(size.replace(",", "")) == len(
            table[benchmark.corpus, "passage"]
        )
        assert domain == benchmark.domain.removesuffix("-domain").removesuffix("-of")
        assert correctness == {"containment": "contains", "label_accuracy": "label"}[benchmark.metric]
        assert title == ("yes" if benchmark.title_answers else "no")
        assert licence == benchmark.licence


@pytest.mark.slow
def test_every_test_set_is_prepared_and_its_counts_are_those_of_the_docs():
    from cosup_fast.data.prepared.prepare import prepare
    from cosup_fast.data.sources import load_corpus, load_examples

    prepare("study")
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    for name, benchmark in BENCHMARKS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |") and line.count("|") == 10)
        passages = {passage.id: passage for passage in load_corpus(benchmark.corpus)}
        for example in load_examples(benchmark.questions, passages):
            assert example.dataset == name
            assert example.gold
        counts = [f"{len(passages):,}"]
        if benchmark.own_corpus:
            counts.append(f"{len(load_examples(f'{name}/whole', None)):,}")
        if "passages-whole.jsonl" in CATALOG[name].files:
            counts.append(f"{len(load_corpus(f'{name}/passages-whole')):,}")
        assert all(count in row for count in counts), row


@pytest.mark.slow
def test_the_sample_is_what_the_script_draws():
    script = Path(__file__).parents[3] / "scripts" / "sampling.py"
    run = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
