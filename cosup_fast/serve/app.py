"""The server as an ASGI application."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Scope

from cosup_fast import __version__
from cosup_fast.generation import GenerationConfig, Generator
from cosup_fast.index import NonparametricIndex
from cosup_fast.serve import chat, passages, responses
from cosup_fast.serve.engine import Engine
from cosup_fast.serve.errors import ApiError, ErrorBody, on_api_error, on_http_error, on_invalid
from cosup_fast.serve.limits import Limits
from cosup_fast.serve.service import ClientGoneError, Served, Service
from cosup_fast.serve.settings import ServeConfig
from cosup_fast.serve.systems import Offered

router = APIRouter()
_INLINE = ("script", "style")


class Model(BaseModel):
    """A system that answers."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["cosup-fast"] = "cosup-fast"


class Models(BaseModel):
    """All systems of a server."""

    object: Literal["list"] = "list"
    data: list[Model]


class Status(BaseModel):
    """How a server is."""

    status: Literal["ok", "unavailable"]


@router.get("/v1/models", tags=["server"])
async def models(served: Served) -> Models:
    """The systems offered; the first one is the default of the page."""
    return Models(data=[Model(id=name, created=served.created) for name in served.offered])


@router.get("/v1/models/{name:path}", tags=["server"])
async def model(name: str, served: Served) -> Model:
    """One of the systems offered."""
    return Model(id=served.system(name).name, created=served.created)


@router.get("/health", tags=["server"], response_model=Status)
async def health(served: Served) -> Response:
    """Whether the process works; 503 when its engine has failed, so that the server has to be started again."""
    if served.engine.failed:
        return ApiError(503, "the engine has failed: start the server again", code="unavailable").response()
    return JSONResponse({"status": "ok"})


@router.get("/ready", tags=["server"], response_model=Status)
async def ready(served: Served) -> Response:
    """Whether requests are taken; 503 when they are not."""
    if served.engine.ready:
        return JSONResponse({"status": "ok"})
    return ApiError(503, "the server takes no requests", code="unavailable").response()


@router.get("/metrics", tags=["server"], responses={200: {"content": {"text/plain": {}}}})
async def metrics(served: Served) -> Response:
    """Counters for Prometheus."""
    return Response(served.engine.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def create_app(
    generator: Generator,
    index: NonparametricIndex | None,
    offered: Mapping[str, Offered],
    generation: GenerationConfig | None = None,
    config: ServeConfig | None = None,
) -> FastAPI:
    """The application; its engine runs between start and end of its lifespan.

    Args:
        generator: answers; it searches what it was made with.
        index: for /v1/search and /passages; None: they answer 404.
        offered: the systems, by name.
        generation: how to write where a request does not say.
        config: limits and keys.
    """
    config = config or ServeConfig()
    engine = Engine(generator, max_batch=config.max_batch, max_waiting=config.max_waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            engine.stop()

    app = FastAPI(
        title="cosup-fast",
        version=__version__,
        summary="Answers with evidence from a nonparametric index, by an API like OpenAI's",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from another host
        redoc_url=None,
        responses={status: {"model": ErrorBody} for status in (400, 401, 403, 404, 413, 429, 500, 503)},
        exception_handlers={
            ApiError: on_api_error,
            HTTPException: on_http_error,
            RequestValidationError: on_invalid,
            ClientGoneError: _gone,
        },
    )
    app.state.service = Service(
        engine, index, dict(offered), generation or generator.config, config, created=int(time.time())
    )
    for part in (router, chat.router, responses.router, passages.router):
        app.include_router(part)
    _add_page(app)

    def count(scope: Scope, status: int) -> None:
        route = scope.get("route")
        path = getattr(route, "path", "other")  # the pattern: paths that clients invent are not counted apart
        engine.metrics.http.labels(path, str(status)).inc()

    app.add_middleware(Limits, config=config, count=count)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    _describe(app)
    return app


def _add_page(app: FastAPI) -> None:
    html = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    # The page runs the scripts and styles that it was written with, and asks no other host for anything.
    script, style = (" ".join(map(_hash, re.findall(f"<{tag}>(.*?)</{tag}>", html, re.S))) for tag in _INLINE)
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


async def _gone(request: Request, error: Exception) -> Response:
    """For nobody to read: the client closed its connection before its answer."""
    return Response(status_code=499)


def _describe(app: FastAPI) -> None:
    """Leaves FastAPI's 422 out of the OpenAPI description: what is not valid is a 400."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = original()
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
        return app.openapi_schema or original()

    app.openapi = openapi  # type: ignore[method-assign]
