"""Finding an answer in a text, in any script: one rule for metrics, mined negatives, the judge and BM25.

A text becomes words that are equal where people would say that they are the same word:

    case, width, ligatures     NFKD and casefolding: "ﬁne" = "FINE", "１９９９" = "1999"
    accents, vowel points      dropped where they are optional: "Sa\u0303o" = "Sao", "مُحَمَّد" = "محمد"; the vowel signs of
                               Indic scripts and Thai are letters and stay
    invisible characters       soft hyphens, zero-width characters and marks of direction are dropped
    digits, thousands          "٣" = "3", "1,000" = "1 000" with a no-break space = "1000"; "1.5" is one word
    initials                   "J. R. R." = "J.R.R." = "JRR", "U.S.A." = "USA"
    scripts without spaces     each character of Chinese, Japanese, Thai, Lao, Khmer, Burmese and Tibetan is a word
    punctuation                separates words, but for "C++", "C#"

An answer is found where its words are in a row; English articles count only for an answer of nothing else.
"""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import regex

from cosup_fast.data.records import Example

ARTICLES = frozenset(("a", "an", "the"))
PATTERN_SECONDS = 1.0
PATTERN_TRIES = 3
"""A pattern that took too long on so many texts is not tried on any more."""

_INSIDE = r"[\p{L}\p{M}\p{N}\p{Default_Ignorable_Code_Point}]"
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}\u30fc\uff70\uff9e\uff9f"
_WORD = regex.compile(
    rf"""
    \d{{1,3}}(?:[,'’٬\u00a0\u2009\u202f]\d{{3}})+(?:\.\d+)?(?!{_INSIDE})  # 1,000.5
    | \d+(?:\.\d+)*(?!{_INSIDE})                                          # 3.14
    | (?<!{_INSIDE})\p{{L}}(?:\.\p{{L}})+\.?(?!{_INSIDE})                 # U.S.A
    | (?<!{_INSIDE})\p{{Lu}}\.(?:\s?\p{{Lu}}\.)+                          # J. R. R.
    | [[{_UNSPACED}]--\p{{P}}][\p{{M}}\p{{Default_Ignorable_Code_Point}}]*
    | (?:[[\p{{L}}\p{{N}}]--[{_UNSPACED}]][\p{{M}}\p{{Default_Ignorable_Code_Point}}]*)+(?:\+\+?|\#)?
    | \p{{So}}
    """,
    regex.VERBOSE | regex.V1,
)
# Accents of Latin, Greek and Cyrillic; points of Hebrew; vowel marks of Arabic and its stretching stroke.
_OPTIONAL = regex.compile(
    r"[\p{Default_Ignorable_Code_Point}\u0300-\u036f\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7"
    r"\u0610-\u061a\u0640\u064b-\u065f\u0670\u06d6-\u06ed.,'’٬\s]"
)


class Word(NamedTuple):
    """A word of a text: its normal form, and where it stands."""

    normal: str
    start: int
    end: int


def words(text: str) -> list[Word]:
    """The words of a text; what is not a letter, digit or pictograph is none."""
    found = (Word(_normal(match.group()), *match.span()) for match in _WORD.finditer(text))
    return [word for word in found if word.normal]


def normal_words(text: str) -> list[str]:
    """The normal forms of a text's words."""
    return [word.normal for word in words(text)]


def contains_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers is in a text, in whole words.

    An answer without a word ("++") is looked for as it is, in lower case; one that is blank is nowhere.
    """
    whole, bare = _joined(text)
    for answer in answers:
        wanted_whole, wanted_bare = _joined(answer)
        if wanted_bare.strip():
            if wanted_bare in bare:
                return True
        elif wanted_whole.strip():
            if wanted_whole in whole:
                return True
        elif (as_it_is := answer.strip().lower()) and as_it_is in text.lower():
            return True
    return False


def holds_answer(text: str, example: Example, *, undecided: bool = False) -> bool:
    """Whether a gold answer of an example, a string, a pattern or one of its short answers, is in a text.

    Args:
        text: where to look.
        example: whose answers.
        undecided: what a pattern counts as that takes too long: found, where a passage must not hold an answer.
    """
    if example.answer_type == "regex":
        return any(matches(pattern, text, undecided=undecided) for pattern in answer_patterns(example))
    return contains_answer(text, all_answers(example))


def all_answers(example: Example) -> list[str]:
    """The gold answers of an example, with the short answers of each of its readings."""
    return [*example.answers, *(answer for answers in example.answer_sets for answer in answers)]


def answer_spans(text: str, example: Example) -> list[tuple[int, int]]:
    """Where the gold answers are in a text, as (start, end) in order and without overlap."""
    found: list[tuple[int, int]] = []
    if example.answer_type == "regex":
        for pattern in answer_patterns(example):
            found += _pattern_spans(pattern, text)
    else:
        every = words(text)
        content = [word for word in every if word.normal not in ARTICLES]
        for answer in all_answers(example):
            wanted = normal_words(answer)
            bare = [word for word in wanted if word not in ARTICLES]
            if wanted:
                found += _word_spans(content if bare else every, bare or wanted)
            elif (as_it_is := answer.strip()) and (place := text.find(as_it_is)) >= 0:  # no letters, so no case
                found.append((place, place + len(as_it_is)))
    spans: list[tuple[int, int]] = []
    for start, end in sorted(found):
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return spans


class Pattern:
    """A regular expression of an answer; a text that it takes too long on is neither a match nor none.

    Args:
        source: the expression, without regard to case, `^` and `$` at every line.

    Raises:
        regex.error: it is not one.
    """

    def __init__(self, source: str):
        self.source = source
        self._compiled = regex.compile(source, regex.IGNORECASE | regex.MULTILINE)
        self._failed = 0

    def search(self, text: str, *, whole: bool = False) -> bool | None:
        """Whether it is found in a text, or is the whole of it; None when that takes too long to tell."""
        found = self.spans(text, whole=whole, most=1)
        return None if found is None else bool(found)

    def spans(self, text: str, *, whole: bool = False, most: int | None = None) -> list[tuple[int, int]] | None:
        """Where it is found, in order; None when that takes too long."""
        if self._failed >= PATTERN_TRIES:
            return None
        try:
            if whole:
                match = self._compiled.fullmatch(text, timeout=PATTERN_SECONDS)
                return [match.span()] if match else []
            spans = []
            for match in self._compiled.finditer(text, timeout=PATTERN_SECONDS):
                spans.append(match.span())
                if len(spans) == most:
                    break
            return spans
        except TimeoutError:
            self._failed += 1
            warnings.warn(
                f"the answer pattern {self.source!r} took more than {PATTERN_SECONDS} s: nested repetitions like (a+)+ "
                "should be simplified",
                stacklevel=2,
            )
            return None


def answer_patterns(example: Example) -> list[Pattern]:
    """The patterns of an example with `answer_type="regex"` (CuratedTREC); none for another one.

    Raises:
        ValueError: a pattern does not compile.
    """
    if example.answer_type != "regex":
        return []
    patterns = []
    for answer in example.answers:
        try:
            patterns.append(_pattern(answer))
        except (regex.error, RecursionError, OverflowError) as error:
            raise ValueError(f"example {example.id!r}: the answer pattern {answer!r} is invalid: {error}") from None
    return patterns


def matches(pattern: Pattern, text: str, *, whole: bool = False, undecided: bool = False) -> bool:
    """Whether a pattern is found in a text, or is the whole of it; `undecided` when that takes too long to tell."""
    found = pattern.search(text, whole=whole)
    return undecided if found is None else found


@cache
def _pattern(source: str) -> Pattern:
    return Pattern(source)


def _pattern_spans(pattern: Pattern, text: str) -> list[tuple[int, int]]:
    return [(start, end) for start, end in pattern.spans(text) or () if start < end]


def _word_spans(every: Sequence[Word], wanted: Sequence[str]) -> list[tuple[int, int]]:
    count = len(wanted)
    return [
        (every[i].start, every[i + count - 1].end)
        for i in range(len(every) - count + 1)
        if [word.normal for word in every[i : i + count]] == list(wanted)
    ]


def _normal(word: str) -> str:
    letters = unicodedata.normalize("NFKD", word).casefold()
    if word[0].isdecimal() or "." in word or not letters.isascii():
        # Inside a number the dot is the decimal point; elsewhere it only ends initials.
        point = word[0].isdecimal()
        letters = "".join(c for c in letters if not _OPTIONAL.fullmatch(c) or (point and c == "."))
        letters = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in letters)
    return unicodedata.normalize("NFC", letters)


@lru_cache(maxsize=1 << 16)
def _joined(text: str) -> tuple[str, str]:
    """The words of a text between spaces: all of them, and those that are not articles."""
    found = normal_words(text)
    return f" {' '.join(found)} ", f" {' '.join(word for word in found if word not in ARTICLES)} "
