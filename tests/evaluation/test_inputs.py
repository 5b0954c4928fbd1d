"""Test sets: what KILT's lines become, and what is wrong with a file, by its line."""

import json

import pytest

from cosup_fast.data.records import DataError, Example, Passage, validate, write_jsonl
from cosup_fast.evaluation.inputs import TestSet, load_test_sets, read_kilt
from cosup_fast.evaluation.scoring import rank_scores

KILT = [
    {
        "id": 75397,
        "input": "Paris is the capital of France.",
        "output": [
            {"answer": "SUPPORTS", "provenance": [{"wikipedia_id": "11", "title": "Paris", "start_paragraph_id": 1}]},
            {"provenance": [{"wikipedia_id": "12", "title": "Seine"}, {"wikipedia_id": "11", "title": "Paris"}]},
        ],
        "meta": {},
    },
    {"id": "b", "input": "Where is Rome?", "output": [{"answer": "Italy"}, {"answer": "Italy"}, {"answer": ""}]},
    {"id": "c", "input": "A blind test question"},
]


@pytest.fixture
def kilt_corpus() -> dict[str, Passage]:
    """A page of two paragraphs, and one that has another id than KILT's."""
    passages = [
        Passage(id="11#0", title="Paris", text="Paris is the capital of France."),
        Passage(id="11#1", title="Paris", text="It lies on the Seine."),
        Passage(id="seine", title="Seine", text="A river."),
    ]
    return {passage.id: passage for passage in passages}


@pytest.fixture
def kilt_file(tmp_path):
    def write(rows=KILT, name="fever-dev-kilt.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def test_kilt_lines_become_examples(kilt_file, kilt_corpus):
    first, second, third = read_kilt(kilt_file(), kilt_corpus)
    assert (first.id, first.dataset, first.question) == ("75397", "fever", "Paris is the capital of France.")
    assert (first.answers, first.gold) == (["SUPPORTS"], ["11", "seine"])  # by id of the page, by title
    converted = {p.id: p for p in (Passage(id="kilt:11:3", title="?", text="x"), kilt_corpus["seine"])}
    assert read_kilt(kilt_file(), converted)[0].gold == ["kilt:11", "seine"]
    assert (second.answers, second.gold, third.answers) == (["Italy"], [], [])


def test_the_outputs_of_kilt_are_alternatives(kilt_file, kilt_corpus):
    pages = ({"wikipedia_id": "11"}, {"title": "Seine"})
    outputs = [{"answer": "x", "provenance": [page]} for page in (*pages, pages[0])] + [{"provenance": pages}]
    (example,) = read_kilt(kilt_file([{"id": "a", "input": "?", "output": outputs}]), kilt_corpus)
    assert (example.gold, example.gold_sets) == (["11", "seine"], [["11"], ["seine"], ["11", "seine"]])
    ((ranked,),) = rank_scores([example], [[("seine", 2.0), ("rome", 1.0)]])
    assert (ranked.scores["rprec"], ranked.scores["recall@5"]) == (1.0, 0.5)
    with pytest.raises(DataError, match=r"gold_sets.1: expected passages that gold lists, too, found 'b'"):
        validate(
            "line 1", Example, {"id": "x", "question": "?", "output": [], "gold": ["a"], "gold_sets": [["a"], ["b"]]}
        )


@pytest.mark.parametrize(
    ("name", "dataset"),
    [
        ("nq-dev-kilt.jsonl", "nq"),
        ("structured_zeroshot-test_without_answers-kilt.jsonl", "structured_zeroshot"),
        ("wow.jsonl", "wow"),
    ],
)
def test_the_data_set_is_the_files_name(kilt_file, kilt_corpus, name, dataset):
    assert read_kilt(kilt_file(name=name), kilt_corpus)[0].dataset == dataset


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "x", "inputs": "?"}, "jsonl:4: input: expected a question, found ''"),
        ({"id": "x", "input": "?", "output": ["a"]}, "jsonl:4: output: expected a list of answers"),
        ({"id": "x", "input": " "}, "jsonl:4: input: expected a question, found ' '"),
        ({"input": "?"}, "jsonl:4: id: expected the id that KILT gives each question, found None"),
        ({"id": "b", "input": "?"}, "jsonl:4: id: expected a new id, found 'b' again"),
    ],
)
def test_broken_kilt_lines_are_named(kilt_file, kilt_corpus, row, message):
    with pytest.raises(DataError, match=message):
        read_kilt(kilt_file([*KILT, row]), kilt_corpus)


def test_gold_pages_must_be_in_the_corpus(kilt_file, kilt_corpus, data_folder):
    rows = [{**KILT[0], "output": [{"answer": "x", "provenance": [{"wikipedia_id": "99", "title": "Mu"}]}]}]
    path = str(kilt_file(rows))
    with pytest.raises(DataError, match=r"example '75397': expected gold pages .* found '99' .* --allow-missing-gold"):
        load_test_sets([path], kilt_corpus)
    (kept,) = load_test_sets([path], kilt_corpus, allow_missing_gold=True)
    assert kept.examples[0].gold == ["99"]
    assert load_test_sets([path], {})[0].examples[0].gold == ["99"]  # a system that retrieves nothing
    own = str(data_folder / "examples.jsonl")
    with pytest.raises(DataError, match=r"examples.jsonl:1: output.0.passage: expected the id of a passage"):
        load_test_sets([own], kilt_corpus)
    (uncited,) = load_test_sets([own], kilt_corpus, allow_missing_gold=True)
    assert [example.output for example in uncited.examples] == [[], [], [], []]
    assert uncited.examples[0].gold == ["paris"]


def test_domains_by_name_and_by_flag(data_folder, tmp_path, corpus, examples):
    names = []
    for name in ("test-in.jsonl", "mine_ood.jsonl", "plain.jsonl", "tin.jsonl"):
        records = [example.model_copy(update={"id": f"{example.id}-{name}"}) for example in examples]
        write_jsonl(tmp_path / name, records)
        names.append(str(tmp_path / name))
    assert [t.domain for t in load_test_sets(names, corpus)] == ["in-domain", "out-of-domain", "", ""]
    seen = load_test_sets(names, corpus, in_domain=["dates"], out_of_domain=[names[2]])
    assert seen[2].domain == {"cities": "out-of-domain", "dates": "in-domain"}
    assert [seen[2].domain_of(example) for example in seen[2].examples] == ["out-of-domain"] * 2 + ["in-domain"] * 2
    assert seen[0].domain == "in-domain"
    assert TestSet("x", examples, {"cities": "in-domain"}).domain_of(examples[2]) == ""
    with pytest.raises(ValueError, match="'dates' is named as in-domain and as out-of-domain"):
        load_test_sets(names, corpus, in_domain=["dates"], out_of_domain=["dates"])
    with pytest.raises(ValueError, match="'date' has a domain but no example, did you mean 'dates'"):
        load_test_sets(names, corpus, in_domain=["date"])


def test_a_limit_draws_from_all_sources(tmp_path, corpus, examples):
    sources = []
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [e.model_copy(update={"dataset": name}) for e in examples])
        sources.append(str(tmp_path / f"{name}.jsonl"))

    def drawn(limit, seed=0):
        sets = load_test_sets(sources, corpus, limit=limit, seed=seed)
        return [(e.dataset, e.id) for s in sets for e in s.examples]

    assert len(drawn(3)) == 3
    assert drawn(3) == drawn(3)
    assert len({tuple(drawn(3, seed)) for seed in range(9)}) > 1
    assert len(drawn(99)) == 8
    with pytest.raises(ValueError, match="at least one example set"):
        load_test_sets([], corpus)


def test_empty_and_missing_files(tmp_path, corpus):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="expected at least one example, found an empty file"):
        load_test_sets([str(tmp_path / "empty.jsonl")], corpus)
    with pytest.raises(DataError, match="found none of these"):
        load_test_sets([str(tmp_path / "absent.jsonl")], corpus)
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"deep\.jsonl:1: expected one JSON object"):
        load_test_sets([str(tmp_path / "deep.jsonl")], corpus)
