"""One thread that owns the decoder: requests join its running batch, and other work on the model runs between steps."""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

from cosup_fast.errors import CosupError
from cosup_fast.generation import Answer, Decoder, Generator, Listener, Request, Ticket
from cosup_fast.generation.decoder import BrokenDecoderError
from cosup_fast.serve.metrics import Metrics

R = TypeVar("R")
log = logging.getLogger(__name__)


class QueueFullError(CosupError, RuntimeError):
    """As many requests are waiting as may wait.

    Args:
        retry_after: seconds after which there is probably room.
    """

    def __init__(self, retry_after: int):
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class StoppedError(CosupError, RuntimeError):
    """The engine takes no more work.

    Args:
        failed: it has ended by an error.
    """

    def __init__(self, *, failed: bool):
        super().__init__("the engine has failed: start the server again" if failed else "the server is shutting down")
        self.code = "unavailable" if failed else "shutting_down"


class Job:
    """A request that the engine has accepted.

    Args:
        request: what to answer.
        listener: called with what happens to it, in the engine's thread.
        on_end: called once, in the engine's thread, with the ticket of the ended request.
    """

    def __init__(self, request: Request, listener: Listener, on_end: Callable[[Ticket], None]):
        self.request = request
        self.listener = listener
        self.on_end = on_end
        self.ticket: Ticket | None = None
        self.submitted = time.perf_counter()
        self._cancelled = False

    @property
    def timeline(self) -> list[tuple[str, float]]:
        """Phases and when they began: waiting first, then those of the ticket."""
        return [("wait", self.submitted), *(self.ticket.timeline if self.ticket is not None else ())]

    def cancel(self) -> None:
        """Ends the request before the next step and frees its place; from any thread, any number of times."""
        self._cancelled = True
        if self.ticket is not None:
            self.ticket.cancel()

    def enter(self, decoder: Decoder) -> Ticket:
        """Hands the request to the decoder, in the engine's thread."""
        self.ticket = decoder.submit(self.request, listener=self.listener)
        if self._cancelled:
            self.ticket.cancel()
        return self.ticket


class Engine:
    """Runs a decoder in a thread of its own.

    Args:
        generator: answers.
        max_batch: requests at once.
        max_waiting: requests that may wait for a place; more are refused.
        metrics: counts what happens.
    """

    def __init__(self, generator: Generator, *, max_batch: int, max_waiting: int, metrics: Metrics | None = None):
        self.generator = generator
        self.metrics = metrics or Metrics()
        self.decoder = generator.decoder(max_batch)
        self._max_batch = max_batch
        self._limit = max_batch + max_waiting
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        # Touched by the thread alone:
        self._jobs: dict[Ticket, Job] = {}
        self._posted: dict[asyncio.AbstractEventLoop, list[Callable[[], object]]] = {}
        self._lock = threading.Lock()
        self._open = 0
        self._seconds = 1.0  # what an answer takes, a moving average
        self._stopping = False
        self.failed = False  # ended by an error that no request can be blamed for
        self.metrics.running.set_function(lambda: min(self._open, max_batch))
        self.metrics.waiting.set_function(lambda: max(0, self._open - max_batch))
        self._thread = threading.Thread(target=self._run, name="cosup-fast engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        """Cancels what is left and ends the thread after the current step."""
        with self._lock:
            self._stopping = True
        self._inbox.put(lambda: None)
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._stopping

    @property
    def open(self) -> int:
        """Requests that run or wait."""
        return self._open

    def submit(self, job: Job) -> None:
        """Accepts a request, from any thread.

        Raises:
            QueueFullError: the queue is full.
            StoppedError: the engine is not running.
        """
        with self._lock:
            self._check_ready()
            if self._open >= self._limit:
                self.metrics.refused.inc()
                rounds = (self._open - self._max_batch) / self._max_batch + 1
                raise QueueFullError(min(60, max(1, math.ceil(rounds * self._seconds))))
            self._open += 1
            self._inbox.put(lambda: self._enter(job))

    def call(self, function: Callable[[], R]) -> Future[R]:
        """Runs a function between two steps, in the thread that may use the model.

        Raises:
            StoppedError: the engine is not running.
        """
        future: Future[R] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        with self._lock:
            self._check_ready()
            self._inbox.put(run)
        return future

    def post(self, loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
        """Runs a function on an event loop once the current step is over, in the order posted; for listeners.

        The functions of one step reach a loop in a single call: a wake-up for each token would make the loop compete
        with the step for the interpreter lock.
        """
        self._posted.setdefault(loop, []).append(function)

    def _check_ready(self) -> None:
        if not self.ready:
            raise StoppedError(failed=self.failed)

    def _enter(self, job: Job) -> None:
        self._jobs[job.enter(self.decoder)] = job

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:  # nobody is left waiting for an answer
            log.critical("the engine has failed; start the server again", exc_info=True)
            with self._lock:
                self.failed = self._stopping = True
            while self._read_now():
                pass
            self._finish(self.decoder.abandon(error))

    def _serve(self) -> None:
        while not self._stopping:
            self._read_inbox()
            if self.decoder.idle:
                continue
            began = time.perf_counter()
            try:
                ended = self.decoder.step()
            except BrokenDecoderError:
                raise
            except Exception as error:
                log.exception("a step failed; the requests that were running are answered with an error")
                ended = self.decoder.abort(error)
            self.metrics.step.observe(time.perf_counter() - began)
            self._finish(ended)
        while self._read_now():
            pass
        for job in self._jobs.values():
            job.cancel()
        while not self.decoder.idle:
            self._finish(self.decoder.step())

    def _read_inbox(self) -> None:
        if self.decoder.idle:
            self._inbox.get()()
        while self._read_now():
            pass

    def _read_now(self) -> bool:
        try:
            self._inbox.get_nowait()()
        except queue.Empty:
            return False
        return True

    def _finish(self, ended: list[Ticket]) -> None:
        for ticket in ended:
            job = self._jobs.pop(ticket)
            seconds = time.perf_counter() - job.submitted
            assert ticket.answer is not None
            with self._lock:
                self._open -= 1
                if ticket.answer.stop_reason not in ("cancelled", "error"):
                    self._seconds += 0.2 * (seconds - self._seconds)
            try:
                self._count(ticket, ticket.answer, job.submitted, seconds)
                job.on_end(ticket)
            except Exception:  # the others are to hear of their ends
                log.exception("the end of a request could not be told")
        posted, self._posted = self._posted, {}
        for loop, functions in posted.items():
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(_run_all, functions)

    def _count(self, ticket: Ticket, answer: Answer, submitted: float, seconds: float) -> None:
        metrics = self.metrics
        metrics.answers.labels(answer.stop_reason).inc()
        metrics.prompt_tokens.inc(answer.prompt_tokens)
        metrics.generated_tokens.inc(answer.generated_tokens)
        metrics.inserted_tokens.inc(answer.inserted_tokens)
        metrics.retrievals.inc(len(answer.retrievals))
        metrics.answer_seconds.observe(seconds)
        written = [at for phase, at in ticket.timeline if phase == "write"]
        if written:
            metrics.first_token.observe(written[0] - submitted)
        for (phase, began), (_, until) in zip(ticket.timeline, ticket.timeline[1:], strict=False):
            if phase == "retrieve":
                metrics.retrieval.observe(until - began)


def _run_all(functions: list[Callable[[], object]]) -> None:
    for function in functions:
        function()
