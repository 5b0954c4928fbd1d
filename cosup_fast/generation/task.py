"""One request on its way: what it reads next, what it has written, and where its text stands."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cosup_fast.config.generation import GenerationConfig
from cosup_fast.generation.answer import Answer, Candidate, Retrieval, StopReason, Transcript
from cosup_fast.generation.grammar import Grammar, State
from cosup_fast.generation.listener import Listener, Phase
from cosup_fast.generation.request import Asked, Found, PromptError, Request

if TYPE_CHECKING:
    from cosup_fast.data.template import Template


class Task:
    """The state of one request.

    `pending` is what Gen has to read before anything else can happen; then, with `state`, either a token is chosen
    (`take`), or, in State.PASSAGE, a passage is retrieved (`insert`).

    Args:
        request: what to answer.
        config: how to write.
        grammar: what may follow what.
        listener: hears what is written and found.
        timeline: phases and when they began (`time.perf_counter`) are added to it.

    Raises:
        PromptError: the prompt is longer than Gen's positions.
    """

    def __init__(
        self,
        request: Request,
        config: GenerationConfig,
        grammar: Grammar,
        listener: Listener,
        timeline: list[tuple[Phase, float]],
    ):
        template: Template = grammar.template
        self.request = request
        self.config = config
        self.state = State.FREE
        self.stop_reason: StopReason | None = None
        self.retrievals: list[Retrieval] = []
        self.length = 0  # tokens in the cache
        self.pending: list[int] = prompt_tokens(template, request.question, request.instruction)
        self.processed = self.generated = self.inserted = self.refed = 0
        self._grammar = grammar
        self._template = template
        self._prompt = len(self.pending)
        self._random = torch.Generator().manual_seed(config.seed)
        self._listener = listener
        self._timeline = timeline
        self._transcript = Transcript(template, listener.on_text, tuple(config.stop), listener.on_segment)
        self._forced = {**request.forced, **({0: template.nsp} if config.ret_first else {})}
        self._asked_at = 0  # the length of the context up to and with the last [NSP]
        self._grounded: list[int] = []  # [Cs] and what was written after it
        if config.ret_first and config.max_new_tokens > 1 and len(self.pending) < template.max_length:
            self.pending.append(template.nsp)  # known beforehand, so read together with the prompt
            self.generated = 1
            self.state = State.PASSAGE
        self._enter("read")

    @property
    def may_retrieve(self) -> bool:
        """Whether [NSP] may be written in free text."""
        return len(self.retrievals) < self.config.max_retrievals

    @property
    def forced(self) -> int | None:
        """The next token of the output, where it is not for Gen to choose."""
        return self._forced.get(self.generated)

    @property
    def random(self) -> torch.Generator:
        """Draws the tokens of this request alone."""
        return self._random

    def read(self, count: int) -> None:
        """The first pending tokens are in the cache now."""
        self.pending = self.pending[count:]
        self.length += count
        self.processed += count

    def take(self, token: int) -> None:
        """The next token of the output; sets what is to be read, or why the answer ends."""
        before = self.state
        self._enter("write")
        if self.forced is not None:
            self._grammar.check(before, self.may_retrieve, token)
        self.generated += 1
        self.state = self._grammar.next(before, token)
        stopped = False
        if self.state is before:
            stopped = self._transcript.text(token)
            if before is State.GROUNDED:
                self._grounded.append(token)
        else:
            stopped = self._transcript.close()
        if self.state is State.END:
            self.stop_reason = "end"
        elif stopped:
            self.stop_reason = "stop"
        elif self.generated == self.config.max_new_tokens:
            self.stop_reason = "max_new_tokens"
        elif self.config.ctx_truncate and before is State.GROUNDED and self.state is State.FREE:
            # What follows the passage has seen it: it is read again where the passage stood.
            self.length = self._asked_at
            self.refed += len(self._grounded)
            self.pending = [*self._grounded, token]
            self._enter("read")
        elif self.length == self._template.max_length:
            self.stop_reason = "context_length"
        else:
            self.pending = [token]

    def asked(self, query: Tensor) -> Asked:
        """The [NSP] that was read last, with its query (D,)."""
        self._enter("retrieve")
        return Asked(self.request, query, self._transcript.segments, len(self.retrievals))

    def insert(self, found: Found) -> None:
        """The passages found for the [NSP] that was read last; the best is to be read now.

        Raises:
            ValueError: nothing was found, or the best passage is too long for the template.
        """
        if not found:
            raise ValueError("the index gave no passage for a query: it needs at least one")
        self._enter("read")
        self.retrievals.append(
            Retrieval(candidates=tuple(Candidate(passage=p.id, title=p.title, score=score) for p, score in found))
        )
        self._listener.on_passages(found)
        given = [*self._template.inserted_passage(found[0][0]), self._template.context_start]
        if self.length + len(given) > self._template.max_length:
            self.stop_reason = "context_length"
            return
        self.pending = given
        self._asked_at = self.length
        self._grounded = [self._template.context_start]
        self.inserted += len(given)
        self.state = self._grammar.next(self.state, self._template.context_start)
        self._transcript.open(found[0][0].id)

    def fail(self, error: Exception) -> Answer:
        """What was written until an error; its text is not reported piece by piece any more."""
        self._transcript.silence()
        self.stop_reason = "error"
        return self.answer(str(error) or type(error).__name__)

    def answer(self, error: str | None = None) -> Answer:
        """What was written, once it is known why it ended."""
        assert self.stop_reason is not None
        segments = self._transcript.finish()
        return Answer(
            text="".join(segment.text for segment in segments),
            segments=segments,
            retrievals=tuple(self.retrievals),
            stop_reason=self.stop_reason,
            prompt_tokens=self._prompt,
            generated_tokens=self.generated,
            inserted_tokens=self.inserted,
            refed_tokens=self.refed,
            processed_tokens=self.processed,
            error=error,
        )

    def _enter(self, phase: Phase) -> None:
        if not self._timeline or self._timeline[-1][0] != phase:
            self._timeline.append((phase, time.perf_counter()))


def prompt_tokens(template: Template, question: str, instruction: str, *more: int) -> list[int]:
    """What Gen reads first.

    Raises:
        PromptError: it is not Unicode text, or longer than Gen's positions.
    """
    for name, text in (("question", question), ("instruction", instruction)):
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise PromptError(f"the {name} {text[:60]!a} holds half of a surrogate pair, which is not Unicode text")
    tokens = [*template.prompt(question, instruction), *more]
    if len(tokens) > template.max_length:
        raise PromptError(
            f"the prompt of the question {question[:60]!r} has {len(tokens)} tokens, more than the "
            f"{template.max_length} positions of Gen: shorten the question or the instruction"
        )
    return tokens
