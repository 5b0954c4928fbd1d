"""POST /v1/responses: an answer as items, each retrieval a `file_search_call` before the words that rest on it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from cosup_fast.data.records import String, Text
from cosup_fast.generation import Answer
from cosup_fast.serve.errors import FOUND, LIST, MESSAGE, TEXT, ApiError
from cosup_fast.serve.evidence import Cited, Phase, SearchResult, phases
from cosup_fast.serve.fields import Message, Writing, text_or_list
from cosup_fast.serve.service import EventStream, Served, sse, while_connected
from cosup_fast.serve.stream import Ended, Event, Evidence, Grounded, Stream
from cosup_fast.serve.stream import Text as Piece

router = APIRouter(prefix="/v1", tags=["answers"])
_INCOMPLETE = ("max_new_tokens", "context_length")


class Found(BaseModel):
    """A retrieval of an earlier response that a client sends back with its message; it is not read again."""

    model_config = ConfigDict(extra="allow")

    type: Literal["file_search_call"]


def _kind(item: Any) -> str:
    return FOUND if isinstance(item, dict) and item.get("type") == "file_search_call" else MESSAGE


Item = Annotated[Annotated[Found, Tag(FOUND)] | Annotated[Message, Tag(MESSAGE)], Discriminator(_kind)]


class ResponsesRequest(Writing):
    """A response; fields of OpenAI's API that are not listed are refused, `seed` and `stop` are extensions."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "background": (False,),
        "include": ([], ["file_search_call.results"]),
        "metadata": ({},),
        "parallel_tool_calls": (True, False),
        "store": (False,),
        "tool_choice": ("auto", "none"),
        "tools": ([],),
        "truncation": ("disabled",),
        "text": ({"format": {"type": "text"}},),
    }

    input: Annotated[
        Annotated[Text, Tag(TEXT)] | Annotated[list[Item], Field(min_length=1, max_length=1000), Tag(LIST)],
        text_or_list,
    ]
    instructions: String | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, description="most tokens that Gen chooses")

    @property
    def messages(self) -> list[Message]:
        """Instructions and input as a conversation."""
        before = [Message(role="system", content=self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return [*before, Message(role="user", content=self.input)]
        return [*before, *(item for item in self.input if isinstance(item, Message))]

    @property
    def last(self) -> str:
        """Where the question is, for errors."""
        return "input" if isinstance(self.input, str) else f"input.{len(self.input) - 1}"


class ResponsesResponse(BaseModel):
    """A response; `output` holds a message and a `file_search_call` for each retrieval, in the order they began."""

    id: str
    object: str = "response"
    created_at: int
    status: str
    model: str
    output: list[dict[str, Any]]
    search_results: list[SearchResult]
    timeline: list[Phase]


@router.post(
    "/responses",
    response_model=ResponsesResponse,
    responses={200: {"content": {"text/event-stream": {}}, "description": "the response, or a stream of events"}},
)
async def respond(body: ResponsesRequest, request: HTTPRequest, served: Served) -> Response:
    """Answers the input."""
    stream = await served.open(body, body.messages, body.max_output_tokens, "input", body.last)
    written = _Written(stream.id, body, Cited(served.urls(request)))
    if body.stream:
        await while_connected(request, stream.start())
        return EventStream(stream, _events(stream, written))
    await while_connected(request, _whole(stream, written))
    return JSONResponse(written.response)


async def _whole(stream: Stream, written: _Written) -> None:
    async with stream:
        async for event in stream:
            for _ in written.take(event):
                pass


async def _events(stream: Stream, written: _Written) -> AsyncIterator[str]:
    number = 0

    def send(kind: str, data: dict[str, Any]) -> str:
        nonlocal number
        number += 1
        return sse({"type": kind, "sequence_number": number - 1, **data}, kind)

    for kind in ("response.created", "response.in_progress"):
        yield send(kind, {"response": written.response})
    try:
        async for event in stream:
            for kind, data in written.take(event):
                yield send(kind, data)
    except ApiError as error:
        yield send("response.failed", {"response": written.failed(error)})


class _Written:
    """A response as it is written, and the events that each step of it makes.

    Args:
        name: makes its ids.
        body: what was asked.
        cited: collects the evidence.
    """

    def __init__(self, name: str, body: ResponsesRequest, cited: Cited):
        self._name, self._cited = name, cited
        self._text = ""
        self._message: dict[str, Any] | None = None
        self.response: dict[str, Any] = {
            "id": f"resp_{name}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": body.model,
            "output": [],
            "parallel_tool_calls": False,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "tool_choice": "none",
            "tools": [],
            "metadata": {},
            "usage": None,
            "search_results": [],
            "timeline": [],
        }

    def take(self, event: Event) -> list[tuple[str, dict[str, Any]]]:
        """The events of OpenAI's API that one of the stream becomes."""
        match event:
            case Piece():
                opened = self._open()
                self._text += event.piece
                return [*opened, ("response.output_text.delta", self._at(delta=event.piece, logprobs=[]))]
            case Evidence():
                return self._search(event)
            case Grounded():
                citation = {"type": "url_citation", **self._cited.cite(event)}
                number = len(self._cited.annotations) - 1
                at = self._at(annotation=citation, annotation_index=number)
                return [("response.output_text.annotation.added", at)]
            case Ended():
                return self._end(event)

    def failed(self, error: ApiError) -> dict[str, Any]:
        """The response after an error."""
        reason = {"code": "server_error", "message": error.message}
        return self.response | {"status": "failed", "error": reason, "output": list(self.response["output"])}

    def _open(self) -> list[tuple[str, dict[str, Any]]]:
        """Adds the message, before its first word."""
        if self._message is not None:
            return []
        self._message = {
            "id": f"msg_{self._name}",
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        self._index = len(self.response["output"])
        self.response["output"].append(self._message)
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return [
            ("response.output_item.added", {"output_index": self._index, "item": dict(self._message)}),
            ("response.content_part.added", self._at(part=part)),
        ]

    def _search(self, event: Evidence) -> list[tuple[str, dict[str, Any]]]:
        found = self._cited.found(event)
        self.response["search_results"] = [one.model_dump() for one in self._cited.results]
        item = {
            "id": f"fs_{self._name}_{event.number}",
            "type": "file_search_call",
            "status": "completed",
            "queries": [],
            "results": [
                {
                    "file_id": one.id,
                    "filename": one.title,
                    "score": one.score,
                    "text": one.snippet,
                    "attributes": {"url": one.url},
                }
                for one in found
            ],
        }
        at = {"output_index": len(self.response["output"]), "item": item}
        self.response["output"].append(item)
        return [("response.output_item.added", at), ("response.output_item.done", at)]

    def _end(self, event: Ended) -> list[tuple[str, dict[str, Any]]]:
        opened = self._open()
        assert self._message is not None
        answer = event.answer
        cut = answer.stop_reason in _INCOMPLETE
        annotations = [{"type": "url_citation", **one} for one in self._cited.annotations]
        part = {"type": "output_text", "text": self._text, "annotations": annotations, "logprobs": []}
        self._message |= {"status": "incomplete" if cut else "completed", "content": [part]}
        self.response |= {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": _usage(answer),
            "timeline": phases(event.timeline),
        }
        return [
            *opened,
            ("response.output_text.done", self._at(text=self._text, logprobs=[])),
            ("response.content_part.done", self._at(part=part)),
            ("response.output_item.done", {"output_index": self._index, "item": self._message}),
            ("response.incomplete" if cut else "response.completed", {"response": self.response}),
        ]

    def _at(self, **more: Any) -> dict[str, Any]:
        """Where in the output the text stands."""
        return {"item_id": f"msg_{self._name}", "output_index": self._index, "content_index": 0, **more}


def _usage(answer: Answer) -> dict[str, Any]:
    read = answer.prompt_tokens + answer.inserted_tokens
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": answer.generated_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + answer.generated_tokens,
    }
