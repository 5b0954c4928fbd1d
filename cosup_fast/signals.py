"""How work is stopped from outside: Ctrl-C and SIGTERM, at once or at the next safe point.

SLURM, Kubernetes and spot machines announce the end with SIGTERM, torchrun passes it on to every rank.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM inside raises KeyboardInterrupt, as Ctrl-C does; only the main thread can arrange that."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handling({signal.SIGTERM: stop}):
        yield


@contextmanager
def deferred(on_first: Callable[[str], None]) -> Iterator[threading.Event]:
    """Turns the first Ctrl-C or SIGTERM into an event, to be read at a safe point.

    A second Ctrl-C raises KeyboardInterrupt at once. Another SIGTERM does not: torchrun sends one after a Ctrl-C and
    means the same by it.

    Args:
        on_first: told, when the event is set, by which signal.
    """
    event = threading.Event()

    def stop(signum: int, frame: FrameType | None) -> None:
        again, by = event.is_set(), signal.Signals(signum).name
        event.set()
        if again and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if not again:
            with contextlib.suppress(RuntimeError):  # Python refuses to print in the middle of another print
                on_first(by)

    with _handling({signal.SIGINT: stop, signal.SIGTERM: stop}):
        yield event


@contextmanager
def _handling(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
