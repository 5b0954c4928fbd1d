"""Data in the forms people have: what every form becomes, what is refused with its line, and direct use by name."""

from __future__ import annotations

import csv
import json
import os

import pyarrow
import pytest
from pyarrow import parquet

from cosup_fast.data.convert import (
    convert_beir,
    convert_dpr,
    convert_kilt,
    convert_sentence_transformers,
    convert_tevatron,
)
from cosup_fast.data.convert import rows as rows_module
from cosup_fast.data.convert.rows import read_rows
from cosup_fast.data.corpus import open_corpus
from cosup_fast.data.records import DataError, Segment, read_examples, read_passages
from cosup_fast.data.sources import load_corpus, load_examples

TRIPLETS = [
    {"anchor": "Where is Oslo?", "positive": "Oslo is in Norway.", "negative": "Rome is in Italy."},
    {"anchor": "Where is Rome?", "positive": "Rome is in Italy.", "negative": 'Paris,\nthe "city".'},
]
TEVATRON = [
    {
        "query_id": 17,
        "query": "Where is Oslo?",
        "answers": ["Norway"],
        "positive_passages": [{"docid": "d1", "title": "Oslo", "text": "Oslo is in Norway."}],
        "negative_passages": [
            {"docid": "d2", "title": "Rome", "text": "Rome is in Italy."},
            {"docid": "d3", "text": "No."},
        ],
    },
    {
        "query_id": 17,
        "query": "Where is Rome?",
        "positive_passages": [
            {"docid": "d2", "title": "Rome", "text": "Rome is in Italy."},
            {"docid": "d4", "text": "It lies in Latium."},
        ],
        "negative_passages": [{"docid": "d2", "title": "Rome", "text": "Rome is in Italy."}],
    },
    {"query_id": "18", "query": "Nobody knows?", "positive_passages": [], "negative_passages": []},
]  # fmt: skip
DPR = [
    {
        "dataset": "nq_train_psgs_w100",
        "question": "where is oslo",
        "answers": ["Norway", "in Norway"],
        "positive_ctxs": [
            {"title": "Oslo", "text": "Oslo is in Norway.", "score": 1000, "title_score": 1, "passage_id": "7"}
        ],
        "negative_ctxs": [{"title": "Nile", "text": "A river.", "score": 0, "title_score": 0, "passage_id": "8"}],
        "hard_negative_ctxs": [{"title": "Bergen", "text": "In Norway, too.", "score": 3, "psg_id": 9}],
    },
    {"question": "who", "answers": [], "positive_ctxs": [], "negative_ctxs": [], "hard_negative_ctxs": []},
]


def _table(path, records, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(records)
    return path


def _parquet(path, records):
    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


@pytest.fixture
def beir(tmp_path, write_lines):
    """A BEIR folder."""
    folder = tmp_path / "scifact"
    (folder / "qrels").mkdir(parents=True)
    write_lines(
        folder / "corpus.jsonl",
        [
            {"_id": "d1", "title": "Oslo", "text": "Oslo is in Norway.", "metadata": {}},
            {"_id": "d2", "title": "Rome", "text": ""},
            {"_id": "d3", "title": "", "text": " "},
        ],
    )
    write_lines(
        folder / "queries.jsonl",
        [{"_id": "1", "text": "Where is Oslo?", "metadata": {}}, {"_id": "2", "text": "Rome?"}],
    )
    head = "query-id\tcorpus-id\tscore\n"
    (folder / "qrels" / "train.tsv").write_text(head + "1\td1\t2\n1\td2\t0\n1\td3\t1\n2\td1\t0\n")
    (folder / "qrels" / "test.tsv").write_text(head + "2\td2\t1\n")
    return folder


def _read(folder, name):
    passages = {p.id: p for p in read_passages(folder / "passages.jsonl")}
    return passages, read_examples(folder / f"{name}.jsonl", passages)


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
def test_columns_are_the_same_pairs_in_every_kind_of_file(tmp_path, form, write_lines):
    path = tmp_path / f"triplets.{form}"
    match form:
        case "jsonl":
            write_lines(path, TRIPLETS)
        case "json":
            path.write_text(json.dumps(TRIPLETS, indent=2))
        case "csv":
            _table(path, TRIPLETS)
        case "parquet":
            _parquet(path, TRIPLETS)
    counts = convert_sentence_transformers([path], tmp_path / "out", progress=False)
    assert counts == {"rows": 2, "examples": 2, "passages": 3}
    passages, (first, second) = _read(tmp_path / "out", "triplets")
    assert [(p.title, p.text) for p in passages.values()] == [
        ("", "Oslo is in Norway."), ("", "Rome is in Italy."), ("", 'Paris,\nthe "city".')
    ]  # fmt: skip
    oslo, rome, paris = passages
    assert (first.id, first.question, first.output) == ("triplets:1", "Where is Oslo?", [])
    assert (first.gold, first.negatives) == ([oslo], [rome])
    assert (second.gold, second.negatives) == ([rome], [paris])


def test_a_quote_of_a_tsv_is_a_character_like_any_other(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text('anchor\tpositive\n"Who?\t"Gauss" it was.\n')
    convert_sentence_transformers([path], tmp_path / "out", progress=False)
    passages, (example,) = _read(tmp_path / "out", "x")
    assert (example.question, passages[example.gold[0]].text) == ('"Who?', '"Gauss" it was.')


def test_columns_may_be_called_otherwise_hold_lists_and_come_in_any_number(tmp_path, write_lines):
    record = {"query": "q", "answer": ["a", "b"], "negative_1": "c", "negative_2": "a", "id": 3, "negatively": "no"}
    record |= {"negatives": ["d"], "negative3": "e"}
    counts = convert_sentence_transformers(
        [write_lines(tmp_path / "x.jsonl", [record])], tmp_path / "out", progress=False
    )
    assert counts["negatives that answer"] == 1
    passages, (example,) = _read(tmp_path / "out", "x")
    assert [passages[name].text for name in example.gold] == ["a", "b"]
    assert sorted(passages[name].text for name in example.negatives) == ["c", "d", "e"]
    table = _table(tmp_path / "faq.tsv", [{"title": "q", "body": "a", "wrong_1": "c"}], delimiter="\t")
    names = {"anchor": "title", "positive": "body", "negative": "wrong"}
    convert_sentence_transformers([table], tmp_path / "faq", columns=names, progress=False)
    passages, (example,) = _read(tmp_path / "faq", "faq")
    assert [passages[name].text for name in (*example.gold, *example.negatives)] == ["a", "c"]
    wide = tmp_path / "wide.csv"
    wide.write_text("anchor,positive,negative_1,negative_2\nq,a,b,\nr,c,,\n")
    convert_sentence_transformers([wide], tmp_path / "wide", progress=False)
    passages, examples = _read(tmp_path / "wide", "wide")
    assert [[passages[name].text for name in example.negatives] for example in examples] == [["b"], []]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "anchor,text\na,b\n", r"x\.csv:2: positive: expected a column of this name, found only anchor, text; "
         r"--columns positive=NAME"),
        ("x.csv", "anchor,positive\na,b\n\nc\n", r"x\.csv:4: expected 2 columns, found 1"),
        ("x.csv", 'anchor,positive\n"a\nb",c\nd,e,f\n', r"x\.csv:4: expected 2 columns, found 3"),
        ("x.csv", 'anchor,positive\na,"b\n', r"x\.csv:2: expected a row of a table, found: unexpected end of data"),
        ("x.csv", "anchor,positive\na,\n", r"x\.csv:2: positive: expected some text, found ''"),
        ("x.csv", "anchor,positive,anchor\na,b,c\n", r"x\.csv:1: expected columns of different names, found 'anchor'"),
        ("x.csv", "anchor,positive,label\na,b,0\n", r"x\.csv:2: label: .*found a column of labels"),
        ("x.jsonl", '{"anchor": "a", "positive": "b"}\n{"anchor": "a"}\n',
         r"x\.jsonl:2: positive: .*found only anchor"),
        ("x.jsonl", '{"anchor": "a", "positive": 3}\n', r"x\.jsonl:1: positive: expected a string, found 3"),
        ("x.json", '[\n{"anchor": "a", "positive": "b"},\n\n{"anchor": "a"}]', r"x\.json:4: positive: expected"),
        ("x.json", '[\n{"anchor": "a", "positive": "b"},\n{"anchor": "a",\n}]',
         r"x\.json:4: expected a JSON object in"),
        ("x.json", '[\n{"anchor": "a", "positive": "b"}\n{"anchor"',
         r"x\.json:3: expected ']' of a JSON list, found '\{'"),
        ("x.json", '[{"anchor": "a", "positive": "b"}]\n[]',
         r"x\.json:2: expected nothing after the list, found '\[\]'"),
        ("x.json", "[3]", r"x\.json:1: expected a JSON object, found 3"),
        ("x.json", "[]", r"x\.json: expected rows with a passage that answers, found none"),
        ("x.parquet", "PAR1", r"x\.parquet: expected a Parquet file"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_and_nothing_is_written(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        convert_sentence_transformers([tmp_path / name], tmp_path / "out", progress=False)
    assert os.listdir(tmp_path) == [name]


def test_bad_rows_are_left_out_and_counted_when_asked(tmp_path, capsys):
    path = tmp_path / "x.csv"
    path.write_text("anchor,positive\na\nb,c\n,d\n")
    counts = convert_sentence_transformers([path], tmp_path / "out", skip_malformed=True, progress=False)
    assert counts == {"rows": 1, "malformed": 2, "examples": 1, "passages": 1}
    told = capsys.readouterr().err
    assert f"left out: {path}:2:" in told
    assert f"left out: {path}:4:" in told


def test_bytes_that_are_not_utf_8_are_named_by_line(tmp_path):
    for name, start in (("x.json", b'[{"a":\n"'), ("x.csv", b'a\n"')):
        (tmp_path / name).write_bytes(start + b"\xff")
        with pytest.raises(DataError, match=rf"{name}:2: "):
            list(read_rows(tmp_path / name))


@pytest.mark.parametrize(("name", "between"), [("x.csv", ","), ("x.tsv", "\t"), ("x.jsonl", ""), ("x.json", "")])
def test_a_byte_order_mark_is_not_part_of_a_name(name, between, tmp_path):
    record = {"anchor": "é", "positive": "\ufeffb"}
    text = json.dumps([record] if name.endswith("json") else record, ensure_ascii=False)
    if between:
        text = "\n".join(map(between.join, (record.keys(), record.values())))
    (tmp_path / name).write_text(text + "\n", encoding="utf-8-sig")
    assert [row.record for row in read_rows(tmp_path / name)] == [record]


def test_a_list_is_read_in_pieces(tmp_path, monkeypatch):
    """Objects that are larger than a piece, and pieces that end inside a character, change nothing."""
    records = [{"text": "é囲" * n, "n": n} for n in (0, 1, 7, 40, 3)]
    path = tmp_path / "x.json"
    path.write_text("\n" + json.dumps(records, ensure_ascii=False, indent=1) + "\n", encoding="utf-8-sig")
    whole = list(read_rows(path))
    monkeypatch.setattr(rows_module, "CHUNK", 5)
    pieces = list(read_rows(path))
    assert [row.record for row in pieces] == records
    assert [row[:2] for row in pieces] == [row[:2] for row in whole]
    assert [row.where for row in whole] == [f"{path}:{line}" for line in (3, 7, 11, 15, 19)]


def test_tevatron(tmp_path, write_lines):
    path = write_lines(tmp_path / "train.jsonl", TEVATRON)
    counts = convert_tevatron([path], tmp_path / "out", progress=False)
    assert counts == {"rows": 3, "left out": 1, "examples": 2, "passages": 4, "negatives that answer": 1}
    passages, (first, second) = _read(tmp_path / "out", "train")
    assert list(passages) == ["d1", "d2", "d3", "d4"]
    assert (passages["d1"].title, passages["d3"].title) == ("Oslo", "")
    assert (first.id, first.gold, first.negatives, first.answers) == ("17", ["d1"], ["d2", "d3"], ["Norway"])
    assert (second.id, second.gold, second.negatives) == ("17#2", ["d2", "d4"], [])
    convert_tevatron([path], tmp_path / "taught", for_training=True, progress=False)
    _, (taught,) = _read(tmp_path / "taught", "train")
    assert taught.output == [Segment(text="Norway", passage="d1")]


def test_one_id_for_two_passages_is_refused(tmp_path, write_lines):
    other = {"query": "q", "positive_passages": [{"docid": "d1", "text": "Something else."}]}
    path = write_lines(tmp_path / "train.jsonl", [TEVATRON[0], other])
    with pytest.raises(DataError, match=r"train\.jsonl:2: expected one text for each passage id, .* for 'd1'"):
        convert_tevatron([path], tmp_path / "out", progress=False)
    counts = convert_tevatron([path], tmp_path / "out", skip_malformed=True, progress=False)
    assert counts["malformed"] == counts["examples"] == 1
    in_one_row = {"query": "q", "positive_passages": [{"docid": "x", "text": text} for text in ("One.", "Another.")]}
    with pytest.raises(DataError, match=r"train\.jsonl:1: expected one text for each passage id, .* for 'x'"):
        convert_tevatron([write_lines(path, [in_one_row])], tmp_path / "again", progress=False)


def test_a_passage_of_a_beir_corpus_is_written_once(tmp_path, beir):
    corpus = beir / "corpus.jsonl"
    first, *others = corpus.read_text().splitlines()
    corpus.write_text("\n".join([first, *others, first]) + "\n")
    assert convert_beir(beir, tmp_path / "out", progress=False)["passages"] == 2
    assert list(_read(tmp_path / "out", "train")[0]) == ["d1", "d2"]
    corpus.write_text("\n".join([first, *others, first.replace("Norway", "Sweden")]) + "\n")
    with pytest.raises(DataError, match=r"corpus\.jsonl:4: expected one text for each passage id, .* for 'd1'"):
        convert_beir(beir, tmp_path / "again", progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": None}, "query: expected a string, found None"),
        ({"positive_passages": "d1"}, "positive_passages: expected a list of objects, found 'd1'"),
        ({"positive_passages": [{"docid": "x"}]}, r"positive_passages\.0\.text: expected a value, found only docid"),
        (
            {"negative_passages": [{"docid": [], "text": "x"}]},
            r"negative_passages\.0\.docid: expected an id, found \[\]",
        ),
        ({"answers": "Norway"}, "answers: expected a list of strings, found 'Norway'"),
    ],
)
def test_a_bad_tevatron_row_is_named(tmp_path, change, message, write_lines):
    path = write_lines(tmp_path / "train.jsonl", [TEVATRON[0], TEVATRON[0] | change])
    with pytest.raises(DataError, match=rf"train\.jsonl:2: {message}"):
        convert_tevatron([path], tmp_path / "out", progress=False)
    renamed = [{"text_of\nquery": "q"}]
    with pytest.raises(DataError, match=r"positive_passages: expected a value, found only text_of\\nquery$"):
        convert_tevatron([write_lines(path, renamed)], tmp_path / "out", progress=False)


def test_dpr(tmp_path):
    path = tmp_path / "biencoder-nq-train.json"
    path.write_text(json.dumps(DPR, indent=4))
    counts = convert_dpr([path], tmp_path / "out", for_training=True, progress=False)
    assert counts == {"rows": 2, "left out": 1, "examples": 1, "passages": 2}
    passages, (example,) = _read(tmp_path / "out", "biencoder-nq-train")
    assert list(passages) == ["7", "9"]
    assert (example.dataset, example.question) == ("nq_train_psgs_w100", "where is oslo")
    assert (example.gold, example.negatives) == (["7"], ["9"])
    assert (example.answers, example.output) == (["Norway", "in Norway"], [Segment(text="Norway", passage="7")])


def test_a_passage_that_was_judged_twice_is_gold_and_no_negative(tmp_path, beir):
    path = beir / "qrels" / "train.tsv"
    path.write_text(path.read_text() + "1\td1\t0\n")
    convert_beir(beir, tmp_path / "out", progress=False)
    (example,) = _read(tmp_path / "out", "train")[1]
    assert (example.gold, example.negatives) == (["d1"], ["d2"])


def test_beir(tmp_path, beir):
    counts = convert_beir(beir, tmp_path / "out", progress=False)
    assert counts["examples"] == 2
    assert (counts["passages"], counts["empty documents"], counts["without a gold passage"]) == (2, 1, 1)
    passages, (first,) = _read(tmp_path / "out", "train")
    assert (passages["d2"].title, passages["d2"].text) == ("", "Rome")
    assert (first.id, first.question, first.gold, first.negatives) == ("1", "Where is Oslo?", ["d1"], ["d2"])
    assert [e.gold for e in _read(tmp_path / "out", "test")[1]] == [["d2"]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("3\td1\t1", "query-id: expected the id of a query, found '3'"),
        ("1\tdx\t1", "corpus-id: expected the id of a passage, found 'dx'"),
        ("1\td1\tyes", "score: expected a whole number, found 'yes'"),
        ("1 d1 1", "expected 3 columns, found 1"),
    ],
)
def test_a_bad_judgement_is_named_and_left_out_when_asked(tmp_path, beir, line, message):
    path = beir / "qrels" / "train.tsv"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=rf"train\.tsv:6: {message}"):
        convert_beir(beir, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    counts = convert_beir(beir, tmp_path / "out", skip_malformed=True, progress=False)
    assert (counts["malformed"], counts["examples"]) == (1, 2)


def test_what_a_beir_folder_needs_is_said(tmp_path, beir):
    (beir / "qrels" / "train.tsv").write_text("query\tdoc\tscore\n1\td1\t1\n")
    with pytest.raises(DataError, match=r"train\.tsv:2: query-id: expected a column .*, found only query, doc, score"):
        convert_beir(beir, tmp_path / "out", progress=False)
    (beir / "qrels" / "train.tsv").write_text("2\td1\t1\n")  # taken for the names of the columns
    with pytest.raises(DataError, match=r"train\.tsv: expected query-id, corpus-id, score and .*, found no row"):
        convert_beir(beir, tmp_path / "out", progress=False)
    for name in ("qrels/train.tsv", "qrels/test.tsv", "queries.jsonl"):
        (beir / name).unlink()
        if name != "qrels/train.tsv":
            missing = "qrels/SPLIT.tsv" if "qrels" in name else name
            with pytest.raises(DataError, match=f"expected a BEIR folder with {missing}"):
                convert_beir(beir, tmp_path / "out", progress=False)


def test_kilt_for_training_grounds_the_first_answer_that_has_a_passage(tmp_path, write_lines):
    pages = write_lines(
        tmp_path / "ks.json", [{"wikipedia_id": "1", "wikipedia_title": "Oslo", "text": ["Oslo", "In Norway."]}]
    )
    here = {"wikipedia_id": "1", "start_paragraph_id": 1, "end_paragraph_id": 1}
    tasks = write_lines(
        tmp_path / "nq-train-kilt.jsonl",
        [
            {
                "id": "a",
                "input": "Where?",
                "output": [{"provenance": [here]}, {"answer": "there"}, {"answer": "Norway", "provenance": [here]}],
            },
            {"id": "b", "input": "When?", "output": [{"answer": "then"}]},
        ],
    )
    options = {"knowledge": pages, "for_training": True, "progress": False}
    counts = convert_kilt([tasks], tmp_path / "out", **options)
    assert counts["left out"] == counts["without a gold passage"] == 1
    _, (example,) = _read(tmp_path / "out", "nq-train-kilt")
    assert example.output == [Segment(text="Norway", passage="kilt:1:1")]
    assert example.answers == ["there", "Norway"]


def test_a_source_is_converted_where_it_is_named(tmp_path, beir, monkeypatch, write_lines):
    monkeypatch.setenv("COSUP_HOME", str(tmp_path / "home"))
    path = write_lines(tmp_path / "train.jsonl", TEVATRON)
    passages = {p.id for p in load_corpus(f"tevatron:{path}")}
    assert len(open_corpus(f"tevatron:{path}")) == len(passages) == 4
    assert [e.id for e in load_examples(f"tevatron:{path}", passages)] == ["17", "17#2"]
    assert len(os.listdir(tmp_path / "home" / "converted")) == 2  # and its lock
    write_lines(path, TEVATRON[:1])
    assert len(load_examples(f"tevatron:{path}", passages)) == 1
    assert len(load_corpus(f"beir:{beir}")) == 2
    assert [e.id for e in load_examples(f"beir:{beir}:test", None)] == ["2"]
    for spec, message in [
        (f"beir:{beir}", f"expected one of the splits test, train, as in beir:{beir}:test, found none"),
        (f"beir:{beir}:tset", "found 'tset', did you mean 'test'"),
        ("beir:nowhere", "expected a file or folder, found none at 'nowhere'"),
        ("dpr:" + str(path), "positive_ctxs: expected a value"),
        ("trec:x", "or FORM:PATH with one of the forms beir, dpr"),
    ]:
        with pytest.raises(DataError, match=message):
            load_examples(spec, None)


@pytest.mark.parametrize("file", ["passages.jsonl", "train.jsonl", "converted.json"])
def test_a_changed_byte_of_what_was_converted_is_not_used(file, tmp_path, monkeypatch, write_lines):
    monkeypatch.setenv("COSUP_HOME", str(tmp_path / "home"))
    spec = f"tevatron:{write_lines(tmp_path / 'train.jsonl', TEVATRON)}"
    load_examples(spec, {passage.id for passage in load_corpus(spec)})
    (path,) = (tmp_path / "home" / "converted").glob(f"*/{file}")
    changed = path.read_bytes().replace(b"Oslo", b"Osla") if file != "converted.json" else b'{"files": 7}'
    assert changed != path.read_bytes()
    path.write_bytes(changed)
    with pytest.raises(DataError, match=rf"{path.parent}.*: remove {path.parent}, and it is converted again"):
        load_corpus(spec) if file == "passages.jsonl" else load_examples(spec, None)


def test_every_form_trains_by_name(cosup, llama_folder, tmp_path, beir, monkeypatch, write_lines):
    monkeypatch.setenv("COSUP_HOME", str(tmp_path / "home"))
    dpr = tmp_path / "dpr.json"
    dpr.write_text(json.dumps(DPR))
    for corpus, train in [
        (f"sentence-transformers:{_table(tmp_path / 'x.csv', TRIPLETS)}",) * 2,
        (f"tevatron:{write_lines(tmp_path / 'y.jsonl', TEVATRON)}",) * 2,
        (f"dpr:{dpr}",) * 2,
        (f"beir:{beir}", f"beir:{beir}:train"),
    ]:
        status, _, err = cosup(
            "train", f"output={tmp_path / 'run' / train[:4]}", f"model.gen={llama_folder}", f"data.train=['{train}']",
            f"data.corpus={corpus}", "data.dev=[]", "training.steps=1", "training.batch_size=2", "ntp.weight=0",
        )  # fmt: skip
        assert status == 0, err


def test_the_command_line_converts(cosup, tmp_path, beir, write_lines):
    table = _table(tmp_path / "faq.csv", [{"title": "q", "body": "a"}])
    dpr = tmp_path / "dpr.json"
    dpr.write_text(json.dumps(DPR))
    for arguments, told in [
        (("sentence-transformers", table, "--columns", "anchor=title,positive=body"), "1 rows, 1 examples, 1 passages"),
        (("tevatron", write_lines(tmp_path / "t.jsonl", TEVATRON)), "2 examples"),
        (("dpr", dpr, "--for-training"), "1 examples"),
        (("beir", beir), "2 examples"),
    ]:
        status, out, err = cosup("data", "convert", *arguments, "--output", tmp_path / "out" / arguments[0])
        assert (status, told in out) == (0, True), out + err
    status, _, err = cosup("data", "convert", "sentence-transformers", table, "--columns", "title", "--output", "x")
    assert (status, "--columns title: expected anchor=NAME, found 'title'" in err) == (1, True)
