"""Questions: cloze masking, answers found in a text, and how sources write things."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosup_fast.data.prepared.questions import (
    BLANK,
    Question,
    bare_title,
    make_cloze,
    parse_question,
    sentences,
    short_answer,
)
from cosup_fast.data.prepared.words import find_answer, tokens
from cosup_fast.data.records import Passage


def lead(title, text):
    return Passage(id="p", title=title, text=text)


@pytest.mark.parametrize(
    ("title", "text", "expected"),
    [
        ("Bat", "Bats are winged mammals capable of flight.", "____ are winged mammals capable of flight."),
        ("Alan Turing", "Alan M. Turing studied early computers, ciphers.", "____ studied early computers, ciphers."),
        ("Titan (moon)", "Titan is the largest moon of planet Saturn.", "____ is the largest moon of planet Saturn."),
        ("Steffi Graf", "Stefanie Graf, known as Steffi Graf, won many grand slam titles.", None),
        ("Theatre", "Theatre or theater is a collaborative form of performing art.", None),
        ("Oak", "An oak is a tree. Its every oak leaf feeds many boars.", "Its every ____ leaf feeds many boars."),
        ("Oak", "An oak is a tree.", None),
        ("The", "The is a very common English word without meaning.", None),
    ],
)  # fmt: skip
def test_cloze(title, text, expected):
    made = make_cloze(lead(title, text))
    assert (made and made[1]) == expected


words = st.sampled_from(["oak", "Oaks", "tree", "forest", "acorn", "OAK", "large", "green", "leaves", "under", "was"])


@given(st.lists(words, min_size=1, max_size=12), st.sampled_from(["Oak", "Oak tree", "Forest (wood)", "Green leaves"]))
def test_a_cloze_question_never_shows_its_answer(body, title):
    made = make_cloze(lead(title, " ".join(body) + "."))
    if made:
        assert BLANK in made[1]
        assert not set(tokens(bare_title(title))) & set(tokens(made[1]))


def test_initials_and_abbreviations_end_no_sentence():
    text = 'Dr. J. R. Smith of the U.S. Army came. He saw. "Done." Then St. Helens fell!'
    assert sentences(text) == ["Dr. J. R. Smith of the U.S. Army came.", "He saw.", '"Done."', "Then St. Helens fell!"]


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("Born in Zürich, Switzerland.", ["ZURICH"], "Zürich"),
        ("He won in 1,000 races", ["1 , 000"], "1,000"),
        ("in New York City today", ["York", "new york city"], "New York City"),
        ("Yorkshire", ["York"], None),
        ("nothing here", ["", "!"], None),
    ],
)
def test_an_answer_is_found_by_words_and_returned_as_written(text, answers, expected):
    assert find_answer(text, answers) == expected


def test_a_pattern_is_searched_without_case():
    assert find_answer("It was in Oct 1954.", [r"oct(ober)?\s+\d{4}", "x*"], "regex") == "Oct 1954"
    assert find_answer("abc", ["x*"], "regex") is None


def test_the_title_is_the_answer_when_an_answer_says_so():
    passage = lead("Titan (moon)", "Titan is the largest moon of Saturn.")
    question = Question("nq", "dev-1", "?", ["Saturn", "TITAN"], "string", None)
    assert short_answer(question, passage) == "Titan"
    assert short_answer(question._replace(answers=["Saturn"]), passage) == "Saturn"
    assert short_answer(question._replace(answers=["ti.an"], answer_type="regex"), passage) == "Titan"


def test_lines_of_sources():
    assert parse_question("who is it\t['A', \"B's\"]") == ("who is it", ["A", "B's"])
    assert parse_question('{"question": "who?", "answer": ["a|b"]}') == ("who?", ["a|b"])
    assert parse_question('"""What is """"it""""?"""\t"[""A""]"') is None
