"""Span questions: a sentence of a lead with a name, date or number masked, so that the answer is in the passage.

    Malawi: It is bordered by ____ to the west, Tanzania to the north and northeast ...   -> Zambia

Cloze questions mask the title, which teaches a generator to copy titles; here the title stays and the text answers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cosup_fast.data.prepared.questions import BLANK, bare_title, sentences
from cosup_fast.data.prepared.words import STOPWORDS, occurs, tokens
from cosup_fast.data.records import Example, Passage, Segment

WORDS = 40  # of a lead that spans are taken from, so that a passage cut to 64 tokens still holds the answer
_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_DATE = rf"\d{{1,2}} {_MONTH} \d{{4}}|{_MONTH} \d{{1,2}}, \d{{4}}|{_MONTH} \d{{4}}|\d{{1,2}}(?:st|nd|rd|th) century"
_NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?%?|\d+(?:\.\d+)?(?:%|s\b)?(?: (?:million|billion|trillion))?"
_NAME = r"[A-Z][\w’'-]*[a-z](?:(?: (?:of|the|de|du|van|von))* [A-Z][\w’'-]*[a-z])*"
_SPAN = re.compile(
    rf"(?<![\w.,/°$€£–-])(?:(?P<date>{_DATE})|(?P<number>{_NUMBER})|(?P<name>{_NAME}))(?![\w/°–-]|[.,]\d)"
)


class Span(NamedTuple):
    """What is masked in a sentence, by its place there."""

    start: int
    end: int
    kind: str


def find_spans(passage: Passage, sentence: str) -> list[Span]:
    """The names, dates and numbers that can be masked in a sentence of a lead.

    A span shares no word with the title, and none of its longer words occurs elsewhere in the sentence.
    The first word of a sentence is not a name.
    """
    title = set(tokens(bare_title(passage.title)))
    found = []
    for match in _SPAN.finditer(sentence):
        end = match.start() + len(re.sub(r"['’]s?$", "", match.group()))
        words = tokens(sentence[match.start() : end])
        telling = [word for word in words if word not in STOPWORDS]
        rest = tokens(sentence[: match.start()]) + tokens(sentence[end:])
        if match.lastgroup == "name" and not sentence[: match.start()].strip('"“‘( '):
            continue
        if not telling or title & set(words) or any(word in rest for word in telling):
            continue
        found.append(Span(match.start(), end, str(match.lastgroup)))
    return found


def make_spans(passages: Iterable[Passage]) -> Iterator[Example]:
    """At most two questions of each lead."""
    for passage in passages:
        for number, (question, answer) in enumerate(span_questions(passage)):
            yield Example(
                id=f"span-{passage.id}-{number}",
                dataset="spans",
                question=question,
                output=[Segment(text=answer, passage=passage.id)],
                answers=[answer],
            )


def span_questions(passage: Passage) -> Iterator[tuple[str, str]]:
    """At most two questions of a lead, and what is masked in each."""
    at = 0
    for sentence in sentences(passage.text)[:2]:
        before, at = at, at + len(sentence.split())
        near = [span for span in find_spans(passage, sentence) if before + len(sentence[: span.end].split()) <= WORDS]
        # "A German mathematician" is asked for only where the sentence names nothing else.
        near = [span for span in near if sentence[: span.start].split()[-1:] not in (["a"], ["an"])] or near
        if near and len(sentence.split()) <= WORDS:
            chosen = near[draw(f"{passage.id} {sentence}") % len(near)]
            question = " ".join((sentence[: chosen.start] + BLANK + sentence[chosen.end :]).split())
            title = bare_title(passage.title)
            if not occurs(tokens(title), tokens(question)):
                question = f"{title}: {question}"
            yield question, sentence[chosen.start : chosen.end]


def draw(text: str) -> int:
    """A number that looks random and is the same for the same text on every machine."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
