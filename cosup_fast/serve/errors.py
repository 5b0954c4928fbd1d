"""Errors in the shape of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from cosup_fast.errors import CosupError
from cosup_fast.generation.decoder import out_of_memory

log = logging.getLogger(__name__)
TEXT, LIST, TITLED, MESSAGE, FOUND = FORMS = "[text]", "[list]", "[titled]", "[message]", "[found]"
"""Tags of the forms that a field may have. pydantic puts them into the place of an error; clients do not see them."""
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail


class ApiError(CosupError, HTTPException):
    """An error whose message is for the client.

    Args:
        status: of the HTTP response.
        message: what is wrong and what to do.
        param: the field of the request that caused it.
        code: a word for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.message, self.param, self.code = message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        kind = _TYPES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """As an HTTP response."""
        return JSONResponse(self.body, self.status_code, self.headers)


def fault(error: Exception, request_id: str) -> ApiError:
    """What a client sees of an error that it did not cause; the log has the rest under the same id."""
    if out_of_memory(error):
        log.warning("request %s ran out of memory", request_id)
        return ApiError(503, "this request needs more memory than there is: shorten it", code="out_of_memory")
    log.error("request %s failed", request_id, exc_info=error)
    return ApiError(500, f"the server failed to answer; its log explains request {request_id}", code="internal_error")


async def on_api_error(request: Request, error: Exception) -> JSONResponse:
    """Answers with an `ApiError`."""
    assert isinstance(error, ApiError)
    return error.response()


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Answers with an error that Starlette or FastAPI raised: unknown paths, wrong methods, unreadable bodies."""
    assert isinstance(error, StarletteHTTPException)
    message = {
        404: f"there is nothing at {request.url.path}",
        405: f"{request.url.path} does not take {request.method}",
    }.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()


async def on_invalid(request: Request, error: Exception) -> JSONResponse:
    """Answers with the first thing that is wrong with a request, as 400."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    _source, *where = first["loc"]  # body, query or path, and then the field
    param = ".".join(str(part) for part in where if part not in FORMS) or None
    match first["type"]:
        case "json_invalid":
            param, message = None, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}"
        case "extra_forbidden":
            message = f"the field {param!r} is not supported: leave it out"
        case "missing":
            message = f"the field {param!r} is missing" if param else "the body is missing: send a JSON object"
        case _:
            message = first["msg"].removeprefix("Value error, ")
            as_json = "the body must be a JSON object, sent with Content-Type: application/json"
            message = f"{param}: {message}" if param else as_json
    code = {"extra_forbidden": "unsupported_parameter", "missing": "missing_required_parameter"}.get(first["type"])
    return ApiError(400, message, param=param, code=code or "invalid_value").response()
