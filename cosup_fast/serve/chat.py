"""POST /v1/chat/completions: an answer with citations, whole or as it is written."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any, ClassVar, Literal

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from cosup_fast.generation import Answer
from cosup_fast.serve.errors import ApiError
from cosup_fast.serve.evidence import Cited, Phase, SearchResult, phases
from cosup_fast.serve.fields import Fields, Messages, Writing
from cosup_fast.serve.service import EventStream, Served, sse, while_connected
from cosup_fast.serve.stream import Ended, Evidence, Grounded, Stream, Text

router = APIRouter(prefix="/v1", tags=["answers"])
FINISH = {"end": "stop", "stop": "stop", "max_new_tokens": "length", "context_length": "length"}


class StreamOptions(Fields):
    """What a stream holds besides the answer."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"include_obfuscation": (False,)}

    include_usage: bool = False


class ChatRequest(Writing):
    """A chat completion; fields of OpenAI's API that are not listed are refused."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "frequency_penalty": (0, 0.0),
        "presence_penalty": (0, 0.0),
        "logprobs": (False,),
        "logit_bias": ({},),
        "metadata": ({},),
        "parallel_tool_calls": (True, False),
        "store": (False,),
        "tool_choice": ("auto", "none"),
        "tools": ([],),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
    }

    messages: Messages
    n: Literal[1] = 1
    max_tokens: int | None = Field(default=None, ge=1, description="most tokens that Gen chooses")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="as max_tokens")
    stream_options: StreamOptions | None = Field(default=None, description="needs stream=true")

    @property
    def most(self) -> int | None:
        """The most tokens to choose.

        Raises:
            ApiError: two limits that differ.
        """
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            message = f"max_tokens={old} and max_completion_tokens={new} differ: give one of them"
            raise ApiError(400, message, param="max_tokens", code="invalid_value")
        return old if new is None else new

    @property
    def includes_usage(self) -> bool:
        """Whether a stream says how many tokens it took.

        Raises:
            ApiError: options of a stream where none is asked for.
        """
        if self.stream_options is None:
            return False
        if not self.stream:
            message = "stream_options are options of a stream: set stream=true, or leave them out"
            raise ApiError(400, message, param="stream_options", code="invalid_value")
        return self.stream_options.include_usage


class UrlCitation(BaseModel):
    """`content[start_index:end_index]` rests on the passage at `url`; indices count Unicode code points."""

    start_index: int
    end_index: int
    title: str
    url: str


class Annotation(BaseModel):
    """A citation."""

    type: Literal["url_citation"] = "url_citation"
    url_citation: UrlCitation


class ChatMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    annotations: list[Annotation]


class Choice(BaseModel):
    """The one choice."""

    index: Literal[0] = 0
    message: ChatMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class Usage(BaseModel):
    """Tokens; those of passages given to Gen count as prompt."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    search_results: list[SearchResult] = Field(description="every passage found, retrieval by retrieval")
    timeline: list[Phase]


@router.post(
    "/chat/completions",
    response_model=ChatCompletion,
    responses={200: {"content": {"text/event-stream": {}}, "description": "the answer, or a stream of chunks"}},
)
async def chat(body: ChatRequest, request: HTTPRequest, served: Served) -> Response:
    """Answers the last message."""
    usage = body.includes_usage
    stream = await served.open(body, body.messages, body.most, "messages", f"messages.{len(body.messages) - 1}")
    cited = Cited(served.urls(request))
    head = {"id": f"chatcmpl-{stream.id}", "created": int(time.time()), "model": body.model}
    if body.stream:
        await while_connected(request, stream.start())
        return EventStream(stream, _chunks(stream, cited, head, usage=usage))
    ended = await while_connected(request, _whole(stream, cited))
    return JSONResponse(
        {
            **head,
            "object": "chat.completion",
            "choices": [
                {
                    "index": 0,
                    "message": {
                        "role": "assistant",
                        "content": ended.answer.text,
                        "refusal": None,
                        "annotations": [_annotation(one) for one in cited.annotations],
                    },
                    "finish_reason": FINISH[ended.answer.stop_reason],
                    "logprobs": None,
                }
            ],
            "usage": _usage(ended.answer),
            "search_results": [one.model_dump() for one in cited.results],
            "timeline": phases(ended.timeline),
        }
    )


async def _whole(stream: Stream, cited: Cited) -> Ended:
    async with stream:
        async for event in stream:
            match event:
                case Evidence():
                    cited.found(event)
                case Grounded():
                    cited.cite(event)
                case Ended():
                    return event
    raise AssertionError("a stream ends with Ended or an error")


async def _chunks(stream: Stream, cited: Cited, head: dict[str, Any], *, usage: bool) -> AsyncIterator[str]:
    """The first chunk holds the role; evidence, words and citations follow in the order in which they came."""

    def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return sse({**head, "object": "chat.completion.chunk", "choices": [choice], **more})

    yield chunk({"role": "assistant", "content": ""}, search_results=[])
    try:
        async for event in stream:
            match event:
                case Text():
                    yield chunk({"content": event.piece})
                case Evidence():
                    found = [one.model_dump() for one in cited.found(event)]
                    yield chunk({}, search_results=found, timeline=phases(event.timeline))
                case Grounded():
                    index = len(cited.annotations)  # by which the client's `stream` helper puts them together
                    yield chunk({"annotations": [{"index": index, **_annotation(cited.cite(event))}]})
                case Ended():
                    every = [one.model_dump() for one in cited.results]
                    finish = FINISH[event.answer.stop_reason]
                    yield chunk({}, finish, search_results=every, timeline=phases(event.timeline))
                    if usage:
                        yield sse(
                            {**head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(event.answer)}
                        )
    except ApiError as error:
        yield sse(error.body)
    yield "data: [DONE]\n\n"


def _annotation(citation: dict[str, Any]) -> dict[str, Any]:
    return {"type": "url_citation", "url_citation": citation}


def _usage(answer: Answer) -> dict[str, int]:
    prompt = answer.prompt_tokens + answer.inserted_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer.generated_tokens,
        "total_tokens": prompt + answer.generated_tokens,
    }
