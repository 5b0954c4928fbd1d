"""Claims made of leads, to be called true or false: a sentence as it stands, or with another name, date or number.

What replaces a span is one of another lead, of the same kind and after the same word, so that the claim reads well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from cosup_fast.data.prepared.questions import VERIFY, bare_title, sentences
from cosup_fast.data.prepared.spans import WORDS, Span, draw, find_spans
from cosup_fast.data.prepared.words import occurs, tokens
from cosup_fast.data.records import Example, Passage, Segment


def make_claims(passages: Iterable[Passage]) -> Iterator[Example]:
    """One claim of every third lead that has a span."""
    chosen: list[tuple[Passage, str, Span]] = []
    others: dict[tuple[str, str], list[str]] = defaultdict(list)
    for passage in passages:
        spans = [(s, span) for s in sentences(passage.text)[:1] for span in find_spans(passage, s)]
        spans = [(s, span) for s, span in spans if len(s.split()) <= WORDS]
        for sentence, span in spans:
            others[_place(sentence, span)].append(sentence[span.start : span.end])
        if spans:
            chosen.append((passage, *spans[draw(f"claim {passage.id}") % len(spans)]))
    for passage, sentence, span in chosen:
        at = draw(f"true {passage.id}")
        if at % 3:
            continue
        said, label = sentence[span.start : span.end], "true" if at // 3 % 2 else "false"
        if label == "false":
            choices, words = others[_place(sentence, span)], tokens(passage.text)
            first = at // 6 % len(choices)
            said = next((other for other in choices[first:] + choices[:first] if not occurs(tokens(other), words)), "")
            if not said:
                continue
        claim = " ".join((sentence[: span.start] + said + sentence[span.end :]).split())
        title = bare_title(passage.title)
        if not occurs(tokens(title), tokens(claim)):
            claim = f"{title}: {claim}"
        yield Example(
            id=f"claim-{passage.id}",
            dataset="claims",
            instruction=VERIFY,
            question=claim,
            output=[Segment(text=label, passage=passage.id)],
            answers=["SUPPORTS" if label == "true" else "REFUTES"],
        )


def _place(sentence: str, span: Span) -> tuple[str, str]:
    """What may replace a span: one of its kind after the same word, a number with as many digits."""
    before = (sentence[: span.start].split() or [""])[-1]
    said = sentence[span.start : span.end]
    return span.kind, before if span.kind == "name" else f"{len(said)} {said[-1].isdigit()}"
