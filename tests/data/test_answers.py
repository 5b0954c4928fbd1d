"""Finding answers in text of any script: what is the same word, and what only looks like it."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosup_fast.data.answers import (
    PATTERN_TRIES,
    Pattern,
    answer_patterns,
    answer_spans,
    contains_answer,
    holds_answer,
    matches,
    normal_words,
    words,
)
from cosup_fast.data.records import Example

FOUND = {
    "NFD": ("Jose\u0301 came", "Jos\u00e9"),
    "accents": ("S\u00e3o Paulo", "Sao Paulo"),
    "Greek accents": ("Αθήνα", "Αθηνα"),
    "case that changes length": ("Hauptstraße", "HAUPTSTRASSE"),
    "Turkish dot": ("\u0130stanbul", "istanbul"),
    "ligature": ("\ufb01nal", "final"),
    "soft hyphen": ("Con\u00adstan\u00adtinople fell", "Constantinople"),
    "zero-width space": ("Par\u200bis", "Paris"),
    "zero-width joiner": ("Par\u200dis", "Paris"),
    "byte order mark": ("\ufeffParis", "Paris"),
    "marks of direction": ("\u202bParis\u202c", "Paris"),
    "full-width letters": ("\uff30\uff21\uff32\uff29\uff33", "Paris"),
    "full-width digits": ("in \uff11\uff19\uff19\uff19", "1999"),
    "Arabic digits": ("سنة \u0661\u0669\u0669\u0669", "1999"),
    "Devanagari digits": ("सन \u0967\u096f\u096f\u096f", "1999"),
    "thousands": ("1,234,567 people", "1234567"),
    "thousands, no-break": ("1\u202f234\u00a0567 people", "1,234,567"),
    "thousands, apostrophe": ("1'234'567", "1234567"),
    "initials": ("J. R. R. Tolkien wrote it", "JRR Tolkien"),
    "initials, close": ("J.R.R. Tolkien", "J. R. R. Tolkien"),
    "initials, open end": ("J.R.R Tolkien", "J.R.R. Tolkien"),
    "abbreviation": ("the U.S.A. won", "USA"),
    "Chinese": ("東京は日本の首都です。", "東京"),
    "Japanese kana": ("これはひらがなです", "ひらがな"),
    "Thai": ("กรุงเทพมหานครเป็นเมืองหลวง", "กรุงเทพ"),
    "Khmer": ("រាជធានីភ្នំពេញ", "ភ្នំពេញ"),
    "Arabic vowels": ("مُحَمَّد رسول", "محمد"),
    "Hebrew points": ("שָׁלוֹם עולם", "שלום"),
    "Hindi": ("भारत की राजधानी नई दिल्ली है", "नई दिल्ली"),
    "Korean": ("서울 은 수도", "서울"),
    "Korean, decomposed": ("\u1109\u1165\u110b\u116e\u11af", "서울"),
    "punctuation between": ("Coca-Cola's", "coca cola"),
    "emoji": ("so 👍 then", "👍"),
    "plus signs": ("written in C++.", "C++"),
    "article before": ("Beatles songs", "The Beatles"),
    "article alone": ("vitamin A helps", "A"),
    "articles alone": ("I like The The best", "The The"),
}
NOT_FOUND = {
    "part of a word": ("a party of artists", "art"),
    "part of a number": ("in 1955", "55"),
    "decimals": ("3.14 is pi", "14"),
    "other order": ("York New", "New York"),
    "other articles": ("I like the Who", "The The"),
    "Hindi, other vowel sign": ("दिल्ला", "दिल्ली"),
    "Hindi, consonants alone": ("हिंदी", "हद"),
    "Hindi, part of a word": ("राजधानी", "धान"),
    "Thai, other vowel": ("กิน", "กัน"),
    "Japanese voicing": ("かき", "がき"),
    "another language": ("written in C++.", "C"),
    "sentence end is not an initial": ("Take vitamin C. A dog barks.", "CA dog"),
    "blank": ("anything", " "),
    "only the article": ("the end", "A"),
    "punctuation that is not there": ("the band", "!!!"),
}


@pytest.mark.parametrize(("text", "answer"), FOUND.values(), ids=FOUND)
def test_found(text, answer):
    assert contains_answer(text, [answer])
    example = Example(id="x", question="?", output=[], answer_sets=[[answer]])
    assert holds_answer(text, example)
    (span,) = answer_spans(text, example)
    assert contains_answer(text[slice(*span)], [answer])


@pytest.mark.parametrize(("text", "answer"), NOT_FOUND.values(), ids=NOT_FOUND)
def test_not_found(text, answer):
    assert not contains_answer(text, [answer])


@pytest.mark.parametrize(
    ("text", "answers", "spans"),
    [
        (
            "«Paris», the capital; PARIS and New  York, The The.",
            {"answers": ["paris", "new york", "The The", "the paris"]},
            ["Paris", "PARIS", "New  York", "The The"],
        ),
        ("Paris, the capital; New  York", {"answer_sets": [["capital"], ["york"]]}, ["capital", "York"]),
        (
            "東京, the Rhône Glacier ice; ice",
            {"answers": ["東", "京", "the Rhône Glacier", "glacier ice", "ice"]},
            ["東京", "Rhône Glacier ice", "ice"],
        ),
        ("New York City", {"answers": ["york", "New York City"]}, ["New York City"]),
        ("İİ costs ++ now", {"answers": [" ++"]}, ["++"]),
    ],
    ids=["every place", "short answers", "what touches or overlaps is one", "one inside another", "no words"],
)
def test_answer_spans_are_where_the_answers_stand(text, answers, spans):
    example = Example(id="x", question="?", output=[], **answers)
    assert [text[start:end] for start, end in answer_spans(text, example)] == spans


def test_words_stand_where_they_say():
    text = "The U.S.A. (1,000 km²) — 東京; Jose\u0301's C#."
    assert [text[word.start : word.end] for word in words(text)] == [
        "The", "U.S.A.", "1,000", "km²", "東", "京", "Jose\u0301", "s", "C#",
    ]  # fmt: skip
    assert normal_words(text) == ["the", "usa", "1000", "km2", "東", "京", "jose", "s", "c#"]


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=30), st.text(max_size=8), st.text(max_size=30))
def test_any_text_holds_what_stands_in_it_between_spaces(before, answer, after):
    assert (
        contains_answer(f"{before} \n {answer} \n {after}", [answer])
        or not answer.strip()
        or _joins(before, answer, after)
    )
    assert all(word and not word.isspace() for word in normal_words(answer))


def _joins(before: str, answer: str, after: str) -> bool:
    """Initials on both sides of the line, or a mark that joins what stands before it."""
    whole = normal_words(f"{before} \n {answer} \n {after}")
    return whole != normal_words(before) + normal_words(answer) + normal_words(after)


@settings(deadline=None, max_examples=200)
@given(st.text("ab ,.'é－the\u00a0ﬁ", max_size=20), st.text("ab ,.'é－the\u00a0ﬁ", min_size=1, max_size=4))
def test_an_answer_is_marked_where_it_is_found(text, answer):
    if answer.strip():
        example = Example(id="x", question="?", output=[], answers=[answer])
        assert bool(answer_spans(text, example)) == contains_answer(text, [answer])


def test_patterns():
    example = Example(id="p", question="?", output=[], answers=[r"753\s*B\.?C"], answer_type="regex")
    (pattern,) = answer_patterns(example)
    assert matches(pattern, "in 753  b.c., they say")
    assert not matches(pattern, "735 BC")
    assert matches(pattern, "753 BC", whole=True)
    assert not matches(pattern, "in 753 BC", whole=True)
    assert answer_spans("in 753  b.c, or 753bc", example) == [(3, 11), (16, 21)]
    assert holds_answer("753 BC", example)
    broken = example.model_copy(update={"answers": ["fine", "(open"]})
    with pytest.raises(ValueError, match=r"'p': the answer pattern '\(open' is invalid"):
        answer_patterns(broken)


@pytest.mark.filterwarnings("ignore:the answer pattern")
def test_a_pattern_that_takes_too_long_is_neither_and_is_given_up(monkeypatch):
    monkeypatch.setattr("cosup_fast.data.answers.PATTERN_SECONDS", 0.05)
    pattern, slow = Pattern("(a|a)+$"), "a" * 60 + "b"
    started = time.monotonic()
    with pytest.warns(UserWarning, match="nested repetitions") as told:
        assert [pattern.search(slow) for _ in range(200)] == [None] * 200
    assert len(told) == PATTERN_TRIES
    assert time.monotonic() - started < 5
    example = Example(id="x", question="?", output=[], answers=["(b|b)+$", "c$"], answer_type="regex")
    assert holds_answer("b" * 60 + "a", example, undecided=True)
    assert not holds_answer("b" * 60 + "a", example)
    assert answer_spans("b" * 60 + "a", example) == []
    assert answer_spans("b" * 60 + "a c", example) == [(62, 63)]
