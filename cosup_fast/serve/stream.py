"""What becomes of a request, from the engine's thread to a coroutine: events in order, and an end that cancels."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

from cosup_fast.generation import Answer, Listener, PromptError, Request, Ticket
from cosup_fast.generation.request import Found
from cosup_fast.serve.engine import Engine, Job, QueueFullError, StoppedError
from cosup_fast.serve.errors import ApiError, fault


@dataclass(frozen=True)
class Span:
    """What a request was busy with, in milliseconds since it arrived."""

    phase: str  # wait, read, write or retrieve
    start: float
    end: float


@dataclass(frozen=True)
class Text:
    """A new piece of the answer."""

    piece: str


@dataclass(frozen=True)
class Evidence:
    """Passages found for an [NSP], best first; the first one is what the words that follow rest on."""

    at: int  # how much text was written before
    number: int  # retrievals before
    found: Found
    timeline: tuple[Span, ...]


@dataclass(frozen=True)
class Grounded:
    """`text[start:end]` rests on a passage."""

    start: int
    end: int
    passage: str


@dataclass(frozen=True)
class Ended:
    """The whole answer."""

    answer: Answer
    timeline: tuple[Span, ...]


Event = Text | Evidence | Grounded | Ended


class Stream(Listener):
    """The events of one request, as an asynchronous iterator; leaving its context cancels a request that still runs.

    Args:
        engine: answers.
        request: what to answer.
        param: the field of the HTTP request that holds the prompt, for errors.
    """

    def __init__(self, engine: Engine, request: Request, param: str):
        self.id = uuid.uuid4().hex
        self._engine = engine
        self._param = param
        self._job = Job(request, self, self._end)
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | ApiError] = asyncio.Queue()
        self._first: Event | None = None
        self._written = self._found = 0

    async def start(self) -> Self:
        """Submits the request and waits for its first event, so that one that cannot be answered has a status for it.

        Raises:
            ApiError: the queue is full, the server stops, or the request cannot be answered.
        """
        try:
            self._engine.submit(self._job)
        except QueueFullError as busy:
            headers = {"Retry-After": str(busy.retry_after)}
            raise ApiError(429, str(busy), code="queue_full", headers=headers) from None
        except StoppedError as stopped:
            raise ApiError(503, str(stopped), code=stopped.code) from None
        try:
            self._first = await self._next()
        except BaseException:
            self.cancel()
            raise
        return self

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    async def __aiter__(self) -> AsyncIterator[Event]:
        event = self._first
        while event is not None:
            yield event
            event = None if isinstance(event, Ended) else await self._next()

    def cancel(self) -> None:
        """Ends the request; nothing happens where it has ended."""
        self._job.cancel()

    async def _next(self) -> Event:
        event = await self._events.get()
        if isinstance(event, ApiError):
            raise event
        return event

    def on_text(self, piece: str) -> None:
        self._written += len(piece)
        self._put(Text(piece))

    def on_passages(self, found: Found) -> None:
        self._put(Evidence(self._written, self._found, found, self._timeline()))
        self._found += 1

    def on_segment(self, start: int, end: int, passage: str) -> None:
        self._put(Grounded(start, end, passage))

    def _end(self, ticket: Ticket) -> None:
        answer, error = ticket.answer, ticket.exception
        assert answer is not None
        if error is None and answer.stop_reason != "cancelled":
            self._put(Ended(answer, self._timeline()))
        elif error is None:
            self._put(ApiError(503, "the request was cancelled: the server is shutting down", code="shutting_down"))
        elif isinstance(error, PromptError):
            self._put(ApiError(400, str(error), param=self._param, code="context_length_exceeded"))
        else:
            self._put(fault(error, self.id))

    def _put(self, event: Event | ApiError) -> None:
        self._engine.post(self._loop, partial(self._events.put_nowait, event))

    def _timeline(self) -> tuple[Span, ...]:
        """The phases so far, each until the next one, the last one until now."""
        begun = self._job.timeline
        arrived = begun[0][1]
        ends = [at for _, at in begun[1:]] + [time.perf_counter()]
        return tuple(
            Span(phase, round(1000 * (at - arrived), 3), round(1000 * (end - arrived), 3))
            for (phase, at), end in zip(begun, ends, strict=True)
        )
