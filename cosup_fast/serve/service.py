"""What the endpoints work with, and answering while the client is there to hear it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends
from fastapi import Request as HTTPRequest
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from cosup_fast.errors import CosupError
from cosup_fast.generation import GenerationConfig, Request
from cosup_fast.index import SequenceIndex
from cosup_fast.serve.engine import Engine
from cosup_fast.serve.errors import ApiError
from cosup_fast.serve.evidence import UrlOf
from cosup_fast.serve.fields import Message, Writing, to_prompt
from cosup_fast.serve.settings import ServeConfig
from cosup_fast.serve.stream import Stream
from cosup_fast.serve.systems import Offered, unknown

R = TypeVar("R")
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True)
class Service:
    """The parts of a running server."""

    engine: Engine
    index: SequenceIndex | None
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

    def open(self, body: Writing, messages: Sequence[Message], most: int | None, param: str) -> Stream:
        """A request for an answer, not yet submitted.

        Raises:
            ApiError: an unknown model, messages without a question, or options that contradict each other.
        """
        system = self.system(body.model)
        question, instruction = to_prompt(messages, self.engine.generator.model.template, param)
        config = body.generation(self.generation, most, retrieves=system.retrieves)
        return Stream(self.engine, Request(question, instruction, config, system.index), param)

    def urls(self, request: HTTPRequest) -> UrlOf:
        """URLs of passages for the client of a request."""
        return UrlOf(str(request.base_url), self.config.passage_url)


def _service(request: HTTPRequest) -> Service:
    return request.app.state.service


Served = Annotated[Service, Depends(_service)]


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
