"""What may be heard of a request while it is answered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from cosup_fast.generation.request import Found

Phase = Literal["read", "write", "retrieve"]
"""What a request is busy with: reading its prompt or a passage, choosing tokens, or searching the index."""


class Listener:
    """Hears of one request while it is answered, in the thread that steps the decoder.

    Override the methods of interest. An exception that one of them raises ends the request.
    """

    def on_text(self, piece: str) -> None:
        """A new piece of the answer's text; the pieces together are `Answer.text`."""

    def on_passages(self, found: Found) -> None:
        """Gen has written [NSP] and these passages were found, best first; the best one is read next."""

    def on_segment(self, start: int, end: int, passage: str) -> None:
        """`text[start:end]` rests on a passage (an id). All of it has been passed to `on_text`, and it is final."""
