"""What the endpoints work with, and answering while the client is there to hear it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends
from fastapi import Request as HTTPRequest
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from cosup_fast.data.template import TooLongError
from cosup_fast.errors import CosupError
from cosup_fast.generation import GenerationConfig, PromptError, Request
from cosup_fast.generation.task import prompt_tokens
from cosup_fast.index import NonparametricIndex
from cosup_fast.serve.engine import Engine
from cosup_fast.serve.errors import ApiError
from cosup_fast.serve.evidence import UrlOf
from cosup_fast.serve.fields import Message, Writing, to_prompt
from cosup_fast.serve.settings import ServeConfig
from cosup_fast.serve.stream import Stream
from cosup_fast.serve.systems import Offered, unknown

R = TypeVar("R")
LONG_PROMPT = 1 << 14
"""Characters from which a prompt is tokenized in a thread of its own before the engine's."""
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True)
class Service:
    """The parts of a running server."""

    engine: Engine
    index: NonparametricIndex | None
    offered: Mapping[str, Offered]
    generation: GenerationConfig
    config: ServeConfig
    created: int  # Unix time

    def system(self, name: str) -> Offered:
        """The system of that name.

        Raises:
            ApiError: there is none.
        """
        if name not in self.offered:
            raise ApiError(404, unknown(name, self.offered), param="model", code="model_not_found")
        return self.offered[name]

    async def open(self, body: Writing, messages: Sequence[Message], most: int | None, param: str, last: str) -> Stream:
        """A request for an answer, not yet submitted.

        Args:
            body: what is asked.
            messages: those of `body`.
            most: the most tokens to choose.
            param: the field that holds the messages, for errors.
            last: the last of them there.

        Raises:
            ApiError: an unknown model, messages without a question, a long prompt that does not fit, or options that
                contradict each other.
        """
        system = self.system(body.model)
        question, instruction = to_prompt(messages, self.engine.generator.model.template, last)
        config = body.generation(self.generation, most, retrieves=system.retrieves)
        with too_long(param):
            await self.check_prompt(question, instruction)
        return Stream(self.engine, Request(question, instruction, config, system.index), param)

    async def check_prompt(self, question: str, instruction: str) -> None:
        """Refuses a long prompt before the engine has it: a megabyte takes a second, for which others would wait.

        Raises:
            PromptError: it is longer than Gen's positions.
        """
        if len(question) + len(instruction) >= LONG_PROMPT:
            template = self.engine.generator.model.template
            await asyncio.to_thread(prompt_tokens, template, question, instruction)

    def urls(self, request: HTTPRequest) -> UrlOf:
        """URLs of passages for the client of a request."""
        return UrlOf(str(request.base_url), self.config.passage_url)


def _service(request: HTTPRequest) -> Service:
    return request.app.state.service


Served = Annotated[Service, Depends(_service)]


@contextmanager
def too_long(param: str) -> Iterator[None]:
    """Tells the client that what it gave in `param` is longer than the model's positions."""
    try:
        yield
    except (PromptError, TooLongError) as error:
        raise ApiError(400, str(error), param=param, code="context_length_exceeded") from None


class ClientGoneError(CosupError, ConnectionError):
    """The client has closed its connection."""


async def while_connected(request: HTTPRequest, work: Coroutine[Any, Any, R]) -> R:
    """What `work` returns; it is cancelled when the client goes away.

    Raises:
        ClientGoneError: the client went away.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: HTTPRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events of a request; when it ends for whatever reason, so does the request.

    Args:
        stream: has had its first event.
        events: what to send.
    """

    def __init__(self, stream: Stream, events: AsyncIterator[str]):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.cancel()


def sse(data: Mapping[str, Any], event: str | None = None) -> str:
    """One server-sent event with JSON data."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {_encode(data)}\n\n"
