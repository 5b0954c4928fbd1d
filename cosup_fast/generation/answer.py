"""What Gen wrote: answers, their segments and retrievals, and how tokens become text while they come in."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from cosup_fast.data.strict import Strict
from cosup_fast.data.template import gap

if TYPE_CHECKING:
    from cosup_fast.data.template import Template

StopReason = Literal["end", "stop", "max_new_tokens", "context_length", "cancelled", "error"]


class AnswerSegment(Strict):
    """A stretch of the answer: grounded on `passage` (an id), or free text when that is None."""

    text: str
    passage: str | None = None


class Candidate(Strict):
    """A passage with its score: the inner product of query and sequence embedding."""

    passage: str
    title: str
    score: float


class Retrieval(Strict):
    """One [NSP]: the passages found, best first; the first one was taken."""

    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The passage that was taken."""
        return self.candidates[0]


class Answer(Strict):
    """What Gen wrote.

    `stop_reason` is `end` (Gen closed its output), `stop` (one of `GenerationConfig.stop` appeared), `max_new_tokens`,
    `context_length`: the next token, or the passage just retrieved, has no place among Gen's positions; `cancelled`,
    or `error`, which `error` explains. Unless it is `end`, a grounded segment that is last may lack its end, and the
    last retrieval its segment. What was written before a cancellation or an error is kept.
    """

    text: str
    segments: tuple[AnswerSegment, ...]
    retrievals: tuple[Retrieval, ...]
    stop_reason: StopReason
    prompt_tokens: int
    generated_tokens: int  # chosen by Gen, [NSP], [Ce] and </s> included
    inserted_tokens: int  # passages and [Cs]
    refed_tokens: int = 0  # read again, without their passage, under ctx_truncate: [Cs] and the grounded text
    processed_tokens: int = 0  # read by Gen: prompt, generated, inserted and read again; the token chosen last is not
    error: str | None = None


class Transcript:
    """Tokens to segments, and to text as soon as it is certain.

    Segments are joined as in training (`gap`): where Gen wrote no space between two, the later one begins with one.

    Args:
        template: decodes the tokens.
        on_text: called with each new piece; the pieces together are the answer's text.
        stop: texts that end the answer. What may be the beginning of one is held back.
        on_segment: called with start, end and passage of each grounded segment, once its whole text was passed on.
    """

    def __init__(
        self,
        template: Template,
        on_text: Callable[[str], None] | None,
        stop: tuple[str, ...] = (),
        on_segment: Callable[[int, int, str], None] | None = None,
    ):
        self._template = template
        self._on_text = on_text
        self._on_segment = on_segment
        self._told = 0  # how many of `_starts` belong to the segments passed on
        self._stop = stop
        self._text = ""
        self._sent = 0
        self._starts: list[tuple[int, str | None]] = [(0, None)]  # where segments begin in the text, and their passage
        # Tokens are decoded from the last place where a character ended, after the tokens before it: how a token
        # decodes may depend on what it follows (a leading space), and on no more than that.
        self._known: list[int] = []
        self._new: list[int] = []

    def text(self, token: int) -> bool:
        """A token of the current segment; True: the answer ends here, one of the stop texts has appeared."""
        self._new.append(token)
        piece = self._decoded()
        # A character of several bytes may come in several tokens; until it is whole it decodes to U+FFFD.
        if piece.endswith("\ufffd"):
            return False
        return self._append(piece)

    def open(self, passage: str) -> None:
        """The next segment is grounded on a passage."""
        self.close()
        self._starts.append((len(self._text), passage))

    def close(self) -> bool:
        """The current segment is complete; free text follows. True as in `text`."""
        stopped = self._append(self._decoded()) if self._new else False
        self._known, self._new = [], []
        self._starts.append((len(self._text), None))
        self._tell()
        return stopped

    def silence(self) -> None:
        """No more pieces, no more segments."""
        self._on_text = self._on_segment = None

    def finish(self) -> tuple[AnswerSegment, ...]:
        """All segments. A grounded segment may be empty, a free one is not."""
        if self._new:
            self._append(self._decoded())
            self._new = []
        self._send(len(self._text))
        self._starts.append((len(self._text), None))
        self._tell()
        return self.segments

    @property
    def segments(self) -> tuple[AnswerSegment, ...]:
        """Those up to the last whole character."""
        ends = [start for start, _ in self._starts[1:]] + [len(self._text)]
        return tuple(
            AnswerSegment(text=self._text[start:end], passage=passage)
            for (start, passage), end in zip(self._starts, ends, strict=True)
            if end > start or passage is not None
        )

    def _decoded(self) -> str:
        """The text of the new tokens."""
        before = self._template.decode(self._known) if self._known else ""
        return self._template.decode([*self._known, *self._new])[len(before) :]

    def _append(self, piece: str) -> bool:
        self._known, self._new = (self._new, []) if piece else ([*self._known, *self._new], [])
        searched = max(0, len(self._text) - max(map(len, self._stop), default=0))
        begins = self._starts[-1][0] == len(self._text)
        self._text += gap(self._text, piece) + piece if begins else piece
        found = [at for stop in self._stop if (at := self._text.find(stop, searched)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self._starts = [(start, passage) for start, passage in self._starts if start <= len(self._text)]
            self._send(len(self._text))
            return True
        self._send(len(self._text) - self._held())
        return False

    def _held(self) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        longest = max(map(len, self._stop), default=1) - 1
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self._text[-n:]) for s in self._stop)), 0)

    def _send(self, end: int) -> None:
        if end > self._sent:
            piece, self._sent = self._text[self._sent : end], end
            if self._on_text is not None:
                self._on_text(piece)
            self._tell()

    def _tell(self) -> None:
        """Passes on the grounded segments that are closed and whose text has been sent."""
        while self._told + 1 < len(self._starts) and (end := self._starts[self._told + 1][0]) <= self._sent:
            start, passage = self._starts[self._told]
            self._told += 1
            if passage is not None and end > start and self._on_segment is not None:
                self._on_segment(start, end, passage)
