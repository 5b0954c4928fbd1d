"""uvicorn around the application: where it listens, and how it ends."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from cosup_fast.serve.settings import ServeConfig


def serve_on(
    app: FastAPI,
    config: ServeConfig,
    listening: socket.socket,
    on_listening: Callable[[str], None] | None = None,
    on_server: Callable[[uvicorn.Server], None] | None = None,
) -> None:
    """Serves until SIGINT or SIGTERM; running requests then have `drain_seconds` to end, others are refused.

    Args:
        app: the application.
        config: how long to drain.
        listening: what `listen` made.
        on_listening: called with the server's address once it accepts connections.
        on_server: called with the server before it runs: `should_exit = True` ends it, from any thread.
    """
    host, port = listening.getsockname()[:2]
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,  # its own would close the handlers that others have made
            log_level="warning",
            server_header=False,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=config.drain_seconds,
        ),
        lambda: on_listening(f"http://{f'[{host}]' if ':' in host else host}:{port}") if on_listening else None,
    )
    if on_server is not None:
        on_server(server)
    server.run(sockets=[listening])


def listen(config: ServeConfig) -> socket.socket:
    """The socket of a server.

    Raises:
        ValueError: another program listens there, or the host is not this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise ValueError(
            f"cannot listen on --host {config.host} --port {config.port}: {error.strerror}; choose another one"
        ) from None
    return listening


class _Server(uvicorn.Server):
    """Says when it listens, and has done its work when a signal ends it."""

    def __init__(self, config: uvicorn.Config, on_listening: Callable[[], None]):
        super().__init__(config)
        self._on_listening = on_listening

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            yield
            self._captured_signals.clear()  # which uvicorn would raise again

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_listening()
