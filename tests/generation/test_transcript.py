"""Tokens to text as they come in: whole characters, stop texts, and the same text as decoding at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosup_fast.data.template import gap
from cosup_fast.generation import GenerationConfig
from cosup_fast.generation.answer import Transcript

texts = st.text(st.characters(codec="utf-8"), max_size=12)
parts = st.lists(st.tuples(texts, st.sampled_from([None, "paris", "go"])), max_size=4)
sentences = st.text("aÉя7 .", min_size=1, max_size=6).filter(lambda text: text[0] != ".")


def joined(parts):
    """The texts of segments with the space that each lacks before it."""
    written, texts = "", []
    for text, _ in parts:
        texts.append(gap(written, text) + text)
        written += texts[-1]
    return texts


def write(template, parts, stop=(), pieces=None, on_segment=None):
    """What is sent, what the segments are, and whether a stop text ended it."""
    pieces = [] if pieces is None else pieces
    transcript = Transcript(template, pieces.append, stop, on_segment)

    def run() -> bool:
        for text, passage in parts:
            if passage is not None:
                transcript.open(passage)
            if any(transcript.text(token) for token in template.encode(text)):
                return True
            if transcript.close():
                return True
        return False

    return run(), pieces, transcript.finish()


@given(parts=parts)
@settings(max_examples=60, deadline=None)
def test_pieces_and_segments_are_the_text(model, parts):
    stopped, pieces, segments = write(model.template, parts)
    assert not stopped
    assert "".join(pieces) == "".join(joined(parts)) == "".join(s.text for s in segments)
    assert all(pieces)
    grounded = [(text, passage) for text, (_, passage) in zip(joined(parts), parts, strict=True) if passage is not None]
    assert [(s.text, s.passage) for s in segments if s.passage is not None] == grounded
    assert all(segment.text for segment in segments if segment.passage is None)


@given(parts=st.lists(st.tuples(sentences, st.sampled_from([None, "paris", "go"])), min_size=2, max_size=4))
@settings(max_examples=60, deadline=None)
def test_segments_do_not_run_together(model, parts):
    told = []
    _, pieces, segments = write(model.template, parts, on_segment=lambda *span: told.append(span))
    text, end = "".join(pieces), 0
    for segment, (written, _) in zip(segments, parts, strict=True):
        start, end = end, end + len(segment.text)
        assert segment.text in (written, " " + written)
        assert start == 0 or text[start - 1].isspace() or text[start].isspace()
        assert not segment.text.startswith("  ") or written.startswith("  ")
        if segment.passage is not None:
            assert told.pop(0) == (start, end, segment.passage)
    assert not told


def test_what_gen_wrote_together_is_not_torn(model):
    parts = [("Paris (", None), ("France", "paris"), (") lies", None), ("", "go"), (" here", None), (".", "go")]
    _, pieces, segments = write(model.template, parts)
    assert "".join(pieces) == "Paris (France) lies here."
    assert [segment.text for segment in segments] == [text for text, _ in parts]


@given(parts=parts, stop=st.lists(st.text("ab \n碁", min_size=1, max_size=3), min_size=1, max_size=2), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_stop_text_ends_the_answer_before_it(model, parts, stop, data):
    inserted = [(text + data.draw(st.sampled_from(["", *stop, *(s[:-1] for s in stop)])), p) for text, p in parts]
    stopped, pieces, segments = write(model.template, inserted, tuple(stop))
    whole = "".join(joined(inserted))
    found = [at for s in stop if (at := whole.find(s)) >= 0]
    assert stopped == bool(found)
    # Written token by token the text ends at the first stop that is complete, before which another may have begun.
    expected = whole[: min(found)] if found else whole
    sent = "".join(pieces)
    assert sent == "".join(segment.text for segment in segments)
    assert whole.startswith(sent)
    assert sent == expected or (found and len(sent) in found)
    assert not any(s in sent for s in stop)


def test_what_may_be_a_stop_is_held_back(model):
    template = model.template
    pieces: list[str] = []
    transcript = Transcript(template, pieces.append, ("ab!",))
    for character, sent in [("x", "x"), ("a", "x"), ("b", "x"), ("a", "xab"), ("b", "xab"), ("?", "xabab?")]:
        assert not any(transcript.text(token) for token in template.encode(character))
        assert "".join(pieces) == sent
    for character in "ab":
        assert not any(transcript.text(token) for token in template.encode(character))
    assert [segment.text for segment in transcript.finish()] == ["xabab?ab"]
    assert "".join(pieces) == "xabab?ab"


def test_a_stop_text_across_segments(model):
    stopped, pieces, segments = write(model.template, [("free en", None), (" d of", "go"), ("more", None)], ("n d",))
    assert stopped
    assert [(s.text, s.passage) for s in segments] == [("free e", None)]
    assert "".join(pieces) == "free e"


def test_an_empty_stop_is_refused():
    with pytest.raises(ValueError, match="holds an empty text"):
        GenerationConfig(stop=["a", ""])


@given(parts=parts, stop=st.lists(st.text("ab \n碁", min_size=1, max_size=3), max_size=2))
@settings(max_examples=60, deadline=None)
def test_a_grounded_segment_is_told_once_its_text_has_been_sent(model, parts, stop):
    """Also where a stop text cuts it, and where what may be one is held back."""
    pieces: list[str] = []
    told: list[tuple[int, int, str]] = []

    def on_segment(start: int, end: int, passage: str) -> None:
        assert end <= len("".join(pieces))
        told.append((start, end, passage))

    _, _, segments = write(model.template, parts, tuple(stop), pieces, on_segment)
    text = "".join(pieces)
    expected = [(segment.text, segment.passage) for segment in segments if segment.passage is not None and segment.text]
    assert [(text[start:end], passage) for start, end, passage in told] == expected
    assert told == sorted(told)


def test_a_segment_whose_end_is_held_back_waits(model):
    for following, expected in ((" y", [(0, 2, "go")]), (" b", [(0, 1, "go")])):  # the stop text does not come, or does
        pieces: list[str] = []
        told: list[tuple[int, int, str, str]] = []

        def on_segment(start, end, passage, pieces=pieces, told=told):
            told.append((start, end, passage, "".join(pieces)))

        write(model.template, [("xa", "go"), (following, None)], ("a b",), pieces, on_segment)
        assert [one[:3] for one in told] == expected
        assert all(end <= len(sent) for _, end, _, sent in told)
