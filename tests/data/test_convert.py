"""Converters on small files of the published forms: what becomes of every mark, and nothing half-written."""

from __future__ import annotations

import json
import os
import time

import pytest

from cosup_fast.data.convert import convert_kilt, convert_self_rag, self_rag_example
from cosup_fast.data.records import DataError, Passage, Segment, read_examples, read_passages

NILE = "<paragraph>Nile\nThe Nile flows north.\nIt is long.</paragraph>"
OSLO = "<paragraph>Oslo\nOslo is in Norway.</paragraph>"
SELF_RAG = [
    {"instruction": "Hi.", "input": "", "output": "[No Retrieval]Hello![Utility:5]", "id": "a", "dataset_name": "x"},
    {
        "instruction": "Where does the Nile flow?",
        "output": f"[Retrieval]{NILE}[Relevant]It flows north.[Fully supported]"
        "[Continue to Use Evidence]It is long.[Partially supported]"
        f"[No Retrieval]That is all.[Retrieval]{OSLO}[Relevant]Oslo is Norwegian.[Fully supported][Utility:5]",
        "id": "b",
        "dataset_name": "nq",
        "topics": ["unknown fields are passed over"],
    },
    {
        "instruction": "Answer the question.",
        "input": "What is [Relevant] in 囲碁?\u2028",
        "output": f"[Retrieval]{OSLO}[Irrelevant]Nothing here.[Retrieval]{NILE}[Relevant]It flows south."
        f"[No support / Contradictory][Retrieval]<paragraph>No title at all</paragraph>[Relevant] Or not.[Utility:3]",
        "id": "b",
    },
    {"instruction": "Only irrelevant.", "output": f"[Retrieval]{OSLO}[Irrelevant]No.[Utility:1]"},
]  # fmt: skip


def test_self_rag(tmp_path, write_lines):
    source = write_lines(tmp_path / "source.jsonl", SELF_RAG)
    counts = convert_self_rag(source, tmp_path / "out", progress=False)
    assert counts == {"lines": 4, "without retrieval": 2, "examples": 2, "passages": 3}
    passages = {p.id: p for p in read_passages(tmp_path / "out" / "passages.jsonl")}
    nile, oslo, bare = passages
    assert (passages[nile].title, passages[nile].text) == ("Nile", "The Nile flows north.\nIt is long.")
    assert (passages[bare].title, passages[bare].text) == ("", "No title at all")
    first, second = read_examples(tmp_path / "out" / "train.jsonl", passages)
    assert (first.id, first.dataset, first.instruction) == ("b", "nq", "")
    assert first.question == "Where does the Nile flow?"
    assert first.output == [
        Segment(text="It flows north. It is long.", passage=nile),
        Segment(text=" That is all."),
        Segment(text=" Oslo is Norwegian.", passage=oslo),
    ]
    assert first.gold == [nile, oslo]
    assert (second.id, second.instruction) == ("b#3", "Answer the question.\n\n")
    assert second.question == SELF_RAG[2]["input"]
    assert second.output == [
        Segment(text="Nothing here. It flows south."),
        Segment(text=" Or not.", passage=bare),
    ]
    note = json.loads((tmp_path / "out" / "converted.json").read_text())
    assert note["counts"] == counts
    assert list(note["sources"]) == ["source.jsonl"]


@pytest.mark.parametrize("marks", ["", "[Irrelevant]Nothing here."])
def test_evidence_that_was_never_relevant_grounds_nothing(marks):
    text = f"[Retrieval]{OSLO}{marks}[Continue to Use Evidence]Oslo is Norwegian.[Utility:1]"
    assert self_rag_example("x:1", {"instruction": "q", "output": text}, "x") == (None, [])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken", "expected one JSON object"),
        (b'"text"', "expected one JSON object"),
        (b"\xff", "expected UTF-8"),
        (b'{"instruction": "q"}', "output: expected some text, found ''"),
        (b'{"instruction": " ", "output": "x"}', "instruction: expected some text"),
        (b'{"instruction": "q", "output": 3}', "output: expected a string, found 3"),
        (b'{"instruction": "q", "output": "[Retrieval]<paragraph>T\\nx[Relevant]a"}', "in pairs, found one alone"),
        (b'{"instruction": "q", "output": "[Retrieval]x</paragraph>[Relevant]a"}', "found"),
        (b'{"instruction": "q", "output": "[Retrieval][Relevant]a"}', r"expected a <paragraph> before \[Relevant\]"),
        (b'{"instruction": "q", "output": "<paragraph> </paragraph>[Relevant]a"}', "some text in <paragraph>"),
        (b'{"instruction": "\\ud800", "output": "<paragraph>a\\nb</paragraph>[Relevant]a"}', "expected Unicode text"),
    ],
)
def test_a_malformed_self_rag_line_is_named_and_nothing_is_written(tmp_path, capsys, line, message):
    source = tmp_path / "source.jsonl"
    good = json.dumps(SELF_RAG[1]).encode()
    source.write_bytes(b"\n".join([good, b"", line, good]) + b"\n")
    with pytest.raises(DataError, match=rf"source\.jsonl:3: .*{message}"):
        convert_self_rag(source, tmp_path / "out", progress=False)
    assert os.listdir(tmp_path) == ["source.jsonl"]
    counts = convert_self_rag(source, tmp_path / "out", skip_malformed=True, progress=False)
    assert counts == {"lines": 2, "malformed": 1, "examples": 2, "passages": 2}
    assert f"left out: {source}:3:" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["<paragraph>" * 20_000, "</paragraph>" * 9 + "<paragraph>x " * 20_000])
def test_many_paragraphs_that_never_end_are_refused_at_once(text):
    started = time.perf_counter()
    with pytest.raises(DataError, match="in pairs, found one alone"):
        self_rag_example("x:1", {"instruction": "q", "output": text}, "x")
    assert time.perf_counter() - started < 5


def test_a_file_in_which_nothing_retrieves_is_refused(tmp_path, write_lines):
    source = write_lines(tmp_path / "source.jsonl", SELF_RAG[:1])
    with pytest.raises(DataError, match=r"expected examples with \[Retrieval\]"):
        convert_self_rag(source, tmp_path / "out", progress=False)
    with pytest.raises(DataError, match="expected a file, found none"):
        convert_self_rag(tmp_path / "none.jsonl", tmp_path / "out", progress=False)
    assert os.listdir(tmp_path) == ["source.jsonl"]


PAGES = [
    {
        "_id": "12",
        "wikipedia_id": "12",
        "wikipedia_title": "Nile",
        "text": ["Nile\n", "The Nile flows north.\n", "Section::::Course.\n", "BULLET::::- Its source: a lake\n", " \n",
                 "Delta.\n"],
        "anchors": [{"text": "x"}],
        "categories": "Rivers",
    },
    {"wikipedia_id": "7", "wikipedia_title": "囲碁", "text": ["囲碁\n", "A board game. 👍\u2028\n"]},
]  # fmt: skip
QUESTIONS = [
    {
        "id": "q1",
        "input": "Where does the Nile flow?",
        "output": [
            {
                "answer": "north",
                "provenance": [
                    {"wikipedia_id": "12", "title": "Nile", "section": "S", "start_paragraph_id": 1,
                     "start_character": 3, "end_paragraph_id": 3, "end_character": 9, "bleu_score": 1.0},
                    {"wikipedia_id": "7", "start_paragraph_id": 0, "end_paragraph_id": 0},
                ],
            },
            {"answer": "to the north"},
            {"answer": "north", "meta": {}},
            {"provenance": [{"wikipedia_id": "12", "start_paragraph_id": 5}]},
        ],
        "meta": {},
    },
    {"id": 5, "input": "Only the page is known, in several\nlines?", "output": [{"provenance": [{"wikipedia_id": 7}]}]},
    {"id": "q3", "input": "Without provenance?", "output": [{"answer": "SUPPORTS"}]},
]  # fmt: skip


def test_kilt(tmp_path, write_lines):
    task = write_lines(tmp_path / "nq-dev-kilt.jsonl", QUESTIONS)
    pages = write_lines(tmp_path / "ks.json", PAGES)
    counts = convert_kilt([task], tmp_path / "out", knowledge=pages, progress=False)
    assert counts == {"questions": 3, "pages": 2, "passages": 4, "without a gold passage": 1}
    passages = read_passages(tmp_path / "out" / "passages.jsonl")
    assert passages == [
        Passage(id="kilt:12:1", title="Nile", text="The Nile flows north."),
        Passage(id="kilt:12:3", title="Nile", text="Its source: a lake"),
        Passage(id="kilt:12:5", title="Nile", text="Delta."),
        Passage(id="kilt:7:1", title="囲碁", text="A board game. 👍"),
    ]
    ids = {p.id for p in passages}
    first, second, third = read_examples(tmp_path / "out" / "nq-dev-kilt.jsonl", ids, allow_no_retrieval=True)
    assert (first.dataset, first.question, first.output) == ("nq", "Where does the Nile flow?", [])
    assert first.answers == ["north", "to the north"]
    assert first.gold == ["kilt:12:1", "kilt:12:3", "kilt:12:5"]  # a title and a heading are not passages
    assert (second.id, second.gold, second.answers) == ("5", ["kilt:7:1"], [])
    assert (third.gold, third.answers) == ([], ["SUPPORTS"])

    convert_kilt([task], tmp_path / "page", knowledge=pages, gold="page", progress=False)
    first = read_examples(tmp_path / "page" / "nq-dev-kilt.jsonl", ids, allow_no_retrieval=True)[0]
    assert first.gold == ["kilt:12:1", "kilt:12:3", "kilt:12:5", "kilt:7:1"]
    convert_kilt([task], tmp_path / "bare", progress=False)
    assert sorted(os.listdir(tmp_path / "bare")) == ["converted.json", "nq-dev-kilt.jsonl"]
    first = read_examples(tmp_path / "bare" / "nq-dev-kilt.jsonl", None, allow_no_retrieval=True)[0]
    assert first.gold == ["kilt:12:1", "kilt:12:2", "kilt:12:3", "kilt:7:0", "kilt:12:5"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "x", "input": "q"}', "output: expected a list of answers .*test files have none"),
        ('{"id": "x", "input": "", "output": [{"answer": "a"}]}', "input: expected a question.*TriviaQA"),
        ('{"id": "x", "input": "q", "output": [3]}', "output: expected a list of answers"),
        ('{"id": "x", "input": "q", "output": [{"answer": 3}]}', r"output\.0\.answer: expected a string, found 3"),
        ('{"id": "x", "input": "q", "output": [{"provenance": [{"title": "t"}]}]}',
         r"output\.0\.provenance\.0\.wikipedia_id: expected a page's id, found None"),
        ('{"id": "x", "input": "q", "output": [{"provenance": {}, "answer": "a"}, {"provenance": 3}]}',
         r"output\.1\.provenance: expected a list"),
        ('{"id": "x", "input": "q", "output": [{"provenance": [{"wikipedia_id": "1", "start_paragraph_id": "1"}]}]}',
         r"start_paragraph_id: expected a whole number, found '1'"),
        ('{"id": "x", "input": "q", "output": [{"provenance": [{"wikipedia_id": "1", "start_paragraph_id": 5, '
         '"end_paragraph_id": 3000000000}]}]}',
         r"output\.0\.provenance\.0\.end_paragraph_id: expected fewer than 10000 paragraphs after 5, found 3000000000"),
        ('{"id": "q1", "input": "q", "output": [{"answer": "a"}]}', "id: expected a new id, found 'q1' again"),
        ('{"input": "q", "output": [{"answer": "a"}]}', "id: expected the id that KILT gives each question"),
        ("{", "expected one JSON object"),
    ],
)  # fmt: skip
def test_a_malformed_kilt_line_is_named_and_nothing_is_written(tmp_path, line, message):
    task = tmp_path / "nq-dev-kilt.jsonl"
    task.write_text(json.dumps(QUESTIONS[0]) + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"nq-dev-kilt\.jsonl:3: .*{message}"):
        convert_kilt([task], tmp_path / "out", progress=False)
    assert os.listdir(tmp_path) == ["nq-dev-kilt.jsonl"]


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ({"wikipedia_title": "t", "text": []}, "wikipedia_id: expected a page's id"),
        ({"wikipedia_id": "1", "text": ["a"]}, "wikipedia_title: expected a string, found None"),
        ({"wikipedia_id": "1", "wikipedia_title": "t", "text": "a"}, "text: expected a list of paragraphs"),
        ({"wikipedia_id": "12", "wikipedia_title": "t", "text": ["a"]}, "expected a new page, found '12' again"),
    ],
)
def test_a_malformed_page_is_named_and_nothing_is_written(tmp_path, page, message, write_lines):
    task = write_lines(tmp_path / "nq-dev-kilt.jsonl", QUESTIONS)
    pages = write_lines(tmp_path / "ks.json", [*PAGES, page])
    with pytest.raises(DataError, match=rf"ks\.json:3: .*{message}"):
        convert_kilt([task], tmp_path / "out", knowledge=pages, progress=False)
    assert sorted(os.listdir(tmp_path)) == ["ks.json", "nq-dev-kilt.jsonl"]


def test_what_kilt_needs_is_said(tmp_path):
    for arguments, message in [
        (([],), "expected task files, a knowledge source or both"),
        ((["a.jsonl"],), "expected a file, found none"),
        ((["a.jsonl", "b/a.jsonl"],), r"'a\.jsonl' would be the name of several files that are written"),
        ((["converted.json"],), r"'converted\.json' would be the name of several files that are written"),
        ((["passages.jsonl"],), r"'passages\.jsonl' would be the name of several files that are written"),
    ]:
        with pytest.raises(DataError, match=message):
            convert_kilt(*arguments, tmp_path / "out", progress=False)
    with pytest.raises(DataError, match="gold='page': the knowledge source says which paragraphs"):
        convert_kilt(["a.jsonl"], tmp_path / "out", gold="page", progress=False)
    with pytest.raises(DataError, match="gold='book': choose paragraph or page"):
        convert_kilt(["a.jsonl"], tmp_path / "out", gold="book", progress=False)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_converted_sets_train_and_are_indexed(cosup, llama_folder, tmp_path, write_lines):
    source = write_lines(tmp_path / "source.jsonl", SELF_RAG)
    status, out, err = cosup("data", "convert", "self-rag", source, "--output", tmp_path / "rag")
    assert (status, "2 examples" in out) == (0, True), err
    task, pages = write_lines(tmp_path / "nq-dev-kilt.jsonl", QUESTIONS), write_lines(tmp_path / "ks.json", PAGES)
    status, out, err = cosup("data", "convert", "kilt", task, "--knowledge", pages, "--output", tmp_path / "kilt")
    assert (status, "4 passages" in out) == (0, True), err
    status, _, err = cosup(
        "train", f"output={tmp_path / 'run'}", f"model.gen={llama_folder}", f"data.train=[{tmp_path}/rag/train.jsonl]",
        f"data.corpus={tmp_path}/rag/passages.jsonl", "data.dev=[]", "training.steps=1", "training.batch_size=2",
    )  # fmt: skip
    assert status == 0, err
    status, _, err = cosup("index", "build", tmp_path / "run", "--corpus", tmp_path / "kilt" / "passages.jsonl")
    assert status == 0, err
    examples = tmp_path / "kilt" / "nq-dev-kilt.jsonl"
    status, _, err = cosup("evaluate", tmp_path / "run", "--examples", examples, "--max-new-tokens", 2)
    assert status == 0, err
