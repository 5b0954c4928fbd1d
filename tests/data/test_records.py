"""Records: what is accepted round-trips, and everything else is one line that says where and what."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosup_fast.data.records import DataError, Example, Passage, Segment, read_examples, read_passages, write_jsonl

GOOD = {"id": "a", "question": "who?", "output": [{"text": "free"}, {"text": "grounded", "passage": "p"}]}

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
nonblank = text.filter(str.strip)
segments = st.builds(Segment, text=nonblank, passage=st.none() | nonblank)
examples = st.builds(
    Example,
    id=nonblank,
    dataset=text,
    instruction=text,
    question=nonblank,
    output=st.lists(segments, max_size=3),
    answers=st.lists(nonblank, max_size=3),
    gold=st.lists(nonblank, max_size=3),
    negatives=st.lists(nonblank.map("not {}".format), max_size=2),
)
passages = st.builds(Passage, id=nonblank, title=text, text=nonblank, topic=text)


@settings(deadline=None)  # it waits for the disk
@given(st.lists(examples, min_size=1, max_size=4, unique_by=lambda e: e.id))
def test_examples_round_trip(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("records") / "x.jsonl"
    write_jsonl(path, records)
    assert read_examples(path, None, allow_no_retrieval=True) == records


@given(st.lists(passages, min_size=1, max_size=4, unique_by=lambda p: p.id))
def test_passages_round_trip(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("records") / "x.jsonl"
    write_jsonl(path, records)
    assert read_passages(path) == records


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
mutations = st.tuples(st.sampled_from([*Example.model_fields, "output.0", "answer"]), json_values)


@given(st.binary(max_size=40) | mutations)
def test_whatever_a_file_holds_the_error_names_it(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("records") / "x.jsonl"
    if isinstance(content, tuple):
        field, value = content
        changed = {**GOOD, "output": [value]} if field == "output.0" else {**GOOD, field: value}
        content = json.dumps(changed).encode()
    path.write_bytes(content)
    message = str(path)
    try:
        read_examples(path, None, allow_no_retrieval=True)
    except DataError as error:
        message = str(error)
    assert message.startswith(str(path))
    assert "\n" not in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, "question: expected a string, found None"),
        ({"question": " "}, "question: expected some text, found ' '"),
        ({"id": 3}, "id: expected a string, found 3"),
        ({"id": "\ud800"}, "id: expected Unicode text, found '.{1,2}ud800'"),
        ({"anwsers": ["x"]}, "anwsers: expected one of id, .*, found 'anwsers', did you mean 'answers'\\?"),
        ({"output": "x"}, "output: expected a list, found 'x'"),
        ({"output": ["x"]}, "output.0: expected an object, found 'x'"),
        ({"output": [{"passage": "p"}]}, "output.0.text: expected a value, found only passage"),
        ({"output": [{"text": "x", "pasage": "p"}]}, "output.0.pasage: .*did you mean 'passage'\\?"),
        ({"a\nb": "x"}, r"a\\nb: expected one of id, .*, found 'a\\nb'$"),
        ({"output": [{"text": "x", "\ud800": "p"}]}, r"output.0.\\ud800: expected one of text, passage, found"),
        ({"output": [{"text": "x", "passage": "q"}]}, "output.0.passage: expected the id of a passage .*, found 'q'"),
        (
            {"output": [{"text": "x"}]},
            "output: expected at least one segment with a passage, or a gold passage, found none",
        ),
        ({"gold": ["q"]}, "gold.0: expected the id of a passage in the corpus, found 'q'"),
        ({"negatives": ["q"]}, "negatives.0: expected the id of a passage in the corpus, found 'q'"),
        (
            {"negatives": ["q", "p"], "gold": ["g"]},
            "negatives.1: expected a passage that does not answer, found 'p', which is gold or in the output",
        ),
        ({"negatives": ["g"], "gold": ["g"]}, "negatives.0: expected a passage that does not answer, found 'g'"),
        ({"answers": [""]}, "answers.0: expected some text, found ''"),
        (
            {"answers": ["("], "answer_type": "regex"},
            "answers: expected a regular expression, found '\\(': missing \\)",
        ),
        ({"answer_type": "glob"}, "answer_type: expected 'string' or 'regex', found 'glob'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_fault_of_an_example_is_named(tmp_path, change, message):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps({**GOOD, "id": "b", **change}) + "\n")
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:3: {message}"):
        read_examples(path, {"p"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": expected at least one passage, found an empty file"),
        (b"{", ":1: expected one JSON object, found '{'"),
        (b"[" * 100_000, ":1: expected one JSON object"),
        (b"[1]", r":1: expected one JSON object, found \[1\]"),
        (b'{"id": "a", "title": "\xff"}', ":1: expected UTF-8, found byte 0xff"),
        (b'{"id": "a", "title": "t"}', ":1: text: expected a value, found only id, title"),
        (b'{"id": "a", "title": "t", "text": ""}', ":1: text: expected some text, found ''"),
        (b'{"id": "a", "title": "t", "text": "x"}\n' * 2, ":2: id: expected a new id, found 'a' of line 1 again"),
    ],
    ids=["empty", "broken", "deep", "list", "not utf-8", "missing", "blank", "twice"],
)
def test_each_fault_of_a_file_is_named(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}{message}"):
        read_passages(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"x\.jsonl: expected a JSONL file, found none"):
        read_passages(tmp_path / "x.jsonl")


def test_line_separators_inside_text_and_a_byte_order_mark_are_no_trouble(tmp_path):
    path = tmp_path / "x.jsonl"
    record = Passage(id="a", title="t\u2028\x85", text="x\r\ny")
    write_jsonl(path, [record])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_passages(path) == [record]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.jsonl"
    old = Passage(id="a", title="t", text="x")
    write_jsonl(path, [old])

    def failing():
        yield old
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_jsonl(path, failing())
    assert read_passages(path) == [old]
    assert list(tmp_path.iterdir()) == [path]


def test_training_asks_for_what_is_cited_or_else_for_the_first_gold_passage():
    cited = [Segment(text=text, passage=name) for text, name in (("a", "q"), ("b", "p"), ("c", "q"))]
    assert Example(id="e", question="?", output=cited, gold=["x", "q"]).asked == ("q", "p")
    assert Example(id="e", question="?", output=[], gold=["x", "y"]).asked == ("x",)
    assert Example(id="e", question="?", output=[]).asked == ()


def test_what_is_not_given_as_gold_is_that_of_the_sets_or_else_what_is_cited():
    cited = [Segment(text=text, passage=name) for text, name in (("a", "q"), ("b", "p"), ("c", "q"))]
    output, sets = [Segment(text="free"), *cited], [["x", "y"], ["y"]]
    assert Example(id="e", question="?", output=output).gold == ["q", "p"]
    assert Example(id="e", question="?", output=output, gold=["z"]).gold == ["z"]
    assert Example(id="e", question="?", output=output, gold_sets=sets).gold == ["x", "y"]
    assert Example(id="e", question="?", output=output, gold_sets=sets, gold=["y", "x", "z"]).gold == ["y", "x", "z"]
