"""The index and Embseq on their own: POST /v1/search and /v1/embeddings, GET /passages/{id}."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Discriminator, Field, Tag

from cosup_fast.data.records import Passage, String, Text
from cosup_fast.index import NonparametricIndex
from cosup_fast.index.embed import embed_sequences
from cosup_fast.serve.engine import StoppedError
from cosup_fast.serve.errors import LIST, TEXT, TITLED, ApiError
from cosup_fast.serve.evidence import SearchResult, results
from cosup_fast.serve.fields import Fields
from cosup_fast.serve.service import Served, Service, too_long, while_connected

router = APIRouter(tags=["passages"])
R = TypeVar("R")
_AT_ONCE = 8  # passages embedded between two steps of the requests that run


class SearchRequest(Fields):
    """A search as Gen makes it when it writes [NSP] first."""

    query: Text
    instruction: String = ""
    k: int = Field(default=5, ge=1, le=100)


class SearchResponse(BaseModel):
    """Passages, best first."""

    object: Literal["list"] = "list"
    search_results: list[SearchResult]


class TitledText(Fields):
    """A passage with a title, an extension of OpenAI's API."""

    title: String = ""
    text: Text


def _form(value: Any) -> str:
    return TEXT if isinstance(value, str) else TITLED


def _form_or_list(value: Any) -> str:
    return LIST if isinstance(value, list) else _form(value)


Input = Annotated[Annotated[Text, Tag(TEXT)] | Annotated[TitledText, Tag(TITLED)], Discriminator(_form)]


class EmbeddingsRequest(Fields):
    """Passages to embed with Embseq."""

    model: String
    input: Annotated[
        Annotated[Text, Tag(TEXT)]
        | Annotated[TitledText, Tag(TITLED)]
        | Annotated[list[Input], Field(min_length=1, max_length=2048), Tag(LIST)],
        Discriminator(_form_or_list),
    ]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1, description="only the width of the model")


class Embedding(BaseModel):
    """A sequence embedding."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens that Embseq has read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """Embeddings in the order of the input."""

    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


@router.post("/v1/search")
async def search(body: SearchRequest, request: HTTPRequest, served: Served) -> SearchResponse:
    """The passages nearest to a question."""
    index = _index(served)

    def run() -> list[tuple[Passage, float]]:
        return index.retrieve(served.engine.generator.query(body.query, body.instruction), body.k)

    with too_long("query"):
        await served.check_prompt(body.query, body.instruction)
        found = await while_connected(request, _between_steps(served, run))
    return SearchResponse(search_results=results(found, served.urls(request)))


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingsRequest, request: HTTPRequest, served: Served) -> EmbeddingsResponse:
    """The sequence embeddings of passages, as the index holds them."""
    served.system(body.model)
    model = served.engine.generator.model
    if body.dimensions not in (None, model.width):
        message = f"dimensions={body.dimensions}: this model's embeddings have {model.width}"
        raise ApiError(400, message, param="dimensions", code="invalid_value")
    given = body.input if isinstance(body.input, list) else [body.input]
    texts = [TitledText(text=one) if isinstance(one, str) else one for one in given]
    passages = [Passage(id=f"input {n}", title=one.title, text=one.text) for n, one in enumerate(texts)]

    def embed(part: list[list[int]]) -> torch.Tensor:
        return embed_sequences(model, [len(sequence) for sequence in part], part.__getitem__)

    async def work() -> tuple[torch.Tensor, int]:
        sequences = await asyncio.to_thread(model.template.sequences, passages)
        starts = range(0, len(sequences), _AT_ONCE)
        parts = [await _between_steps(served, partial(embed, sequences[at : at + _AT_ONCE])) for at in starts]
        return torch.cat(parts), sum(map(len, sequences))

    with too_long("input"):
        vectors, tokens = await while_connected(request, work())
    data = [Embedding(index=row, embedding=_encoded(vector, body)) for row, vector in enumerate(vectors.numpy())]
    usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
    return EmbeddingsResponse(model=body.model, data=data, usage=usage)


@router.get("/passages/{name:path}", response_model=Passage)
async def passage(name: str, served: Served) -> Response:
    """A passage of the index by its id: what citations link to."""
    # A look-up may wait for a server, and the engine's thread may use the index meanwhile.
    found = await _between_steps(served, partial(_index(served).by_id.get, name))
    if found is None:
        raise ApiError(404, f"the index has no passage with the id {name[:80]!r}", param="name")
    return JSONResponse(found.model_dump())


def _index(served: Service) -> NonparametricIndex:
    if served.index is None:
        raise ApiError(404, "this server has no index: it was started with max_retrievals=0", code="no_index")
    return served.index


async def _between_steps(served: Service, run: Callable[[], R]) -> R:
    try:
        future = served.engine.call(run)
    except StoppedError as stopped:
        raise ApiError(503, str(stopped), code=stopped.code) from None
    return await asyncio.wrap_future(future)


def _encoded(vector: np.ndarray, body: EmbeddingsRequest) -> list[float] | str:
    if body.encoding_format == "float":
        return vector.tolist()
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
