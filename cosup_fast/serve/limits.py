"""Who may call, under which name, how much a body may hold, and what is said of a fault: one ASGI middleware."""

from __future__ import annotations

import hmac
import uuid
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cosup_fast.serve.errors import ApiError, fault
from cosup_fast.serve.settings import ServeConfig

_OPEN = frozenset({"/", "/health", "/ready"})
"""Paths that need no key: the page asks for it."""


class Limits:
    """Checks a request before the application reads it, and answers where the application fails.

    Args:
        app: what it protects.
        config: the key and the largest body.
        count: called with path and status of each response.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, count: Callable[[Scope, int], None]):
        self._app, self._config, self._count = app, config, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                self._count(scope, message["status"])
            await send(message)

        refused = self._refuse(scope)
        if refused is not None:
            await refused.response()(scope, receive, sending)
            return
        try:
            await self._app(scope, self._limited(receive), sending)
        except Exception as error:
            if started:
                raise
            await fault(error, uuid.uuid4().hex).response()(scope, receive, sending)

    def _refuse(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if (refused := self._refuse_site(headers)) is not None:
            return refused
        if self._config.api_key is not None and scope["path"] not in _OPEN and scope["method"] != "OPTIONS":
            kind, _, key = headers.get("authorization", "").partition(" ")
            expected = self._config.api_key.get_secret_value().encode()
            if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), expected):
                message = "this API key is not valid" if key else "send the API key as 'Authorization: Bearer KEY'"
                bearer = {"WWW-Authenticate": "Bearer"}
                return ApiError(401, message, code="invalid_api_key", headers=bearer)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._config.max_body_bytes:
            return self._too_large()
        return None

    def _refuse_site(self, headers: Headers) -> ApiError | None:
        """Refuses what a page of another site sends from a browser on this machine."""
        host, origin = headers.get("host", ""), headers.get("origin")
        name = _hostname(host)
        if host and not (name and self._config.knows(name)):
            message = f"this server does not answer to the host {host[:80]!r}; start it with --allowed-host to allow it"
            return ApiError(403, message, code="host_not_allowed")
        if origin is None or not {"*", origin}.isdisjoint(self._config.cors_origins):
            return None
        if origin.partition("://")[2].lower() != host.lower():
            message = f"pages from {origin[:80]!r} may not call this server; start it with --cors-origin to allow them"
            return ApiError(403, message, code="origin_not_allowed")
        return None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._config.max_body_bytes} bytes", code="body_too_large")

    def _limited(self, receive: Receive) -> Receive:
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._config.max_body_bytes:  # a chunked body says no length
                raise self._too_large()
            return message

        return limited


def _hostname(host: str) -> str | None:
    """The name or address in a Host header; None if it has none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").removesuffix(".") or None
    except ValueError:
        return None
